"""Transformers, both ways: any of its causal language models as a Model, and any Model as one of its PreTrainedModels.

`transformers` is imported when something here is first used, never by `import remanence`.
"""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .models.base import Model
from .ops.softmax import DEAD, visible
from .span import Span, documents, positions
from .state import Growing, State

RAGGED = frozenset([
    "apertus", "arcee", "bamba", "bitnet", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "flex_olmo",
    "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite",
    "granitemoehybrid", "helium", "hunyuan_v1_dense", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "llama", "minimax_m2", "ministral",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma",
])  # fmt: skip
"""Model types whose attention takes any mask and any positions, so that rows may be of different length and documents packed."""

CHUNKED = frozenset([
    "bamba", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "mamba2", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next",
])  # fmt: skip
"""Model types whose recurrent layers go on from a state by many tokens at once; the others (mamba, jamba) by one token at a time."""

_LOCK = threading.RLock()  # a call puts its own `forward` in the place of the layers' for as long as it lasts


class CausalLMKeys(State):
    keys: Growing | Tensor  # [B, n, G, D]
    values: Growing | Tensor  # [B, n, G, D']


class CausalLMRecurrence(State):
    conv: tuple  # of each of the layer's states, [B, C, W] or None
    recurrent: tuple  # of each of the layer's states, [B, ...] or None


class CausalLMState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    at: tuple  # of each kind of attention layer, positions [B, n] int64 of its keys in their document, -1 for one that is not to be seen
    layers: tuple  # of each layer, CausalLMKeys, CausalLMRecurrence, or None where it keeps nothing


