"""Gradient-based activation recoding: at every token the state takes a step down an error signal, at test time too (arXiv 2101.00674)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, unknown
from ..models import Model, Output
from ..state import State

SIGNALS = ("surprisal", "entropy")
STATES = ("after", "before")


class RecodingState(State):
    seen: Tensor  # [B] int64, tokens read
    before: State | None  # the model's state before the last token: the token is read again, to be recoded when the next one comes
    last: Tensor  # [B] int64, the last token


@system(
    "recoding",
    kind="training",
    paper="arXiv:2101.00674",
    year=2021,
    name="Gradient-based activation recoding",
    parity="alpha=0 is the model itself",
    claim="Recoding changes the perplexity of an LSTM language model a little, mostly for the better.",
)
class Recoding(nn.Module):
    """A model whose recurrent state is recoded when it has been read from and the next token w comes, before w is read:

        h_t <- h_t - alpha grad_{h_t} d_t        d_t = -log p_t(w)  (signal="surprisal"),  or the entropy of p_t  ("entropy")

    Surprisal is that of a token which is already known, so nothing is leaked (the paper's weakly supervised signal; its Monte-Carlo
    dropout and ensemble signals, its learned step-size network, and its decoding of p_t again after the step, which at test time would
    need the token to be predicted, are not here). h_t is every floating-point tensor of the model's new state from which its output was
    computed in reading one token (for a `flashrnn` y and c of all layers); the others stay. of="before", ours, is for models that compute
    an output otherwise (a delta rule's): the state before the token takes the step, and the token is read again. The step is a constant
    to training, as in the released code; learn=True makes alpha a parameter. In training mode gradients flow through the states;
    otherwise each is cut.
    """

    def __init__(self, model: Model, alpha: float = 0.1, signal: str = "surprisal", of: str = "after", learn: bool = False):
        super().__init__()
        for name, value, known in (("signal", signal, SIGNALS), ("of", of, STATES)):
            if value not in known:
                raise unknown(name, value, known)
        self.model, self.signal, self.of = model, signal, of
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if learn else alpha

    def forward(self, ids: Tensor, state: RecodingState | None = None) -> Output:
        """ids [B, T] int64, unpadded -> logits, hidden and a RecodingState. Token by token, with gradients even under torch.no_grad."""
        if ids.ndim != 2 or ids.numel() == 0:
            raise ShapeError(f"ids have shape {list(ids.shape)}; expected [B, T] with T >= 1.")
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise UsageError("no parameter of the model requires gradients; recoding needs the gradient of its output.")
        training = self.training and torch.is_grad_enabled()
        out, before, last, seen = None, None, ids[:, 0], torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        if state is not None:
            before, last, seen = state.before, state.last, state.seen
            out = self._read(last, before)
        logits, hidden = [], []
        for token in ids.unbind(1):
            if out is not None:
                before = self._recode(out, token) if self.of == "after" else self._recode_before(last, before, token)
                before = before if training else before.detach()
            out, last = self._read(token, before), token
            assert out.logits is not None
            logits.append(out.logits if training else out.logits.detach())
            hidden.append(out.hidden if training else out.hidden.detach())
        new = RecodingState(seen=seen + ids.shape[1], before=before, last=ids[:, -1])
        return Output(torch.cat(logits, 1), new, torch.cat(hidden, 1))

    def _read(self, token: Tensor, state: State | None) -> Output:
        with torch.enable_grad():
            return self.model(token[:, None], state)

    def _recode(self, out: Output, token: Tensor) -> State:
        """The state after a token, stepped down the error signal when `token` comes. Raises UsageError if nothing in it can step."""
        return self._step(out.state, out, token, "the model's output is not computed from the state that it returns; use of='before'.")

    def _recode_before(self, last: Tensor, before: State | None, token: Tensor) -> State:
        """The state after reading `last` from `before`, when that has stepped down the error signal; a fresh start has nothing to step."""
        if before is None:
            return self._read(last, None).state
        before = before.map(lambda t: t.detach().requires_grad_() if t.is_floating_point() and not t.requires_grad else t)
        stepped = self._step(before, self._read(last, before), token, "the model's output does not depend on its state.")
        return self._read(last, stepped).state

    def _step(self, state: State, out: Output, token: Tensor, otherwise: str) -> State:
        """`state`, each tensor that the error signal of `out` depends on stepped down its gradient."""
        assert out.logits is not None
        with torch.enable_grad():
            log_p = out.logits[:, 0].log_softmax(-1)  # [B, V]
            signal = F.nll_loss(log_p, token, reduction="sum") if self.signal == "surprisal" else -(log_p.exp() * log_p).sum()
        able = [tensor for tensor in state.tensors() if tensor.requires_grad]
        grads = torch.autograd.grad(signal, able, retain_graph=True, allow_unused=True) if able else ()
        if all(grad is None for grad in grads):
            raise UsageError(otherwise)
        steps = {id(tensor): grad for tensor, grad in zip(able, grads, strict=True) if grad is not None}
        return state.map(lambda tensor: tensor - self.alpha * steps[id(tensor)] if id(tensor) in steps else tensor)
