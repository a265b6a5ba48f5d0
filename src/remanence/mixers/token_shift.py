"""Token shift: what RWKV layers see of the token before, and keep as state."""

from __future__ import annotations

import torch
from torch import Tensor

from ..span import Span, last_inputs


def token_shift(x: Tensor, before: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
    """The previous token's x, [B, T, D], zeros at document starts; and the new `before`, [B, 1, D], each row's last real x.

    x [B, T, D], right-padded; before [B, 1, D]: what the call before this one returned, or None for a fresh start (zeros).
    """
    before = torch.zeros_like(x[:, :1]) if before is None else before.to(x.dtype)
    previous = torch.cat([before, x[:, :-1]], 1)
    if span is not None and span.reset is not None:
        previous = previous.masked_fill(span.reset[..., None], 0)
    return previous, last_inputs(before, x, span)
