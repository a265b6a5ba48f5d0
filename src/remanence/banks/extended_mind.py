"""Extended Mind: every token attends to the memories that fit it best beside its window, in one softmax, untrained (arXiv 2406.02332)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..mixers.attention import rotate
from ..mixers.parts import l2_normalize
from ..models.decoder import Decoder, ModelConfig, parse_layers
from ..ops.backend import accumulate_dtype
from ..state import State
from .log import LogMixer, LogState, Round, choose, columns, distances, fetch, joint


class ExtendedMindCarry(State):
    start: Tensor  # [B] int64, where the current text starts: everything before it in the document is a memory


@system(
    "extended-mind",
    kind="external-memory",
    paper="arXiv:2406.02332",
    year=2024,
    name="Extended Mind Transformer",
    example={"window": 12, "top": 8, "kv_heads": 2},
    state="2 T G D",
    parity="the equations in a loop; attention with memory keys at position 0 when all are chosen; attention in the window",
    claim="Answers about a document that only the memory holds are better than without; retrieval in all layers beats one.",
)
class ExtendedMind(LogMixer):
    """x [B, T, dim] -> y [B, T, dim]; one softmax over the last `window` tokens and the `top` memories chosen for a token and head.

        memories: every token of the document before the window, and before the last `remember`
        chosen: by cosine(R_p q_i, k_j), keys not rotated, above `threshold`        p = min(tokens of the text, window)
        logits = (R_p q_i) . k_j / sqrt(D) of memories | (R_i q_i) . (R_j k_j) / sqrt(D) of the window

    R: rotary positions. The weights are those of `Attention` under the same names: `extend` makes the model of a trained one, which needs
    no training. The paper reads documents beforehand; here reading on makes memories, and `remember(state)` makes one of all that was
    read. Our reading: p stops at the window, so that a stream has no last position. heads: H. kv_heads: G. The state grows.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 512,
        top: int = 10,
        threshold: float | None = None,
        theta: float = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        if head_dim is None:
            divides("heads", heads, "dim", dim)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim or dim // heads
        divides("kv_heads", self.kv_heads, "heads", heads)
        divides("2 (rotated pairs)", 2, "head_dim", self.head_dim)
        if threshold is not None and not -1 <= threshold <= 1:
            raise UsageError(f"threshold is {threshold!r}; it must be a cosine, -1 to 1, or None.")
        self.window, self.top, self.threshold, self.theta = window, top, threshold, theta
        self.to_qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=bias)

    def fresh(self, x: Tensor) -> ExtendedMindCarry:
        return ExtendedMindCarry(start=torch.zeros(len(x), dtype=torch.long, device=x.device))

    def project(self, x: Tensor, at: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        q, k, v = self.to_qkv(x).unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], 2)
        return (q,), (k, v)

    def advance(
        self, queries: tuple[Tensor, ...], logs: tuple[Tensor, ...], at: Tensor, first: Tensor, carry: Any, r: Round
    ) -> tuple[Tensor, Any]:
        start = torch.where(torch.as_tensor(r.fresh, device=at.device), 0, carry.start)
        queries = (*queries, start[:, None].expand_as(at))
        return super().advance(queries, logs, at, first, carry, r)[0], ExtendedMindCarry(start=start)

    def attend(self, queries: tuple[Tensor, ...], logs: tuple[Tensor, ...], at: Tensor, first: Tensor) -> Tensor:
        (q, start), (keys, values), dtype = queries, logs, accumulate_dtype(queries[0])
        repeat, scale = self.heads // self.kv_heads, self.head_dim**-0.5
        near = columns(at, first, 0, self.window - 1)
        distance = distances(at, first, near)  # [B, n, N]
        place = first[:, None] + torch.arange(near.start, near.stop, device=at.device)
        k, v = rotate(keys[:, near], place, self.theta, self.head_dim), values[:, near].repeat_interleave(repeat, 2)
        score = torch.einsum("bnhd,bjhd->bnhj", rotate(q, at, self.theta, self.head_dim), k.repeat_interleave(repeat, 2)) * scale
        here = (distance >= 0) & (distance < self.window) & (place[:, None] >= start[..., None])
        parts = [(score, here[:, :, None])]

        far = slice(0, max(0, int((torch.maximum(start - 1, at - self.window) - first[:, None]).max()) + 1))
        if far.stop == 0:
            (weight,) = joint(parts, dtype)
            return torch.einsum("bnhj,bjhd->bnhd", weight.to(v.dtype), v)
        distance = distances(at, first, far)
        can = (distance >= self.window) | ((at[..., None] - distance) < start[..., None])
        can = can & (distance >= 0)
        q = rotate(q, torch.minimum(at - start, start.new_tensor(self.window)), self.theta, self.head_dim)
        grouped = l2_normalize(q.detach().to(dtype)).unflatten(2, (self.kv_heads, repeat))
        fit = torch.einsum("bngrd,bjgd->bgrnj", grouped, l2_normalize(keys[:, far].detach().to(dtype))).flatten(1, 2)  # [B, H, n, N]
        can = can[:, None] if self.threshold is None else can[:, None] & (fit > self.threshold)
        index, found = choose(fit, can, self.top)
        parts.append(((q[..., None, :] * fetch(keys, index)).sum(-1) * scale, found))
        weight, recalled = joint(parts, dtype)
        return torch.einsum("bnhj,bjhd->bnhd", weight.to(v.dtype), v) + (recalled.to(v.dtype)[..., None] * fetch(values, index)).sum(3)


def remember(state: State) -> State:
    """The state in which all that was read is memory, and a text starts: of an ExtendedMind, or of a Decoder with such layers."""
    if isinstance(state, LogState) and isinstance(state.carry, ExtendedMindCarry):
        return state.replace(carry=ExtendedMindCarry(start=state.seen))
    if "layers" in state.fields:
        return state.replace(layers=tuple(remember(layer) for layer in state.layers))  # type: ignore[attr-defined]
    return state


def extend(model: Decoder, window: int, top: int = 10, threshold: float | None = None, layers: tuple[int, ...] | None = None) -> Decoder:
    """A copy of a Decoder whose attention layers (all, or the numbers given, from 1) are ExtendedMind ones with its weights."""
    config = dict(model.config)
    specs = parse_layers(config["layers"]) * config["repeat"]
    for number, spec in enumerate(specs, start=1):
        if spec["mixer"] == "attention" and (layers is None or number in layers):
            mixer = model.blocks[number - 1].mixer
            if mixer.window is not None or mixer.rope_dims != mixer.head_dim:  # type: ignore[union-attr]
                raise UsageError(f"layer {number} has a window or keys that are rotated in part; extend takes attention with neither.")
            spec.pop("rope", None)
            spec.update(mixer="extended-mind", window=window, top=top, threshold=threshold)
    if not any(spec["mixer"] == "extended-mind" for spec in specs):
        raise UsageError(f"none of the layers {'named ' if layers else ''}is attention; extend changes those.")
    new = Decoder(ModelConfig(**(config | {"layers": specs, "repeat": 1})))
    new.load_state_dict(model.state_dict())
    return new.to(next(model.parameters())).train(model.training)
