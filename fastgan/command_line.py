"""How our command lines speak and end: one line for whatever is wrong, and an exit status."""

import importlib
import os
import sys
import warnings

from fastgan.checks import is_out_of_memory

_TAKE_MEMORY = ("batch_size", "image_size", "ngf", "ndf", "num")
_PACKAGES = {"PIL": "pillow"}  # those of another name than their module


def run_command(main, options, **renamed):
    """Call ``main()`` and return its exit status: 2 after one line for bad input or lack of memory, 130 after Ctrl-C.

    Args:
        options: names of the arguments that messages may begin with; the user knows ``image_size`` as --image-size.
        renamed: options of another name than the argument's: ``root="dataroot"``.
    """
    known = {name: name for name in options} | renamed
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", "stderr")
            return main()
    except (ValueError, OSError) as error:
        name, *rest = " ".join(str(error).splitlines()).split(" ", 1)
        name = _flag(known[name]) if name in known else name
        say(" ".join(["error:", name, *rest]), "stderr")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).partition("\n")[0] or type(error).__name__
        flags = " or ".join(_flag(name) for name in _TAKE_MEMORY if name in known)
        say(f"error: not enough memory: {cause}" + (f"; a smaller {flags} needs less" if flags else ""), "stderr")
        return 2
    except KeyboardInterrupt:
        say("interrupted", "stderr")
        return 130


def _flag(name):
    return "--" + name.replace("_", "-")


def require(module, user, extra="train"):
    """Import a module that only some of our work needs; ValueError with the remedy where it is missing.

    Args:
        user: what needs it, as the message begins: "training".
        extra: which of our optional dependencies it is among.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{needs_package(user, module, extra)} ({error})") from error


def needs_package(user, module, extra="train"):
    """What is said where the package of a module is missing; the arguments are those of ``require``."""
    name = module.partition(".")[0]
    return f'{user} needs the package {_PACKAGES.get(name, name)}: pip install -e ".[{extra}]"'


def first_few(things, separator=", ", most=5):
    """The first few of a list in one line, and … where there are more."""
    said = [str(thing) for thing in things]
    return separator.join(said[:most] + ["…"] * (len(said) > most))


def say(text, stream="stdout"):
    """Print a line that is no result: where nobody reads it any more (a closed pipe or terminal), the work goes on."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # for all that follows, and for Python, which flushes as it exits
