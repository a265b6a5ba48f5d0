"""What a delta-rule memory attended to: how much of an answer's read came from each token that was ever written.

Unrolling S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, the read o = S_T^T q is a sum over the tokens written,

    o = sum_j a_j v_j        a_j = b_j k_j . u_j        u_T = q,  u_{j-1} = u_j - a_j k_j

which is an attention over the whole past, exactly. Only tokens with b_j > 0 have a share, so with a write gate that can be shut the
ledger of (position, b, k, v) stays short however long the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UsageError, positive
from ..mixers.gated_deltanet import GatedDeltaNet
from ..models import Model
from ..state import State


@dataclass(frozen=True)
class Share:
    """One token's part in a read: `weight` is |a_j| |v_j| over heads and layers, as a fraction of that of all tokens."""

    position: int
    weight: float


@dataclass(frozen=True)
class _Write:
    position: int
    beta: Tensor  # [H]
    key: Tensor  # [H, K]
    value: Tensor  # [H, V]


class Recall:
    """Keeps the ledger of what one stream (batch 1) writes into a model's delta-rule memories while the context is open.

        with Recall(model) as recall:
            out = model(ids, state)                      # any number of calls, in order
            shares = recall.attended(question, out.state)

    Memories that forget (a decay) would need the decays too: only layers with forget=False count. limit: writes kept for each layer; older
    ones are let go, and `dropped` says how many. Raises UsageError if the model has no such layer.
    """

    def __init__(self, model: Model, limit: int = 1 << 16):
        positive(limit=limit)
        self.model = model
        self.mixers = [m for m in model.modules() if isinstance(m, GatedDeltaNet) and m.to_decay is None]
        if not self.mixers:
            raise UsageError("the model has no delta-rule memory without decay; recall needs gated-deltanet layers with forget=False.")
        self.ledgers: list[deque[_Write]] = [deque(maxlen=limit) for _ in self.mixers]
        self.dropped = 0
        self.reads: list[Tensor] = [torch.empty(0)] * len(self.mixers)  # q of the last token, [H, K]
        self._qkv: dict[int, Tensor] = {}
        self._seen = [0] * len(self.mixers)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for index, mixer in enumerate(self.mixers):
            self._handles.append(mixer.conv.register_forward_hook(self._on_conv(index)))
            self._handles.append(mixer.to_beta.register_forward_hook(self._on_beta(index, mixer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_conv(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if len(output[0]) != 1:
                raise UsageError(f"recall follows one stream; the call has {len(output[0])} rows.")
            self._qkv[index] = output[0].detach()[0]  # [T, ...]

        return keep

    def _on_beta(self, index: int, mixer: GatedDeltaNet) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            z = output.detach()[0]  # [T, H]
            beta = (z.clamp(0, 1) if mixer.write == "hard" else z.sigmoid()) * mixer.beta_scale
            q, k, v = mixer.split(self._qkv.pop(index))
            self.reads[index] = q[-1]
            ledger = self.ledgers[index]
            for t in (beta > 0).any(-1).nonzero()[:, 0].tolist():
                self.dropped += len(ledger) == ledger.maxlen
                ledger.append(_Write(self._seen[index] + t, beta[t], k[t], v[t].clone()))
            self._seen[index] += len(z)

        return keep

    @torch.no_grad()
    def attended(self, ids: Tensor, state: State | None) -> list[Share]:
        """Read ids [T] (a question) on a fork of `state` and say where the read of its last token came from, largest share first.

        Positions count the tokens read while the context was open; the question's own follow those of the stream. The ledger is afterwards
        what it was. May be called inside the context and outside.
        """
        kept, seen = [deque(ledger, ledger.maxlen) for ledger in self.ledgers], list(self._seen)
        try:
            with nullcontext() if self._handles else self:
                self.model(ids[None].to(self.model.device), state, logits="none")
            weights: dict[int, float] = {}
            for ledger, q in zip(self.ledgers, self.reads):
                u = q  # [H, K]
                for write in reversed(ledger):
                    a = write.beta * (write.key * u).sum(-1)  # [H]
                    u = u - a[:, None] * write.key
                    weights[write.position] = weights.get(write.position, 0.0) + float((a.abs() * write.value.norm(dim=-1)).sum())
        finally:
            self.ledgers, self._seen = kept, seen
        total = sum(weights.values()) or 1.0
        shares = [Share(position, weight / total) for position, weight in weights.items() if weight > 0]
        return sorted(shares, key=lambda share: -share.weight)
