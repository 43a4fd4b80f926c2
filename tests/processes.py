"""Python programs that tests start."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_compiling(*arguments, **variables):
    """`python *arguments`, at the top of the repository and with `variables` in its environment.

    In this process Triton's interpreter may have taken the place of its compiler; in that one it has not.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
