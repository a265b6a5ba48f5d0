"""ProSG: what a recurrent model knows after a prompt becomes a low-rank change of its weights, for that row alone (arXiv 2311.01981)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, positive, unknown
from ..mixers.parts import l2_normalize
from ..models.base import Model
from ..models.decoder import Decoder
from ..ops.backend import accumulate_dtype
from ..span import Span, advance
from ..state import State


class ProSGState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    base: State  # the decoder's
    factors: tuple  # of each target matrix W [out, in], in order: a [B, r, in] and b [B, r, out]; zero until a prompt is absorbed


def features(state: State) -> Tensor:
    """Every number of a layer's state but its counts, [B, F]: sign(x) log(1 + |x|), because sums and logs of sums differ in scale."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in state.tensors() if x.is_floating_point() or x.is_complex()]
    flat = torch.cat([part.flatten(1).to(accumulate_dtype(part)) for part in parts], 1)
    return flat.sign() * flat.abs().log1p()


class Mapper(nn.Module):
    """features [B, F] of a layer's state -> a [B, r, in], rows of norm 1, and b [B, r, out], at first zero, for each of its targets."""

    def __init__(self, size: int, hidden: int, rank: int, shapes: Sequence[tuple[int, int]]):
        super().__init__()
        self.sizes = [(rank, width) for out, inner in shapes for width in (inner, out)]
        self.inner = nn.Linear(size, hidden)
        self.outer = nn.ModuleList(nn.Linear(hidden, rank * width) for rank, width in self.sizes)
        for linear in list(self.outer)[1::2]:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.tanh(self.inner(x.to(self.inner.weight.dtype)))
        made = [linear(h).unflatten(1, size) for linear, size in zip(self.outer, self.sizes)]
        return [factor if index % 2 else l2_normalize(factor) for index, factor in enumerate(made)]


