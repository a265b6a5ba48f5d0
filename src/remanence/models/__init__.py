"""Models: stacks of mixers described as data."""

from . import based as _based  # noqa: F401 (registers them)
from . import presets as _presets  # noqa: F401
from . import xlstm as _xlstm  # noqa: F401
from .base import Model, Output, load
from .decoder import Decoder, ModelConfig, parse_layers

__all__ = ["Decoder", "Model", "ModelConfig", "Output", "load", "parse_layers"]
