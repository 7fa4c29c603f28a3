"""The training loop and what it keeps: the running mean, checkpoints, the run folder and its log."""

from carrara.training.loop import Progress, Trainer

__all__ = ["Progress", "Trainer"]
