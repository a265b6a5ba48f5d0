"""Running log-sum-exp averages: softmax-weighted sums over everything read so far, carried as (max, sum, weighted sum)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ...span import Span
from ..backend import accumulate_dtype, pick
from .chunk import chunk, log_keep, running_max
from .latents import latents
from .naive import FLOOR, Sums, naive
from .step import step

__all__ = ["FLOOR", "Sums", "average", "chunk", "expsum", "latents", "log_keep", "merge", "naive", "running_max", "step"]


def expsum(
    score: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial: Sums | None = None,
    span: Span | None = None,
    backend: str = "auto",
) -> tuple[Sums, Sums]:
    """Sums over s <= t with weights w_ts = exp(score_s + g_{s+1} + ... + g_t): exp(m_t) den_t = sum w_ts, exp(m_t) num_t = sum w_ts v_s.

    score [B, T, H]; v [B, T, H, V]; log_decay g [B, T, H], [H] or None (0); initial (m [B, H], den [B, H], num [B, H, V]) or None.
    Returns (m, den, num) after every token, [B, T, ...], and the last, in float32 at least. m is the largest exponent, without gradient;
    before any token it is FLOOR and the sums are 0. Padding in `span` neither decays nor adds; a reset starts anew.
    Milakov, Gimelshein 2018 (arXiv 1805.02867); Feng et al. 2024 (2405.13956). Raises ShapeError if the shapes do not fit.
    """
    if score.ndim != 3 or v.shape[:-1] != score.shape:
        raise ShapeError(f"score and v have shapes {list(score.shape)} and {list(v.shape)}; expected [B, T, H] and [B, T, H, V].")
    if log_decay is not None and log_decay.shape not in (score.shape, score.shape[2:]):
        raise ShapeError(f"log_decay has shape {list(log_decay.shape)}; expected [B, T, H] = {list(score.shape)} or [H].")
    dtype = accumulate_dtype(score, v, *([] if log_decay is None else [log_decay]))
    g = score.new_zeros((), dtype=dtype) if log_decay is None else log_decay.to(dtype)
    score, v, g, reset = score.to(dtype), v.to(dtype), g.expand_as(score), None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            padding = ~span.valid[..., None]
            score, g, v = score.masked_fill(padding, -torch.inf), g.masked_fill(padding, 0), v.masked_fill(padding[..., None], 0)
    if initial is not None:
        initial = initial[0].detach().to(dtype), initial[1].to(dtype), initial[2].to(dtype)
    rule = {"naive": naive, "step": step, "chunk": chunk}[pick(backend, score.shape[1])]
    return rule(score, v, g, initial, reset)


def average(den: Tensor, num: Tensor) -> Tensor:
    """num / den [..., V], and 0 where nothing was summed (den [...] is 0)."""
    return num / torch.where(den > 0, den, 1.0)[..., None]


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over two disjoint sets of tokens, from the sums over each; m may be any scale, with a gradient or not."""
    m = torch.maximum(a[0], b[0]).detach()
    scale_a, scale_b = (a[0] - m).exp(), (b[0] - m).exp()
    return m, scale_a * a[1] + scale_b * b[1], scale_a[..., None] * a[2] + scale_b[..., None] * b[2]
