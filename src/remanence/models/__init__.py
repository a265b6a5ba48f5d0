"""Models: stacks of mixers described as data."""

from . import based as _based  # noqa: F401 (registers them)
from . import linear_moe as _linear_moe  # noqa: F401
from . import linear_transformer as _linear_transformer  # noqa: F401
from . import presets as _presets  # noqa: F401
from . import vssm as _vssm  # noqa: F401
from . import xlstm as _xlstm  # noqa: F401
from .base import Model, Output, load
from .decoder import Decoder, ModelConfig, parse_layers
from .encdec import EncoderDecoder

__all__ = ["Decoder", "EncoderDecoder", "Model", "ModelConfig", "Output", "load", "parse_layers"]