class CausalLM(Model):
    """A causal language model of `transformers` behind the Model interface: ids [B, T] -> logits, and its cache as a value.

    hf_model: a PreTrainedModel with a language-modelling head. The state holds each attention layer's keys and values (the last
    window - 1 of them where it has a window) and each recurrent layer's convolution and recurrent states. All laws hold, to the
    precision that transformers computes in (its Mamba layers: float32), except that these are refused with one sentence:

    - Rows of different length, padding and packed documents, where attention layers are of a model type not in `RAGGED` (bloom, mpt,
      llama4 ...: positions or masks are made inside from one length for all rows), or of an attention kernel that takes no mask.
    - A text longer than a table of learned positions (gpt2, opt); a segment memory stays within it.
    - Models that keep their state elsewhere than in the cache (rwkv, xlstm), layers that attend and recur at once (falcon_h1, zamba),
      rotary frequencies that change with the length (dynamic, longrope), encoder-decoders, models of several modalities, gradient
      checkpointing.

    Recurrent layers read rows and documents one after the other, and go on from a state token by token where the model type is not in
    `CHUNKED`: a prompt costs what transformers' own prefill does, later text more. Calls of one process take turns.
    """

    kind = "hf"

    def __init__(self, hf_model: Any):
        super().__init__()
        _check(hf_model)
        from transformers import DynamicCache

        self.hf = hf_model
        self.hf_config = config = hf_model.config
        self.model_type: str = config.model_type
        base, count = _decoder(hf_model), config.num_hidden_layers
        layers = (m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        self._parts = base, next(layers, nn.ModuleList())  # in a tuple, or their weights would have two names
        self.vocab, self.dim = config.vocab_size, hf_model.get_input_embeddings().embedding_dim
        origin = ("_name_or_path", "architectures", "transformers_version")  # where it came from, which is not what it is
        described = {key: value for key, value in config.to_dict().items() if key not in origin}
        self.config = _plain({"architecture": type(hf_model).__name__, "config": described | {"dtype": hf_model.dtype}})
        takes = inspect.signature(self.base.forward).parameters
        self._cache_name = next((name for name in ("past_key_values", "cache_params") if name in takes), "")
        self._takes_positions = "position_ids" in takes
        self._plan = [_layer_kind(layer, self._named) for layer in DynamicCache(config=config).layers]
        recurs = any(kind == "recurrence" for kind, _ in self._plan)
        if not self._cache_name or (self._cache_name == "cache_params" and not recurs):
            raise UsageError(f"{self._named} keeps its state in no cache of transformers; it cannot be held.")
        if len(self._plan) != len(self.blocks):
            raise UsageError(f"{self._named} has {len(self.blocks)} layers and caches for {len(self._plan)}; its state cannot be held.")
        self._windows = sorted({window for kind, window in self._plan if kind == "attention"}, key=lambda w: (w is not None, w))
        tables = [name for name, _ in (*self.base.named_modules(), *self.base.named_buffers())]
        learned = any(name.split(".")[-1] in ("wpe", "embed_positions", "position_embeddings") for name in tables)
        self._longest = config.max_position_embeddings if learned else None

    @classmethod
    def build(cls, config: dict[str, Any]) -> CausalLM:
        import transformers

        architecture = getattr(transformers, config["architecture"], None)
        if architecture is None:
            raise UsageError(f"transformers {transformers.__version__} has no {config['architecture']}; a newer version may.")
        hf_config = architecture.config_class.from_dict(config["config"])
        model = architecture(hf_config)
        return cls(model.to(hf_config.dtype) if hf_config.dtype else model)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> CausalLM:
        """What `transformers.AutoModelForCausalLM.from_pretrained(name, **options)` gives, wrapped, in eval mode."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(name, **options)).eval()  # type: ignore[return-value]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the wrapped model in the format of transformers; `save` writes that of this library."""
        self.hf.save_pretrained(folder)

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self._parts[0]

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, bottom up."""
        return self._parts[1]

    @property
    def _named(self) -> str:
        return f"{type(self.hf).__name__} ({self.model_type})"

    def embed(self, ids: Tensor) -> Tensor:
        return self.hf.get_input_embeddings()(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """By the wrapped model's own forward, so that scaled or capped logits are what they should be."""
        given = _Given(hidden if hidden.ndim == 3 else hidden[None])
        with _LOCK, _in_place_of(self.base, lambda *_, **__: given):
            logits = self.hf(inputs_embeds=given.last_hidden_state, use_cache=False, return_dict=True).logits
        return logits if hidden.ndim == 3 else logits[0]

    def encode(
        self,
        h: Tensor,
        state: CausalLMState | None = None,
        span: Span | None = None,
        before: Callable[[int, Tensor], Tensor] | None = None,
        after: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, CausalLMState]:
        """h [B, T, dim], right-padded -> (hidden after the last norm, state).

        before(l, h) and after(l, h), if given, may change what enters and what leaves layer l.
        """
        if self.training and getattr(self.base, "gradient_checkpointing", False):
            raise UsageError(f"{self._named} checkpoints its gradients, which drops the cache; turn that off first.")
        if span is not None and span.valid is None and span.reset is None:
            span = None
        batch, length, _ = h.shape
        seen = state.seen if state else torch.zeros(batch, dtype=torch.long, device=h.device)
        at, doc = positions(seen, length, span), documents(span)
        if self._longest is not None and int(at.max()) >= self._longest:
            raise UsageError(
                f"{self._named} has {self._longest} positions and was given token {int(at.max()) + 1} of a text; "
                "put a segment memory such as rmt around it, or start a new document."
            )
        k_at = at if span is None or span.valid is None else torch.where(span.valid, at, DEAD)
        past = [_tensor(held) for held in state.at] if state else [k_at[:, :0]] * len(self._windows)
        places = [torch.cat([held, k_at], 1) for held in past]  # [B, n + T] of each kind
        shortest = int(seen.min())
        ragged = doc is not None or any(held.shape[1] > shortest for held in past)  # some keys are not to be seen by every row
        masks = self._masks(h, at, doc, places) if ragged and self._windows else None
        groups = _groups(seen, length, span, fresh=state is None) if any(kind == "recurrence" for kind, _ in self._plan) else []
        cache = self._cache(state, int(seen.max()))
        recurrences: dict[int, CausalLMRecurrence] = {}

        def around(index: int, block: nn.Module) -> Callable[..., Any]:
            forward, (kind, window) = block.forward, self._plan[index]
            takes_mask = masks is not None and kind == "attention"
            signature = inspect.signature(forward) if takes_mask else None

            def call(*args: Any, **kwargs: Any) -> Any:
                x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                x = before(index, x) if before else x
                if kind == "recurrence":
                    held = state.layers[index] if state else None
                    out, recurrences[index] = self._recur(index, lambda part: forward(part, *args, **kwargs), x, cache, held, groups)
                elif signature is not None and masks is not None:
                    bound = signature.bind(x, *args, **kwargs)
                    bound.arguments["attention_mask"] = masks[window]
                    out = forward(*bound.args, **bound.kwargs)
                else:
                    out = forward(x, *args, **kwargs)
                if after is None:
                    return out
                return (after(index, out[0]), *out[1:]) if isinstance(out, tuple) else after(index, out)

            return call

        options = {self._cache_name: cache, "use_cache": True, "return_dict": True}
        if self._takes_positions:
            options["position_ids"] = at.clamp(min=0)  # a padded position with nothing before it has -1
        with _LOCK, ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(_in_place_of(block, around(index, block)))
            hidden = self.base(inputs_embeds=h, **options)[0]
        sorted_out = ragged or span is not None
        kept = [self._kept(window, where, at, doc, sorted_out) for window, where in zip(self._windows, places)]
        layers = tuple(
            recurrences.get(index) if kind != "attention" else self._keys(index, cache, places, kept)
            for index, (kind, _) in enumerate(self._plan)
        )
        held_at: list[Any] = [_keep(where, pick, window) for where, pick, window in zip(places, kept, self._windows)]
        for index, window in enumerate(self._windows):
            if window is None:
                held_at[index] = state.at[index].append(k_at) if state and kept[index] is None else Growing(held_at[index])
        return hidden, CausalLMState(seen=at[:, -1] + 1, at=tuple(held_at), layers=layers).stamp(*self.header)

    def _keys(self, index: int, cache: Any, places: list[Tensor], kept: list[Tensor | None]) -> CausalLMKeys:
        """What an attention layer's cache holds after the call, without what no later token may see."""
        held, window = cache.layers[index].held, self._plan[index][1]
        kind = self._windows.index(window)
        if held is None or _tensor(held[0]).shape[1] != places[kind].shape[1]:
            raise UsageError(f"{self._named} did not use the cache it was given; its state cannot be held.")
        if window is not None:
            keys, values = (_keep(item, kept[kind], window) for item in held)
        else:
            keys, values = held if kept[kind] is None else (Growing(_keep(item.tensor, kept[kind], None)) for item in held)
        return CausalLMKeys(keys=keys, values=values)

    def _cache(self, state: CausalLMState | None, seen: int) -> Any:
        """A cache of transformers that holds what `state` does and writes into nothing of it."""
        own, layers = _cache_layers(), []
        for index, (kind, extra) in enumerate(self._plan):
            held = state.layers[index] if state else None
            if kind == "attention":
                pair = None if held is None else (held.keys, held.values)
                layers.append(own.Full(pair) if extra is None else own.Window(extra, pair, seen))
            else:
                layers.append(own.Recurrence(extra, held) if kind == "recurrence" else own.Dummy())
        return own.cache(layers)

    def _masks(self, h: Tensor, at: Tensor, doc: Tensor | None, places: list[Tensor]) -> dict[int | None, Tensor]:
        """For each window, which key each query sees, as the attention kernel takes it: [B, 1, T, n + T]."""
        kernel = self.hf_config._attn_implementation
        if self.model_type not in RAGGED:
            raise UsageError(
                f"{self._named} cannot be masked from outside; rows must be of one length, without padding before later calls or resets."
            )
        if kernel not in ("sdpa", "eager"):
            raise UsageError(f"the attention of this {self._named} is {kernel!r}, which takes no mask; load it with 'sdpa' or 'eager'.")
        masks = {}
        for window, where in zip(self._windows, places):
            past = where.shape[1] - at.shape[1]
            k_doc = None if doc is None else F.pad(doc, (past, 0))
            seen = visible(at, where, doc, k_doc, window, 0)
            seen = (seen | ~seen.any(-1, keepdim=True))[:, None]  # a padded query sees anything rather than nothing: no NaN
            if kernel == "eager":
                seen = torch.zeros_like(seen, dtype=h.dtype).masked_fill(~seen, torch.finfo(h.dtype).min)
            masks[window] = seen
        return masks

    def _kept(self, window: int | None, where: Tensor, at: Tensor, doc: Tensor | None, sorted_out: bool) -> Tensor | None:
        """Index [B, n] of the keys that a later token may see, in their order; None where those are simply the last ones, or all."""
        if not sorted_out or (window is None and doc is None):
            return None
        alive = where >= 0
        if window is not None:
            alive = alive & (where > at[:, -1:] - window + 1)
        if doc is not None:
            alive = alive & (F.pad(doc, (where.shape[1] - at.shape[1], 0)) == doc[:, -1:])
        size = int(alive.sum(1).max())
        order = alive.to(torch.int8).argsort(dim=1, stable=True)[:, where.shape[1] - size :]
        return torch.where(alive.gather(1, order), order, DEAD)

    def _recur(
        self, index: int, forward: Callable[[Tensor], Any], x: Tensor, cache: Any, state: CausalLMRecurrence | None,
        groups: list[tuple[list[int] | None, tuple]],
    ) -> tuple[Any, CausalLMRecurrence]:  # fmt: skip
        """One recurrent layer over x [B, T, dim]: rows and documents apart, as its scan knows neither padding nor resets."""
        own, (_, number) = _cache_layers(), self._plan[index]
        outputs, states, length, rest = [], [], x.shape[1], None  # rest: what the layer gives beside its output
        for rows, cuts in groups:
            part = x if rows is None else x[rows]
            held = state if rows is None or state is None else state.rows(rows)
            ys = []
            for start, stop, fresh in cuts:
                step = max(stop - start, 1) if fresh or self.model_type in CHUNKED else 1
                for first in range(start, max(stop, start + 1), step):
                    cache.layers[index] = own.Recurrence(number, None if fresh else held)
                    y = forward(part[:, first : first + step])
                    y, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
                    ys.append(y)
                    new = cache.layers[index].value()
                    if stop > start:
                        held = new
                    elif held is None:  # a token was run for the shapes alone: a fresh start holds zeros
                        held = new.map(torch.zeros_like)
            y = torch.cat(ys, 1)
            outputs.append(F.pad(y, (0, 0, 0, length - y.shape[1])))
            states.append(held)
        y, held = outputs[0], states[0]
        if len(groups) > 1:
            back = torch.tensor([row for rows, _ in groups for row in rows or ()], device=x.device).argsort()
            joined = iter([torch.cat(parts)[back] for parts in zip(*(held.tensors() for held in states))])
            y, held = torch.cat(outputs)[back], held.map(lambda _: next(joined))
        return y if rest is None else (y, *rest), held


def _decoder(model: Any) -> Any:
    """What runs the layers: the module that a causal language model's forward calls between embedding and head."""
    decoder = model.get_decoder()
    return getattr(model, "model", model) if decoder is model else decoder


def _tensor(held: Growing | Tensor) -> Tensor:
    return held.tensor if isinstance(held, Growing) else held


def _plain(value: Any) -> Any:
    """As it is after a round trip through JSON."""
    return json.loads(json.dumps(value, default=lambda other: str(other).removeprefix("torch.")))


def _keep(x: Tensor, pick: Tensor | None, window: int | None) -> Tensor:
    """The entries of x [B, n, ...] that stay: those picked (DEAD: one that stays for its place only), else the last window - 1 or all."""
    if pick is not None:
        index = pick.clamp(min=0).reshape(*pick.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index) if x.ndim > 2 else torch.where(pick >= 0, x.gather(1, index), DEAD)
    return x if window is None else x[:, max(x.shape[1] - window + 1, 0) :].clone()


def _groups(seen: Tensor, length: int, span: Span | None, fresh: bool) -> list[tuple[list[int] | None, tuple]]:
    """(rows, pieces) for recurrent layers: rows that are cut alike, and of each piece (start, stop, whether it starts a document).

    Rows is None for all of them. A row that reads nothing has one piece, which stops where it starts.
    """
    if span is None:
        return [(None, ((0, length, fresh),))]
    ends = [length] * len(seen) if span.valid is None else span.valid.sum(1).tolist()
    resets = [[]] * len(seen) if span.reset is None else [row.nonzero()[:, 0].tolist() for row in span.reset]
    groups: dict[tuple, list[int]] = {}
    for row, (end, starts, read) in enumerate(zip(ends, resets, seen.tolist())):
        new = fresh or read == 0
        edges = sorted({0, *starts, end})
        pieces = [(a, b, a in starts or (a == 0 and new)) for a, b in zip(edges, edges[1:])]
        groups.setdefault(tuple(pieces or [(0, 0, new)]), []).append(row)
    return [(rows if len(groups) > 1 else None, pieces) for pieces, rows in groups.items()]


class _Given(SimpleNamespace):
    """What a base model would have returned, had it been run: its last hidden state, and None for anything else."""

    def __init__(self, hidden: Tensor):
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


@contextmanager
def _in_place_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """For as long as this lasts, `module` runs `forward`."""
    old = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if old is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = old


class _Slot(Tensor):
    """A recurrent state as transformers' layers see it: `copy_`, with which they write into it, keeps the new value beside the old."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def copy_(self, src: Tensor, non_blocking: bool = False) -> Tensor:
        self.written = src.to(self.dtype)
        return self.written

    @staticmethod
    def of(tensor: Tensor | None) -> _Slot | None:
        return None if tensor is None else tensor.clone().as_subclass(_Slot)  # cloned: a kernel writes past `copy_`

    @staticmethod
    def value(tensor: Tensor | None) -> Tensor | None:
        if not isinstance(tensor, _Slot):
            return tensor
        return tensor.__dict__["written"] if "written" in tensor.__dict__ else tensor.as_subclass(Tensor)


@functools.cache
def _cache_layers() -> SimpleNamespace:
    """Cache layers that take a state's tensors and change none of them."""
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    class Full(DynamicLayer):
        """All keys and values, appended at O(1) amortised cost. held: (keys, values), Growing [B, n, G, D]."""

        def __init__(self, held: tuple[Growing, Growing] | None):
            super().__init__()
            self.held = held
            self._show()

        def _show(self) -> None:
            if self.held is not None:
                self.keys, self.values = (item.tensor.transpose(1, 2) for item in self.held)
                self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            new = key_states.transpose(1, 2), value_states.transpose(1, 2)
            self.held = (Growing(new[0]), Growing(new[1])) if self.held is None else tuple(a.append(b) for a, b in zip(self.held, new))
            self._show()
            return self.keys, self.values  # type: ignore[return-value]

    class Window(DynamicSlidingWindowLayer):
        """The keys and values of a window. held: (keys, values) [B, n, G, D]; after `update`, the past and all new ones."""

        def __init__(self, window: int, held: tuple[Tensor, Tensor] | None, seen: int):
            super().__init__(sliding_window=window)
            self.held, self.cumulative_length = held, seen

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            new = key_states.transpose(1, 2), value_states.transpose(1, 2)
            self.held = new if self.held is None else tuple(torch.cat(pair, 1) for pair in zip(self.held, new))
            self.cumulative_length += key_states.shape[2]
            return self.held[0].transpose(1, 2), self.held[1].transpose(1, 2)  # type: ignore[index]

    class Recurrence(LinearAttentionLayer):
        """`number` pairs of a convolution's last inputs and a recurrent state."""

        def __init__(self, number: int, held: CausalLMRecurrence | None):
            super().__init__(number_of_states=number)
            if held is not None:
                self.conv_states = {i: _Slot.of(tensor) for i, tensor in enumerate(held.conv)}
                self.recurrent_states = {i: _Slot.of(tensor) for i, tensor in enumerate(held.recurrent)}
                self.has_previous_state = dict.fromkeys(range(number), True)

        def update_conv_state(
            self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
        ) -> Tensor:
            old = self.conv_states[state_idx]
            size = old.shape[-1] if old is not None else conv_kernel_size or conv_states.shape[-1]
            full = F.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0)) if old is None else torch.cat([old, conv_states], -1)
            self.conv_states[state_idx] = full[..., full.shape[-1] - size :]
            self.has_previous_state[state_idx] = True
            return full

        def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            self.has_previous_state[state_idx] = True
            return recurrent_states

        def value(self) -> CausalLMRecurrence:
            conv, recurrent = (
                tuple(_Slot.value(held[i]) for i in range(self.number_of_states)) for held in (self.conv_states, self.recurrent_states)
            )
            if all(item is None for item in (*conv, *recurrent)):
                raise UsageError("a recurrent layer did not use the cache it was given; its state cannot be held.")
            return CausalLMRecurrence(conv=conv, recurrent=recurrent)

    def cache(layers: list[Any]) -> Any:
        new = DynamicCache()
        new.layers, new.layer_class_to_replicate = layers, None
        return new

    return SimpleNamespace(cache=cache, Dummy=DummyLayer, Full=Full, Window=Window, Recurrence=Recurrence)


