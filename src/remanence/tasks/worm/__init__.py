"""WorM: ten tests of human working memory, each with its trials in symbols, an answer by rule, and measures of behaviour.

A new task is a function in `trials` that writes the frames of many trials at once, its entry in `problems`, and its rule in `rules`.
"""

from .measures import accuracy_by, clusters, frame_ends, serial_position, switch_cost, task_variance, top_recall
from .problems import PROBLEMS, TRAINED, Problem
from .rules import Frame, frames, solve
from .task import JOINT, Trial, WorMSymbolic, batch
from .trials import MODALITIES, TRAITS, VOCAB_SIZE

__all__ = [
    "Frame", "JOINT", "MODALITIES", "PROBLEMS", "Problem", "TRAINED", "TRAITS", "Trial", "VOCAB_SIZE", "WorMSymbolic", "accuracy_by",
    "batch", "clusters", "frame_ends", "frames", "serial_position", "solve", "switch_cost", "task_variance", "top_recall",
]  # fmt: skip
