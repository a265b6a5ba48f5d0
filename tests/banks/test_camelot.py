"""CAMELoT: reading and writing in a loop, the limits of the threshold, and what a mode conserves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.errors import UsageError

from .loops import inputs, layer, qkv, softmax_read, turn


def fits(key: Tensor, store: list[dict]) -> list[float]:
    return [float(F.cosine_similarity(key, mode["k"], dim=0)) for mode in store]


def by_token(mixer: rm.Mixer, x: Tensor, heads: int, segment: int, modes: int, threshold: float) -> Tensor:
    q, k, v = (y[0] for y in qkv(mixer, x, heads))
    out = torch.zeros_like(q)
    for h in range(heads):
        store: list[dict] = []
        for start in range(0, len(q), segment):
            inside = range(start, min(start + segment, len(q)))
            recalled = {j: store[max(range(len(store)), key=fits(k[j, h], store).__getitem__)] for j in inside} if store else {}
            for i in inside:
                logits, values = [], []
                for j in range(start, i + 1):
                    for pair, place in ((recalled.get(j), j - start), ({"k": k[j, h], "v": v[j, h]}, segment + j - start)):
                        if pair:
                            asks = turn(q[i, h], segment + i - start) * q.shape[-1] ** -0.5
                            logits.append(asks @ turn(pair["k"], place))
                            values.append(pair["v"])
                out[i, h] = softmax_read(logits, values)
            for j in inside if len(inside) == segment else ():
                fit = fits(k[j, h], store)
                best = max(range(len(store)), key=fit.__getitem__) if store else -1
                for mode in store:
                    mode["age"] += 1
                if store and fit[best] > threshold:
                    c = store[best]["c"]
                    store[best] = {"k": (c * store[best]["k"] + k[j, h]) / (c + 1), "v": (c * store[best]["v"] + v[j, h]) / (c + 1)}
                    store[best] |= {"c": c + 1, "age": 0}
                else:
                    new = {"k": k[j, h], "v": v[j, h], "c": 1, "age": 0}
                    if len(store) < modes:
                        store.append(new)
                    else:
                        store[max(range(modes), key=lambda m: store[m]["age"])] = new
    return out.flatten(1)[None] @ mixer.out.weight.T


@pytest.mark.parametrize("threshold", [0.5, 0.9, 2.0, -2.0])
def test_parity_with_the_equations_in_a_loop(threshold: float) -> None:
    mixer, x = layer("camelot", heads=2, segment=6, modes=5, threshold=threshold), inputs(1, 40)
    with torch.no_grad():
        want = by_token(mixer, x, 2, 6, 5, threshold)
        assert_parity("camelot", "reading and writing as the paper describes them, token by token", mixer(x)[0], want)


def test_a_threshold_above_one_is_a_ring() -> None:
    mixer, x = layer("camelot", heads=2, segment=6, modes=10, threshold=1.5), inputs(1, 36)
    _, k, v = qkv(mixer, x, 2)
    with torch.no_grad():
        state = mixer(x)[1]
        for got, want in ((state.mode_keys, k), (state.mode_values, v)):
            order = state.age[0, :, 0].argsort(descending=True)
            assert_close("the last keys, oldest first", got[0, order], want[0, -10:], 1e-12)
    assert (state.count == 1).all()


def test_a_threshold_below_all_is_one_mean() -> None:
    mixer, x = layer("camelot", heads=2, segment=6, modes=10, threshold=-2.0), inputs(1, 36)
    with torch.no_grad():
        state = mixer(x)[1]
        assert_close("mean", state.mode_keys[:, 0], qkv(mixer, x, 2)[1].mean(1), 1e-12)
    assert state.count[0, :, 0].tolist() == [36] + [0] * 9


def test_count_times_value_is_what_was_taken() -> None:
    """Nothing is overwritten while there are free modes: the sum over modes of c v is the sum of all values."""
    mixer, x = layer("camelot", heads=2, segment=6, modes=36, threshold=0.6), inputs(1, 36)
    with torch.no_grad():
        state = mixer(x)[1]
        total = (state.count[..., None] * state.mode_values).sum(1)
        assert_close("sum", total, qkv(mixer, x, 2)[2].sum(1), 1e-12)
    assert int(state.count.sum()) == 2 * 36 and int(state.count.max()) > 1


def test_bad_threshold() -> None:
    with pytest.raises(UsageError, match="threshold is 7"):
        rm.mixer("camelot", dim=12, heads=2, threshold=7)