def _layer_kind(layer: Any, named: str) -> tuple[str, int | None]:
    """('attention', window or None), ('recurrence', number of states) or ('nothing', None). Raises UsageError on any other cache layer."""
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    if type(layer) is DynamicLayer:
        return "attention", None
    if type(layer) is DynamicSlidingWindowLayer:
        return "attention", layer.sliding_window
    if type(layer) is LinearAttentionLayer:
        return "recurrence", layer.number_of_states
    if type(layer) is DummyLayer:
        return "nothing", None
    raise UsageError(f"{named} has layers with a {type(layer).__name__}, which is none of the caches that can be held as a value.")


def _check(model: Any) -> None:
    """Raise UsageError on what cannot be wrapped."""
    from transformers import PreTrainedModel, __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 23):
        raise UsageError(f"transformers {__version__} is installed; what its layers keep between calls is known from 5.23 on.")
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"hf_model is a {type(model).__name__}; CausalLM needs a PreTrainedModel of transformers.")
    config, named = model.config, f"{type(model).__name__} ({model.config.model_type})"
    if isinstance(getattr(model, "model", None), Model):
        raise UsageError(f"{named} is a Model of this library already; take its .model.")
    if model.get_output_embeddings() is None or _decoder(model) is model:
        raise UsageError(f"{named} has no language-modelling head; load it by AutoModelForCausalLM.")
    if config.get_text_config() is not config:
        raise UsageError(f"{named} reads more than text; give its language model.")
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UsageError(f"{named} attends to an encoder; a causal language model is needed.")
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise UsageError(f"{named} is not causal; it has no state to carry.")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise UsageError(f"{named} feeds token ids to every layer; it cannot be run from embeddings alone.")
    if getattr(config, "alibi", False):
        raise UsageError(f"{named} with alibi makes its positions from one length for all rows; it cannot be held as a value.")
    if model.get_input_embeddings().embedding_dim != config.hidden_size:
        raise UsageError(f"{named} projects its embeddings to another width; it cannot be run as embed, encode, head.")
    limits = {tuple(limit) for module in model.modules() if (limit := getattr(module, "time_step_limit", None)) is not None}
    if limits - {(0.0, float("inf"))}:
        raise UsageError(f"{named} limits its time step, which transformers does for many tokens and not for one; they would not agree.")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *(value for value in rope.values() if isinstance(value, dict)))}
    if changing := [kind for kind in ("dynamic", "longrope") if kind in kinds]:
        raise UsageError(f"{named} has {changing[0]!r} rotary positions, whose angles change with the length of the text.")


