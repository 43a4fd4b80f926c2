"""Command lines run in an empty folder, on one thread."""

from pathlib import Path

import pytest

from tests.scripts.commands import TINY, train


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_folder():
    """A run of two steps in the folder "run"."""
    assert train([*TINY, "--max-steps", "2", "--out", "run"]) == 0
    return Path("run")
