"""HMT against its three passes in a loop over segments, and against RMT with one memory token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from segment_memories import build, ids_of, softmax_loop, through

S, N, K = 6, 2, 4
T = 4 * S + 5


def loop(model: rm.Model, ids: Tensor, j: int) -> tuple[Tensor, Tensor]:
    decoder, outputs, queue = model.backbone, [], []
    start, topic = (x.expand(len(ids), -1, -1) for x in (model.start, model.topic))
    tail = torch.zeros(len(ids), 0, 16, dtype=start.dtype)
    for x in ids.split(S, 1):
        e = decoder.embedding(x)
        newest = queue[-1] if queue else start
        p, parts = newest, [newest, tail, e[:, :j]]
        if e.shape[1] >= j:
            s = through(decoder, torch.cat([topic, e[:, :j], topic], 1))[:, -1:]
            p = start
            if queue:
                M = torch.cat(queue, 1)
                p = softmax_loop((s @ model.to_q.weight.T) @ (M @ model.to_k.weight.T).mT / 4.0) @ M
            parts += [p, e[:, j:]]
        full = e.shape[1] == S
        hidden = through(decoder, torch.cat([*parts, p] if full else parts, 1))
        lead = 1 + tail.shape[1]
        tokens = torch.cat([hidden[:, lead : lead + j], hidden[:, lead + j + 1 : lead + S + 1]], 1)
        outputs.append(decoder.unembedding(tokens))
        if full:
            queue = [*queue, hidden[:, -1:]][-N:]
            tail = e[:, S - K :]
    return torch.cat(outputs, 1), torch.cat(queue, 1)


@pytest.mark.parametrize("j", [1, 3, S])
def test_parity_with_the_passes_in_a_loop(j: int) -> None:
    model, ids = build("hmt", segment=S, queue=N, sensory=K, query=j), ids_of(T)
    out, (want, queue) = model(ids), loop(model, ids, j)
    assert_parity("hmt", "OswaldHe/HMT-pytorch's recall and passes in a loop", out.logits, want, 1e-10)
    assert_close("queue", out.state.memory.queue, queue, 1e-10)
    grads = []
    for logits in (out.logits, want):
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert_gradients_close("hmt", *grads, tol=1e-9)


def test_parity_without_recall_it_is_rmt() -> None:
    model, ids = build("hmt", segment=S, recall=False), ids_of(T)
    other = rm.memory("rmt", backbone=model.backbone, segment=S, tokens=1).double()
    with torch.no_grad():
        other.prompt.copy_(model.start)
        assert_parity("hmt", "rmt with one memory token, where p_n is m_{n-1}", model(ids).logits, other(ids).logits, 1e-12)


def test_no_token_sees_its_future() -> None:
    model, ids = build("hmt", segment=S, queue=N, sensory=K), ids_of(T)
    with torch.no_grad():
        want = model(ids).logits
        for t in (2, S + 2, T - 1):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % 13
            got = model(changed).logits
            assert torch.equal(got[:, :t], want[:, :t]) and not torch.equal(got[:, t:], want[:, t:])


def test_bad_arguments() -> None:
    backbone = rm.Decoder(rm.ModelConfig(vocab=13, dim=16))
    for hyper, message in (
        ({"segment": 4, "sensory": 5}, "sensory is 5 and segment 4"),
        ({"segment": 4, "query": 5}, "query is 5 and segment 4"),
        ({"queue": 0}, "queue is 0"),
    ):
        with pytest.raises(rm.errors.UsageError, match=message):
            rm.memory("hmt", backbone=backbone, **hyper)
