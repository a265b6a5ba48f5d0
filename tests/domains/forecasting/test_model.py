"""SeriesModel: streaming, padding, saving, training; forecast_mse against a loop over windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import remanence as rm
from helpers import assert_close, assert_states_close
from remanence.domains.forecasting import SeriesModel, forecast_mse, series_loss
from remanence.domains.forecasting.model import ahead
from remanence.errors import ShapeError, StateError, UsageError
from remanence.train import Piece, TrainConfig, train

LAYERS = [{"mixer": "deconstruct", "cell": "gru"}, {"mixer": "attention", "window": 6}]


def build(**options) -> SeriesModel:
    """With weights that no zero hides."""
    torch.manual_seed(0)
    model = SeriesModel(3, dim=16, **({"layers": LAYERS} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_streams_pads_and_packs() -> None:
    model, x = build(horizon=2), torch.randn(2, 30, 3)
    out = model(x)
    assert out.logits.shape == (2, 30, 2, 3)
    state, parts = None, []
    for part in x.split([1, 12, 1, 16], 1):
        piece = model(part, state)
        state = piece.state
        parts.append(piece.logits)
    assert_close("pieces", torch.cat(parts, 1), out.logits, 1e-5)
    assert_states_close("pieces", state, out.state, 1e-5)
    for side in ("left", "right"):
        span = rm.Span.from_lengths([30, 11], 40, side)
        padded = torch.full((2, 40, 3), torch.nan)
        padded[span.valid] = torch.cat([x[0], x[1, :11]])
        got = model(padded, span=span)
        assert_close(side, got.logits[span.valid], torch.cat([out.logits[0], out.logits[1, :11]]), 1e-5)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[:, 9] = True
    assert_close("packed", model(x, span=rm.Span(reset=reset)).logits[:, 9:], model(x[:, 9:]).logits, 1e-5)


def test_a_fresh_model_repeats_the_last_row() -> None:
    model, x = SeriesModel(3, dim=16, horizon=4), torch.randn(2, 5, 3)
    assert torch.equal(model(x).logits, x[:, :, None].expand(-1, -1, 4, -1))
    assert torch.equal(model.rollout(x, 6), x[:, -1:].expand(-1, 6, -1))
    assert not torch.equal(SeriesModel(3, dim=16, relative=False)(x).logits[:, :, 0], x)


@pytest.mark.parametrize("horizon", [1, 3])
def test_rollout_reads_its_own_forecasts(horizon: int) -> None:
    model, x = build(horizon=horizon), torch.randn(2, 8, 3)
    rows, want = x, []
    while len(want) < 7:
        new = model(rows).logits[:, -1]
        want += list(new.unbind(1))
        rows = torch.cat([rows, new], 1)
    assert_close("rollout", model.rollout(x, 7), torch.stack(want[:7], 1), 1e-5)
    first = model(x[:, :5]).state
    assert_close("from a state", model.rollout(x[:, 5:], 7, first), torch.stack(want[:7], 1), 1e-5)


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("stride", [1, 3])
def test_forecast_mse_is_the_loop_over_windows(horizon: int, stride: int) -> None:
    model, series = build(horizon=horizon), torch.randn(40, 3)
    errors = [
        model.rollout(series[None, at : at + 10], 4)[0] - series[at + 10 : at + 14] for at in range(0, 40 - 14 + 1, stride)
    ]
    got = forecast_mse(model, series.numpy().astype(np.float64), window=10, horizon=4, stride=stride, batch=5)
    want = torch.stack(errors)
    assert got["forecasts"] == len(errors)
    assert got["mse"] == pytest.approx(float(want.square().mean()), rel=1e-5)
    assert got["mae"] == pytest.approx(float(want.abs().mean()), rel=1e-5)


def test_forecast_mse_of_a_stream() -> None:
    model, series = build(horizon=4), torch.randn(1100, 3)
    with torch.no_grad():
        forecasts = model(series[None]).logits[0, :-4]
    want = forecasts - series[1:].unfold(0, 4, 1).transpose(1, 2)
    got = forecast_mse(model, series, window=None, horizon=4)
    assert got["forecasts"] == 1096 and got["mse"] == pytest.approx(float(want.square().mean()), rel=1e-4)


def test_trains_saves_and_beats_repeating(tmp_path: Path) -> None:
    """A sine of two frequencies; the loop's own checkpoint is a model that loads."""

    class Sines:
        def batch(self, seed: int, index: int) -> Piece:
            phase = torch.rand(8, 1, 3, generator=torch.Generator().manual_seed(1000 * seed + index)) * 6.28
            return Piece(*ahead(torch.sin(torch.arange(33.0)[None, :, None] * torch.tensor([0.3, 0.5, 0.8]) + phase), 1))

    model = SeriesModel(3, dim=16, layers="mingru")
    row = train(model, Sines(), TrainConfig(steps=60, lr=1e-2, device="cpu", precision="fp32"), tmp_path, loss=series_loss, quiet=True)
    values, targets = ahead(torch.sin(torch.arange(60.0)[None, :, None] * torch.tensor([0.3, 0.5, 0.8])), 1)
    model.eval()
    error = (model(values).logits - targets).square().mean()
    assert error < 0.2 * (values[:, :, None] - targets).square().mean() and row["loss"] < 0.1
    again = rm.load(tmp_path / "last")
    assert isinstance(again, SeriesModel) and torch.equal(again(values).logits, model(values).logits)


def test_wrong_use() -> None:
    model = build()
    with pytest.raises(ShapeError, match=r"\[2, 5, 4\]; this model expects \[B, T, 3\]"):
        model(torch.zeros(2, 5, 4))
    with pytest.raises(ShapeError, match=r"\[2, 0, 3\]"):
        model(torch.zeros(2, 0, 3))
    with pytest.raises(StateError):
        model(torch.zeros(2, 5, 3), build(horizon=2)(torch.zeros(2, 5, 3)).state)
    with pytest.raises(UsageError, match="series has 13 rows"):
        forecast_mse(model, torch.zeros(13, 3), 10, 4)
    with pytest.raises(UsageError, match="by this model up to 1 rows ahead"):
        forecast_mse(model, torch.zeros(50, 3), None, 4)
    with pytest.raises(ShapeError, match=r"\[50, 2\]"):
        forecast_mse(model, torch.zeros(50, 2), 10, 4)
