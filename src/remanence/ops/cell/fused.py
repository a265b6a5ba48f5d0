"""The LSTM by torch's own fused kernel (oneDNN on a CPU, cuDNN on a GPU), head by head: faster than `loop` where it can be used.

torch's GRU and RNN have no such kernel on a CPU, and there `loop` is the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...span import Span
from .step import States


def usable(kind: str, x: Tensor, span: Span | None, backend: str) -> bool:
    """Whether `fused` can stand in for a projection and `cell`: an lstm in float32, more than one token, no padding and no resets."""
    whole = span is None or (span.valid is None and span.reset is None)
    full = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return kind == "lstm" and backend in ("auto", "torch") and full and whole and x.shape[1] > 1


def fused(x: Tensor, weight: Tensor, bias: Tensor, R: Tensor, initial: States | None = None) -> tuple[Tensor, States]:
    """As cell("lstm", x W^T + b, R, initial) -> y [B, T, H, D], (y, c). x [B, T, C] float32; weight [H 4 D, C]; bias [H 4 D].

    A head is an LSTM of its own, with gates i, f, z, o in torch's order. First-order gradients only.
    """
    heads, size = R.shape[:2]
    if initial is None:
        initial = (x.new_zeros(len(x), heads, size),) * 2
    y, c = (state.to(x.dtype).transpose(0, 1).contiguous() for state in initial)  # [H, B, D]
    recurrent = R.flatten(2).transpose(1, 2).contiguous()  # [H, 4 D, D]
    none = torch.zeros_like(bias[: 4 * size])
    each = zip(weight.chunk(heads), recurrent.unbind(0), bias.chunk(heads), y.split(1), c.split(1))
    outputs = []
    for w, r, b, y_h, c_h in each:
        outputs.append(torch.lstm(x, (y_h, c_h), (w, r, b, none), True, 1, 0.0, torch.is_grad_enabled(), False, True))
    out, last_y, last_c = zip(*outputs)
    return torch.stack(out, 2), (torch.cat(last_y).transpose(0, 1), torch.cat(last_c).transpose(0, 1))
