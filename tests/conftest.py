"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import sys

import pytest
import torch

from tests.interpreter import use_interpreter

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start, too

HAS_GPU = torch.cuda.is_available()
# What kernels are tested in: the interpreter computes bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16)
if not HAS_GPU:
    use_interpreter()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def ieee_float32():
    """Float32 means float32: cuDNN takes TF32 by its default, but only for some sizes, and a CPU never does."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul) if HAS_GPU else (torch.backends.cudnn.conv,)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.fixture
def one_thread():
    """Networks this small are computed fastest by one thread, above all where other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Tests compile the same classes: after eight of them Dynamo would refuse, whichever test then comes."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def device():
    """Where the kernels are tested."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def triton_backend(monkeypatch):
    """Run the operators' kernels, on the CPU too."""
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")


@pytest.fixture
def choose_in(monkeypatch):
    """A function (module, choose) that has the module's operators take the Choices of this `choose`.

    On a GPU calls are replayed for as long as choices stand: those of others are forgotten before, and these after it.
    """
    from fastgan.ops import choice

    def replace(module, choose):
        monkeypatch.setattr(module, "choose", choose)
        choice.forget()

    yield replace
    choice.forget()


@pytest.fixture(params=["auto", "triton"])
def each_backend(request, monkeypatch):
    """What runs by itself here, and the kernels."""
    monkeypatch.setenv("FASTGAN_BACKEND", request.param)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written yet reads as NaN, so that an element left out shows."""
    with torch.device("meta"):  # which finds out once which functions make tensors: it must see torch's own
        torch.empty(0)

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned_allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
