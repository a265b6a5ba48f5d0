"""Ways to use a trained model better without training it: functions around any Model, whose states are what they work on.

`oprm` reads a long context in chunks and answers from one of their states; `stuffed_mamba` watches a state past the training length and
keeps it from collapsing; `hidden_state_optimisation` improves what a state has cached; `beam_search` looks for the most probable
continuation, `translate` after a prompt or a source, and `conditional_beam` for the best one that has an attribute; `reform` reads a long
context with a small cache, and then only the tokens that matter. JRT-Prompt, saying the prompt twice, is `remanence.mixers.jrt.jrt_prompt`.
"""

from . import stuffed_mamba
from .beam import beam_search, translate
from .conditional_beam import Hypothesis, conditional_beam
from .generate import greedy
from .hidden_state_optimisation import hidden_state_optimisation
from .oprm import OPRM, oprm
from .reform import REFORM, Head, needles, reform, retrieval_mrr, select_heads

__all__ = [
    "OPRM", "REFORM", "Head", "Hypothesis", "beam_search", "conditional_beam", "greedy", "hidden_state_optimisation", "needles", "oprm",
    "reform", "retrieval_mrr", "select_heads", "stuffed_mamba", "translate",
]  # fmt: skip
