"""Shiftable context: the augmented-memory layer in a loop, full segments, and agreement with the offline output on random chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close, relative_error
from parity import assert_parity
from remanence.errors import ShapeError, StateError, UsageError
from remanence.memory.shiftable_context import ShiftableContext, suppress
from remanence.mixers.relative_attention import sinusoids

L, C, R, D = 3, 4, 2, 16


def build(partial: str = "shift", suppression: float | None = 0.5, bank: int | None = None, right: int = R) -> ShiftableContext:
    torch.manual_seed(0)
    hyper = {"left": L, "centre": C, "right": right, "suppression": suppression, "bank": bank, "partial_segment": partial}
    return rm.find("shiftable-context").builder(D, 2, 4, **hyper).double()


def frames(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stream(encoder: ShiftableContext, x: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """The outputs, the last part being final, and how many frames the states held."""
    state, outputs, held = None, [], []
    for index, part in enumerate(x.split(sizes, 1)):
        y, state = encoder(part, state, final=index == len(sizes) - 1)
        outputs.append(y)
        held.append(state.frames.shape[1])
    return torch.cat(outputs, 1), held


def loop(encoder: ShiftableContext, x: Tensor) -> Tensor:
    """Segment by segment, head by head, as fairseq's module has it; x [1, T, D] with T a multiple of the centre."""
    banks, outputs, T = [[] for _ in encoder.layers], [], x.shape[1]
    for start in range(0, T, C):
        low, high = max(start - L, 0), min(start + C + encoder.right, T)
        table = sinusoids(L + C + encoder.right, D, x.device, x.dtype)
        h = x[0, low:high] + torch.stack([table[L + t - start] for t in range(low, high)])
        for layer, bank in zip(encoder.layers, banks):
            n = layer.norm(h)
            query = torch.cat([n, n[start - low : start - low + C].mean(0, keepdim=True)])
            keys = torch.cat([*bank[-encoder.bank :], n]) if encoder.bank else torch.cat([*bank, n])
            old = len(keys) - len(n)
            q, k, v = layer.to_q(query), layer.to_k(keys), layer.to_v(keys)
            heads = []
            for i in range(4):
                part = slice(i * D // 4, (i + 1) * D // 4)
                score = q[:, part] @ k[:, part].T * (D // 4) ** -0.5
                score[-1, :old] = -torch.inf
                if layer.suppression is not None:
                    p = score.softmax(-1)
                    for row in range(len(p)):
                        there = p[row] > 0
                        mean, n_there = p[row].sum() / there.sum(), there.sum()
                        std = (((p[row] - mean) ** 2)[there].sum() / (n_there - 1)).sqrt()
                        score[row, p[row] < mean - layer.suppression * std] = -torch.inf
                heads.append(score.softmax(-1) @ v[:, part])
            o = layer.out(torch.cat(heads, -1))
            bank.append(torch.tanh(o[-1:]))
            h = h + o[:-1]
            h = h + layer.down(F.relu(layer.up(layer.ffn_norm(h))))
        outputs.append(h[start - low : start - low + C])
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("bank", [None, 2])
@pytest.mark.parametrize("suppression", [None, 0.5])
def test_parity_with_the_module_in_a_loop(suppression: float | None, bank: int | None) -> None:
    encoder, x = build(suppression=suppression, bank=bank), frames(5 * C, 1)
    with torch.no_grad():
        got, _ = encoder(x, final=True)
        assert_parity("shiftable-context", "fairseq's augmented memory attention in a loop", got, loop(encoder, x), 1e-10)


@pytest.mark.parametrize("partial", ["shift", "short", "pad"])
def test_full_segments_are_the_base_model(partial: str) -> None:
    encoder, x = build(partial), frames(5 * C)
    with torch.no_grad():
        want, _ = build("short")(x, final=True)
        got, _ = stream(encoder, x, [C + R, C, 2 * C, C - R])
        assert_close(partial, got, want, 1e-12)


def test_a_shifted_window_has_the_sizes_of_training() -> None:
    """One new frame after two segments, right = 0: its window is the last L + C frames, and the bank holds both summaries."""
    encoder, x = build(right=0, suppression=None), frames(2 * C + 1)
    with torch.no_grad():
        got, _ = stream(encoder, x, [2 * C, 1])
        _, state = encoder(x[:, : 2 * C])
        h, _ = encoder.read(x[:, -L - C :], list(state.banks), slice(L, L + C))
        assert_close("the newest frame", got[:, -1], h[:, -1], 1e-12)
        short, _ = stream(build("short", None, right=0), x, [2 * C, 1])
        h, _ = encoder.read(x[:, 2 * C - L :], list(state.banks), slice(L, L + 1))
        assert_close("short", short[:, -1], h[:, -1], 1e-12)
        pad, _ = stream(build("pad", None, right=0), x, [2 * C, 1])
        h, _ = encoder.read(F.pad(x[:, 2 * C - L :], (0, 0, 0, C - 1)), list(state.banks), slice(L, L + 1))
        assert_close("pad", pad[:, -1], h[:, L], 1e-12)


@pytest.mark.parametrize("partial", ["shift", "short", "pad"])
def test_every_frame_comes_out_once_and_the_state_is_bounded(partial: str) -> None:
    encoder, x, random = build(partial, bank=3), frames(400, 1), torch.Generator().manual_seed(2)
    sizes = []
    while sum(sizes) < 400:
        sizes.append(min(int(torch.randint(1, 9, (), generator=random)), 400 - sum(sizes)))
    with torch.no_grad():
        got, held = stream(encoder, x, sizes)
    assert got.shape == x.shape and bool(got.isfinite().all()) and max(held) <= L + C + R


def test_only_partial_segments_differ_from_the_offline_output() -> None:
    """One frame at a time: the first of a segment is far from what it is offline, the last is exactly that if the bank agrees."""
    x = frames(3 * C)
    with torch.no_grad():
        for partial in ("shift", "short", "pad"):
            encoder = build(partial, right=0)
            (got, _), (want, _) = stream(encoder, x, [1] * 3 * C), encoder(x, final=True)
            assert_close(partial, got[:, C - 1 :: C], want[:, C - 1 :: C], 1e-12)
            assert relative_error(got[:, C::C], want[:, C::C]) > 1e-4


def test_suppression_keeps_at_least_one_key() -> None:
    for score in (torch.zeros(2, 3), torch.randn(5, 7), torch.zeros(1, 1), torch.tensor([[0.0, -torch.inf]])):
        kept = suppress(score, 0.5)
        assert bool(kept.isfinite().any(-1).all())
    assert suppress(torch.zeros(2, 3), 0.5).isfinite().all()


def test_state_is_a_value_and_bad_input_is_refused() -> None:
    encoder, x = build(), frames(11)
    with torch.no_grad():
        _, state = encoder(x)
        digest = state.digest()
        a, b = encoder(x, state)[0], encoder(x, state)[0]
    assert torch.equal(a, b) and state.digest() == digest and state.tokens == 11
    with pytest.raises(ShapeError, match=r"frames have shape \[2, 5\]; shiftable-context expects"):
        encoder(torch.zeros(2, 5))
    with pytest.raises(StateError, match="2 rows and the input 1"):
        encoder(x[:1], state)
    with pytest.raises(UsageError, match="partial_segment is 'grow'"):
        build("grow")
    with pytest.raises(UsageError, match="left is -1"):
        ShiftableContext(8, left=-1)
