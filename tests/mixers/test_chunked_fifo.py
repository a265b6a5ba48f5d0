"""Chunked attention with a FIFO memory: each branch alone, and the memory in a loop over chunks."""

from __future__ import annotations

import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.mixers.chunked_fifo import ChunkedFIFO

DIM, H, S, M = 16, 2, 5, 3


def build(only: int | None = None, full: bool = True) -> ChunkedFIFO:
    mixer = rm.mixer("chunked-fifo-rmat", dim=DIM, heads=H, segment=S, slots=M, full=full).double()
    with torch.no_grad():
        mixer.mix.normal_()
        if only is not None:
            mixer.mix[:, only] = 1e9
    return mixer  # type: ignore[return-value]


def rotated(y: Tensor, theta: float) -> Tensor:
    """y [B, T, H, D], head h by the base theta^((h + 1) / H), one pair of numbers after the other."""
    half, out = y.shape[-1] // 2, torch.empty_like(y)
    for h in range(H):
        for i in range(half):
            angle = torch.arange(y.shape[1], dtype=torch.float64) * theta ** (-(h + 1) / H * i / half)
            a, b = y[:, :, h, i], y[:, :, h, i + half]
            out[:, :, h, i], out[:, :, h, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def loop(mixer: ChunkedFIFO, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The chunk, memory and full branches [B, T, H, D], and the last bank."""
    q, k, v = (y.unflatten(-1, (H, -1)) for y in mixer.to_qkv(x).chunk(3, -1))
    q, k = rotated(q, mixer.theta), rotated(k, mixer.theta)
    bank, branches = [], ([], [], [])

    def attend(t: int, keys: Tensor, values: Tensor) -> Tensor:
        weight = (torch.einsum("bhd,bjhd->bhj", q[:, t], keys) * (DIM // H) ** -0.5).softmax(-1)
        return torch.einsum("bhj,bjhd->bhd", weight, values)

    for t in range(x.shape[1]):
        start = t // S * S
        branches[0].append(attend(t, k[:, start : t + 1], v[:, start : t + 1]))
        slots = [y.unflatten(-1, (H, -1)) for y in mixer.slot_kv(torch.stack(bank, 1)).chunk(2, -1)] if bank else None
        branches[1].append(attend(t, *slots) if slots else torch.zeros_like(q[:, t]))
        branches[2].append(attend(t, k[:, : t + 1], v[:, : t + 1]))
        if t + 1 == start + S:
            s, last = x[:, start : t + 1].mean(1), bank[-1] if bank else torch.zeros_like(x[:, 0])
            g = mixer.gate(torch.cat([s, last], -1)).sigmoid()
            bank = [*bank, g * s + (1 - g) * last][-M:]
    return [torch.stack(branch, 1) for branch in branches], torch.stack(bank, 1)


def test_parity_with_the_reading_in_a_loop() -> None:
    mixer, x = build(), torch.randn(2, 5 * S + 2, DIM, dtype=torch.float64)
    (got, state), (branches, bank) = mixer(x), loop(mixer, x)
    want = mixer.out(torch.einsum("btnhd,hn->bthd", torch.stack(branches, 2), mixer.mix.softmax(-1)).flatten(2))
    assert_parity("chunked-fifo-rmat", "our reading in a loop over tokens", got, want, 1e-10)
    assert_close("bank", state.bank, bank, 1e-10)
    grads = []
    for y in (got, want):
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        grads.append(dict(zip(dict(mixer.named_parameters()), found)))
    assert_gradients_close("chunked-fifo-rmat", *grads, tol=1e-9)


def test_with_the_gate_on_one_branch_it_is_that_attention() -> None:
    x = torch.randn(2, 4 * S + 2, DIM, dtype=torch.float64)
    for only, name in enumerate(("chunk", "memory", "full")):
        mixer = build(only)
        assert_close(name, mixer(x)[0], mixer.out(loop(mixer, x)[0][only].flatten(2)), 1e-10)


def test_without_the_full_branch() -> None:
    mixer, x = build(full=False), torch.randn(2, 4 * S + 2, DIM, dtype=torch.float64)
    got, state = mixer(x)
    want = torch.einsum("btnhd,hn->bthd", torch.stack(loop(mixer, x)[0][:2], 2), mixer.mix.softmax(-1))
    assert_close("two branches", got, mixer.out(want.flatten(2)), 1e-10)
    assert state.everything is None
