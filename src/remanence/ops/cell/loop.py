"""The nonlinear cells in a loop of a few in-place calls a token, with back-propagation through time written by hand.

A nonlinear recurrence cannot be cut into chunks, so what is left is to do little per token: one small matrix product and a handful of
calls into buffers made beforehand. Backward, everything that does not depend on the token after is computed for all tokens at once (the
local derivatives before the loop, the gradient of R as one matrix product after it).

Inside, tensors are [T, H, B, ...]: every token's part is contiguous and its product with R is one batched product over the heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .step import States


class Resets:
    """Where documents start. `at[t]` is the mask [1, B, 1] of the rows that start at token t, or None if none does."""

    def __init__(self, reset: Tensor | None, length: int):
        self.mask = None if reset is None else reset.t()[:, None, :, None]  # [T, 1, B, 1]
        self.at: list[Tensor | None] = [None] * length
        if reset is not None:
            self.at = [mask if any_row else None for mask, any_row in zip(self.mask, reset.any(0).tolist())]  # type: ignore[arg-type]

    def start(self, t: int, *states: Tensor, fill: float = 0.0) -> tuple[Tensor, ...]:
        """The states that token t starts from (or, backward, the gradients that it hands on)."""
        mask = self.at[t]
        return states if mask is None else tuple(state.masked_fill(mask, fill) for state in states)

    def before(self, states: Tensor, initial: Tensor, fill: float = 0.0) -> Tensor:
        """The states that all tokens start from: [T, H, B, D] shifted by one."""
        shifted = torch.cat([initial[None], states[:-1]])
        return shifted if self.mask is None else shifted.masked_fill(self.mask, fill)


def _gates(flat: Tensor, count: int) -> tuple[Tensor, ...]:
    """[..., G D] -> G views [..., D]."""
    return flat.unflatten(-1, (count, -1)).unbind(-2)


def _elman(wx: Tensor, R: Tensor, initial: Tensor, inner: Tensor, resets: Resets, out: Tensor, kept: list[Tensor]) -> None:
    y = initial[0]
    for t, (wx_t, y_t) in enumerate(zip(wx.unbind(0), out[0].unbind(0))):
        (y,) = resets.start(t, y)
        y = torch.baddbmm(wx_t, y, R, out=y_t).tanh_()


def _lstm(wx: Tensor, R: Tensor, initial: Tensor, inner: Tensor, resets: Resets, out: Tensor, kept: list[Tensor]) -> None:
    y, c = initial
    a, iz, tanh_c = torch.empty_like(wx[0]), torch.empty_like(y), torch.empty_like(y)
    i, f, z, o = _gates(a, 4)
    i_and_f = a[..., : 2 * y.shape[-1]]
    for t, (wx_t, y_t, c_t) in enumerate(zip(wx.unbind(0), out[0].unbind(0), out[1].unbind(0))):
        y, c = resets.start(t, y, c)
        torch.baddbmm(wx_t, y, R, out=a)
        i_and_f.sigmoid_()
        z.tanh_()
        o.sigmoid_()
        torch.mul(i, z, out=iz)
        c = torch.addcmul(iz, f, c, out=c_t)
        y = torch.mul(o, torch.tanh(c, out=tanh_c), out=y_t)
        if kept:
            kept[t].copy_(a)


def _gru(wx: Tensor, R: Tensor, initial: Tensor, inner: Tensor, resets: Resets, out: Tensor, kept: list[Tensor]) -> None:
    y, D = initial[0], initial.shape[-1]
    offset = F.pad(inner, (2 * D, 0))[:, None].expand(-1, y.shape[1], -1)  # [H, B, 3 D], 0 for r and z
    a = torch.empty_like(wx[0])
    n = torch.empty_like(y)
    r_and_z, (r, z, candidate) = a[..., : 2 * D], _gates(a, 3)
    for t, (wx_rz, wx_n, y_t) in enumerate(zip(wx[..., : 2 * D].unbind(0), wx[..., 2 * D :].unbind(0), out[0].unbind(0))):
        (y,) = resets.start(t, y)
        torch.baddbmm(offset, y, R, out=a)
        r_and_z.add_(wx_rz).sigmoid_()
        torch.addcmul(wx_n, r, candidate, out=n).tanh_()
        y = torch.lerp(n, y, z, out=y_t)
        if kept:
            torch.cat([a, n], -1, out=kept[t])


def _slstm(wx: Tensor, R: Tensor, initial: Tensor, inner: Tensor, resets: Resets, out: Tensor, kept: list[Tensor]) -> None:
    y, c, n, m = initial  # m is -inf where fresh, which makes m' = i and f' = 0
    a = torch.empty_like(wx[0])
    i, f, z, o = _gates(a, 4)
    for t, (wx_t, y_t, c_t, n_t, m_t) in enumerate(zip(wx.unbind(0), *(part.unbind(0) for part in out))):
        y, c, n = resets.start(t, y, c, n)
        (m,) = resets.start(t, m, fill=-torch.inf)
        torch.baddbmm(wx_t, y, R, out=a)
        if kept:
            kept[t].copy_(a)
        log_f = F.logsigmoid(f).add_(m)
        m = torch.maximum(i, log_f, out=m_t)
        i.sub_(m).exp_()
        log_f.sub_(m).exp_()
        n = torch.addcmul(i, log_f, n, out=n_t)
        c = torch.addcmul(i.mul_(z.tanh_()), log_f, c, out=c_t)
        y = torch.div(c, n, out=y_t).mul_(o.sigmoid_())


FORWARD = {"elman": _elman, "lstm": _lstm, "gru": _gru, "slstm": _slstm}


def _elman_back(dy: Tensor, d_aux: Tensor, states: Tensor, kept: Tensor, R: Tensor, initial: Tensor, resets: Resets) -> tuple[Tensor, ...]:
    local = 1 - states[0].square()
    da = torch.empty_like(local)
    handed, dh = torch.zeros_like(local[0]), torch.empty_like(local[0])
    steps = list(zip(dy.unbind(0), local.unbind(0), da.unbind(0)))
    for t in range(len(steps) - 1, -1, -1):
        dy_t, local_t, da_t = steps[t]
        torch.baddbmm(dy_t, handed, R, out=dh)
        (handed,) = resets.start(t, torch.mul(dh, local_t, out=da_t))
    return da, da, (handed @ R)[None]


def _lstm_back(dy: Tensor, d_aux: Tensor, states: Tensor, kept: Tensor, R: Tensor, initial: Tensor, resets: Resets) -> tuple[Tensor, ...]:
    i, f, z, o = _gates(kept, 4)
    tanh_c = states[1].tanh()
    to_c = o * (1 - tanh_c.square())  # of dy, to c
    to_o = tanh_c * o * (1 - o)  # of dy, to the pre-activation of o
    before = resets.before(states[1], initial[1])
    local = torch.stack([z * i * (1 - i), before * f * (1 - f), i * (1 - z.square())], -2)  # of dc, to i, f, z
    da = torch.empty_like(kept)
    parts = da.unflatten(-1, (4, -1))
    dh, dc, carry, handed = torch.empty_like(to_c[0]), torch.empty_like(to_c[0]), torch.zeros_like(to_c[0]), torch.zeros_like(da[0])
    dc_gates, given = dc.unsqueeze(-2), d_aux[0].flatten(1).any(1).tolist()
    steps = list(zip(*(x.unbind(0) for x in (dy, to_c, to_o, local, f, da, parts[..., :3, :], parts[..., 3, :]))))
    for t in range(len(steps) - 1, -1, -1):
        dy_t, to_c_t, to_o_t, local_t, f_t, da_t, da_ifz, da_o = steps[t]
        if given[t]:
            carry += d_aux[0, t]
        torch.baddbmm(dy_t, handed, R, out=dh)
        torch.addcmul(carry, dh, to_c_t, out=dc)
        torch.mul(dc_gates, local_t, out=da_ifz)
        torch.mul(dh, to_o_t, out=da_o)
        handed, carry = resets.start(t, da_t, torch.mul(dc, f_t, out=carry))
    return da, da, torch.stack([handed @ R, carry])


def _gru_back(dy: Tensor, d_aux: Tensor, states: Tensor, kept: Tensor, R: Tensor, initial: Tensor, resets: Resets) -> tuple[Tensor, ...]:
    r, z, candidate, n = _gates(kept, 4)
    to_n = (1 - z) * (1 - n.square())
    to_z = (resets.before(states[0], initial[0]) - n) * z * (1 - z)
    local = torch.stack([to_n * candidate * r * (1 - r), to_z, to_n * r], -2)  # of dh, to r, z and the inner product
    dh = torch.empty_like(to_n)
    da = kept.new_empty(*dh.shape[:-1], 3 * dh.shape[-1])
    carry, handed = torch.zeros_like(dh[0]), torch.zeros_like(da[0])
    steps = list(zip(*(x.unbind(0) for x in (dy, dh, dh.unsqueeze(-2), local, z, da, da.unflatten(-1, (3, -1))))))
    for t in range(len(steps) - 1, -1, -1):
        dy_t, dh_t, dh_gates, local_t, z_t, da_t, da_gates = steps[t]
        torch.baddbmm(carry.add_(dy_t), handed, R, out=dh_t)
        torch.mul(dh_gates, local_t, out=da_gates)
        handed, carry = resets.start(t, da_t, torch.mul(dh_t, z_t, out=carry))
    return da, torch.cat([da[..., : 2 * dh.shape[-1]], dh * to_n], -1), torch.baddbmm(carry, handed, R)[None]


def _slstm_back(dy: Tensor, d_aux: Tensor, states: Tensor, kept: Tensor, R: Tensor, initial: Tensor, resets: Resets) -> tuple[Tensor, ...]:
    i, f, z, o = _gates(kept, 4)
    _, c, n, m = states
    keep = (F.logsigmoid(f) + resets.before(m, initial[3], -torch.inf) - m).exp()
    to_f = keep * (-f).sigmoid()
    i, z, o = (i - m).exp(), z.tanh(), o.sigmoid()
    ratio = c / n
    to_cn = torch.stack([o / n, -o / n * ratio], 1)  # of dy, to c and n
    to_o = ratio * o * (1 - o)
    c_local = torch.stack([i * z, to_f * resets.before(c, initial[1]), i * (1 - z.square())], -2)  # of dc, to i, f, z
    n_local = torch.stack([i, to_f * resets.before(n, initial[2])], -2)  # of dn, to i, f
    da = torch.empty_like(kept)
    parts = da.unflatten(-1, (4, -1))
    dh, d_cn, carry, handed = torch.empty_like(c[0]), torch.empty_like(to_cn[0]), torch.zeros_like(to_cn[0]), torch.zeros_like(da[0])
    dc_gates, dn_gates = d_cn.unsqueeze(-2)
    given = d_aux[:2].flatten(2).any(2).any(0).tolist()
    walk = (dy, to_cn, to_o, c_local, n_local, keep, da, parts[..., :3, :], parts[..., :2, :], parts[..., 3, :])
    steps = list(zip(*(x.unbind(0) for x in walk)))
    for t in range(len(steps) - 1, -1, -1):
        dy_t, to_cn_t, to_o_t, c_local_t, n_local_t, keep_t, da_t, da_ifz, da_if, da_o = steps[t]
        if given[t]:
            carry += d_aux[:2, t]
        torch.baddbmm(dy_t, handed, R, out=dh)
        torch.addcmul(carry, dh, to_cn_t, out=d_cn)
        torch.mul(dc_gates, c_local_t, out=da_ifz)
        da_if.addcmul_(dn_gates, n_local_t)
        torch.mul(dh, to_o_t, out=da_o)
        handed, carry = resets.start(t, da_t, torch.mul(d_cn, keep_t, out=carry))
    return da, da, torch.cat([(handed @ R)[None], carry, torch.zeros_like(carry[:1])])


BACKWARD = {"elman": _elman_back, "lstm": _lstm_back, "gru": _gru_back, "slstm": _slstm_back}
KEPT = {"elman": 0, "lstm": 4, "gru": 4, "slstm": 4}
"""How many vectors [D] a token each cell keeps for its backward pass, beside its states."""

SCHEMA = "(str kind, Tensor wx, Tensor R, Tensor initial, Tensor inner, Tensor? reset, bool keep) -> (Tensor, Tensor)"
BACK_SCHEMA = (
    "(str kind, Tensor dy, Tensor d_aux, Tensor states, Tensor kept, Tensor R, Tensor initial, Tensor? reset)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("remanence::cell", mutates_args=(), schema=SCHEMA)
def run(kind: str, wx: Tensor, R: Tensor, initial: Tensor, inner: Tensor, reset: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """All states [S, T, H, B, D], and what the backward pass needs. An operator of its own, so that torch.compile keeps it whole.

    wx [T, H, B, G D]; R [H, D, G D]; initial [S, H, B, D]; inner [H, D], used by the gru; reset [B, T].
    """
    (length, heads, batch, _), size = wx.shape, R.shape[1]
    out = wx.new_empty(len(initial), length, heads, batch, size)
    kept = wx.new_empty(length, heads, batch, KEPT[kind] * size if keep else 0)
    FORWARD[kind](wx, R, initial, inner, Resets(reset, length), out, list(kept.unbind(0)) if kept.numel() else [])
    return out, kept


@run.register_fake
def _(kind: str, wx: Tensor, R: Tensor, initial: Tensor, inner: Tensor, reset: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    out = wx.new_empty(len(initial), *wx.shape[:3], R.shape[1])
    return out, wx.new_empty(*wx.shape[:3], KEPT[kind] * R.shape[1] if keep else 0)


@torch.library.custom_op("remanence::cell_backward", mutates_args=(), schema=BACK_SCHEMA)
def run_back(
    kind: str, dy: Tensor, d_aux: Tensor, states: Tensor, kept: Tensor, R: Tensor, initial: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of wx, R, initial and inner."""
    resets = Resets(reset, dy.shape[0])
    da, d_wx, d_initial = BACKWARD[kind](dy, d_aux, states, kept, R.transpose(1, 2).contiguous(), initial, resets)
    before = resets.before(states[0], initial[0]).transpose(0, 1).flatten(1, 2)  # [H, T B, D]
    d_R = before.transpose(1, 2) @ da.transpose(0, 1).flatten(1, 2)
    d_inner = da[..., -R.shape[1] :].sum((0, 2))
    return d_wx, d_R, d_initial, d_inner


