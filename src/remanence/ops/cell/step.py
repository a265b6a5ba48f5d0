"""The nonlinear cells for one token, from their equations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STATES = {"elman": ("y",), "lstm": ("y", "c"), "gru": ("y",), "slstm": ("y", "c", "n", "m")}
"""What each cell carries from token to token; y is also its output."""
GATES = {"elman": 1, "lstm": 4, "gru": 3, "slstm": 4}
"""Number of gates: lstm and slstm i, f, z, o; gru r, z, n."""

States = tuple[Tensor, ...]


def step(kind: str, wx: Tensor, R: Tensor, states: States, inner: Tensor | None = None) -> States:
    """(y, ...) after one token. wx [B, H, G, D]; R [H, D, G, D]; states, each [B, H, D]; inner [H, D], the gru's bias on its inner product.

    With a = wx + y R, gate by gate:

        elman    y = tanh(a)
        lstm     c = sigmoid(f) c + sigmoid(i) tanh(z)              y = sigmoid(o) tanh(c)
        gru      y = (1 - z') n' + z' y, z' = sigmoid(z), n' = tanh(wx_n + sigmoid(r) (y R_n + inner))
        slstm    m' = max(i, log sigmoid(f) + m), or i where n = 0 (a fresh start); i' = exp(i - m'); f' = exp(log sigmoid(f) + m - m')
                 c = f' c + i' tanh(z)      n = f' n + i'           y = sigmoid(o) c / n

    The stabiliser m is a scale (c and n are stored times exp(-m)), so no gradient goes through it; y does not depend on it.
    """
    y = states[0]
    ry = torch.einsum("bhi,higj->bhgj", y, R)
    if kind == "gru":
        r, z = (wx[:, :, :2] + ry[:, :, :2]).sigmoid().unbind(2)
        candidate = ry[:, :, 2] if inner is None else ry[:, :, 2] + inner
        n = torch.tanh(wx[:, :, 2] + r * candidate)
        return (n + z * (y - n),)
    a = wx + ry
    if kind == "elman":
        return (a[:, :, 0].tanh(),)
    i, f, z, o = a.unbind(2)
    if kind == "lstm":
        c = f.sigmoid() * states[1] + i.sigmoid() * z.tanh()
        return o.sigmoid() * c.tanh(), c
    _, c, n, m = states
    log_f = F.logsigmoid(f) + m.detach()
    m = torch.where(n == 0, i, torch.maximum(i, log_f)).detach()
    i, f = (i - m).exp(), torch.where(n == 0, 0.0, (log_f - m).clamp(max=0).exp())
    c, n = f * c + i * z.tanh(), f * n + i
    return o.sigmoid() * c / n, c, n, m