@functools.cache
def register() -> SimpleNamespace:
    """Make AutoConfig and AutoModelForCausalLM know model type 'remanence'; gives RemanenceConfig, RemanenceForCausalLM, RemanenceCache.

    `to_hf` does so too; a process that only loads must call it before `AutoModelForCausalLM.from_pretrained(folder)`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class RemanenceConfig(PreTrainedConfig):
        """remanence_kind and remanence_config: what `Model.save` writes into its config.json."""

        model_type = "remanence"
        remanence_kind: str = ""
        remanence_config: dict | None = None
        vocab_size: int = 0
        hidden_size: int = 0

    class RemanenceCache(Cache):
        """A State as generation carries it. state: None before the first token; length: positions fed, padding included."""

        def __init__(self, state: State | None = None, length: int | None = None):
            super().__init__(layers=[])
            self.state = state
            self.length = (state.tokens if state else 0) if length is None else length

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.length

        def get_max_length(self, layer_idx: int | None = None) -> int:
            return -1

        @property
        def is_croppable(self) -> bool:
            return False

        def crop(self, tokens_to_remove: int) -> None:
            raise UsageError("a memory has read what it has read: this cache cannot be cropped; keep the state from before instead.")

        def reset(self) -> None:
            self.state, self.length = None, 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.batch_select_indices(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            self.state = self.state and self.state.rows(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.state is not None:
                self.batch_select_indices(torch.arange(self.state.batch, device=self.state.device).repeat_interleave(repeats))

    class RemanenceForCausalLM(PreTrainedModel, GenerationMixin):
        """A Model of this library, at `.model`, with the interface of a causal language model of transformers.

        attention_mask [B, n], n at least the tokens given, marks padding on either side; positions are those of the real tokens, so there
        are no position_ids. past_key_values is a RemanenceCache, whose `state` a call replaces. labels are shifted inside.
        """

        config_class = RemanenceConfig
        base_model_prefix = "model"
        main_input_name = "input_ids"
        _is_stateful = True  # no speculative decoding: a memory does not forget

        def __init__(self, config: RemanenceConfig):
            super().__init__(config)
            if config.remanence_kind not in Model._kinds:
                raise UsageError(f"a model of kind {config.remanence_kind!r} is not known; known: {', '.join(sorted(Model._kinds))}.")
            self._hold(Model._kinds[config.remanence_kind].build(config.remanence_config or {}))

        def _hold(self, model: Model) -> None:
            self.model = model
            first: dict[int, str] = {}
            self._tied_weights_keys = {}
            for name, tensor in self.state_dict(keep_vars=True).items():
                if first.setdefault(id(tensor), name) != name:
                    self._tied_weights_keys[name] = first[id(tensor)]
            self.config.tie_word_embeddings = bool(self._tied_weights_keys)
            self.post_init()

        @classmethod
        def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
            """Without the meta device, on which a model's own buffers would be lost."""
            contexts = super().get_init_context(*args, **kwargs)
            return [context for context in contexts if not (isinstance(context, torch.device) and context.type == "meta")]

        def _init_weights(self, module: nn.Module) -> None:
            """A Model initialises itself."""

        def get_input_embeddings(self) -> None:
            """None: what a Model embeds with is its own affair."""

        def get_output_embeddings(self) -> None:
            """None, likewise."""

        def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = RemanenceCache()

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            past_key_values: RemanenceCache | None = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int = 0,
            return_dict: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            if given := [name for name, value in kwargs.items() if name in ("inputs_embeds", "position_ids") and value is not None]:
                raise UsageError(f"{given[0]} cannot be given to a {self.config.remanence_kind}; it reads input_ids, in order.")
            if input_ids is None:
                raise UsageError("input_ids is None; a model reads token ids [B, T].")
            cache = past_key_values
            if cache is None and use_cache is not False:
                cache = RemanenceCache()
            if cache is not None and not isinstance(cache, RemanenceCache):
                raise UsageError(f"past_key_values is a {type(cache).__name__}; it must be a RemanenceCache or None.")
            length, span = input_ids.shape[1], None
            if attention_mask is not None:
                if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
                    raise UsageError(f"attention_mask has shape {list(attention_mask.shape)}; it must be [B, n], n >= {length}.")
                valid = attention_mask[:, attention_mask.shape[1] - length :].bool()
                span = None if bool(valid.all()) else Span(valid)
            out = self.model(input_ids, cache.state if cache is not None else None, span, logits="none")
            if cache is not None:
                cache.state, cache.length = out.state, cache.length + length
            logits, loss = self.model.head(out.hidden[:, -logits_to_keep:] if logits_to_keep else out.hidden), None
            if labels is not None:
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
            return result if return_dict is not False else result.to_tuple()

    AutoConfig.register(RemanenceConfig.model_type, RemanenceConfig, exist_ok=True)
    AutoModelForCausalLM.register(RemanenceConfig, RemanenceForCausalLM, exist_ok=True)
    return SimpleNamespace(
        RemanenceConfig=RemanenceConfig, RemanenceForCausalLM=RemanenceForCausalLM, RemanenceCache=RemanenceCache
    )  # fmt: skip


def to_hf(model: Model) -> Any:
    """A Model as a PreTrainedModel that holds it (the same weights, not a copy): generate, save_pretrained, the tools of transformers.

    `RemanenceForCausalLM.from_pretrained(folder)` and, once `register()` was called, AutoModelForCausalLM read it back.
    """
    own = register()
    config = own.RemanenceConfig(
        remanence_kind=model.kind, remanence_config=_plain(model.config), vocab_size=model.vocab, hidden_size=model.dim
    )  # fmt: skip
    new = own.RemanenceForCausalLM.__new__(own.RemanenceForCausalLM)
    super(own.RemanenceForCausalLM, new).__init__(config)
    new._hold(model)
    return new.train(model.training)
