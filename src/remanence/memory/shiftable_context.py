"""Shiftable context: an augmented-memory encoder whose newest segment, while it is partial, borrows older frames (arXiv 2307.01377)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, divides, positive
from ..mixers.base import check_state, config_digest
from ..mixers.relative_attention import sinusoids
from ..state import State

PARTIAL = ("shift", "short", "pad")


class ShiftableState(State):
    seen: Tensor  # [B] int64, frames read
    emitted: Tensor  # [B] int64, frames whose output has been given
    frames: Tensor  # [B, n, dim], the last ones, at most left + centre + right
    banks: tuple  # of each layer, the summaries of earlier segments [B, K, dim], the newest last


def suppress(score: Tensor, scale: float) -> Tensor:
    """score [..., K] with -inf where softmax(score) is below its mean - scale std, both over the keys whose probability is not zero."""
    p = score.softmax(-1)
    there = p > 0
    count = there.sum(-1, keepdim=True)
    mean = p.sum(-1, keepdim=True) / count
    var = ((p - mean).square() * there).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    low = mean * (1 - 4 * torch.finfo(p.dtype).eps) - scale * var.clamp(min=1e-20).sqrt()  # where all are equal, rounding must drop none
    return score.masked_fill(p < low, -torch.inf)


class AugmentedMemoryLayer(nn.Module):
    """h [B, n, dim], a window of frames, and bank [B, K, dim] -> (h, summary [B, 1, dim]): attention, then a feed-forward, pre-norm.

    Frames attend to [bank | window]; one more query, the mean of the centre's normed frames, attends to the window only, and the tanh of
    its output is the window's summary. No mask in the window.
    """

    def __init__(self, dim: int, heads: int, hidden: int, suppression: float | None):
        super().__init__()
        self.heads, self.suppression = heads, suppression
        self.norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, h: Tensor, bank: Tensor, centre: slice) -> tuple[Tensor, Tensor]:
        x = self.norm(h)
        asks = torch.cat([x, x[:, centre].mean(1, keepdim=True)], 1)
        seen = torch.cat([bank, x], 1)
        q, k, v = (to(y).unflatten(-1, (self.heads, -1)) for to, y in ((self.to_q, asks), (self.to_k, seen), (self.to_v, seen)))
        score = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        if bank.shape[1]:
            last = torch.zeros(score.shape[-2:], dtype=torch.bool, device=h.device)
            last[-1, : bank.shape[1]] = True
            score = score.masked_fill(last, -torch.inf)
        if self.suppression is not None:
            score = suppress(score, self.suppression)
        o = self.out(torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v).flatten(2))
        h = h + o[:, :-1]
        return h + self.down(F.relu(self.up(self.ffn_norm(h)))), o[:, -1:].tanh()


@system(
    "shiftable-context",
    kind="audio",
    paper="arXiv:2307.01377",
    year=2023,
    name="Shiftable Context (Augmented Memory Transformer)",
    example={"dim": 16, "depth": 2, "left": 3, "centre": 4, "right": 2},
    state="(left + centre + right) dim + L K dim",
    parity="fairseq's augmented memory attention in a loop",
    claim="With random chunks it agrees better with the offline output than short or padded segments do.",
)
class ShiftableContext(nn.Module):
    """frames [B, T, dim] -> (outputs [B, m, dim] of the m frames that are ready, state); the state is bounded if the bank is.

        out, state = encoder(frames); out, state = encoder(more, state); out, state = encoder(last, state, final=True)

    Frames are cut into segments of `centre`; one is read in a window [left | centre | right] after the bank of earlier segments'
    summaries, by every layer in turn; its positions (sinusoids) are those in the window. A frame is ready when `right` frames after it are
    there, or none will come (final). If that leaves a segment partial, partial_segment says what its window is: 'shift',
    [e - centre - left, e + right) where frame e is the first that is not ready, so that left and centre are as in training; 'short',
    what there is of the segment and its contexts; 'pad', that with zero frames up to the size of training. Only new frames are given out,
    and a summary enters the bank when its segment is complete (our reading). Where every call completes a segment all three are the same.
    Not a mixer: a frame sees frames to come, and what it sees depends on the cut. All rows have the same number of frames. bank: summaries
    kept, None for all. suppression: of attention, None for none; 0.5 in the papers. ffn: hidden width as a multiple of dim.
    """

    slug = "shiftable-context"

    def __init__(
        self,
        dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        left: int = 32,
        centre: int = 64,
        right: int = 32,
        bank: int | None = None,
        suppression: float | None = None,
        partial_segment: str = "shift",
        ffn: float = 4.0,
    ):
        super().__init__()
        positive(dim=dim, depth=depth, heads=heads, centre=centre)
        divides("heads", heads, "dim", dim)
        divides("2 (a sine and a cosine a frequency)", 2, "dim", dim)
        for name, size in (("left", left), ("right", right), ("bank", bank or 0)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise UsageError(f"{name} is {size!r}; it must be an integer >= 0.")
        if partial_segment not in PARTIAL:
            raise UsageError(f"partial_segment is {partial_segment!r}; it may be {', '.join(map(repr, PARTIAL))}.")
        if suppression is not None and not suppression >= 0:
            raise UsageError(f"suppression is {suppression!r}; it must be a number >= 0, or None.")
        self.dim, self.left, self.centre, self.right, self.bank, self.partial = dim, left, centre, right, bank, partial_segment
        self.layers = nn.ModuleList(AugmentedMemoryLayer(dim, heads, int(ffn * dim), suppression) for _ in range(depth))
        # how partial segments are read is no part of what a state is
        shape = {"dim": dim, "depth": depth, "heads": heads, "left": left, "centre": centre, "right": right, "bank": bank}
        self.header = (self.slug, config_digest(self.slug, shape))

    def forward(self, frames: Tensor, state: ShiftableState | None = None, final: bool = False) -> tuple[Tensor, ShiftableState]:
        if frames.ndim != 3 or frames.shape[-1] != self.dim or not len(frames):
            raise ShapeError(f"frames have shape {list(frames.shape)}; {self.slug} expects [B, T, {self.dim}].")
        if state is None:
            seen = emitted = 0
            held, banks = frames, [frames[:, :0] for _ in self.layers]
        else:
            check_state(state, self.header, len(frames), frames.device)
            seen, emitted = int(state.seen[0]), int(state.emitted[0])
            held, banks = torch.cat([state.frames, frames], 1), list(state.banks)
        seen += frames.shape[1]
        base, ready, outputs = seen - held.shape[1], seen if final else seen - self.right, []  # base: the number of the first frame held
        while emitted < ready:
            start = emitted // self.centre * self.centre
            stop = min(start + self.centre, ready)
            whole, pad = stop - start == self.centre, 0
            begin = start
            if not whole and self.partial == "shift":
                begin = max(stop - self.centre, 0)
            elif not whole and self.partial == "pad":
                pad = self.centre - (stop - start)
            first = max(begin - self.left, 0)
            window = F.pad(held[:, first - base : min(stop + self.right, seen) - base], (0, 0, 0, pad))
            h, summaries = self.read(window, banks, slice(begin - first, stop - first))
            outputs.append(h[:, emitted - first : stop - first])
            if whole:
                banks = [self._push(bank, summary) for bank, summary in zip(banks, summaries, strict=True)]
            emitted = stop
        held = held[:, max(emitted - self.centre - self.left - base, 0) :]
        count = torch.ones(len(frames), dtype=torch.long, device=frames.device)
        new = ShiftableState(seen=count * seen, emitted=count * emitted, frames=held, banks=tuple(banks))
        return torch.cat(outputs, 1) if outputs else frames[:, :0], new.stamp(*self.header)

    def read(self, window: Tensor, banks: list[Tensor], centre: slice) -> tuple[Tensor, list[Tensor]]:
        """The window, with its positions, through all layers -> (h, each layer's summary). The centre's first position is `left`."""
        at = self.left - centre.start
        h, summaries = window + sinusoids(at + window.shape[1], self.dim, window.device, window.dtype)[at:], []
        for layer, bank in zip(self.layers, banks, strict=True):
            h, summary = layer(h, bank, centre)
            summaries.append(summary)
        return h, summaries

    def _push(self, bank: Tensor, summary: Tensor) -> Tensor:
        both = torch.cat([bank, summary], 1)
        return both if self.bank is None else both[:, max(both.shape[1] - self.bank, 0) :]