@system(
    "prosg",
    kind="parametric-memory",
    paper="arXiv:2311.01981",
    year=2023,
    name="ProSG (prompt synthetic gradients)",
    state="the decoder's, and r (in + out) a target matrix",
    parity="eta=0 is the decoder; each row is the decoder with that row's W + eta b a^T",
    claim="A field of the prompt is recalled after filler that has pushed it out of the state.",
)
class ProSG(Model):
    """ids [B, T] -> logits, as the decoder; after a prompt, with its target matrices changed row by row:

        state = prosg(prompt, logits="none").state; state = prosg.absorb(state); out = prosg(ids, state)
        (a_l, b_l) = net_l(features of layer l's state)        y = (W + eta b_l^T a_l) x = W x + eta b_l^T (a_l x)

    Written from the abstract: the nets, which matrices, and the norms are our reading. A net is one hidden layer of `hidden` tanh units
    over a layer's state; it makes rank r factors for every target in its layer, a with rows of norm 1 and b zero at the start of training.
    Absorbing again (after more tokens, which are read with the old factors) replaces the factors; a reset clears them. The state is
    bounded. backbone: a Decoder of mixers whose states do not grow. targets: ends of the names of Linear layers in a block, such as
    "ffn.up" or "mixer.out". train_base: else only the nets are trained, and the backbone's parameters are frozen in place.
    """

    kind = "prosg"
    backbone: Decoder

    def __init__(
        self,
        backbone: Model,
        rank: int = 2,
        eta: float = 0.1,
        hidden: int = 64,
        targets: Sequence[str] = ("ffn.up", "ffn.down"),
        train_base: bool = False,
    ):
        super().__init__()
        if not isinstance(backbone, Decoder):
            raise UsageError(f"backbone is a {type(backbone).__name__}; prosg changes the matrices of a Decoder.")
        positive(rank=rank, hidden=hidden)
        self.backbone, self.eta = backbone, eta
        self.vocab, self.dim = backbone.vocab, backbone.dim
        self.config = {"rank": rank, "eta": eta, "hidden": hidden, "targets": list(targets), "train_base": train_base}
        self.config["backbone"] = {"kind": backbone.kind, "config": backbone.config}
        ids = torch.zeros(1, 2, dtype=torch.long, device=backbone.device)
        with torch.no_grad():
            one, two = backbone(ids[:, :1], logits="none").state, backbone(ids, logits="none").state
        self.mappers = nn.ModuleList()
        for index, block in enumerate(backbone.blocks):
            size = features(one.layers[index]).shape[1]
            if features(two.layers[index]).shape[1] != size:
                raise UsageError(f"layer {index + 1}'s state grows with the tokens read; prosg needs states of one size.")
            shapes = [(linear.out_features, linear.in_features) for linear in self._targets(block)]
            self.mappers.append(Mapper(size, hidden, rank, shapes))
        if not any(mapper.sizes for mapper in self.mappers):  # type: ignore[union-attr]
            known = [name for name, module in backbone.blocks[0].named_modules() if isinstance(module, nn.Linear)]
            raise unknown("target of prosg", ", ".join(targets), known)
        self.mappers.to(backbone.embedding.weight)
        backbone.requires_grad_(train_base)

    @classmethod
    def build(cls, config: dict[str, Any]) -> ProSG:
        own = dict(config)
        inner = own.pop("backbone")
        return cls(Model._kinds[inner["kind"]].build(inner["config"]), **own)

    def _targets(self, block: nn.Module) -> list[nn.Linear]:
        ends = self.config["targets"]
        named = [(f".{name}", module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        return [module for name, module in named if any(name.endswith(f".{end}") for end in ends)]

    def embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids)

    def head(self, hidden: Tensor) -> Tensor:
        return self.backbone.head(hidden)

    def absorb(self, state: State) -> ProSGState:
        """The state with the factors that its own recurrent part makes; rows that have read nothing keep none."""
        if not isinstance(state, ProSGState) or state.header != self.header:
            raise UsageError("absorb needs a state that this prosg returned; read the prompt first.")
        layers = zip(self.mappers, state.base.layers, strict=True)  # type: ignore[attr-defined]
        made = [factor for mapper, layer in layers for factor in mapper(features(layer))]
        some = (state.seen > 0)[:, None, None]
        return state.replace(factors=tuple(torch.where(some, factor, torch.zeros_like(factor)) for factor in made))

    def encode(self, h: Tensor, state: ProSGState | None = None, span: Span | None = None) -> tuple[Tensor, ProSGState]:
        if state is None:
            zero = [h.new_zeros(len(h), *size) for mapper in self.mappers for size in mapper.sizes]  # type: ignore[union-attr]
            base, factors = None, tuple(zero)
            seen = torch.zeros(len(h), dtype=torch.long, device=h.device)
        else:
            base, factors, seen = state.base, state.factors, state.seen
        alive = None
        if span is not None and span.reset is not None:  # after a reset a row is that of a fresh start
            alive = (span.reset.cumsum(1) == 0)[..., None]  # [B, T, 1]
        if state is None or self.eta == 0:
            hidden, base = self.backbone.encode(h, base, span)  # type: ignore[arg-type]
        else:
            with self._changed(factors, alive):
                hidden, base = self.backbone.encode(h, base, span)  # type: ignore[arg-type]
        if alive is not None:
            factors = tuple(factor * alive[:, -1:].to(factor.dtype) for factor in factors)
        return hidden, ProSGState(seen=advance(seen, h.shape[1], span), base=base, factors=factors)

    @contextmanager
    def _changed(self, factors: tuple[Tensor, ...], alive: Tensor | None) -> Iterator[None]:
        """Within the block every target adds eta b^T (a x) to what it gives, row by row."""
        linears = [linear for block in self.backbone.blocks for linear in self._targets(block)]

        def change(linear: nn.Linear, a: Tensor, b: Tensor) -> Any:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
                (x,) = inputs
                if x.ndim != 3 or len(x) != len(a):
                    raise ShapeError(f"a target of prosg reads {list(x.shape)}; it must read [B, T, {linear.in_features}].")
                new = self.eta * ((x @ a.mT.to(x.dtype)) @ b.to(x.dtype))
                return y + (new if alive is None else new * alive.to(new.dtype))

            return linear.register_forward_hook(hook)

        hooks = [change(linear, a, b) for linear, a, b in zip(linears, factors[::2], factors[1::2], strict=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def prompt_loss(model: ProSG, piece: Any, state: State | None) -> tuple[Tensor | None, State, dict[str, Tensor]]:
    """A loss for the training loop: a batch is [prompt, answer], two pieces of which the first has no targets and is absorbed.

    The answer's piece starts with the prompt's last token, so that every token of the answer is predicted by the changed weights.
    """
    count = piece.count
    out = model(piece.ids, state, piece.span, targets=piece.targets if count else None, logits="none")
    if out.loss is None:
        return None, model.absorb(out.state), {}
    return out.loss * count, out.state, {}
