"""HGRN: gated linear recurrence whose forget gates have lower bounds that grow with depth (arXiv 2311.04823)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import RMSNorm, no_decay


class HGRNState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, D] float32; [B, D, 2], real and imaginary parts, if complex


class LowerBound(nn.Module):
    """The bound under the forget gates of layer l of L, from Gamma [L, D]: with P = softmax over layers, P_2 + ... + P_l.

    It is 0 in the first layer, which therefore has no Gamma, and grows with depth. Every mixer owns a Gamma, so that it can stand alone;
    `tie_lower_bounds` makes those of a model one parameter, as published. A saved model holds a copy for every layer all the same.
    """

    def __init__(self, dim: int, layer: int, layers: int):
        super().__init__()
        if layer > layers:
            raise UsageError(f"layer={layer} of layers={layers}; layers are counted from 1.")
        self.layer = layer
        self.Gamma = no_decay(nn.Parameter(torch.zeros(layers, dim))) if layer > 1 else None
        self.register_state_dict_post_hook(_own_copy)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """log(gamma + (1 - gamma) sigmoid(f)) and one minus its exponential, each without cancellation. f [B, T, D]."""
        if self.Gamma is None:
            return F.logsigmoid(f), torch.sigmoid(-f)
        P = self.Gamma.to(f.dtype).softmax(0)
        rest = P[self.layer :].sum(0) + P[0]  # 1 - gamma
        write = rest * torch.sigmoid(-f)
        shut = torch.logaddexp(P[1 : self.layer].sum(0).log(), rest.log() + F.logsigmoid(f))
        # for an open gate that would be a small difference of large terms, and might come out above 0
        return torch.where(write < 0.5, torch.log1p(-write.clamp(max=0.5)), shut), write


def _own_copy(module: nn.Module, tensors: dict[str, Any], prefix: str, _: Any) -> None:
    """A tied Gamma is saved under the name of each layer: one that is loaded need not know of the tie."""
    if (name := f"{prefix}Gamma") in tensors:
        tensors[name] = tensors[name].view_as(tensors[name])


def tie_lower_bounds(model: nn.Module) -> nn.Parameter:
    """Let all HGRN and HGRN2 layers of a model share one Gamma (that of the lowest which has one), and return it.

    Call it before an optimiser is made, and again on a model that was loaded. Raises UsageError if there is none or shapes differ.
    """
    bounds = [module for module in model.modules() if isinstance(module, LowerBound) and module.Gamma is not None]
    shapes = {tuple(bound.Gamma.shape) for bound in bounds if bound.Gamma is not None}
    if len(shapes) != 1:
        raise UsageError(f"lower bounds have shapes {sorted(shapes)}; tying needs HGRN layers above the first, of one width.")
    shared = bounds[0].Gamma
    assert shared is not None
    for bound in bounds:
        bound.Gamma = shared
    return shared


@system(
    "hgrn",
    kind="mixer",
    paper="arXiv:2311.04823",
    year=2023,
    name="HGRN",
    aliases=("hgrn-hgrn2",),
    example={"layer": 2, "layers": 3},
    state="D, or 2 D if complex",
    parity="the per-token loop of fla's naive_recurrent_hgrn with fla's gates, derived anew",
    claim="Learned forget gates grow with depth; without lower bounds long-range tasks suffer.",
)
class HGRN(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of dim numbers, or of dim complex ones.

        h_t = f_t h_{t-1} + (1 - f_t) SiLU(W_i x_t)              f = gamma + (1 - gamma) sigmoid(W_f x)
        y = W_o (RMSNorm(h) * SiLU(W_g x))                       gamma: see LowerBound

    This is fla's real form. complex=True is the paper's: h_t = f_t e^(i theta) h_{t-1} + (1 - f_t) c_t with theta learned per channel (at
    first 10000^(-2 d / D)), Re c and Im c = SiLU(W_i x), and y = W_o (RMSNorm([Re h, Im h]) * SiLU(W_g x)). There the authors' norm is a
    LayerNorm and their gate of low rank; norm and gate are fla's here (our reading).
    layer, layers: its place in the model, which Decoder fills in; tie_lower_bounds then shares Gamma between layers.
    """

    def __init__(self, dim: int, complex: bool = False, layer: int = 1, layers: int = 1, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        inner = 2 * dim if complex else dim
        self.to_f = nn.Linear(dim, dim, bias=False)
        self.to_i = nn.Linear(dim, inner, bias=False)
        self.to_gate = nn.Linear(dim, inner, bias=False)
        self.bound = LowerBound(dim, layer, layers)
        self.theta = no_decay(nn.Parameter(10000 ** (-2 / dim * torch.arange(dim)))) if complex else None
        self.norm = RMSNorm(inner)
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, state: HGRNState | None = None, span: Span | None = None) -> tuple[Tensor, HGRNState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        full = accumulate_dtype(x)
        log_f, write = self.bound(self.to_f(x).to(full))  # [B, T, D]
        c = F.silu(self.to_i(x).to(full))
        if self.theta is None:
            h, hidden = scan(log_f, write * c, state and state.hidden, span, self.backend)
        else:
            re, im = c.chunk(2, -1)
            start = torch.view_as_complex(state.hidden.contiguous()) if state else None
            turn = torch.complex(log_f, self.theta.to(full).expand_as(log_f))
            h, last = scan(turn, torch.complex(write * re, write * im), start, span, self.backend)
            h, hidden = torch.cat([h.real, h.imag], -1), torch.view_as_real(last)
        y = self.out(self.norm(h.to(x.dtype)) * F.silu(self.to_gate(x)))
        return y, HGRNState(seen=advance(seen, x.shape[1], span), hidden=hidden)
