"""Extended Mind: the equations one token at a time, attention while nothing is remembered, and a document read beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.banks.extended_mind import extend, remember
from remanence.errors import UsageError

from .loops import inputs, layer, qkv, softmax_read, turn


def by_token(mixer: rm.Mixer, x: Tensor, heads: int, window: int, top: int, threshold: float, start: int) -> Tensor:
    """x [1, T, dim] whose tokens before `start` were read and remembered."""
    q, k, v = (y[0] for y in qkv(mixer, x, heads))
    scale = q.shape[-1] ** -0.5
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(len(q)):
            text = start if i >= start else 0
            near = [j for j in range(i + 1) if i - j < window and j >= text]
            asks = turn(q[i, h], min(i - text, window))
            cosine = {j: float(asks @ k[j, h] / asks.norm() / k[j, h].norm()) for j in range(i + 1) if j not in near}
            best = sorted((j for j in cosine if cosine[j] > threshold), key=lambda j: -cosine[j])[:top]
            logits = [scale * turn(q[i, h], i) @ turn(k[j, h], j) for j in near] + [scale * asks @ k[j, h] for j in best]
            out[i, h] = softmax_read(logits, [v[j, h] for j in near + best])
    return out.flatten(1)[None] @ mixer.out.weight.T


@pytest.mark.parametrize(("top", "threshold"), [(3, -1.0), (100, -1.0), (4, 0.25)])
@pytest.mark.parametrize("start", [0, 17])
def test_parity_with_the_equations_in_a_loop(top: int, threshold: float, start: int) -> None:
    mixer = layer("extended-mind", heads=2, window=6, top=top, threshold=None if threshold == -1 else threshold)
    x = inputs(1, 40)
    with torch.no_grad():
        want = by_token(mixer, x, 2, 6, top, threshold, start)
        if start:
            before, state = mixer(x[:, :start])
            after, _ = mixer(x[:, start:], remember(state))
            got = torch.cat([before, after], 1)
        else:
            got, _ = mixer(x)
        assert_parity("extended-mind", "the equations of the authors' Llama layer, token by token", got, want)


def test_before_the_window_is_full_it_is_the_model_it_was() -> None:
    torch.manual_seed(0)
    specs = [{"mixer": "attention", "heads": 4, "kv_heads": 2}, "gated-deltanet"]
    model = rm.model(rm.ModelConfig(vocab=11, dim=16, layers=specs)).double()
    ids = torch.randint(11, (2, 60))
    mind = extend(model, window=30, top=2)
    with torch.no_grad():
        assert_close("in the window", mind(ids[:, :30]).logits, model(ids[:, :30]).logits, 1e-9)
        _, state = None, mind(ids[:, :30]).state
        fresh, held = mind(ids[:, 30:40], state).logits, mind(ids[:, 30:40], remember(state)).logits
        assert float((fresh - held).abs().max()) > 1e-6  # the same text, near the document and with it in memory
        mind.blocks[0].mixer.threshold = 1.0  # nothing fits: a document that is remembered is not read
        alone = mind.blocks[0].mixer(inputs(1, 5, 16))[0]
        state = remember(mind.blocks[0].mixer(inputs(1, 20, 16, seed=2))[1])
        assert_close("no memory fits", mind.blocks[0].mixer(inputs(1, 5, 16), state)[0], alone, 1e-9)


def test_extend_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UsageError, match="none of the layers is attention"):
        extend(rm.model(rm.ModelConfig(vocab=5, dim=16, layers="mingru")), window=4)
    with pytest.raises(UsageError, match="layer 1 has a window"):
        extend(rm.model(rm.ModelConfig(vocab=5, dim=16, layers=[{"mixer": "attention", "window": 4}])), window=4)
    with pytest.raises(UsageError, match="threshold is 2"):
        rm.mixer("extended-mind", dim=16, threshold=2.0)
