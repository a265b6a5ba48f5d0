"""Mixtures of running softmax averages that share their values: L averages a head, read without being written out (Latte)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ShapeError
from ...span import Span
from ..backend import accumulate_dtype, pick
from ..scan import scan
from .chunk import running_max
from .naive import FLOOR, Sums, naive

CHUNK = 16
"""Tokens of a chunk; the weights inside one are [C, C, L], exponentiated one by one, so that no score can overflow."""


def latents(
    p: Tensor, score: Tensor, v: Tensor, initial: Sums | None = None, span: Span | None = None, backend: str = "auto"
) -> tuple[Tensor, Sums]:
    """o_t = sum_l p_t[l] (sum_{s<=t} e^{score_s[l]} v_s) / (sum_{s<=t} e^{score_s[l]}).

    p, score [B, T, H, L]; v [B, T, H, V]; initial (m [B, H, L], den [B, H, L], num [B, H, L, V]) or None. Returns o [B, T, H, V] in v's
    dtype and the last (m, den, num), float32 at least, as `expsum` has them for H L heads. Padding in `span` adds nothing and its o is 0;
    a reset starts anew. Dolga et al. 2024 (arXiv 2402.17512). Raises ShapeError if the shapes do not fit.
    """
    if p.ndim != 4 or p.shape != score.shape or v.shape[:-1] != p.shape[:-1]:
        shapes = ", ".join(str(list(x.shape)) for x in (p, score, v))
        raise ShapeError(f"p, score, v have shapes {shapes}; expected [B, T, H, L] twice and [B, T, H, V].")
    dtype, out = accumulate_dtype(p, score, v), v.dtype
    p, score, v = p.to(dtype), score.to(dtype), v.to(dtype)
    if initial is None:
        m = torch.full_like(score[:, 0], FLOOR)
        initial = m, torch.zeros_like(m), v.new_zeros(*m.shape, v.shape[-1])
    initial = initial[0].detach().to(dtype), initial[1].to(dtype), initial[2].to(dtype)
    reset = None
    if span is not None:
        reset = span.reset
        if span.valid is not None:
            padding = ~span.valid[..., None, None]
            p, score, v = p.masked_fill(padding, 0), score.masked_fill(padding, -torch.inf), v.masked_fill(padding, 0)
    rule = _one_by_one if pick(backend, p.shape[1]) == "naive" else _chunks
    o, last = rule(p, score, v, initial, reset)
    return o.to(out), last


def _one_by_one(p: Tensor, score: Tensor, v: Tensor, initial: Sums, reset: Tensor | None) -> tuple[Tensor, Sums]:
    """The equation: L heads of `expsum` for every head, all written out."""
    values = v[..., None, :].expand(*score.shape, -1).flatten(2, 3)
    flat = initial[0].flatten(1), initial[1].flatten(1), initial[2].flatten(1, 2)
    (_, den, num), last = naive(score.flatten(2), values, torch.zeros_like(score.flatten(2)), flat, reset)
    den, num = den.view_as(score), num.unflatten(2, score.shape[2:])
    o = (p[..., None] * num / torch.where(den > 0, den, 1.0)[..., None]).sum(-2)
    return o, (last[0].view_as(initial[0]), last[1].view_as(initial[1]), last[2].view_as(initial[2]))


def _chunks(p: Tensor, score: Tensor, v: Tensor, initial: Sums, reset: Tensor | None) -> tuple[Tensor, Sums]:
    """In chunks of C tokens, with m_t the running maxima, M_n those at the end of chunk n and w_tsl = exp(score_s[l] - m_t[l]) for s <= t:

        den_t = sum_s w_ts + e^{M_{n-1} - m_t} DEN_{n-1}      o_t = sum_s (sum_l p_t[l] w_tsl / den_t[l]) v_s + ... NUM_{n-1}

    and one linear scan from chunk to chunk for [DEN, NUM].
    """
    length = p.shape[1]
    size = min(CHUNK, length)
    if pad := -length % size:
        p, score, v = F.pad(p, (0, 0, 0, 0, 0, pad)), F.pad(score, (0, 0, 0, 0, 0, pad), value=-torch.inf), F.pad(v, (0, 0, 0, 0, 0, pad))
        reset = None if reset is None else F.pad(reset, (0, pad))
    m0, den0, num0 = initial
    m = running_max(score.flatten(2), None, m0.flatten(1), reset).view_as(score)
    p, score, v, m = (x.unflatten(1, (-1, size)).transpose(2, 3) for x in (p, score, v, m))  # [B, N, H, C, L or V]
    end = m[:, :, :, -1]  # M_n [B, N, H, L]
    start = torch.cat([m0[:, None], end[:, :-1]], 1)
    read, write = start[..., None, :] - m, score - end[..., None, :]  # exponents [B, N, H, C, L]
    hidden = torch.ones(size, size, dtype=torch.bool, device=p.device).triu(1)  # [C, C], and [B, N, 1, C, C] with resets
    restarts = None
    if reset is not None:
        document = reset.unflatten(1, (-1, size)).cumsum(2)[:, :, None]  # [B, N, 1, C]: resets so far in the chunk
        hidden = hidden | (document[..., :, None] != document[..., None, :])
        read = read.masked_fill((document > 0)[..., None], -torch.inf)
        write = write.masked_fill((document != document[..., -1:])[..., None], -torch.inf)
        restarts = document[:, :, 0, -1] > 0  # [B, N]
    weights = (score[:, :, :, None] - m[..., None, :]).masked_fill_(hidden[..., None], -torch.inf).exp_()  # [B, N, H, C, C, L]
    read, write = read.exp(), write.exp()

    added = torch.cat([write.sum(-2)[..., None], write.mT @ v], -1)  # [B, N, H, L, 1 + V]
    log_a = start - end if restarts is None else (start - end).masked_fill(restarts[..., None, None], 0)
    sums0 = torch.cat([den0[..., None], num0], -1)
    flat, last = scan(
        log_a[..., None].expand_as(added).flatten(2), added.flatten(2), sums0.flatten(1), None if restarts is None else Span(reset=restarts)
    )
    before = torch.cat([sums0[:, None], flat.view_as(added)[:, :-1]], 1)  # the state that each chunk starts from
    den = weights.sum(-2) + read * before[..., None, :, 0]  # [B, N, H, C, L]
    share = p / torch.where(den > 0, den, 1.0)
    o = (weights @ share[..., None])[..., 0] @ v + (share * read) @ before[..., 1:]  # [B, N, H, C, V]
    last = last.view_as(sums0)
    return o.transpose(2, 3).flatten(1, 2)[:, :length], (end[:, -1], last[..., 0], last[..., 1:])
