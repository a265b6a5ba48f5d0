"""Small-E: cross-attention from speech to text that knows where it is but not what it reads (arXiv 2406.04467, Lina-Speech)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...catalog import find, system
from ...errors import ShapeError, UsageError, positive
from ...mixers.attention import rotate
from ...ops.backend import accumulate_dtype
from ...span import Span, positions
from ...state import State

THETA = 10000.0


class SmallEState(State):
    seen: Tensor  # [B] int64, decoder steps of the current utterance
    keys: Tensor  # [B, N, A], of the text, rotated
    values: Tensor  # [B, N, A], of the text
    real: Tensor  # [B, N] bool, False where the text is padding
    position: State  # of the recurrence over positions, None at the start or without one


def sinusoids(length: int, dim: int, like: Tensor) -> Tensor:
    """sin(p w_i) and then cos(p w_i), w_i = 10000^(-2 i / dim), for p = 0 .. length - 1: [length, dim]."""
    angle = torch.arange(length, dtype=torch.float64)[:, None] * THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.cat([angle.sin(), angle.cos()], 1).to(like)


@system(
    "small-e",
    kind="audio",
    paper="arXiv:2406.04467",
    year=2024,
    name="Small-E (position-aware cross-attention)",
    example={"dim": 32, "text_dim": 24, "inner": 16, "position_dim": 16},
    state="2 A N and the recurrence's, A = inner, N tokens of text",
    parity="without a recurrence, both attentions in a loop; where the first picks one token each time, the look-up of its position",
    claim="On a monotone copy it skips and repeats less than plain cross-attention at 4 times the length.",
)
class SmallE(nn.Module):
    """x [B, T, dim] of a decoder -> y [B, T, inner], what it should say now; the text is given once, by `read_text`.

        p_t = softmax(q_t . k_n / sqrt A) P         q = RoPE(LN(W_q x)), k = RoPE(LN(W_k text)), P the sinusoids of n: where am I?
        r = recurrence(p)                           causal, over decoder steps; it sees positions only
        y_t = softmax(r_t . P_n / sqrt d) v_n       v = LN(W_v text): what stands there?

    One head; the first half of A is rotated. position: slug of the recurrence of width d = position_dim, None for none. Dropout, which
    the released code has on both attentions, is left to the caller. Steps and texts may be cut and padded as in a mixer (`span`).
    """

    def __init__(
        self,
        dim: int = 256,
        text_dim: int = 256,
        inner: int = 256,
        position_dim: int = 64,
        position: str | None = "gated-deltanet",
        position_config: dict[str, Any] | None = None,
    ):
        super().__init__()
        positive(dim=dim, text_dim=text_dim, inner=inner, position_dim=position_dim)
        if inner % 4 or position_dim % 2:
            raise UsageError(f"inner={inner} must be a multiple of 4 and position_dim={position_dim} of 2: their halves are rotated.")
        self.inner, self.position_dim = inner, position_dim
        self.to_q, self.to_kv = nn.Linear(dim, inner), nn.Linear(text_dim, 2 * inner)
        self.q_norm, self.k_norm, self.v_norm = nn.LayerNorm(inner), nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.position = None if position is None else find(position, ("mixer",)).builder(dim=position_dim, **(position_config or {}))

    def read_text(self, text: Tensor, lengths: Tensor | None = None) -> SmallEState:
        """The state of an utterance about to begin. text [B, N, text_dim]; lengths [B]: of its rows, the rest being padding."""
        if text.ndim != 3 or not text.shape[1]:
            raise ShapeError(f"text has shape {list(text.shape)}; expected [B, N, text_dim] with N >= 1.")
        at = torch.arange(text.shape[1], device=text.device).expand(text.shape[:2])
        real = torch.ones_like(at, dtype=torch.bool) if lengths is None else at < lengths[:, None]
        if not bool(real.any(1).all()):
            raise UsageError("a text is empty; each row must have at least one token.")
        k, v = self.to_kv(text.masked_fill(~real[..., None], 0)).chunk(2, -1)
        seen = torch.zeros(len(text), dtype=torch.long, device=text.device)
        return SmallEState(seen=seen, keys=self._rotate(self.k_norm(k), at), values=self.v_norm(v), real=real, position=None)

    def forward(self, x: Tensor, state: SmallEState, span: Span | None = None) -> tuple[Tensor, SmallEState]:
        """The next T decoder steps. Padding in `span` must be on the right; another utterance begins with `read_text`, not with a reset."""
        if span is not None and span.reset is not None:
            raise UsageError("an utterance cannot start in the middle of a call: its text is in the state; begin it with read_text.")
        at = positions(state.seen, x.shape[1], span)
        P = sinusoids(state.keys.shape[1], self.position_dim, state.keys)  # [N, d]
        q = self._rotate(self.q_norm(self.to_q(x)), at)
        r = self._weights(q, state.keys, state.real) @ P
        position = state.position
        if self.position is not None:
            r, position = self.position(r, position, span)
        y = self._weights(r, P, state.real) @ state.values
        if span is not None and span.valid is not None:
            y = y * span.valid[..., None].to(y.dtype)
        return y, state.replace(seen=at[:, -1] + 1, position=position)

    def _rotate(self, x: Tensor, at: Tensor) -> Tensor:
        return rotate(x[:, :, None], at, THETA, self.inner // 2)[:, :, 0]

    def _weights(self, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """softmax_n(q_t . k_n / sqrt(width)) over the real n, [B, T, N]."""
        score = (q @ k.mT).to(accumulate_dtype(q)) / math.sqrt(q.shape[-1])
        return score.masked_fill(~real[:, None], -torch.inf).softmax(-1).to(q.dtype)


def monotone_copy(
    rng: np.random.Generator, n: int, length: int = 16, vocab: int = 32, least: int = 2, most: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Speech in miniature: texts [n, length] of uniform tokens 1 .. vocab - 1, and each token repeated least .. most times, [n, longest].

    The repetitions are drawn anew for every token; 0 pads the shorter rows. No two neighbours in a text are equal, so that a skip and a
    repeat can be told apart (`skips_and_repeats`).
    """
    positive(n=n, length=length, least=least)
    if vocab < 3 or most < least:
        raise UsageError(f"vocab is {vocab} and repetitions {least}..{most}; it takes 3 ids or more, and a range that is not empty.")
    steps = np.concatenate([rng.integers(vocab - 1, size=(n, 1)), rng.integers(1, vocab - 1, size=(n, length - 1))], 1)
    text = 1 + steps.cumsum(1) % (vocab - 1)
    times = rng.integers(least, most + 1, size=(n, length))
    speech = np.zeros((n, times.sum(1).max()), np.int64)
    for row, tokens, repeat in zip(speech, text, times, strict=True):
        row[: repeat.sum()] = np.repeat(tokens, repeat)
    return text, speech


def skips_and_repeats(text: np.ndarray, speech: np.ndarray) -> tuple[int, int]:
    """(tokens of `text` [N] left out, tokens too many) of a predicted `speech` [T] once runs are merged and zeros dropped.

    Counted along a longest common subsequence of the two.
    """
    said = speech[speech != 0]
    said = said[np.flatnonzero(np.diff(said, prepend=0))]
    common = np.zeros(len(said) + 1, np.int64)
    for token in text:
        match = np.maximum.accumulate(np.concatenate([[0], np.where(said == token, common[:-1] + 1, 0)]))
        common = np.maximum(common, match)
    return len(text) - int(common[-1]), len(said) - int(common[-1])
