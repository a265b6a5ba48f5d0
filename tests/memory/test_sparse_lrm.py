"""The schedule of memory lengths, and that it is a schedule and nothing else."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from remanence import Decoder, ModelConfig
from remanence.errors import UsageError
from remanence.memory.sparse_lrm import lrm_schedule


def long_ones(*args, **kwargs) -> list[int]:
    return [layer for layer, spec in enumerate(lrm_schedule(*args, **kwargs), start=1) if spec["window"] == 2304]


def test_placements() -> None:
    assert long_ones(8, 2, "first") == [1, 2]
    assert long_ones(8, 2, "last") == [7, 8]
    assert long_ones(8, 2) == [4, 8] and long_ones(24, 4) == [6, 12, 18, 24] and long_ones(8, 3) == [3, 6, 8]
    assert long_ones(5, 0) == [] and long_ones(5, 5, "first") == long_ones(5, 5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("mixer", ["relative-attention", "attention"])
def test_all_long_is_the_plain_stack(mixer: str) -> None:
    """Windows longer than the text: a Transformer-XL that remembers everything, which is one causal pass."""
    layers = lrm_schedule(3, 3, long=40, short=4, mixer=mixer)
    model, plain = (Decoder(ModelConfig(vocab=13, dim=16, layers=specs, ffn=1)).double() for specs in (layers, f"3 x {mixer}"))
    plain.load_state_dict(model.state_dict())
    xl, ids = rm.memory("transformer-xl", backbone=plain, segment=8, memory=40).eval(), torch.randint(13, (2, 30))
    with torch.no_grad():
        assert_close("plain", model(ids).logits, plain(ids).logits, 1e-12)
        assert_close("transformer-xl", model(ids).logits, xl(ids).logits, 1e-10)


def test_the_state_is_the_sum_of_the_windows() -> None:
    model = Decoder(ModelConfig(vocab=13, dim=16, layers=lrm_schedule(4, 1, "last", long=20, short=5), ffn=1))
    sizes = {layer.keys.shape[1] for layer in model(torch.randint(13, (1, 60))).state.layers[:3]}
    assert sizes == {4} and model(torch.randint(13, (1, 60))).state.layers[3].keys.shape[1] == 19


def test_bad_schedules() -> None:
    for kwargs, message in (
        ({"n": 5}, "n is 5; it must be an integer in 0..4"),
        ({"n": 1, "placement": "middle"}, "placement is 'middle'"),
        ({"n": 1, "long": 4, "short": 8}, "short is 8 and long 4"),
    ):
        with pytest.raises(UsageError, match=message):
            lrm_schedule(4, **kwargs)
