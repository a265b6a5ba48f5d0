"""The nonlinear cells in a loop, differentiated by autograd: the ground truth of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import States, step


def naive(
    kind: str,
    wx: Tensor,
    R: Tensor,
    initial: States,
    inner: Tensor | None = None,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, States]:
    """`step` for every token. wx [B, T, H, G, D]; valid, reset [B, T] bool or None -> y [B, T, H, D], 0 at padding, and the last states.

    Computes in the inputs' dtype: pass float64 to use it as a reference.
    """
    states, outputs = initial, []
    for t in range(wx.shape[1]):
        before = states
        if reset is not None:
            before = tuple(torch.where(reset[:, t, None, None], 0.0, s) for s in before)
        states = step(kind, wx[:, t], R, before, inner)
        if valid is not None:
            states = tuple(torch.where(valid[:, t, None, None], new, old) for new, old in zip(states, before, strict=True))
        outputs.append(states[0] if valid is None else states[0] * valid[:, t, None, None])
    return torch.stack(outputs, 1), states
