"""Linear time-invariant memories in chunks: inside a chunk a Toeplitz product with the impulse response, between chunks the state.

Every document is laid out from the start of a chunk, so a chunk never holds two of them and one impulse response serves all: resets and
padding are exact, whatever they are, at the price of a partly filled chunk a document.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...span import Span
from ..scan import scan

SIZE = 64
"""Tokens of a chunk. The Toeplitz product costs SIZE multiplications a token and feature, reading and writing the state 2 N."""


class Layout(NamedTuple):
    """u [B, T, D] in chunks of L tokens of one document each."""

    u: Tensor  # [B, n, L, D], zero where a chunk has no token
    fresh: Tensor | None  # [B, n] bool: the chunk starts from nothing; None if none does
    slot: Tensor | None  # [B, T] place of every token in the flattened chunks; None if they are in order
    end: Tensor  # [B] the row's last chunk
    count: Tensor  # [B] tokens in it
    tail: Tensor  # [B, L, D] its tokens, pushed to the right


def arrange(u: Tensor, size: int, valid: Tensor | None, reset: Tensor | None) -> Layout:
    """Lay the tokens out. valid must be right-padded."""
    batch, length, dim = u.shape
    ends = torch.full((batch,), length, device=u.device) if valid is None else valid.sum(1)
    at = torch.arange(length, device=u.device)
    if reset is None:
        fresh, slot, chunks = None, None, -(-length // size)
        end = ((ends - 1) // size).clamp(min=0)
        count = ends - end * size
        real = u if valid is None else u.masked_fill(~valid[..., None], 0)
        laid = F.pad(real, (0, 0, 0, chunks * size - length)).unflatten(1, (chunks, size))
    else:
        live = torch.ones_like(reset) if valid is None else valid
        start = torch.where(reset, at, 0).cummax(1).values
        place = (at - start) % size
        opens = (place == 0) & live
        which = opens.cumsum(1) - 1  # chunk of every token
        end = which[:, -1].clamp(min=0)
        chunks = int(end.max()) + 1
        slot = torch.where(live, which * size + place, chunks * size)
        laid = u.new_zeros(batch, chunks * size + 1, dim).scatter(1, slot[..., None].expand_as(u), u)[:, :-1].unflatten(1, (chunks, size))
        first = torch.where(reset & live, which, chunks)
        fresh = torch.zeros(batch, chunks + 1, dtype=torch.bool, device=u.device).scatter(1, first, True)[:, :-1]
        slot = slot.clamp(max=chunks * size - 1)
        last = (ends - 1).clamp(min=0)[:, None]
        count = torch.where(ends > 0, place.gather(1, last)[:, 0] + 1, 0)
    index = ends[:, None] - size + torch.arange(size, device=u.device)  # [B, L]
    outside = torch.arange(size, device=u.device) < size - count[:, None]
    tail = u.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, dim)).masked_fill(outside[..., None], 0)
    return Layout(laid, fresh, slot, end, count, tail)


def collect(y: Tensor, layout: Layout, length: int) -> Tensor:
    """y [B, n, L, ...] back in the order of the tokens, [B, T, ...]."""
    y = y.flatten(1, 2)
    if layout.slot is None:
        return y[:, :length]
    index = layout.slot.reshape(*layout.slot.shape, *[1] * (y.ndim - 2)).expand(-1, -1, *y.shape[2:])
    return y.gather(1, index)


def toeplitz(kernel: Tensor) -> Tensor:
    """[..., L] -> [..., L, L], entry (i, j) being kernel[i - j] on and below the diagonal, 0 above."""
    size = kernel.shape[-1]
    return F.pad(kernel, (size - 1, 0)).unfold(-1, size, 1).flip(-1)


def powers(log_a: Tensor, count: int) -> Tensor:
    """exp(l log_a) for l = 0 .. count - 1, [..., count], to the precision of the dtype.

    The angle l Im(log_a) is many turns, so it is taken in float64, for about 2 sqrt(count) exponents; the rest are products of two.
    """
    small = max(int(count**0.5), 1)
    large = -(-count // small)
    wide = torch.promote_types(log_a.dtype, torch.float64)
    at = torch.arange(max(small, large), device=log_a.device, dtype=torch.float64)
    fine = (log_a.to(wide)[..., None] * at[:small]).exp().to(log_a.dtype)
    coarse = (log_a.to(wide)[..., None] * (at[:large] * small)).exp().to(log_a.dtype)
    return (coarse[..., None] * fine[..., None, :]).flatten(-2)[..., :count]


def rows(x: Tensor) -> Tensor:
    """[D, M, ...] complex -> [D, 2 M, ...] real: real and imaginary part of each mode; real ones stay as they are."""
    return torch.view_as_real(x).movedim(-1, 2).flatten(1, 2) if x.is_complex() else x


def diagonal(
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    u: Tensor,
    initial: Tensor | None,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.diagonal`; initial may be None (zeros). With X_n the state at the start of chunk n and K_l = 2 Re sum c a^l b:

    Y_n = Toeplitz(K) U_n + 2 Re (c a^{l+1}) X_n        X_{n+1} = a^L X_n + (b a^{L-1-l}) U_n
    """
    batch, length, dim = u.shape
    size, modes = min(SIZE, length), log_a.shape[1]
    layout = arrange(u, size, valid, reset)
    chunks = layout.u.shape[1]
    power = powers(log_a, size + 1)  # [D, M, L + 1]
    write = rows(b[..., None] * power[..., :size].flip(-1))  # [D, R, L], R = 2 M numbers of a complex state
    read = c[..., None] * power[..., 1:]
    response = (c * b)[..., None] * power[..., :size]
    if log_a.is_complex():
        read, response = 2 * read.conj().resolve_conj(), 2 * response.real
    impulse = toeplitz(response.sum(1))  # [D, L, L]
    columns = layout.u.permute(3, 2, 0, 1).reshape(dim, size, batch * chunks)

    def modes_of(x: Tensor, *shape: int) -> Tensor:
        """[D, R, columns] -> [*shape, D, M]."""
        x = x.unflatten(1, (modes, -1))  # [D, M, 1 or 2, columns]
        x = torch.complex(x[:, :, 0], x[:, :, 1]) if log_a.is_complex() else x[:, :, 0]
        return x.permute(2, 0, 1).reshape(*shape, dim, modes)

    if initial is None:
        initial = log_a.new_zeros(batch, dim, modes)
    first = initial if layout.fresh is None else torch.where(layout.fresh[:, 0, None, None], 0.0, initial)
    starts = first[:, None]
    if chunks > 1:
        added = modes_of(write @ columns, batch, chunks)[:, :-1]
        span = None
        if layout.fresh is not None:
            span = Span(reset=layout.fresh[:, 1:])
            added = torch.where(layout.fresh[:, 1:, None, None], 0.0, added)
        decay = (log_a * size).flatten().expand(batch, chunks - 1, -1)
        later, _ = scan(decay, added.flatten(2), first.flatten(1), span, "torch")
        starts = torch.cat([starts, later.unflatten(2, (dim, modes))], 1)  # [B, n, D, M]
    held = starts.permute(2, 3, 0, 1).reshape(dim, modes, -1)
    y = torch.baddbmm(rows(read).mT @ rows(held), impulse, columns)  # [D, L, B n]
    y = y.reshape(dim, size, batch, chunks).permute(2, 3, 1, 0)
    before = starts[torch.arange(batch, device=u.device), layout.end]  # [B, D, M]
    wide = torch.promote_types(log_a.dtype, torch.float64)
    last = modes_of(write @ layout.tail.permute(2, 1, 0), batch)
    last = last + (log_a.to(wide) * layout.count[:, None, None]).exp().to(log_a.dtype) * before
    return collect(y, layout, length), last


