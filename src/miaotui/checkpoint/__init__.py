"""Checkpoints: a model's name to its files, and its files to tensors, one at a time."""

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.resolve import open_checkpoint, resolve

__all__ = ["Checkpoint", "open_checkpoint", "resolve"]
