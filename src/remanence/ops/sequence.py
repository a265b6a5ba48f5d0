"""Sequence parallelism for recurrences that are linear in their state: pieces are read side by side from zero, then put right.

A piece maps the state S that it starts from to A S + E, and to its outputs adds something linear in S. So each piece, on its own, gives its
end E from a zero start and its decay A; those of all pieces (one all-gather among machines) give every start by `split_sequence_states`;
and each piece adds what its start changes. Here in one process, piece after piece (LASP-2, arXiv 2502.07563; Linear-MoE, 2503.05447).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ShapeError, positive
from ..span import Span
from .delta import delta
from .outer import outer
from .scan import scan

Apply = Callable[[Tensor, Tensor], Tensor]


def _scale(decay: Tensor, S: Tensor) -> Tensor:
    return decay * S


def split_sequence_states(
    decays: Sequence[Tensor], ends: Sequence[Tensor], initial: Tensor | None = None, apply: Apply = _scale
) -> tuple[list[Tensor], Tensor]:
    """The state S_n that each piece starts from, and the last: S_0 = initial (zero if None), S_{n+1} = A_n S_n + E_n.

    decays: A_n of each piece, not logs; ends: E_n, its final state from a zero start. apply(A, S): the product, elementwise by default.
    """
    if len(decays) != len(ends) or not ends:
        raise ShapeError(f"{len(decays)} pieces have a decay and {len(ends)} a final state; there must be one of each for every piece.")
    S = torch.zeros_like(ends[0]) if initial is None else initial.to(ends[0].dtype)
    starts = []
    for A, E in zip(decays, ends):
        starts.append(S)
        S = apply(A, S) + E
    return starts, S


def cuts(length: int, pieces: int) -> list[slice]:
    """`pieces` slices of about equal length that cover a sequence; fewer if it is shorter than that."""
    positive(pieces=pieces)
    edges = [length * n // pieces for n in range(pieces + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if a < b]


def _carried(log_decay: Tensor, span: Span | None) -> Tensor:
    """[B, T, ...]: the product of the decays up to each token of a piece, zero from the first reset on. Padding does not decay."""
    if span is not None and span.valid is not None:
        log_decay = log_decay * _as(span.valid, log_decay)
    carried = log_decay.cumsum(1).exp()
    if span is not None and span.reset is not None:
        carried = carried * (~_as(span.reset.cumsum(1) > 0, carried))
    return carried


def _as(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))


def split_outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    span: Span | None = None,
    pieces: int = 4,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `ops.outer.outer` (without a bonus), in pieces. A piece's decay is exp(sum g), and token t adds (exp(g_1 + .. + g_t) S)^T q_t."""
    parts = cuts(q.shape[1], pieces)
    spans = [span and span[part] for part in parts]
    g = q.new_zeros(v.shape[:3]) if log_decay is None else log_decay
    local = [outer(q[:, part], k[:, part], v[:, part], g[:, part], None, inside, backend) for part, inside in zip(parts, spans)]
    ends = [end for _, end in local]
    carried = [_carried(g[:, part].to(ends[0].dtype), inside) for part, inside in zip(parts, spans)]  # [B, T, H] or [B, T, H, K]
    carried = [c if c.ndim == 4 else c[..., None] for c in carried]
    starts, last = split_sequence_states([c[:, -1, :, :, None] for c in carried], ends, initial)
    queries = q.repeat_interleave(v.shape[2] // q.shape[2], 2)
    outputs = [
        o + torch.einsum("bthk,bhkv->bthv", queries[:, part] * c, start).to(o.dtype)
        for part, (o, _), c, start in zip(parts, local, carried, starts)
    ]
    return torch.cat(outputs, 1), last


def split_scan(
    log_a: Tensor, b: Tensor, initial: Tensor | None = None, span: Span | None = None, pieces: int = 4, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """As `ops.scan.scan`, in pieces."""
    parts = cuts(b.shape[1], pieces)
    spans = [span and span[part] for part in parts]
    local = [scan(log_a[:, part], b[:, part], None, inside, backend) for part, inside in zip(parts, spans)]
    ends = [end for _, end in local]
    carried = [_carried(log_a[:, part].to(ends[0].dtype), inside) for part, inside in zip(parts, spans)]  # [B, T, D]
    starts, last = split_sequence_states([c[:, -1] for c in carried], ends, initial)
    outputs = [h + (c * start[:, None]).to(h.dtype) for (h, _), c, start in zip(local, carried, starts)]
    return torch.cat(outputs, 1), last


def split_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial: Tensor | None = None,
    span: Span | None = None,
    pieces: int = 4,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `ops.delta.delta`, in pieces. A piece's "decay" is a K x K matrix a head: what the rule, with no values, makes of the identity.

    What a start changes is the rule again, without values: three passes in all, and K^2 more numbers to gather for every head.
    """
    parts = cuts(q.shape[1], pieces)
    spans = [span and span[part] for part in parts]

    def run(part: slice, inside: Span | None, v: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        g = None if log_decay is None else log_decay[:, part]
        return delta(q[:, part], k[:, part], v, g, beta[:, part], start, inside, backend)

    local = [run(part, inside, v[:, part], None) for part, inside in zip(parts, spans)]
    ends = [end for _, end in local]
    eye = torch.eye(k.shape[-1], dtype=ends[0].dtype, device=k.device).expand(*ends[0].shape[:2], -1, -1)
    decays = [run(part, inside, torch.zeros_like(k[:, part]), eye)[1] for part, inside in zip(parts, spans)]  # [B, H, K, K]
    starts, last = split_sequence_states(decays, ends, initial, torch.matmul)
    changes = [run(part, inside, torch.zeros_like(v[:, part]), start)[0] for part, inside, start in zip(parts, spans, starts)]
    return torch.cat([o + change for (o, _), change in zip(local, changes)], 1), last
