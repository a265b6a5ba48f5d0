"""Shortformer: attention whose queries and keys, and not its values, hold positions, so that inputs can be cached (arXiv 2012.15832)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..state import State
from .relative_attention import sinusoids
from .segmented import Part, SegmentMixer


class ShortformerState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    keys: Tensor  # [B, 2 S, H, D]: the segment before as it is seen from the open one, then the open one; 0 where no token is
    values: Tensor  # [B, 2 S, H, D]
    later: Tensor  # [B, S, H, D], keys of the open segment as the next one will see them


@system(
    "shortformer",
    kind="segment-memory",
    paper="arXiv:2012.15832",
    year=2020,
    name="Shortformer (position-infused attention)",
    aliases=("position-infused-attention",),
    example={"segment": 8},
    state="5 S dim",
    parity="the equation in a loop; an empty cache is ordinary attention with positions",
    claim="Staged lengths reach a loss in less time and end lower; the cache is faster than evaluation with overlapping windows.",
)
class Shortformer(SegmentMixer):
    """x [B, T, dim] -> y [B, T, dim]; causal attention over the segment before and the token's own.

        q = (x + p) W_q        k = (x + p) W_k        v = x W_v        p: sinusoid of the place in [cache | segment], 0 .. 2 S - 1

    In a document's first segment there is no cache, and places start at 0. A key has another place once it is cached, and both are made
    when its token is read. The paper stops gradients at the cache; here `state.detach()` does. heads: H. segment: S. dim must be even.
    """

    def __init__(self, dim: int, heads: int = 4, segment: int = 128):
        super().__init__()
        divides("heads", heads, "dim", dim)
        divides("2 (a sine and a cosine a frequency)", 2, "dim", dim)
        self.heads, self.segment = heads, segment
        self.to_qk = nn.Linear(dim, 2 * dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def fresh(self, x: Tensor) -> ShortformerState:
        empty = x.new_zeros(len(x), 2 * self.segment, self.heads, x.shape[2] // self.heads)
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return ShortformerState(seen=seen, keys=empty, values=empty, later=empty[:, : self.segment])

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        table = sinusoids(2 * self.segment, x.shape[2], x.device, x.dtype)  # [2 S, dim]
        then = at % self.segment
        now = torch.where(at < self.segment, at, self.segment + then)
        if at.numel() < self.segment:  # few tokens: project their places rather than all
            place_now, place_then = self.to_qk(table[now]), self.to_qk(table[then])
        else:
            places = self.to_qk(table)
            place_now, place_then = places[now], places[then]
        y, size = self.to_qk(x), x.shape[2]
        q, k_now = (y + place_now).chunk(2, -1)
        k_then = y[..., size:] + place_then[..., size:]
        return tuple(y.unflatten(-1, (self.heads, -1)) for y in (q, k_now, k_then, self.to_v(x)))

    def advance(self, parts: tuple[Tensor, ...], state: ShortformerState, part: Part) -> tuple[Tensor, ShortformerState]:
        q, k_now, k_then, v = parts  # [B, n, H, D]
        size = self.segment
        keys, values = (part.place(old[:, size:], new) for old, new in ((state.keys, k_now), (state.values, v)))
        later = part.place(state.later, k_then)
        past_keys, past_values = state.keys[:, :size], state.values[:, :size]
        cached = (part.before > 0)[:, None].expand(-1, size)  # all of a segment, or nothing
        o = part.attend(q, torch.cat([past_keys, keys], 1), torch.cat([past_values, values], 1), cached)
        keys = torch.cat([part.commit(later, past_keys), part.reopen(keys)], 1)
        values = torch.cat([part.commit(values, past_values), part.reopen(values)], 1)
        return o, state.replace(keys=keys, values=values, later=part.reopen(later))


def staged_lengths(steps: int, lengths: tuple[int, ...] = (128, 512), first: float = 0.5) -> list[int]:
    """The length of the training sequences at each of `steps` updates: the first of `lengths` for the fraction `first`, the others after.

    The rest is shared equally by the other lengths, in order (the paper has one). Only the length changes: one optimiser and one schedule
    go through all stages. Raises UsageError on lengths that do not grow or a fraction outside 0..1.
    """
    if not lengths or lengths[0] < 1 or any(a >= b for a, b in zip(lengths, lengths[1:])):
        raise UsageError(f"lengths are {lengths}; they must be >= 1 and grow from stage to stage.")
    if not 0 <= first <= 1:
        raise UsageError(f"first is {first}; it must be in 0..1, the fraction of all updates at the shortest length.")
    if len(lengths) == 1:
        return [lengths[0]] * steps
    short = round(steps * first)
    return [lengths[0] if n < short else lengths[1 + (n - short) * (len(lengths) - 1) // (steps - short)] for n in range(steps)]
