"""Training: one GAN update as an object, and runs with records, checkpoints and resuming."""

from fastgan.training.allocation import keep_freed_memory
from fastgan.training.checkpoints import load_generator, read_checkpoint
from fastgan.training.config import TrainConfig
from fastgan.training.generate import generate
from fastgan.training.loop import train
from fastgan.training.run import Run, new_run, resumed_run
from fastgan.training.step import TrainStep

__all__ = [
    "Run",
    "TrainConfig",
    "TrainStep",
    "generate",
    "keep_freed_memory",
    "load_generator",
    "new_run",
    "read_checkpoint",
    "resumed_run",
    "train",
]
