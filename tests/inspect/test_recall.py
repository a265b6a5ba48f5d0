"""Recall: the shares are those of the unrolled recurrence, and the ledger follows the stream."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from remanence.errors import UsageError
from remanence.inspect import Recall


def model(**hyper) -> rm.Model:
    torch.manual_seed(0)
    layer = {"mixer": "gated-deltanet", "heads": 2, "forget": False, **hyper}
    return rm.model(rm.ModelConfig(vocab=50, dim=16, layers=[layer]))


def read(net: rm.Model, ids: torch.Tensor) -> torch.Tensor:
    """What the memory gives to the last token, before norm and gate: S^T q, [H, V]."""
    mixer = net.blocks[0].mixer
    x = net.blocks[0].norm(net.embed(ids[None]))
    qkv, _ = mixer.conv(mixer.to_qkv(x), None, None)
    memory = net(ids[None]).state.layers[0].memory[0]  # [H, K, V]
    return torch.einsum("hk,hkv->hv", mixer.split(qkv)[0][0, -1], memory)


@pytest.mark.parametrize("write", ["hard", "sigmoid"])
def test_the_sum_over_the_ledger_is_the_read(write):
    net, ids = model(write=write), torch.randint(0, 50, (40,))
    with torch.no_grad(), Recall(net) as recall:
        net(ids[None])
        u, total = recall.reads[0], 0
        for w in reversed(recall.ledgers[0]):
            a = w.beta * (w.key * u).sum(-1)
            total, u = total + a[:, None] * w.value, u - a[:, None] * w.key
        want = read(net, ids)
    assert torch.allclose(total, want, atol=1e-6 * float(want.norm()) + 1e-9)


def test_cuts_do_not_change_the_shares_and_asking_leaves_the_ledger():
    net, ids, question = model(write="sigmoid"), torch.randint(0, 50, (30,)), torch.randint(0, 50, (5,))
    found = []
    for cuts in ([30], [1, 12, 17]):
        with torch.no_grad(), Recall(net) as recall:
            state = None
            for piece in ids.split(cuts):
                state = net(piece[None], state).state
            found.append(recall.attended(question, state))
            assert len(recall.ledgers[0]) == 30
        assert recall.attended(question, state) == found[-1]
        assert not net.blocks[0].mixer.conv._forward_hooks
    whole, pieces = ({share.position: share.weight for share in shares} for shares in found)
    assert whole.keys() == pieces.keys() == set(range(35))
    assert sum(whole.values()) == pytest.approx(1) and all(whole[p] == pytest.approx(pieces[p], abs=1e-5) for p in whole)


def test_a_stream_longer_than_the_ledger_says_what_it_dropped():
    net = model(write="sigmoid")
    with torch.no_grad(), Recall(net, limit=8) as recall:
        net(torch.randint(0, 50, (1, 20)))
        assert len(recall.ledgers[0]) == 8 and recall.dropped == 12 and recall.ledgers[0][0].position == 12


def test_models_it_cannot_follow_are_refused():
    with pytest.raises(UsageError, match="forget=False"):
        Recall(model(forget=True))
    net = model()
    with pytest.raises(UsageError, match="one stream"), Recall(net):
        net(torch.zeros(2, 3, dtype=torch.long))


def test_the_shipped_model_attends_to_the_fact_that_answers():
    net, tokenizer = rm.reader()
    facts = [" Mary went to the garden.", " John moved to the office.", " It was a fine day at sea, and dry.", " Mary went to the kitchen."]
    ids = [tokenizer.encode(fact) for fact in facts]
    starts = [sum(map(len, ids[:i])) for i in range(5)]
    with torch.no_grad(), Recall(net) as recall:
        state = net(torch.tensor([sum(ids, [])]), logits="none").state
        shares = recall.attended(torch.tensor(tokenizer.encode(" Where is Mary?")), state)
    by_fact = [sum(s.weight for s in shares if a <= s.position < b) for a, b in zip(starts, starts[1:])]
    assert max(range(4), key=by_fact.__getitem__) == 3
