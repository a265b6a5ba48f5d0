"""SeriesModel: a stack of mixers between two linear layers that forecasts a series of vectors, with a state; and how well it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ShapeError, UsageError, positive
from ...mixers.base import check_state
from ...mixers.parts import RMSNorm
from ...models import Model, Output
from ...models.decoder import Block, Layers, parse_layers
from ...span import Span, advance
from ...state import State
from ...train.data import Piece


class SeriesState(State):
    seen: Tensor  # [B] int64, rows of the series read
    layers: tuple  # the mixers' states, bottom up


class SeriesModel(Model):
    """values [B, T, features] -> forecasts [B, T, horizon, features] of the rows after each; `out.logits` are the forecasts.

    Linear, blocks (as in a Decoder: norm, mixer, residual; norm, feed-forward, residual), norm, Linear. layers: as in ModelConfig, of any
    mixers of the catalog. relative: the last layer gives differences to the row just read, so that a fresh model repeats it.
    """

    kind = "series"

    def __init__(
        self, features: int, dim: int = 64, layers: Layers = "2 x mingru", horizon: int = 1, ffn: float = 2.0, relative: bool = True
    ):
        super().__init__()
        positive(features=features, dim=dim, horizon=horizon)
        specs = parse_layers(layers)
        self.config = {"features": features, "dim": dim, "layers": specs, "horizon": horizon, "ffn": ffn, "relative": relative}
        self.features, self.horizon, self.relative, self.dim, self.vocab = features, horizon, relative, dim, 0
        self.embedding = nn.Linear(features, dim)
        self.blocks = nn.ModuleList(Block(dim, spec, ffn, 1e-5, layer, len(specs)) for layer, spec in enumerate(specs, start=1))
        self.norm = RMSNorm(dim)
        self.to_forecast = nn.Linear(dim, horizon * features)
        with torch.no_grad():
            for block in self.blocks:
                for linear in block.ends():  # type: ignore[operator]
                    linear.weight.mul_((2 * len(specs)) ** -0.5)
            if relative:
                self.to_forecast.weight.zero_()
                self.to_forecast.bias.zero_()

    @classmethod
    def build(cls, config: dict[str, Any]) -> SeriesModel:
        return cls(**config)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def encode(self, h: Tensor, state: SeriesState | None = None, span: Span | None = None) -> tuple[Tensor, SeriesState]:
        layers = []
        for index, block in enumerate(self.blocks):
            h, new = block(h, state and state.layers[index], span)
            layers.append(new)
        seen = state.seen if state else torch.zeros(len(h), dtype=torch.long, device=h.device)
        return self.norm(h), SeriesState(seen=advance(seen, h.shape[1], span), layers=tuple(layers)).stamp(*self.header)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., horizon, features], relative to the row read if the model is."""
        return self.to_forecast(hidden).unflatten(-1, (self.horizon, self.features))

    def forward(self, values: Tensor, state: SeriesState | None = None, span: Span | None = None) -> Output:  # type: ignore[override]
        """values [B, T, features] of the weights' dtype, T >= 1. Raises ShapeError on other values, StateError on another model's state."""
        if values.ndim != 3 or values.shape[2] != self.features or 0 in values.shape:
            raise ShapeError(f"values have shape {list(values.shape)}; this model expects [B, T, {self.features}] with B, T >= 1.")
        if state is not None:
            check_state(state, self.header, len(values), values.device)
        order, back = None, values
        if span is not None:
            span.check(*values.shape[:2])
            if span.valid is not None:
                values = values.masked_fill(~span.valid[..., None], 0)
            span, order = span.right_padded()
            back = values
            if order is not None:
                values = values.gather(1, order[..., None].expand_as(values))
        hidden, new = self.encode(self.embed(values), state, span)
        if order is not None:
            hidden = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        forecast = self.head(hidden)
        return Output(forecast + back[:, :, None] if self.relative else forecast, new, hidden)

    @torch.no_grad()
    def rollout(self, values: Tensor, steps: int, state: SeriesState | None = None) -> Tensor:
        """The `steps` rows after values [B, T, features], each block of `horizon` read as if it had happened: [B, steps, features]."""
        positive(steps=steps)
        rows: list[Tensor] = []
        for _ in range(0, steps, self.horizon):
            out = self(values, state)
            values, state = out.logits[:, -1], out.state
            rows.append(values)
        return torch.cat(rows, 1)[:, :steps]


