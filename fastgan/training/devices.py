"""Which device computes, and what it can compute in."""

import re
import warnings

import torch

from fastgan.backend import PRECISIONS
from fastgan.checks import check_choice


def pick_device(name="auto"):
    """The torch.device for "auto" (CUDA if there is one that torch can use, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: another name, or a CUDA device that this machine does not have or this build of torch cannot use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and (why := _why_unusable()):
            warnings.warn(f"the CPU computes: {why}", stacklevel=2)
            name = "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} needs CUDA, which this machine or this build of torch does not have")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
        if why := _why_unusable(device.index):
            raise ValueError(f"device {name!r} cannot be used: {why}")
    return device


def _why_unusable(index=None):
    """None, or why torch starts nothing on this CUDA device: its builds leave out code for the oldest GPUs."""
    major, minor = torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    known = [match for arch in built_for if (match := re.match(r"(sm|compute)_(\d+)\d", arch))]  # none for ROCm
    # Machine code runs on GPUs of the same generation; PTX, which the driver compiles, on later ones too.
    if not known or any(int(a[2]) == major or (a[1] == "compute" and int(a[2]) < major) for a in known):
        return None
    return (
        f"this build of torch, for {', '.join(built_for)}, has no code for {torch.cuda.get_device_name(index)}, "
        f"of compute capability {major}.{minor}"
    )


def check_precision(precision, device):
    """Raise ValueError unless ``precision`` is one of ``PRECISIONS`` and ``device`` computes in it."""
    check_choice("precision", precision, PRECISIONS)
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("precision fp16 needs a CUDA device; on the CPU use fp32 or bf16")
    if precision != "fp32" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        needed = (8, 0) if precision == "bf16" else (5, 3)
        if capability < needed:
            raise ValueError(
                f"precision {precision} needs a CUDA device of compute capability {needed[0]}.{needed[1]}; "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
            )


def synchronize(device):
    """Wait until ``device`` has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device):
    """The most memory used so far, in MiB: allocated by torch on a GPU, resident in the process on a CPU.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
        import sys
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
