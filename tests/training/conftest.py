import pytest

from fastgan.training import TrainConfig

TINY = {
    "dataset": "fake",
    "image_size": 8,
    "batch_size": 4,
    "nz": 5,
    "ngf": 4,
    "ndf": 4,
    "max_steps": 6,
    "log_every": 2,
    "save_every": 3,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All of these tests."""


@pytest.fixture
def tiny():
    """Makes a TrainConfig that trains in a moment; arguments change options."""
    return lambda **changes: TrainConfig(**{**TINY, **changes})
