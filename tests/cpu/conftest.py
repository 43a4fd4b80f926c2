"""The CPU that the tests in this folder are of."""

import pytest

from fastgan.cpu import choice
from fastgan.cpu import convolution as cpu_convolution


class _NoAnswers(dict):
    """Of questions that are asked again after what decides them was patched."""

    def get(self, key):
        return None


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """An Intel CPU that has AVX-512 and instructions for half precision, and takes layers as small as these."""
    monkeypatch.setattr(choice, "_answers", _NoAnswers())
    monkeypatch.setattr(choice, "cpu_kind", lambda: "Intel")
    monkeypatch.setattr(cpu_convolution, "gains_in_float32", lambda dtype, trains: False)
    monkeypatch.setattr(choice, "_LEAST_LOW", 1)
    monkeypatch.setattr(choice, "_LEAST_CHANNELS", 6)
