"""Which implementation the operators run: our Triton kernels, or the plain-torch reference beside each operator."""

import functools
import importlib.util
import os
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from fastgan.checks import check_choice

_CHOICES = ("auto", "triton", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# What the kernels compute with, as options name it. Everything else, float64 say, goes to the reference.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNEL_DTYPES = tuple(PRECISIONS.values())
OLDEST = 70  # the compute capability from which on Triton compiles for GPUs of NVIDIA's
# The dictionaries of the hooks that are registered for every module there is.
HOOKS_OF_ALL = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)
# Where os.environ keeps FASTGAN_BACKEND. Its own look-up of what is not set raises and catches two errors, which takes
# as long as a small operator.
_environment, _key = os.environ._data, os.environ.encodekey("FASTGAN_BACKEND")


@contextmanager
def without_autocast(device_type):
    """Within it autocast casts nothing: what is called has chosen its dtypes. In half the time of `torch.autocast`."""
    enabled = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, enabled)


def constant_result(function):
    """`torch.compiler.assume_constant_result`, which imports Dynamo, as long as torch itself takes, to do just this."""
    function._dynamo_marked_constant = True
    return function


@constant_result
def _choice():
    """The value of FASTGAN_BACKEND, checked."""
    if _key not in _environment:
        return "auto"
    choice = os.environ["FASTGAN_BACKEND"]
    check_choice("FASTGAN_BACKEND", choice, _CHOICES)
    return choice


@constant_result
def interpreted():
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@constant_result
def capability(index):
    """10 · major + minor of the compute capability of GPU number `index`; 0 of another maker's GPU, and of none."""
    return _capability(index)


@functools.cache
def _capability(index):
    if torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@constant_result
def transformed():
    """Whether we are inside of torch.func's transforms (grad, vmap, jvp, …) or of forward-mode differentiation.

    Custom operators do not work there: PyTorch refuses their reverse mode, and forward mode takes their results for
    constants.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@constant_result
def has_dispatch_mode():
    """Whether a TorchDispatchMode sees every operator and may keep its result, as selective checkpointing does."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_batched(*tensors):
    """Whether a backward computes with one of many gradients at once, or within a transform, though forward did not.

    That is ``torch.autograd.grad(..., is_grads_batched=True)``, and ``jacobian`` and ``hessian`` with
    ``vectorize=True``. It maps operators of PyTorch, and neither ours nor questions for a memory format.
    """
    if torch.compiler.is_compiling():
        return False
    return transformed() or any([torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors])


def select(device, dtype):
    """(name, reason): "triton" or "reference" for tensors of this device and dtype, and why.

    FASTGAN_BACKEND=auto takes Triton on CUDA and the reference elsewhere; `triton` insists, which on a CPU needs
    Triton's interpreter (TRITON_INTERPRET=1); `reference` forces plain torch.

    Raises:
        ValueError: FASTGAN_BACKEND has another value, or asks for Triton where it cannot run.
    """
    choice = _choice()
    if choice == "reference":
        return "reference", "FASTGAN_BACKEND=reference"
    if device.type == "meta":
        return "reference", "meta tensors have no numbers for kernels"
    if choice == "triton":
        if not HAS_TRITON:
            raise ValueError("FASTGAN_BACKEND=triton, but the triton package is not installed")
        if device.type != "cuda" and not interpreted():
            raise ValueError(
                f"FASTGAN_BACKEND=triton, but the tensors are on {device.type!r}: the kernels need a CUDA device, "
                "or TRITON_INTERPRET=1 to run in the interpreter"
            )
    elif device.type != "cuda":
        return "reference", f"the tensors are on {device.type!r}"
    elif not HAS_TRITON:
        return "reference", "the triton package is not installed"
    elif 0 < (has := capability(device.index)) < OLDEST:
        return "reference", f"Triton needs compute capability {OLDEST / 10}, this GPU has {has / 10}"
    if dtype not in KERNEL_DTYPES:
        return "reference", f"no kernels for {dtype}"
    if dtype == torch.bfloat16 and interpreted():
        return "reference", "Triton's interpreter computes bfloat16 wrongly"
    if transformed():
        return "reference", "plain torch inside of torch.func's transforms and forward-mode differentiation"
    return "triton", "FASTGAN_BACKEND=triton" if choice == "triton" else "the tensors are on CUDA"


def may_run_kernels(tensor):
    """Whether `select` may give "triton" for a tensor: the first question, as a small network feels each on a CPU."""
    return tensor.is_cuda or forces_triton()


def forces_triton():
    """Whether FASTGAN_BACKEND insists on our kernels, wherever the tensors are and whatever else is faster."""
    return _choice() == "triton"


def matmul_precision(dtype):
    """How the kernels multiply: TF32 for float32 only where torch's setting for convolutions allows it."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
        return "ieee"
    return "tf32"
