"""What is wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A folder that can't be read, doesn't fit the model, or can't be written for it."""