def squarings(a: Tensor, count: int) -> list[Tensor]:
    """A, A^2, A^4, ... up to the first exponent >= count."""
    found = [a]
    while 1 << len(found) - 1 < count:
        found.append(found[-1] @ found[-1])
    return found


def krylov(squares: list[Tensor], b: Tensor, count: int) -> Tensor:
    """A^l b for l = 0 .. count - 1, [D, N, count, columns], by doubling; b [D, N, columns]."""
    table = b[:, :, None]
    for square in squares:
        if table.shape[2] < count:
            table = torch.cat([table, (square @ table.flatten(2)).unflatten(2, table.shape[2:])], 2)
    return table[:, :, :count]


def advance(squares: list[Tensor], m: Tensor, count: Tensor) -> Tensor:
    """A^count m, each row of the batch with its own count [B]; m [B, D, N]."""
    for k, square in enumerate(squares):
        moved = (square.to(m.dtype) @ m[..., None])[..., 0]
        m = torch.where((count >> k & 1).bool()[:, None, None], moved, m)
    return m


def dense(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    u: Tensor,
    initial: Tensor | None,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.dense`; initial may be None (zeros). With X_n the state at the start of chunk n and K_l = C A^l b:

        Y_n = Toeplitz(K) U_n + (C A^{l+1}) X_n        X_{n+1} = A^L X_n + (A^{L-1-l} b) U_n

    The tables are made in float64, by doubling: HiPPO matrices are far from normal and their powers lose digits in float32. A chunk is
    shorter where C is None and N large, so that the table of powers stays small.
    """
    batch, length, dim = u.shape
    groups, order = a.shape[0], a.shape[1]  # D systems, or one for all features
    size = min(SIZE if c is not None else max(8, min(SIZE, 4096 // order)), length)
    layout = arrange(u, size, valid, reset)
    chunks = layout.u.shape[1]
    squares = squarings(a.double(), size)
    write = krylov(squares, b.double()[..., None], size)[..., 0]  # [D, N, L]: A^l b
    target = torch.eye(order, dtype=write.dtype, device=a.device).expand(groups, -1, -1) if c is None else c.double()
    read = krylov([square.mT for square in squares], (target @ squares[0]).mT, size)  # [D, N, L, O]: (C A^{l+1})^T
    impulse = toeplitz(target @ write).transpose(1, 2)  # [D, L, O, L]
    across = functools.reduce(torch.matmul, [square for k, square in enumerate(squares) if size >> k & 1]).to(u.dtype)  # A^L
    impulse, read, write = impulse.flatten(1, 2).to(u.dtype), read.flatten(2).mT.to(u.dtype), write.flip(-1).to(u.dtype)

    def columns(x: Tensor, inner: int) -> Tensor:
        """[..., D, inner] -> [groups, inner, columns], a shared system's features lying side by side as columns."""
        lead = x.shape[:-2]
        x = x.reshape(-1, groups, dim // groups, inner)
        return x.permute(1, 3, 0, 2).reshape(groups, inner, -1) if lead else x

    def features(x: Tensor, *lead: int) -> Tensor:
        """[groups, inner, columns] -> [*lead, D, inner]."""
        inner = x.shape[1]
        return x.reshape(groups, inner, -1, dim // groups).permute(2, 0, 3, 1).reshape(*lead, dim, inner)

    now = u.new_zeros(batch, dim, order) if initial is None else initial
    now = now if layout.fresh is None else torch.where(layout.fresh[:, 0, None, None], 0.0, now)
    now = columns(now, order)  # [groups, N, B D / groups]
    inputs = columns(layout.u.transpose(2, 3), size)  # [groups, L, B n D / groups]
    added = features(write @ inputs, batch, chunks) if chunks > 1 else None
    starts = [now]
    for n in range(1, chunks):
        now = torch.baddbmm(columns(added[:, n - 1], order), across, now)  # type: ignore[index]
        if layout.fresh is not None:
            now = torch.where(layout.fresh[:, n, None].expand(-1, dim // groups).flatten(), 0.0, now)
        starts.append(now)
    held = torch.stack([features(x, batch) for x in starts], 1)  # [B, n, D, N]
    y = torch.baddbmm(read @ columns(held, order), impulse, inputs)  # [groups, L O, columns]
    y = features(y, batch, chunks).unflatten(-1, (size, -1)).transpose(2, 3)  # [B, n, L, D, O]
    before = held[torch.arange(batch, device=u.device), layout.end]
    last = features(write @ columns(layout.tail.mT, size), batch)
    return collect(y, layout, length), last + advance(squares, before, layout.count)

