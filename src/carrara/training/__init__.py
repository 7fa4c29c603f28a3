"""The training loop and what it keeps: the running mean, checkpoints, the run folder and its log."""

from carrara.training.loop import Trainer
from carrara.training.progress import Progress

__all__ = ["Progress", "Trainer"]
