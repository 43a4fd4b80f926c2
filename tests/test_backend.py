"""Which implementation runs where, as FASTGAN_BACKEND and the GPU have it."""

import pytest
import torch

from fastgan import backend

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.delenv("FASTGAN_BACKEND", raising=False)


@pytest.mark.parametrize("capability, chosen", ((61, "reference"), (70, "triton"), (120, "triton"), (0, "triton")))
@pytest.mark.parametrize("how", ("eager", "compiled"))
def test_gpus_that_triton_does_not_compile_for(capability, chosen, how, monkeypatch):
    """0: another maker's, or one of fake tensors."""
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "_capability", lambda index: capability)

    def is_ours(x):
        return x + (backend.select(CUDA, torch.float32)[0] == "triton")

    if how == "compiled":
        is_ours = torch.compile(is_ours, fullgraph=True, backend="eager")
    assert is_ours(torch.zeros(())) == (chosen == "triton")


def test_reasons(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "_capability", lambda index: 61)
    reason = "Triton needs compute capability 7.0, this GPU has 6.1"
    assert backend.select(CUDA, torch.float32) == ("reference", reason)
    monkeypatch.setattr(backend, "_capability", lambda index: 90)
    assert backend.select(CUDA, torch.float32) == ("triton", "the tensors are on CUDA")
    assert backend.select(CUDA, torch.float64) == ("reference", "no kernels for torch.float64")
    assert backend.select(torch.device("cpu"), torch.float32) == ("reference", "the tensors are on 'cpu'")
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    reason = "Triton's interpreter computes bfloat16 wrongly"
    assert backend.select(CUDA, torch.bfloat16) == ("reference", reason)
    assert backend.select(CUDA, torch.float16)[0] == "triton"
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.select(CUDA, torch.float32) == ("reference", "the triton package is not installed")
