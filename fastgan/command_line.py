"""How our command lines end: one line for whatever is wrong, and an exit status."""

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
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return main()
    except (ValueError, OSError) as error:
        name, *rest = " ".join(str(error).splitlines()).split(" ", 1)
        name = "--" + known[name].replace("_", "-") if name in known else name
        print(" ".join(["error:", name, *rest]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
