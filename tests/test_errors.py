"""Every error of use is a RemanenceError of one line that says what it was, what it got and what it may be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import remanence as rm
from remanence import Decoder, ModelConfig, Span, errors
from remanence.errors import RemanenceError, ShapeError, StateError, UnknownName, UsageError

MIXERS = [entry.slug for entry in rm.catalog("mixer")]


def zeros(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(*shape, **kwargs)


def mixer(slug: str = "gated-deltanet", **hyper: Any) -> rm.Mixer:
    return rm.mixer(slug, **{"dim": 32, **dict(rm.find(slug).example), **hyper})


def model(**changes: Any) -> Decoder:
    return Decoder(ModelConfig(**{"vocab": 7, "dim": 16, "layers": "attention", **changes}))


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=words) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, RemanenceError)
    assert "\n" not in text and text.endswith((".", ")", "?")) and len(text) < 400, text


def test_errors_are_value_or_runtime_errors() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert len(kinds) >= 7
    for kind in kinds:
        assert issubclass(kind, RemanenceError) and kind.__doc__
        assert kind is RemanenceError or issubclass(kind, (ValueError, RuntimeError))


@pytest.mark.parametrize("slug", MIXERS)
def test_every_mixer_checks_its_input(slug: str) -> None:
    it = mixer(slug)
    refused(ShapeError, r"\[2, 3, 31\].* expects \[B, T, 32\]", lambda: it(zeros(2, 3, 31)))
    refused(ShapeError, r"\[3, 32\]", lambda: it(zeros(3, 32)))
    refused(ShapeError, "empty", lambda: it(zeros(2, 0, 32)))
    refused(ShapeError, "empty", lambda: it(zeros(0, 2, 32)))
    refused(ShapeError, "float64.* computes in torch.float32", lambda: it(zeros(2, 3, 32, dtype=torch.float64)))
    refused(ShapeError, "int64", lambda: it(zeros(2, 3, 32, dtype=torch.int64)))
    refused(ShapeError, "meta.* is on cpu", lambda: it(zeros(2, 3, 32, device="meta")))
    refused(ShapeError, "span.valid", lambda: it(zeros(2, 3, 32), span=Span.from_lengths([1, 2], 4)))
    refused(ShapeError, "span.reset", lambda: it(zeros(2, 3, 32), span=Span(reset=torch.ones(1, 3, dtype=torch.bool))))


@pytest.mark.parametrize("slug", MIXERS)
def test_every_mixer_checks_its_state(slug: str) -> None:
    it, x = mixer(slug), zeros(2, 3, 32)
    _, state = it(x)
    other = "attention" if slug != "attention" else "gated-deltanet"
    refused(StateError, f"made by {other}; {slug} can only continue its own", lambda: it(x, mixer(other)(x)[1]))
    refused(StateError, "2 rows and the input 1", lambda: it(x[:1], state))
    refused(StateError, "on meta and the input on cpu", lambda: it(x, state.to("meta")))
    refused(StateError, "configuration", lambda: mixer(slug, dim=64)(zeros(2, 3, 64), state))
    refused(StateError, "state is a tuple; it must be a State", lambda: it(x, (1, 2)))
    refused(StateError, "a part of a system", lambda: it(x, state.map(torch.clone).stamp("", "")))


@pytest.mark.parametrize("slug", MIXERS)
def test_every_mixer_checks_its_hyper_parameters(slug: str) -> None:
    refused(UsageError, "not_an_option", lambda: mixer(slug, not_an_option=1))
    for value in (0, -4):
        refused(UsageError, f"dim is {value}; it must be an integer >= 1", lambda value=value: mixer(slug, dim=value))
    taken = inspect.signature(rm.find(slug).builder).parameters
    for name, parameter in taken.items():
        if isinstance(parameter.default, int) and not isinstance(parameter.default, bool):
            refused(UsageError, f"{name} is 0", lambda name=name: mixer(slug, **{name: 0}))
    if "heads" in taken:
        refused(UsageError, "heads=5 does not divide", lambda: mixer(slug, heads=5))
    if "backend" in taken:
        refused(UsageError, "backend is 'abacus'", lambda: mixer(slug, backend="abacus")(zeros(1, 2, 32)))


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (UsageError, "write is 'soft'", lambda: mixer(write="soft")),
        (UsageError, "heads=5 does not divide dim=32", lambda: mixer(heads=5)),
        (errors.BackendError, "no triton form", lambda: mixer(backend="triton")(zeros(1, 2, 32))),
        (UsageError, "kv_heads=3 does not divide heads=4", lambda: mixer("attention", kv_heads=3)),
        (UsageError, "sinks=2 needs a window", lambda: mixer("attention", sinks=2)),
        (UnknownName, "did you mean gated-deltanet", lambda: rm.mixer("gated-delta-net")),
        (UsageError, "vocab is 0", lambda: model(vocab=0)),
        (UsageError, "dim is 2.5", lambda: model(dim=2.5)),
        (UsageError, "repeat is True", lambda: model(repeat=True)),
        (UsageError, "ffn is -1", lambda: model(ffn=-1)),
        (UsageError, "times is 0", lambda: model(layers="0 x attention")),
        (UsageError, "'attention attention' is not understood", lambda: model(layers="attention attention")),
        (UsageError, "names no mixer", lambda: model(layers=[{"window": 3}])),
        (UsageError, "layers is empty", lambda: model(layers=[])),
        (UnknownName, "did you mean attention", lambda: model(layers="2 x atention")),
        (UsageError, "bmojo is a layer", lambda: rm.memory("bmojo", backbone=model())),
        (UsageError, "windw", lambda: model(layers=[{"mixer": "attention", "windw": 3}])),
        (ShapeError, "dtype torch.float32", lambda: model()(zeros(1, 2))),
        (ShapeError, r"shape \[2\]", lambda: model()(zeros(2, dtype=torch.long))),
        (ShapeError, "empty", lambda: model()(zeros(1, 0, dtype=torch.long))),
        (ShapeError, r"range from 0 to 7; this model's vocabulary is 0\.\.6", lambda: model()(ids([0, 7]))),
        (ShapeError, "range from -1 to 3", lambda: model()(ids([3, -1]))),
        (ShapeError, r"targets have shape \[1, 1\] and ids \[1, 2\]", lambda: model()(ids([1, 2]), targets=ids([1]))),
        (UsageError, "logits is 'some'", lambda: model()(ids([1]), logits="some")),
        (ShapeError, "span.valid", lambda: model()(ids([1, 2]), span=Span.from_lengths([1], 3))),
        (StateError, "decoder can only continue its own", lambda: model()(ids([1]), mixer()(zeros(1, 2, 32))[1])),
        (StateError, "1 rows and the input 2", lambda: model()(ids([1], [2]), model()(ids([1])).state)),
    ],
)
def test_bad_calls(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    refused(kind, words, call)
