"""Checkpoints: a model's name to its files, and its files to tensors, one at a time."""

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.resolve import look, open_checkpoint, resolve

__all__ = ["Checkpoint", "look", "open_checkpoint", "resolve"]
