"""CAMELoT: keys and values of the past consolidated into a bounded number of modes, training-free (arXiv 2402.13449)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, even_heads
from ..mixers.attention import rotate
from ..mixers.segmented import Part, SegmentMixer
from ..ops.backend import accumulate_dtype
from ..state import State
from .log import joint

EMPTY = 1 << 40
"""Age of a mode that holds nothing: older than any that does."""


class CamelotState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    mode_keys: Tensor  # [B, M, H, D] float32, means of keys that are not rotated
    mode_values: Tensor  # [B, M, H, D] float32
    count: Tensor  # [B, M, H] int64, tokens that the mode is the mean of; 0: empty
    age: Tensor  # [B, M, H] int64, tokens since it last changed
    keys: Tensor  # [B, S, H, D] of the open segment, not rotated; 0 where no token is yet
    values: Tensor  # [B, S, H, D]


@system(
    "camelot",
    kind="external-memory",
    paper="arXiv:2402.13449",
    year=2024,
    name="CAMELoT (consolidated associative memory)",
    exempt={"bf16": "whether a token joins a mode is a comparison; rounding decides it otherwise, and the mode keeps what it took"},
    example={"segment": 8, "modes": 6, "threshold": 0.5},
    state="2 M dim + 2 M H + 2 S dim",
    parity="none; threshold above 1 is a ring of the last keys, -1 one running mean; count x value is the sum of what a mode took",
    claim="On repetitive text the perplexity of a frozen model with a window of 64 falls with the number of modes.",
)
class Camelot(SegmentMixer):
    """x [B, T, dim] -> y [B, T, dim]; causal rotary attention within a segment of S tokens, and to one recalled pair for each of them.

        recalled for token j, per head: the mode mu with the largest cos(k_j, k_mu), as the key and value at position j - S; seen by tokens
        i >= j, so that no token reads what a later one recalled
        at the segment's end, for its tokens in order    if cos(k_j, k_mu) > R: k_mu <- (c k_mu + k_j) / (c + 1), v_mu likewise, c <- c + 1
        else the mode of the largest age becomes k_j, v_j with c = 1        the age of the mode that changed is 0, of all others one more

    Our reading of a paper without public code: modes are per head, keys not rotated, segments do not overlap, pairs that many tokens recall
    are kept. threshold: R. modes: M. The state is bounded. Writing is a loop over tokens: where one goes depends on those before.
    """

    def __init__(self, dim: int, heads: int = 4, segment: int = 128, modes: int = 512, threshold: float = 0.9, theta: float = 10000.0):
        super().__init__()
        even_heads(heads, dim)
        if not isinstance(threshold, (int, float)) or not -2 <= threshold <= 2:
            raise UsageError(f"threshold is {threshold!r}; it must be a number in -2..2, which a cosine is compared with.")
        self.heads, self.segment, self.modes, self.threshold, self.theta = heads, segment, modes, threshold, theta
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def fresh(self, x: Tensor) -> CamelotState:
        batch, width = len(x), x.shape[2] // self.heads
        mode = x.new_zeros(batch, self.modes, self.heads, width, dtype=accumulate_dtype(x))
        open = x.new_zeros(batch, self.segment, self.heads, width)
        count = torch.zeros(mode.shape[:3], dtype=torch.long, device=x.device)
        return CamelotState(seen=count[:, 0, 0], mode_keys=mode, mode_values=mode, count=count, age=count + EMPTY, keys=open, values=open)

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        return self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, D]

    def advance(self, parts: tuple[Tensor, ...], state: CamelotState, part: Part) -> tuple[Tensor, CamelotState]:
        q, k, v = parts
        S, width = self.segment, q.shape[-1]
        keys, values = part.place(state.keys, k), part.place(state.values, v)
        with torch.no_grad():
            fit = torch.einsum("bshd,bmhd->bshm", F.normalize(keys.to(state.mode_keys.dtype), dim=-1), F.normalize(state.mode_keys, dim=-1))
            best = fit.masked_fill((state.count == 0).transpose(1, 2)[:, None], -torch.inf).argmax(-1)  # [B, S, H]
        index = best[..., None].expand(-1, -1, -1, width)
        recalled = [mode.gather(1, index).to(q.dtype) for mode in (state.mode_keys, state.mode_values)]
        place = torch.arange(2 * S, device=q.device).expand(len(q), -1)
        k = rotate(torch.cat([recalled[0], keys], 1), place, self.theta, width)
        slots = part.slots(q.device).expand(len(q), -1)
        score = torch.einsum("bnhd,bjhd->bnhj", rotate(q, S + slots, self.theta, width), k) * width**-0.5
        causal = (place[:, None, :S] <= slots[..., None])[:, :, None]
        full = (state.count > 0).any(1).any(1)[:, None, None, None]  # any mode at all: they fill from the first
        recall, own = joint([(score[..., :S], causal & full), (score[..., S:], causal)], state.mode_keys.dtype)
        o = torch.einsum("bnhj,bjhd->bnhd", torch.cat([recall, own], -1).to(q.dtype), torch.cat([recalled[1], values], 1))
        if part.any_ends:
            written = self._write(state, keys, values)
            state = state.replace(**{name: part.commit(new, getattr(state, name)) for name, new in written.items()})
        return o, state.replace(keys=part.reopen(keys), values=part.reopen(values))

    def _write(self, state: CamelotState, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The modes after the tokens of a whole segment, in order."""
        mode_k, mode_v, count, age = state.mode_keys, state.mode_values, state.count, state.age
        keys, values = keys.to(mode_k.dtype), values.to(mode_v.dtype)
        for k, v in zip(keys.unbind(1), values.unbind(1)):  # [B, H, D]
            with torch.no_grad():
                fit = torch.einsum("bhd,bmhd->bmh", F.normalize(k, dim=-1), F.normalize(mode_k, dim=-1))
                best = fit.masked_fill(count == 0, -torch.inf).max(1, keepdim=True)  # [B, 1, H]
                hit = best.values > self.threshold
                target = torch.where(hit, best.indices, age.argmax(1, keepdim=True))
            index = target[..., None].expand(-1, -1, -1, k.shape[-1])
            held = torch.where(hit, count.gather(1, target), 0)
            share = 1 / (held + 1).to(k.dtype)[..., None]
            mode_k, mode_v = (
                mode.scatter(1, index, mode.gather(1, index) * (1 - share) + new[:, None] * share)
                for mode, new in ((mode_k, k), (mode_v, v))
            )
            count = count.scatter(1, target, held + 1)
            age = (age + 1).scatter(1, target, 0)
        return {"mode_keys": mode_k, "mode_values": mode_v, "count": count, "age": age}
