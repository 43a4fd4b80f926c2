"""How our command lines speak and end: one line for whatever is wrong, and an exit status."""

import os
import sys
import warnings


def run_command(main, options, **renamed):
    """Call ``main()`` and return its exit status: 2 after one line for bad input, 130 after Ctrl-C.

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
        name = "--" + known[name].replace("_", "-") if name in known else name
        say(" ".join(["error:", name, *rest]), "stderr")
        return 2
    except KeyboardInterrupt:
        say("interrupted", "stderr")
        return 130


def say(text, stream="stdout"):
    """Print a line that is no result: where nobody reads it any more (a closed pipe or terminal), the work goes on."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # for all that follows, and for Python, which flushes as it exits
