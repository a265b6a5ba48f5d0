"""Forecasting: series of numbers in, what comes next out; the chaotic benchmarks are in tasks/chaos.py."""

from ...tasks import chaos as _chaos  # noqa: F401 (registers them)
from .etth1 import ETTh1, read_etth1
from .model import SeriesModel, forecast_mse, series_loss

__all__ = ["ETTh1", "SeriesModel", "forecast_mse", "read_etth1", "series_loss"]