@run_back.register_fake
def _(
    kind: str, dy: Tensor, d_aux: Tensor, states: Tensor, kept: Tensor, R: Tensor, initial: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dy.new_empty(*dy.shape[:3], R.shape[2]), torch.empty_like(R), torch.empty_like(initial), dy.new_empty(R.shape[0], R.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.kind, _, R, initial, _, reset, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(R, initial, reset, *output)


def _backward(ctx: Any, d_states: Tensor, d_kept: Tensor) -> tuple[Tensor | None, ...]:
    R, initial, reset, states, kept = ctx.saved_tensors
    grads = run_back(ctx.kind, d_states[0].contiguous(), d_states[1:], states, kept, R, initial, reset)
    return None, *grads, None, None


run.register_autograd(_backward, setup_context=_save)


def loop(
    kind: str,
    wx: Tensor,
    R: Tensor,
    initial: States,
    inner: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, States]:
    """As `naive`, any T; first-order gradients only. lengths [B]: each row's real tokens, which come first, or None (all)."""
    heads, size = R.shape[:2]
    begin = list(initial)
    if kind == "slstm":
        begin[3] = torch.where(initial[2] == 0, -torch.inf, initial[3])
    start = torch.stack(begin).transpose(1, 2)  # [S, H, B, D]
    inner = wx.new_zeros(heads, size) if inner is None else inner
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (wx, R, start, inner))
    flat = wx.permute(1, 2, 0, 3, 4).flatten(3).contiguous()  # [T, H, B, G D]
    states, _ = run(kind, flat, R.flatten(2).contiguous(), start.contiguous(), inner, reset, keep)
    y = states[0].permute(2, 0, 1, 3)  # [B, T, H, D]
    if lengths is None:
        return y, tuple(states[:, -1].transpose(1, 2).unbind(0))
    row = torch.arange(len(lengths), device=wx.device)
    last = states[:, (lengths - 1).clamp(min=0), :, row].unbind(1)  # indexed dimensions come first: [B, S, H, D]
    final = tuple(torch.where(lengths[:, None, None] == 0, old, new) for old, new in zip(initial, last, strict=True))
    real = torch.arange(wx.shape[1], device=wx.device) < lengths[:, None]
    return y.masked_fill(~real[..., None, None], 0), final
