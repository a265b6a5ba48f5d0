"""What all segment mixers share: a state that stays small, sizes that are refused, and rows at different places."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from remanence import Span
from remanence.errors import ShapeError, UsageError

SMALL = {
    "infini-attention": {},
    "shortformer": {},
    "grc-cache": {"slots": 16},
    "compressive-transformer": {"memory": 64, "compressed": 16},
    "block-recurrent-transformer": {"slots": 8},
    "chunked-fifo-rmat": {"full": False, "slots": 4},
}


@pytest.mark.parametrize("slug", SMALL)
def test_the_state_stays_as_large_as_it_is(slug: str) -> None:
    mixer, state, sizes = rm.mixer(slug, dim=8, heads=2, segment=64, **SMALL[slug]).eval(), None, set()
    with torch.no_grad():
        for _ in range(5):
            y, state = mixer(torch.randn(1, 4001, 8), state)
            sizes.add(state.nbytes)
    assert state.tokens == 20005 and len(sizes) == 1 and bool(y.isfinite().all())


def test_without_its_global_branch_only_is_the_fifo_bounded() -> None:
    mixer = rm.mixer("chunked-fifo-rmat", dim=8, heads=2, segment=16, slots=4)
    (_, short), (_, long) = mixer(torch.randn(1, 32, 8)), mixer(torch.randn(1, 64, 8))
    assert long.nbytes - short.nbytes == 32 * (2 * 8 * 4 + 8)  # a key, a value and a position a token


@pytest.mark.parametrize("slug", SMALL)
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_resets_at_the_first_and_the_last_token(slug: str, length: int) -> None:
    mixer = rm.mixer(slug, dim=16, heads=2, segment=16, **SMALL[slug])
    x, reset = torch.randn(2, length, 16), torch.zeros(2, length, dtype=torch.bool)
    reset[0, 0] = reset[0, -1] = True
    with torch.no_grad():
        _, before = mixer(torch.randn(2, 21, 16))
        y, state = mixer(x, before, Span(reset=reset))
        alone, _ = mixer(x[:1, -1:])
        assert_close("the last token", y[:1, -1:], alone, 1e-5)
        assert_close("a row without a reset", y[1:], mixer(x[1:], before.rows([1]))[0], 1e-5)
    assert state.seen.tolist() == [1, 21 + length]


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ShapeError, match="empty"):
        rm.mixer("infini-attention", dim=16)(torch.zeros(1, 0, 16))


@pytest.mark.parametrize(
    ("slug", "hyper", "message"),
    [
        ("infini-attention", {"heads": 3}, "does not divide dim=16"),
        ("infini-attention", {"rule": "hebb"}, "rule is 'hebb'"),
        ("shortformer", {"segment": 0}, "segment is 0"),
        ("grc-cache", {"slots": 9}, "slots=9 and segment=8"),
        ("grc-cache", {"ratio": 0.4}, "multiple of heads"),
        ("compressive-transformer", {"ratio": 3}, "ratio=3 does not divide segment=8"),
        ("compressive-transformer", {"memory": 6}, "ratio=4 does not divide memory=6"),
        ("compressive-transformer", {"compression": "most-used"}, "compression is 'most-used'"),
        ("block-recurrent-transformer", {"gate": "gru"}, "gate is 'gru'"),
        ("chunked-fifo-rmat", {"heads": 3}, "does not divide dim=16"),
    ],
)
def test_bad_sizes(slug: str, hyper: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rm.mixer(slug, dim=16, **{"segment": 8, **hyper})
