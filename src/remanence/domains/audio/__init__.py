"""Audio: streams of frames, classified as they come, and text read aloud."""

from .lmuformer import LMUFormer
from .small_e import SmallE, monotone_copy, skips_and_repeats

__all__ = ["LMUFormer", "SmallE", "monotone_copy", "skips_and_repeats"]
