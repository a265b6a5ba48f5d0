"""What is in a memory."""

from .gated_rnn import GatedRNN, linear_attention_to_gated_rnn
from .recall import Recall, Share

__all__ = ["GatedRNN", "Recall", "Share", "linear_attention_to_gated_rnn"]
