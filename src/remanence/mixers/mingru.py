"""minGRU: a GRU whose gate reads the input only, so that all of its steps are one linear scan (arXiv 2410.01201)."""

from __future__ import annotations

from typing import ClassVar

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

FORMS = ("log", "vanilla")


class MinGRUState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    hidden: Tensor  # [B, E] float32


def g(x: Tensor) -> Tensor:
    """x + 1/2 where x >= 0, sigmoid(x) below: the candidate's activation in the paper's log-space form, always positive."""
    return x.relu() + x.clamp(max=0).sigmoid()


def inner_size(dim: int, expansion: float, form: str) -> int:
    """E = int(dim * expansion). Raises UsageError on an expansion or a form that makes no sense."""
    if form not in FORMS:
        raise UsageError(f"form is {form!r}; it may be {' or '.join(map(repr, FORMS))}.")
    if not dim * expansion >= 1:
        raise UsageError(f"expansion is {expansion}; dim={dim} times it must be at least 1.")
    return int(dim * expansion)


class MinRNN(Mixer):
    """What minGRU and minLSTM share: one projection to the candidate and its gates, one linear scan, one projection back."""

    gates: ClassVar[int]
    """Gates beside the candidate."""

    def __init__(self, dim: int, expansion: float = 1.5, form: str = "log", backend: str = "auto"):
        super().__init__()
        inner = inner_size(dim, expansion, form)
        self.form, self.backend = form, backend
        self.to_hidden_gates = nn.Linear(dim, (1 + self.gates) * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False) if inner != dim else nn.Identity()

    def weights(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        """(log of what is kept, what is taken in), [B, T, E] each, from the gates' pre-activations."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: MinGRUState | None = None, span: Span | None = None) -> tuple[Tensor, MinGRUState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        u, *gates = self.to_hidden_gates(x).to(accumulate_dtype(x)).chunk(1 + self.gates, -1)  # [B, T, E]
        log_keep, take = self.weights(*gates)
        candidate = g(u) if self.form == "log" else u
        h, hidden = scan(log_keep, take * candidate, state and state.hidden, span, self.backend)
        return self.out(h.to(x.dtype)), MinGRUState(seen=advance(seen, x.shape[1], span), hidden=hidden)


@system(
    "mingru", kind="mixer", paper="arXiv:2410.01201", year=2024, name="minGRU", aliases=("mingru-minlstm",),
    state="E", parity="minGRU-pytorch minGRU", claim="Three layers solve selective copying, one does not.",
)  # fmt: skip
class MinGRU(MinRNN):
    """x [B, T, dim] -> y [B, T, dim]; the state is one vector of E = int(dim * expansion) numbers.

        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t)        z = sigmoid(W_z x)        y = W_o h, or h where expansion is 1

    form="log": g(u) = u + 1/2 where u >= 0, else sigmoid(u), so that h > 0; the paper's default. form="vanilla": g(u) = u. The paper's
    block puts a short convolution of its own before this one. Its log-space scan (log h by logcumsumexp) is not needed: with
    log(1 - z) = logsigmoid(-W_z x) the recurrence is linear and is run as such, which loses no digits and bears an h of either sign.
    """

    gates = 1

    def weights(self, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.logsigmoid(-k), k.sigmoid()
