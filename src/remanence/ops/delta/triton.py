"""The gated delta rule on a GPU: torch's chunk form, with a kernel for what goes from chunk to chunk. Also the door to fla's kernel."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import fla_documents, precision
from .chunk import Loops
from .chunk import chunk as torch_chunk


@triton.jit
def _carry(
    left, right, across, news, states, chunks, rows, size, key_dim: tl.constexpr, value_dim: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row (a head of a sequence), V of its value channels, all chunks one after the other with S [K, V] in registers.

        news <- news - left S      S <- across S + right^T news;    BACK: news <- news + left S      S <- states + across S - right^T news

    left, right [N, M, C, K]; news [N, M, C, V] and states [N + 1, M, K, V] are written over; BACK goes from the last to the first.
    """
    row = tl.program_id(0).to(tl.int64)
    c, key = tl.arange(0, C), tl.arange(0, K)
    value = tl.program_id(1) * V + tl.arange(0, V)
    key_at, value_at = c[:, None] * key_dim + key[None, :], c[:, None] * value_dim + value[None, :]
    key_ok, value_ok = (c < size)[:, None] & (key < key_dim)[None, :], (c < size)[:, None] & (value < value_dim)[None, :]
    state_at, state_ok = key[:, None] * value_dim + value[None, :], (key < key_dim)[:, None] & (value < value_dim)[None, :]
    first = chunks if BACK else 0
    S = tl.load(states + (first * rows + row) * key_dim * value_dim + state_at, mask=state_ok, other=0)
    for i in tl.range(0, chunks):
        n = chunks - 1 - i if BACK else i
        at = n * rows + row
        new_at = news + at * size * value_dim + value_at
        b_left = tl.load(left + at * size * key_dim + key_at, mask=key_ok, other=0)
        b_right = tl.load(right + at * size * key_dim + key_at, mask=key_ok, other=0)
        new = tl.load(new_at, mask=value_ok, other=0)
        decay = tl.load(across + at)
        read = tl.dot(b_left, S, input_precision=PRECISION)
        new = new + read if BACK else new - read
        tl.store(new_at, new, mask=value_ok)
        write = tl.dot(tl.trans(b_right), new, input_precision=PRECISION)
        if BACK:
            out = states + at * key_dim * value_dim + state_at
            S = tl.load(out, mask=state_ok, other=0) + decay * S - write
        else:
            out = states + (at + rows) * key_dim * value_dim + state_at
            S = decay * S + write
        tl.store(out, S, mask=state_ok)


@torch.library.custom_op("remanence::delta_triton", mutates_args=("news", "states"))
def carry(left: Tensor, right: Tensor, across: Tensor, news: Tensor, states: Tensor, back: bool, precision: str) -> None:
    """`_carry` for all rows, in place. An operator of its own, so that torch.compile keeps it whole."""
    left, right, across = (x.contiguous() for x in (left, right, across))
    chunks, rows, size, key_dim = left.shape
    width = news.shape[-1]
    C, K = (max(16, triton.next_power_of_2(x)) for x in (size, key_dim))
    V = 32 if precision == "tf32" and K <= 128 else 16
    _carry[(rows, triton.cdiv(width, V))](
        left, right, across, news, states, chunks, rows, size, key_dim, width,
        C=C, K=K, V=V, BACK=back, PRECISION=precision, num_warps=8, num_stages=1,
    )  # fmt: skip


@carry.register_fake
def _(left: Tensor, right: Tensor, across: Tensor, news: Tensor, states: Tensor, back: bool, precision: str) -> None: ...


def _forward(X: Tensor, news: Tensor, readers: Tensor, writers: Tensor, across: Tensor, states: Tensor, precision: str) -> None:
    """As `run`, with the triangular solve first: it does not wait for the state."""
    news.copy_(X @ news)
    carry(X @ readers, writers.mT, across, news, states, False, precision)


def _backward(X: Tensor, p: Tensor, readers: Tensor, writers: Tensor, across: Tensor, d_states: Tensor, precision: str) -> None:
    """As `run_back`, likewise."""
    p.copy_(X.mT @ p)
    carry(X.mT @ writers, readers.mT, across, p, d_states, True, precision)


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As the `chunk` of torch, for K up to 256; computes and returns in log_decay's dtype, q, k, v may be shorter ones."""
    how, width = precision(q, k, v), k.shape[-1]
    if size is None:  # what the registers of an A100 hold, with V of `carry`; a product in full float32 takes more of them
        size = (64 if width <= 128 else 32) if how == "tf32" else (32 if width <= 64 else 16)
    q, k, v = (x.to(log_decay.dtype) for x in (q, k, v))
    loops = Loops(partial(_forward, precision=how), partial(_backward, precision=how))
    return torch_chunk(q, k, v, log_decay, beta, initial, reset, size, loops)


def fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By fla's kernel; resets only in one row (B == 1)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    initial, documents = fla_documents(reset, initial)
    given = {"scale": 1.0, "initial_state": initial, "output_final_state": True, **documents}
    inputs = (x.to(v.dtype).contiguous() for x in (q, k, v))
    o, S = chunk_gated_delta_rule(*inputs, g=log_decay.contiguous(), beta=beta.to(v.dtype).contiguous(), **given)
    return o, S[-1:] if documents else S
