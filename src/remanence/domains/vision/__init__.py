"""Vision: pictures and films, read as sequences of patches."""

from .mamba_nd import MambaND
from .plstm_2d import PLSTM2D, PLSTMVis
from .vit import ViT

__all__ = ["MambaND", "PLSTM2D", "PLSTMVis", "ViT"]
