"""B'MOJO: attention over a window, the fading outputs of a recurrence, and the most surprising tokens of the past (arXiv 2407.06324)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import find, system
from ..errors import even_heads
from ..ops.backend import accumulate_dtype
from ..ops.softmax import DEAD, attend
from ..span import Span, documents, last_inputs, positions
from ..state import State
from .attention import rotate
from .base import Mixer

PIECE = 1024
"""Most tokens that are read at once: scores are a matrix of these by those and what is kept."""


class BMojoState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    fading: State  # the recurrence's
    last: Tensor  # [B, 1, dim], what the recurrence gave for the last token
    window: tuple  # k, v [B, W - 1, H, D], position [B, W - 1] int64 or -1, surprise [B, W - 1] of the last tokens
    eidetic: tuple  # the same of the M most surprising tokens of all whole chunks, by position
    summaries: tuple  # k, v [B, S, H, D], position [B, S] of the recurrence's outputs at the last chunks' ends


def choose(pool: tuple[Tensor, ...], keep: Tensor, size: int) -> tuple[Tensor, ...]:
    """The last `size` entries of the pool that `keep` [B, N] marks, in order, after dead ones (position -1, zeros) if there are fewer."""
    order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, keep.shape[1] - size :]
    alive = keep.gather(1, order)

    def pick(x: Tensor) -> Tensor:
        index = order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index).masked_fill(~alive.reshape(*alive.shape, *[1] * (x.ndim - 2)), 0 if x.is_floating_point() else DEAD)

    return tuple(map(pick, pool))


@system(
    "bmojo",
    kind="external-memory",
    paper="arXiv:2407.06324",
    year=2024,
    name="B'MOJO (fading and eidetic memory)",
    example={"window": 8, "eidetic": 6, "summaries": 2, "fading": "mingru"},
    state="2 dim (W - 1 + M + S), W = window, M = eidetic, S = summaries, and the recurrence's",
    parity="window attention without eidetic tokens and summaries; full attention where every token is eidetic",
    claim="On MQAR it recalls more than Mamba and window hybrids at equal memory.",
)
class BMojo(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; one softmax of each token over three memories, with the same W_k and W_v for all.

        window    the last W tokens, itself included
        fading    f_t = recurrence(x)_t: its outputs at the ends of the last S whole chunks of W tokens of the document
        eidetic   the M tokens with the largest surprise of those in whole chunks of the document, while they are W tokens old or more
        surprise  e_t = |x_t - W_p f_{t-1}|, how far the token is from what the recurrence's last output predicts

    This is our reading: the predictor and the sizes are uncertain. Whole chunks are those before the token's own, so the choice changes
    once every W tokens. Keys are rotated to their own positions (a summary's is its chunk's end). Choosing has no gradient: W_p learns
    from `innovation` alone, as an auxiliary loss. fading: slug of the recurrence, with hyper-parameters `fading_config`. eidetic: M,
    None for B'MOJO-F. summaries: S, None for none.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        window: int = 64,
        eidetic: int | None = 64,
        summaries: int | None = 1,
        fading: str = "mamba2",
        fading_config: dict[str, Any] | None = None,
        theta: float = 10000.0,
    ):
        super().__init__()
        even_heads(heads, dim)
        self.heads, self.window, self.theta = heads, window, theta
        self.eidetic, self.summaries = eidetic or 0, summaries or 0
        self.fading = find(fading, ("mixer",)).builder(dim=dim, **(fading_config or {}))
        self.predict = nn.Linear(dim, dim, bias=False)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def innovation(self, x: Tensor, f: Tensor, before: Tensor | None = None, first: Tensor | None = None) -> Tensor:
        """e [B, T]: |x_t - W_p f_{t-1}|. f [B, T, dim]; before [B, 1, dim]: f of the token before; first [B, T]: starts of documents."""
        before = torch.zeros_like(f[:, :1]) if before is None else before
        previous = torch.cat([before, f[:, :-1]], 1)
        if first is not None:
            previous = previous.masked_fill(first[..., None], 0)
        return (x - self.predict(previous)).to(accumulate_dtype(x)).norm(dim=-1)

    def forward(self, x: Tensor, state: BMojoState | None = None, span: Span | None = None) -> tuple[Tensor, BMojoState]:
        state, outputs = state or self._fresh(x), []
        for start in range(0, x.shape[1], PIECE):
            part = slice(start, start + PIECE)
            y, state = self._read(x[:, part], state, None if span is None else span[part])
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def _fresh(self, x: Tensor) -> BMojoState:
        def nothing(size: int) -> tuple[Tensor, ...]:
            k = x.new_zeros(len(x), size, self.heads, x.shape[2] // self.heads)
            return k, k, torch.full((len(x), size), DEAD, device=x.device), x.new_zeros(len(x), size, dtype=accumulate_dtype(x))

        memories = {"window": nothing(self.window - 1), "eidetic": nothing(self.eidetic), "summaries": nothing(self.summaries)[:3]}
        seen = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return BMojoState(seen=seen, fading=None, last=torch.zeros_like(x[:, :1]), **memories)

    def _read(self, x: Tensor, state: BMojoState, span: Span | None) -> tuple[Tensor, BMojoState]:
        W, M = self.window, self.eidetic
        at, reset = positions(state.seen, x.shape[1], span), documents(span)
        doc = torch.zeros_like(at) if reset is None else reset
        k_at = at if span is None or span.valid is None else torch.where(span.valid, at, DEAD)
        f, fading = self.fading(x, state.fading, span)
        with torch.no_grad():
            surprise = self.innovation(x, f, state.last, at == 0)
        q, k, v = self._project(x, at)
        new = (k, v, k_at, surprise)
        pool = tuple(torch.cat(parts, 1) for parts in zip(state.eidetic, state.window, new))
        p_at, p_doc = pool[2], F.pad(doc, (M + W - 1, 0))  # [B, N]; what is held belongs to the document that goes on
        age = at[..., None] - p_at[:, None]  # [B, T, N]
        alive = (p_at >= 0)[:, None] & (doc[..., None] == p_doc[:, None])
        mask = alive & (age >= 0) & (age < W)
        mask[..., :M] = False  # an eidetic token that is still in the window is seen there

        # the chunks of the call, counted along the row; the last is the one that comes next
        chunk = ((k_at >= 0) & (at % W == 0)).cumsum(1)  # [B, T]
        count = int(chunk.max()) + 1
        start, of = at.new_zeros(2, len(x), count + 1)
        end, last_doc = at[:, -1] + 1, doc[:, -1]
        start = start.scatter(1, chunk, at // W * W).index_copy(1, chunk.new_tensor([count]), (end // W * W)[:, None])
        of = of.scatter(1, chunk, doc).index_copy(1, chunk.new_tensor([count]), last_doc[:, None])
        eligible = p_at >= 0
        eligible[:, M : M + W - 1] &= state.window[2] >= (state.seen // W * W)[:, None]  # older ones have had their turn
        chosen = eligible[:, None] & (p_at[:, None] < start[..., None]) & (p_doc[:, None] == of[..., None])  # [B, count + 1, N]
        best = pool[3][:, None].expand(chosen.shape).masked_fill(~chosen, -torch.inf).topk(M, dim=-1)
        chosen = torch.zeros_like(chosen).scatter(2, best.indices, best.values > -torch.inf)
        mask = mask | (age >= W) & chosen.gather(1, chunk[..., None].expand(-1, -1, chosen.shape[2]))

        # what the recurrence gave at the chunks' ends
        ends = (k_at >= 0) & ((at + 1) % W == 0)
        f_end, s_at, s_doc = choose((f, at, doc), ends, int(ends.sum(1).max()))
        _, s_k, s_v = self._project(f_end, s_at)
        sums = tuple(torch.cat(parts, 1) for parts in zip(state.summaries, (s_k, s_v, s_at)))
        s_doc = F.pad(s_doc, (self.summaries, 0))
        chunks_ago = (at // W)[..., None] - ((sums[2] + 1) // W)[:, None]
        s_mask = (sums[2] >= 0)[:, None] & (doc[..., None] == s_doc[:, None]) & (chunks_ago >= 0) & (chunks_ago < self.summaries)

        mask = torch.cat([mask, s_mask], 2)
        keys, values = torch.cat([pool[0], sums[0]], 1), torch.cat([pool[1], sums[1]], 1)
        o = attend(q, keys, values, mask | ~mask.any(-1, keepdim=True), q.shape[-1] ** -0.5)
        recent = (p_at > (end - W)[:, None]) & (p_at >= 0) & (p_doc == last_doc[:, None])
        recent[:, :M] = False
        s_recent = (sums[2] >= 0) & (s_doc == last_doc[:, None]) & ((end // W)[:, None] - (sums[2] + 1) // W < self.summaries)
        return self.out(o.flatten(2)), BMojoState(
            seen=end,
            fading=fading,
            last=last_inputs(state.last, f, span),
            window=choose(pool, recent, W - 1),
            eidetic=choose(pool, chosen[:, -1], M),
            summaries=choose(sums, s_recent, self.summaries),
        )

    def _project(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D] of x, q and k rotated to the positions `at`."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return rotate(q, at, self.theta, q.shape[-1]), rotate(k, at, self.theta, k.shape[-1]), v
