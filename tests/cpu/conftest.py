"""The CPU that the tests in this folder are of."""

import pytest

from fastgan.cpu import convolution as cpu_convolution


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """An Intel CPU that has AVX-512 and instructions for half precision, and takes layers as small as these."""
    monkeypatch.setattr(cpu_convolution, "_is_intel", lambda: True)
    monkeypatch.setattr(cpu_convolution, "lacks_avx512", lambda: False)
    monkeypatch.setattr(cpu_convolution, "_gains_in_float32", lambda dtype, trains: False)
    monkeypatch.setattr(cpu_convolution, "_LEAST_LOW", 1)
    monkeypatch.setattr(cpu_convolution, "_LEAST_CHANNELS", 6)
