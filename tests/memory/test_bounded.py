"""Over a long stream a memory's state stays what it is, or grows as it says; and what makes no sense is refused in a sentence."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from remanence import Decoder, ModelConfig

VOCAB = 11
BOUNDED = {
    "memformer": {"slots": 4},
    "rxt": {"slots": 4},
    "membart": {"slots": 4},
    "lm2": {"slots": 4},
    "memoryprompt": {"slots": 2, "hidden": 16},
    "contextual-memory-reweaving": {"buffer": 100},
    "hmt": {"queue": 8, "sensory": 4},
    "ccm": {"slots": 2},
}


def small(slug: str, mixers: str = "attention, gated-deltanet", **hyper: object) -> rm.Model:
    torch.manual_seed(0)
    return rm.memory(slug, backbone=Decoder(ModelConfig(vocab=VOCAB, dim=8, layers=mixers, ffn=1)), **hyper).eval()


@pytest.mark.parametrize("slug", BOUNDED)
def test_the_state_is_bounded(slug: str) -> None:
    """20,480 tokens in segments of 512 and pieces that end in mid-segment: after the start, the same bytes at the same phase."""
    memory, sizes, state = small(slug, "attention", segment=512, **BOUNDED[slug]), [], None
    ids = torch.randint(VOCAB, (1, 20480))
    with torch.no_grad():
        for part in ids.split(2048 + 256, 1):
            state = memory(part, state, logits="none").state
            sizes.append((int(state.phase[0]), state.nbytes))
    assert state.tokens == 20480
    early = dict(sizes[2:6])
    assert all(early.setdefault(phase, size) == size for phase, size in sizes[2:]) and len({phase for phase, _ in sizes}) >= 2


@pytest.mark.parametrize(("slug", "hyper"), [("ccm", {"mode": "concat", "slots": 2}), ("uio-llms", {"slots": 2})])
def test_the_state_grows_by_a_few_vectors_a_segment(slug: str, hyper: dict) -> None:
    memory, state, sizes = small(slug, segment=128, **hyper), None, []
    with torch.no_grad():
        for part in torch.randint(VOCAB, (1, 1280)).split(256, 1):
            state = memory(part, state, logits="none").state
            sizes.append(state.nbytes)
    steps = {b - a for a, b in zip(sizes, sizes[1:])}
    assert steps == {2 * 2 * (2 * 8 * 4 + 1)}  # a call is two segments of two entries: keys and values, or two layers, of 8 numbers; a mark


@pytest.mark.parametrize("slug", [*BOUNDED, "uio-llms"])
def test_it_needs_a_model_with_layers(slug: str) -> None:
    with pytest.raises(rm.errors.UsageError, match=r"backbone is a Linear; .*(needs a Model|between the layers of a Decoder)"):
        rm.memory(slug, backbone=torch.nn.Linear(2, 2))
    if slug not in ("memoryprompt", "hmt"):
        with pytest.raises(rm.errors.UsageError, match="backbone is a RMT; .* between the layers of a Decoder"):
            rm.memory(slug, backbone=small("rmt"))


@pytest.mark.parametrize("slug", [*BOUNDED, "uio-llms"])
def test_defaults_work_and_survive_a_round_trip(slug: str, tmp_path) -> None:
    memory, ids = small(slug), torch.randint(VOCAB, (2, 150))
    with torch.no_grad():
        want = memory(ids)
        memory.save(tmp_path)
        again = rm.load(tmp_path)
        assert again.config == memory.config and torch.equal(again(ids).logits, want.logits)


def test_bad_arguments() -> None:
    for slug, hyper, message in (
        ("memformer", {"slots": 0}, "slots is 0; it must be an integer >= 1"),
        ("memformer", {"tau": -1.0}, "tau is -1.0"),
        ("memformer", {"update": "lstm"}, "update is 'lstm'; it may be 'bmn' or 'gru'"),
        ("memformer", {"heads": 3}, "heads=3 does not divide dim=8"),
        ("rxt", {"mix": "all"}, "mix is 'all'"),
        ("rxt", {"gate": "open"}, "gate is 'open'"),
        ("membart", {"slots": -1}, "slots is -1"),
        ("lm2", {"memory_scope": "global"}, "memory_scope is 'global'"),
        ("contextual-memory-reweaving", {"layers": [3]}, "layers is .3.; it must name layers in 1..2"),
        ("contextual-memory-reweaving", {"buffer": 0}, "buffer is 0"),
    ):
        with pytest.raises(rm.errors.UsageError, match=message):
            small(slug, **hyper)
