"""Ways to use a trained model better without training it: functions around any Model, whose states are what they work on.

`oprm` reads a long context in chunks and answers from one of their states; `stuffed_mamba` watches a state past the training length and
keeps it from collapsing. JRT-Prompt, saying the prompt twice, is `remanence.mixers.jrt.jrt_prompt`.
"""

from . import stuffed_mamba
from .generate import greedy
from .oprm import OPRM, oprm

__all__ = ["OPRM", "greedy", "oprm", "stuffed_mamba"]
