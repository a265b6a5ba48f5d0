"""What is in a memory."""

from .recall import Recall, Share

__all__ = ["Recall", "Share"]
