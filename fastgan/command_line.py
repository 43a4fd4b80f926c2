"""How our command lines speak and end: one line for whatever is wrong, an exit status, tables with straight columns."""

import os
import sys
import warnings

from fastgan.checks import is_out_of_memory

_TAKE_MEMORY = ("batch_size", "image_size", "ngf", "ndf", "num")


def run_command(main, options, **renamed):
    """Call ``main()`` and return its exit status: 2 after one line for bad input or lack of memory, 130 after Ctrl-C.

    Args:
        options: names of the arguments that messages may begin with; the user knows ``image_size`` as --image-size.
        renamed: options of another name than the argument's: ``root="dataroot"``.
    """
    known = {name: name for name in options} | renamed
    print_what_can_be_shown()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", "stderr")
            return main()
    except (ValueError, OSError, Warning) as error:  # `python -W error` raises warnings
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


def print_what_can_be_shown():
    """Have standard output put a question mark where its encoding lacks a character, × in ASCII say."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def aligned(rows):
    """Lines of text with the cells of the rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _flag(name):
    return "--" + name.replace("_", "-")


def say(text, stream="stdout"):
    """Print a line that is no result: where nobody reads it any more (a closed pipe or terminal), the work goes on."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # for all that follows, and for Python, which flushes as it exits
