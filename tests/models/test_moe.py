"""Mixtures of experts: against Mixtral's block and loss, as data in a Decoder, and the loss that is collected from outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, pieces
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span
from remanence.errors import UsageError
from remanence.mixers.parts import GatedFFN
from remanence.models.moe import MoE, balance_loss, balanced, routed
from remanence.train import Piece, token_loss

hf = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    config = {"vocab": 20, "dim": 32, "layers": "2 x gated-deltanet", "ffn": 1.0, "experts": 4} | changes
    return Decoder(ModelConfig(**config)).eval()


def ids(length: int = 60) -> Tensor:
    return torch.randint(20, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k", [2, 3])
def test_parity_with_mixtral(top_k: int) -> None:
    from transformers import MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=5, num_experts_per_tok=top_k)
    theirs, ours = hf.MixtralSparseMoeBlock(config), MoE(24, 40, 5, top_k)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.3)
        ours.router.weight.copy_(theirs.gate.weight)
        for index, expert in enumerate(ours.experts):
            expert.up.weight.copy_(theirs.experts.gate_up_proj[index])
            expert.down.weight.copy_(theirs.experts.down_proj[index])
    x, dy = torch.randn(2, 2, 30, 24)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    with routed(ours) as routes:
        got = ours(xs[0])
    want = theirs(xs[1])
    assert_parity("linear-moe", "transformers MixtralSparseMoeBlock", got, want)
    assert_close("gradient", *(torch.autograd.grad(y, x, dy)[0] for y, x in zip((got, want), xs)), 1e-5)
    valid = torch.rand(2, 30) < 0.7
    for mask in (None, valid):
        flat = tuple(route.logits.flatten(0, -2) for route in routes)
        want = hf.load_balancing_loss_func(flat, 5, top_k, None if mask is None else mask.long())
        assert_parity("linear-moe", "transformers load_balancing_loss_func", balance_loss(routes, mask), want)


def test_parity_of_one_expert_with_the_dense_feed_forward() -> None:
    torch.manual_seed(0)
    dense, moe = GatedFFN(16, 24), MoE(16, 24, 1, 1)
    moe.experts[0].load_state_dict(dense.state_dict())
    x = torch.randn(2, 9, 16)
    assert_parity("linear-moe", "the dense feed-forward", moe(x), dense(x))


def test_top_1_is_weighted_by_its_probability_and_trains_the_router() -> None:
    torch.manual_seed(0)
    moe, x = MoE(16, 24, 3, 1), torch.randn(10, 16)
    p = moe.router(x).softmax(-1)
    want = torch.stack([p[i, e] * moe.experts[e](x[i]) for i, e in enumerate(p.argmax(-1).tolist())])
    y = moe(x)
    assert_close("y", y, want, 1e-5)
    y.square().sum().backward()
    assert bool(moe.router.weight.grad.any())


def test_a_decoder_of_experts_is_data(tmp_path) -> None:
    model = decoder(layers=[{"mixer": "gla"}, {"mixer": "gla", "experts": 0}, {"mixer": "gla", "experts": 6, "top_k": 1}])
    kinds = [(len(b.ffn.experts), b.ffn.top_k) if isinstance(b.ffn, MoE) else None for b in model.blocks]
    assert kinds == [(4, 2), None, (6, 1)]
    assert len(model.blocks[0].ends()) == 5 and len(model.blocks[1].ends()) == 2
    model.save(tmp_path)
    again = rm.load(tmp_path)
    assert again.config == model.config and torch.equal(again(ids()).logits, model(ids()).logits)
    assert "experts" not in decoder(experts=0).config
    with pytest.raises(UsageError, match="top_k is 5; there are 4 experts"):
        decoder(top_k=5)
    with pytest.raises(UsageError, match="experts is -1"):
        decoder(experts=-1)


def test_any_cut_padding_and_rows() -> None:
    model, x = decoder(), ids()
    whole, state, outputs = model(x), None, []
    for part in pieces(x, [1, 2, 20]):
        out = model(part, state)
        state, outputs = out.state, [*outputs, out.logits]
    assert_close("any cut", torch.cat(outputs, 1), whole.logits, 1e-5)
    span = Span.from_lengths([40, 60], 60, side="left")
    assert_close("padding", model(x, span=span).logits[0, 20:], model(x[:1, 20:]).logits[0], 1e-5)


def test_the_balance_loss_of_even_and_uneven_routers() -> None:
    from remanence.models.moe import Routes

    even = torch.eye(4).repeat(5, 1) * 30
    assert balance_loss([Routes(even, 1)]).item() == pytest.approx(1.0, abs=1e-4)
    assert balance_loss([Routes(even[:1].repeat(9, 1), 1)]).item() == pytest.approx(4.0, abs=1e-4)


def test_balanced_adds_the_loss_and_leaves_padding_out() -> None:
    model, x = decoder(), ids()
    targets = x.roll(-1, 1).masked_fill(torch.arange(60) >= 30, -100)
    span = Span.from_lengths([30, 60], 60, side="left")
    plain, _, _ = token_loss(model, Piece(x, targets, span), None)
    value, state, metrics = balanced(token_loss, 0.5)(model, Piece(x, targets, span), None)
    assert value.item() == pytest.approx(plain.item() + 0.5 * 60 * metrics["balance"].item(), rel=1e-5)
    with routed(model) as routes:
        model(x[:1, 30:])
        model(x[1:])
    parts = [balance_loss([type(routes[0])(torch.cat([a.logits, b.logits]), 2)]) for a, b in zip(routes[:2], routes[2:])]
    assert metrics["balance"].item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)
    assert not any(hook for layer in model.modules() for hook in layer._forward_hooks) and state.tokens == 60
    (value / 60).backward()
    assert all(bool(block.ffn.router.weight.grad.any()) for block in model.blocks)
    with pytest.raises(UsageError, match="no mixture of experts"), routed(decoder(experts=0)):
        pass


def test_the_preset() -> None:
    model = rm.model("linear-moe", vocab=20, dim=32, layers=5, mixer="mingru", pattern="LLLN", experts=3)
    assert [block.mixer.slug for block in model.blocks] == ["mingru"] * 3 + ["attention", "mingru"]
    assert all(len(block.ffn.experts) == 3 for block in model.blocks)
    x = torch.randint(20, (1, 30))
    pure = rm.model("linear-moe", vocab=20, dim=32, hyper={"heads": 2}, experts=2)
    assert pure(x).state.nbytes == pure(x[:, :5]).state.nbytes  # memory is flat in the length
    with pytest.raises(UsageError, match="pattern is 'LLX'"):
        rm.model("linear-moe", vocab=20, dim=32, pattern="LLX")
