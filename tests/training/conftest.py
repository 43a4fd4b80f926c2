import pytest
import torch

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
def one_thread():
    """Networks this small are computed fastest by one thread, above all where other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """Makes a TrainConfig that trains in a moment; arguments change options."""
    return lambda **changes: TrainConfig(**{**TINY, **changes})
