"""The gated outer-product state on a GPU: one kernel that runs the chunk form either way in time. Also the door to fla's kernels."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import fla_documents, precision
from .chunk import split


@triton.jit
def _chunks(
    q, k, v, log_decay, reset, initial, o, last, states, dots, length,
    heads: tl.constexpr, q_heads: tl.constexpr, k_heads: tl.constexpr, v_heads: tl.constexpr,
    key_dim: tl.constexpr, value_dim: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, RESETS: tl.constexpr, KEEP: tl.constexpr, DOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head, K of its key and V of its value channels, all chunks of C tokens one after the other with the state S [K, V] in registers.

    Forward: the equations of `chunk.chunk`, which are sums over key channels: o [key blocks, B, T, H, V] are its parts. KEEP writes S after
    every chunk. REVERSE: the transpose, S_t = exp(g_{t+1}) S_{t+1} + k_t v_t^T, o_t = S_t^T q_t, from the last token to the first; DOTS
    writes the part of <S, states> before every chunk.
    """
    number = tl.num_programs(0).to(tl.int64)
    pid = tl.program_id(0)
    block = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    row, head = (pid // heads).to(tl.int64), pid % heads
    c, key, value = tl.arange(0, C), tl.program_id(1) * K + tl.arange(0, K), tl.program_id(2) * V + tl.arange(0, V)
    state_at = (row * heads + head) * key_dim * value_dim + key[:, None] * value_dim + value[None, :]
    state_ok = (key < key_dim)[:, None] & (value < value_dim)[None, :]
    S = tl.load(initial + state_at, mask=state_ok, other=0)
    TYPE: tl.constexpr = S.dtype
    chunks = tl.cdiv(length, C)
    for i in tl.range(0, chunks):
        n = chunks - 1 - i if REVERSE else i
        t = n * C + c
        ok = t < length
        token = row * length + t
        key_ok, value_ok = ok[:, None] & (key < key_dim)[None, :], ok[:, None] & (value < value_dim)[None, :]
        q_at = (token * q_heads + head // (heads // q_heads))[:, None] * key_dim + key[None, :]
        k_at = (token * k_heads + head // (heads // k_heads))[:, None] * key_dim + key[None, :]
        v_at = (token * v_heads + head // (heads // v_heads))[:, None] * value_dim + value[None, :]
        b_q = tl.load(q + q_at, mask=key_ok, other=0).to(TYPE)
        b_k = tl.load(k + k_at, mask=key_ok, other=0).to(TYPE)
        b_v = tl.load(v + v_at, mask=value_ok, other=0).to(TYPE)
        step = tl.load(log_decay + token * heads + head, mask=ok, other=0).to(TYPE)
        g = tl.cumsum(step, 0)
        total = tl.sum(step, 0)
        from_start, to_end, across = tl.exp(g), tl.exp(total - g), tl.exp(total)
        same = c[:, None] >= c[None, :]
        if RESETS:
            mark = tl.load(reset + token, mask=ok, other=0).to(tl.int32)
            document, documents = tl.cumsum(mark, 0), tl.sum(mark, 0)
            same = same & (document[:, None] == document[None, :])
            from_start = tl.where(document == 0, from_start, 0)
            to_end = tl.where(document == documents, to_end, 0)
            across = tl.where(documents == 0, across, 0)
        # exponentials only where they are <= 1: the other triangle would overflow
        within = tl.exp(tl.where(same, g[:, None] - g[None, :], float("-inf")))
        if REVERSE:
            within = tl.trans(within)
            from_start, to_end = to_end, from_start
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * within
        b_o = tl.dot(b_q * from_start[:, None], S, input_precision=PRECISION)
        b_o += tl.dot(scores, b_v, input_precision=PRECISION)
        o_at = ((tl.program_id(1) * (number // heads) * length + token) * heads + head)[:, None] * value_dim + value[None, :]
        tl.store(o + o_at, b_o, mask=value_ok)
        kept_at = n * number * key_dim * value_dim + state_at
        if DOTS:
            product = tl.sum(S * tl.load(states + kept_at, mask=state_ok, other=0))
            tl.store(dots + (block * chunks + n) * number + pid, product)
        S = S * across + tl.dot(tl.trans(b_k * to_end[:, None]), b_v, input_precision=PRECISION)
        if KEEP:
            tl.store(states + kept_at, S, mask=state_ok)
    tl.store(last + state_at, S, mask=state_ok)


CHUNK = 32
SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? reset, Tensor S, bool reverse, bool keep, Tensor? states, str precision)"


@torch.library.custom_op("remanence::outer_triton", mutates_args=(), schema=f"{SCHEMA} -> (Tensor, Tensor, Tensor)")
def launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, reset: Tensor | None, S: Tensor,
    reverse: bool, keep: bool, states: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V], the last S [B, H, K, V], and: with `keep` S after every chunk [N, B, H, K, V], with `states` <S, states> [N, B, H].

    q, k, v may each have H heads or fewer that divide H. One operator, so that torch.compile keeps it whole.
    """
    q, k, v, g, S = (x.contiguous() for x in (q, k, v, g, S))
    batch, length, heads = g.shape
    key_dim, value_dim = S.shape[2:]
    # tl.dot takes 16 or more; with 64 x 32 the registers of an A100 hold all, in float32 with 8 warps
    K, V = (min(max(16, triton.next_power_of_2(x)), most) for x, most in ((key_dim, 64), (value_dim, 32)))
    chunks, blocks = triton.cdiv(length, CHUNK), (triton.cdiv(key_dim, K), triton.cdiv(value_dim, V))
    o, last = S.new_empty(blocks[0], batch, length, heads, value_dim), torch.empty_like(S)
    kept = S.new_empty(chunks if keep else 0, *S.shape)
    dots = S.new_empty(blocks[0] * blocks[1], chunks if states is not None else 0, batch, heads)
    marks = g if reset is None else reset.contiguous().view(torch.int8)
    _chunks[(batch * heads, *blocks)](
        q, k, v, g, marks, S, o, last, kept if states is None else states, dots, length,
        heads, q.shape[2], k.shape[2], v.shape[2], key_dim, value_dim, C=CHUNK, K=K, V=V, REVERSE=reverse, RESETS=reset is not None,
        KEEP=keep, DOTS=states is not None, PRECISION=precision, num_warps=4 if precision == "tf32" else 8,
    )  # fmt: skip
    return o[0] if blocks[0] == 1 else o.sum(0), last, kept if states is None else dots.sum(0)


@launch.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, reset: Any, S: Tensor, reverse: bool, keep: bool, states: Any, precision: str) -> Any:
    chunks = -(-g.shape[1] // CHUNK)
    third = S.new_empty(chunks if keep else 0, *S.shape) if states is None else S.new_empty(chunks, *S.shape[:2])
    return S.new_empty(*g.shape, S.shape[3]), torch.empty_like(S, memory_format=torch.contiguous_format), third


class _Outer(torch.autograd.Function):
    """q, k [B, T, G, K], v [B, T, H, V], log decays g [B, T, H], S [B, H, K, V], reset [B, T] or None -> o like v, final S.

    With dS_t the gradient of the state after token t, dS_t = exp(g_{t+1}) dS_{t+1} + q_t do_t^T, the transposed recurrence. Then
    dq = S do, dv = dS^T k and dk = dS v are all reads of such states: the same kernel with q, k, v, do in other places. Those of g are
    as in `chunk`: sums from token t to its chunk's end of <q, dq> - <k, dk>, and <S, dS> there.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, reset: Tensor | None, precision: str
    ) -> tuple[Tensor, Tensor]:
        o, last, _ = launch(q, k, v, g, reset, S, False, False, None, precision)
        ctx.save_for_backward(q, k, v, g, S, reset)
        ctx.precision = precision
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, S, reset = ctx.saved_tensors
        precision, groups, length = ctx.precision, q.shape[2], q.shape[1]
        dq, _, states = launch(do, v, k, g, reset, S.mT, False, True, None, precision)  # S^T after every chunk
        dk, _, dots = launch(v, do, q, g, reset, dS.mT, True, False, states, precision)
        dv, dS, _ = launch(k, q, do, g, reset, dS, True, False, None, precision)
        dq, dk = (x.unflatten(2, (groups, -1)) for x in (dq, dk))  # [B, T, G, R, K]
        dg = (q[:, :, :, None] * dq - k[:, :, :, None] * dk).sum(-1).flatten(2)  # [B, T, H], of running sums in a chunk
        dg = split(dg, CHUNK)
        dg[:, :, -1] += dots
        dg = dg.flip(2).cumsum(2).flip(2).transpose(0, 1).flatten(1, 2)[:, :length]
        return dq.sum(3).to(q.dtype), dk.sum(3).to(k.dtype), dv.to(v.dtype), dg, dS, None, None


def chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As the `chunk` of torch, any T; computes and returns in log_decay's dtype, q, k, v may be shorter ones."""
    shape = (*v.shape[:1], *v.shape[2:3], q.shape[-1], v.shape[-1])
    S = log_decay.new_zeros(shape) if initial is None else initial
    with torch.autocast(v.device.type, enabled=False):
        return _Outer.apply(q, k, v, log_decay, S, reset, precision(q, k, v))


def fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By fla's kernels, simple GLA or (decays [B, T, H, K]) GLA; resets only in one row (B == 1)."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    rule = chunk_gla if log_decay.ndim == 4 else chunk_simple_gla
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2).to(v.dtype) for x in (q, k))
    initial, documents = fla_documents(reset, initial)
    given = {"scale": 1.0, "initial_state": initial, "output_final_state": True, **documents}
    o, S = rule(q.contiguous(), k.contiguous(), v.contiguous(), g=log_decay.contiguous(), **given)
    return o, S[-1:] if documents else S
