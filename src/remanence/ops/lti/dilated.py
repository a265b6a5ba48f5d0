"""Causal depthwise convolution with gaps between its taps, and a state: what the trees of MultiresNet and TCNCA are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ...span import Span, last_inputs


def dilated(x: Tensor, weights: tuple[Tensor, ...], gap: int, before: Tensor | None, span: Span | None) -> tuple[list[Tensor], Tensor]:
    """y_t = sum_j w_j x_{t - j gap} for each of the `weights` [C, W] (weight[:, -1] is the current token's), inputs before a document zero.

    x [B, T, C]; before [B, (W - 1) gap, C] or None for a fresh start; span right-padded. Returns the y's [B, T, C] and the new state.
    """
    length, reach = x.shape[1], (weights[0].shape[1] - 1) * gap
    if before is None:
        before = x.new_zeros(x.shape[0], reach, x.shape[2])
    both = torch.cat([before, x], 1)
    fresh = None
    if span is not None and span.reset is not None:  # tokens since the document started; large enough where that was before this call
        at = torch.arange(length, device=x.device)
        fresh = at - torch.where(span.reset, at, -reach - 1).cummax(1).values
    outputs = [x * weight[:, -1] for weight in weights]
    for j in range(1, weights[0].shape[1]):
        past = both[:, reach - j * gap : reach - j * gap + length]
        if fresh is not None:
            past = past * (fresh >= j * gap)[..., None].to(x.dtype)
        outputs = [torch.addcmul(y, past, weight[:, -1 - j]) for y, weight in zip(outputs, weights)]
    return outputs, last_inputs(before, x, span)
