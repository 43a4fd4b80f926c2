"""Python programs that tests start, in processes of their own or in this one."""

import importlib.util
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


def main_of(script):
    """The function `main` of scripts/`script`.py."""
    spec = importlib.util.spec_from_file_location(f"scripts_{script}", ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