def series_loss(model: Model, piece: Piece, state: State | None) -> tuple[Tensor, State, dict[str, Tensor]]:
    """The summed squared error of a piece whose ids are values [B, T, features], its targets the rows to come [B, T, horizon, features].

    For `train`; the loss it reports is then the mean squared error. A target that is -100 is not counted.
    """
    assert piece.targets is not None
    out = model(piece.ids, state, piece.span)
    error = (out.logits - piece.targets).square() * (piece.targets != -100)
    return error.sum(), out.state, {}


def ahead(values: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """values [B, T + horizon, F] -> rows to read [B, T, F] and the `horizon` rows after each [B, T, horizon, F]."""
    return values[:, :-horizon], values[:, 1:].unfold(1, horizon, 1).transpose(2, 3)


@torch.no_grad()
def forecast_mse(
    model: SeriesModel,
    series: Tensor | np.ndarray,
    window: int | None = 96,
    horizon: int = 96,
    stride: int = 1,
    batch: int = 256,
) -> dict[str, float]:
    """Mean squared and absolute error of forecasting `horizon` rows of series [N, features], over all of the rows and features forecast.

    window: from every `stride`-th window of that many rows, read from a fresh start; a model whose horizon is shorter is iterated. None:
    the series is one stream, read once, and row t's forecast rests on all rows up to t (the model's horizon must be as long). A series of
    window + n rows has its first forecast at row `window`, in either case n - horizon + 1 of them at stride 1.
    -> {"mse", "mae", "forecasts"}. Raises UsageError if the series is too short.
    """
    positive(horizon=horizon, stride=stride, batch=batch, **({} if window is None else {"window": window}))
    weight = next(model.parameters())
    rows = torch.as_tensor(series).to(weight)
    if rows.ndim != 2 or rows.shape[1] != model.features:
        raise ShapeError(f"series has shape {list(rows.shape)}; this model expects [N, {model.features}].")
    if len(rows) < (window or 1) + horizon:
        raise UsageError(f"series has {len(rows)} rows; window={window} and horizon={horizon} need {(window or 1) + horizon}.")
    if window is None and model.horizon < horizon:
        raise UsageError(f"horizon is {horizon}; a stream is forecast directly, by this model up to {model.horizon} rows ahead.")
    was, square, absolute, count = model.training, 0.0, 0.0, 0
    model.eval()
    if window is None:
        reading, state = rows[None], None
        for begin in range(0, len(rows) - horizon, 1024):
            part = reading[:, begin : min(begin + 1024, len(rows) - horizon)]
            out = model(part, state)
            state, forecasts = out.state, out.logits[0, ::stride, :horizon]
            truth = ahead(reading[:, begin : begin + part.shape[1] + horizon], horizon)[1][0, ::stride]
            square, absolute = square + float((forecasts - truth).square().sum()), absolute + float((forecasts - truth).abs().sum())
            count += len(truth)
    else:
        spans = rows.unfold(0, window + horizon, stride).transpose(1, 2)  # [n, window + horizon, F]
        for part in spans.split(batch):
            error = model.rollout(part[:, :window], horizon) - part[:, window:]
            square, absolute, count = square + float(error.square().sum()), absolute + float(error.abs().sum()), count + len(part)
    model.train(was)
    size = count * horizon * model.features
    return {"mse": square / size, "mae": absolute / size, "forecasts": count}
