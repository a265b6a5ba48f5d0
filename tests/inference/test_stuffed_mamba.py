"""Stuffed Mamba: the record of a state, and the three fixes, each against what it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Span
from remanence.inference.stuffed_mamba import clip_norm, forget_more, record, rewired, sliding_window, windowed
from remanence.ops.delta import naive as delta_naive
from remanence.ops.outer import naive


def drawn(length: int = 50, by_key: bool = False, heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, length, heads, 5, dtype=torch.float64)
    v = torch.randn(2, length, heads, 3, dtype=torch.float64)
    g = -torch.rand(2, length, heads, *([5] if by_key else []), dtype=torch.float64) * 0.1
    return q, k, v, g


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("window", [1, 7, 49, 50, 200])
def test_parity_a_window_is_reading_from_r_tokens_ago(window: int, by_key: bool) -> None:
    q, k, v, g = drawn(by_key=by_key)
    o, S = windowed(q, k, v, g, window=window)
    rows = []
    for t in range(50):
        part = slice(max(0, t + 1 - window), t + 1)
        held = torch.zeros(2, 2, 5, 3, dtype=torch.float64)
        for s in range(part.start, part.stop):
            a = g[:, s].exp()
            held = held * (a[..., None] if by_key else a[..., None, None]) + k[:, s, :, :, None] * v[:, s, :, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], held))
    assert_parity("stuffed-mamba", "reading from t - r with an empty state", o, torch.stack(rows, 1), 1e-11)
    assert_close("state", S, held, 1e-11)


def test_a_window_in_float32_stays_exact_on_a_long_stream() -> None:
    q, k, v, _ = (x.float() for x in drawn(6000, heads=1))
    o, _ = windowed(q, k, v, window=64)
    want, _ = naive(*(x[:, -64:].double() for x in (q, k, v)), torch.zeros(2, 64, 1, dtype=torch.float64))
    assert_close("the last token", o[:, -1], want[:, -1], 1e-5)


def test_a_window_ends_with_its_document_and_skips_padding() -> None:
    q, k, v, g = drawn()
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[0, 20] = reset[1, [1, 46]] = True
    valid = Span.from_lengths([50, 48], 50).valid
    o, _ = windowed(q, k, v, g, span=Span(valid, reset), window=7)
    for row, (a, b) in ((0, (0, 20)), (0, (20, 50)), (1, (0, 1)), (1, (1, 46)), (1, (46, 48))):
        want, _ = windowed(*(x[row : row + 1, a:b] for x in (q, k, v, g)), window=7)
        assert_close(f"{row}: {a}..{b}", o[row, a:b], want[0], 1e-11)


def decoder(*layers: str) -> rm.Model:
    torch.manual_seed(0)
    specs = [{"mixer": slug, **({"head_dim": 8, "state_size": 8} if slug == "mamba2" else {})} for slug in layers]
    return rm.model(rm.ModelConfig(vocab=30, dim=32, layers=specs, ffn=1)).double().eval()


def test_parity_a_model_in_a_window_forgets_what_left_it() -> None:
    """One Mamba-2 layer with a convolution of width 4 sees r + 3 tokens: what came before may be anything."""
    model, ids = decoder("mamba2"), torch.randint(30, (2, 60))
    other = torch.cat([torch.randint(30, (2, 30)), ids[:, 30:]], 1)
    with torch.no_grad():
        plain = [model(x).logits[:, -1] for x in (ids, other)]
        with sliding_window(model, 20):
            inside = [model(x).logits[:, -1] for x in (ids, other)]
        assert_parity("stuffed-mamba", "the same tokens after another past", inside[0], inside[1], 1e-10)
        assert (plain[0] - plain[1]).abs().max() > 1e-6
        with sliding_window(model, 60):  # nothing leaves
            assert_close("a window of everything", model(ids).logits[:, -1], plain[0], 1e-10)
        assert torch.equal(model(ids).logits[:, -1], plain[0])  # outside, as before
        state = model(ids).state
        with sliding_window(model, 20), pytest.raises(rm.errors.UsageError, match="in one call"):
            model(ids, state)


@pytest.mark.parametrize("slug", ["mamba2", "gated-deltanet", "based"])
def test_forgetting_more_is_another_decay_and_another_write(slug: str) -> None:
    model, ids = decoder(slug), torch.randint(30, (2, 40))
    slow = rewired_naive(0.9, 0.5)
    with torch.no_grad():
        plain = model(ids).logits
        with forget_more(model, retention=0.9, insertion=0.5):
            got = model(ids).logits
        with rewired(model, **slow):
            want = model(ids).logits
        assert_close("against the equation", got, want, 1e-9)
        assert (got - plain).abs().max() > 1e-6
        with forget_more(model):
            assert_close("no change", model(ids).logits, plain, 1e-12)
        with forget_more(model, retention=0.9):
            whole = model(ids)
            start = model(ids[:, :17])
            rest = model(ids[:, 17:], start.state)
        assert_close("in two calls", torch.cat([start.logits, rest.logits], 1), whole.logits, 1e-9)


def rewired_naive(retention: float, insertion: float) -> dict:
    """The two rules as loops over the equations, with the factors written into these."""
    log = torch.tensor(retention, dtype=torch.float64).log()

    def outer(op, q, k, v, g=None, initial=None, span=None, backend=None):
        g = v.new_zeros(v.shape[:3]) if g is None else g
        return naive(q, k, v * insertion, g + log, initial)

    def delta(op, q, k, v, g, beta, initial=None, span=None, backend=None):
        return delta_naive(q, k, v, g + log, beta * insertion, initial)

    return {"outer": outer, "delta": delta}


def test_a_norm_is_clipped_head_by_head() -> None:
    model, ids = decoder("mamba2", "attention"), torch.randint(30, (2, 40))
    with torch.no_grad():
        state = model(ids).state
        before, after = state.layers[0].memory, clip_norm(state, 0.05).layers[0].memory
        norms = before.norm(dim=(-2, -1))
        assert (norms > 0.05).any() and (norms < 0.05).any()  # some heads are clipped, some are not
        assert_close("norms", after.norm(dim=(-2, -1)), norms.clamp(max=0.05), 1e-10)
        assert torch.equal(after[norms < 0.05], before[norms < 0.05])
        assert torch.equal(clip_norm(state, 0.05).layers[1].keys.tensor, state.layers[1].keys.tensor)
        assert torch.isfinite(model(ids, clip_norm(state, 0.05)).logits).all()


def test_the_record_of_a_stream() -> None:
    model, ids = decoder("mamba2", "gated-deltanet"), torch.randint(30, (2, 101))
    with torch.no_grad():
        trace = record(model, ids, every=32)
        assert trace.tokens.tolist() == [32, 64, 96, 100]
        out = model(ids[:, :100], targets=ids[:, 1:])
        weights = torch.tensor([32, 32, 32, 4]) / 100
        assert_close("loss", (trace.loss * weights).sum(), out.loss, 1e-6)
        memory = out.state.layers[0].memory
        got = trace.moments["layers.0.memory"][-1]
        assert got.shape == (memory.shape[1], 3)
        assert_close("mean", got[:, 0], memory.float().mean((0, 2, 3)), 1e-4)
        assert_close("variance", got[:, 1], memory.float().var((0, 2, 3), unbiased=False), 1e-4)
        assert_close("largest", got[:, 2], memory.float().abs().amax((0, 2, 3)), 1e-4)
        growth = trace.growth(64)["layers.0.memory"]
        assert_close("growth", growth, got[:, 1] / trace.moments["layers.0.memory"][1, :, 1], 1e-6)
        clipped = record(model, ids, every=32, fix=lambda state: clip_norm(state, 1e-3))
        assert clipped.moments["layers.1.memory"][..., 2].max() <= 1e-3


def test_wrong_use() -> None:
    model, ids = decoder("attention"), torch.randint(30, (1, 9))
    with pytest.raises(rm.errors.UsageError, match="no mixer of this Decoder is built on outer"), sliding_window(model, 4):
        pass
    with pytest.raises(rm.errors.UsageError, match="retention is 1.5"), forget_more(model, retention=1.5):
        pass
    with pytest.raises(rm.errors.UsageError, match="limit is -1"):
        clip_norm(model(ids).state, -1)
    with pytest.raises(rm.errors.ShapeError, match="T >= 2"):
        record(model, ids[:, :1])
    with pytest.raises(rm.errors.UsageError, match="the first record was made after 4"):
        record(model, ids, every=4).growth(3)
