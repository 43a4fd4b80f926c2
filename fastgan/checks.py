"""What is said of bad input: one message with the argument's name, what came and what is allowed."""

import importlib
import numbers
import sys

import torch

_NUMBERS = (float, int, numbers.Real)  # first those that are told at once
_PACKAGES = {"PIL": "pillow"}  # those of another name than their module


def check_integer(name, value, least, most=None):
    """Raise ValueError unless ``value`` is an integer of at least ``least`` and at most ``most``."""
    if not is_integer(value) or value < least or (most is not None and value > most):
        unlimited = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        allowed = unlimited if most is None else f"an integer from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def check_choice(name, value, allowed):
    """Raise ValueError unless ``value`` is one of those that are allowed."""
    if value not in tuple(allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_positive(name, value):
    """Raise ValueError unless ``value`` is a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:  # an integer may be larger
        raise ValueError(f"{name} must be a positive number; got {value!r}")


def is_integer(value):
    """Whether it is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value):
    """Whether it is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def is_out_of_memory(error):
    """Whether an exception says that the machine's memory, or the GPU's, does not suffice."""
    said = ("out of memory", "can't allocate memory", "not enough memory")  # GPUs; CPUs; CPUs with Windows
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def in_short(error, most=200):
    """An exception in a part of a line: its type and the first sentence of what it says, cut to ``most`` characters."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}"[:most]


def require(module, user, extra="train"):
    """Import a module that only some of our work needs; ValueError with the remedy where it is missing or broken.

    Args:
        user: what needs it, as the message begins: "training".
        extra: which of our optional dependencies it is among.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{needs_package(user, module, extra)} ({in_short(error)})") from error


def needs_package(user, module, extra="train"):
    """What is said where the package of a module is missing; the arguments are those of ``require``."""
    name = module.partition(".")[0]
    return f'{user} needs the package {_PACKAGES.get(name, name)}: pip install -e ".[{extra}]"'


def first_few(things, separator=", "):
    """The first few of a list in one line, and … where there are more."""
    said = [str(thing) for thing in things]
    return separator.join(said[:5] + ["…"] * (len(said) > 5))


def pair(name, value, least=0):
    """An int or a pair of ints as a pair; ValueError for anything else, and for ints below ``least``."""
    values = value if isinstance(value, list | tuple) else [value, value]
    if len(values) != 2 or not all(map(is_integer, values)):
        raise ValueError(f"{name} must be an int or a pair of ints; got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")
    return tuple(values)


def check_loss(logits, targets):
    """Raise for logits that are not floating point, empty or on different devices, and targets outside [0, 1].

    Args:
        logits, targets: {name: value}.
    """
    devices = set()
    for name, tensor in logits.items():
        check_tensor(name, tensor)
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty; got shape {tuple(tensor.shape)}")
        devices.add(tensor.device)
    if len(devices) > 1:
        on = ", ".join(str(tensor.device) for tensor in logits.values())
        raise ValueError(f"logits must be on one device; got {on}")
    for name, target in targets.items():
        if not (is_number(target) or (torch.is_tensor(target) and target.dim() == 0)):
            raise TypeError(f"{name} must be a number between 0 and 1; got {target!r}")
        if not 0.0 <= target <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1; got {target!r}")


def check_loss_of_parts(logits, targets):
    """`check_loss` of logits that consist of one part or two equal ones, each with its target."""
    if not isinstance(targets, list | tuple) or len(targets) not in (1, 2):
        raise ValueError(f"targets must be one or two numbers in a tuple; got {targets!r}")
    fits = isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.numel() > 0
    if not (fits and all([0.0 <= target <= 1.0 for target in targets])):  # asked at each step, so not by their names
        check_loss({"logits": logits}, {f"targets[{i}]": target for i, target in enumerate(targets)})
    if len(targets) == 2 and (logits.dim() == 0 or len(logits) % 2):
        raise ValueError(f"logits must have two equal parts for two targets; got shape {tuple(logits.shape)}")


def check_tensor(name, value):
    """Raise TypeError unless it is a tensor of floating-point numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {value.dtype}")
