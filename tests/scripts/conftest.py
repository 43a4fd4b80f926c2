"""Command lines run in an empty folder, on one thread."""

from pathlib import Path

import pytest
import torch

from tests.scripts.commands import TINY, train


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_folder():
    """A run of two steps in the folder "run"."""
    assert train([*TINY, "--max-steps", "2", "--out", "run"]) == 0
    return Path("run")
