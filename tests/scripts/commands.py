"""The command lines that are tested, in this process or in one of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT, main_of

SCRIPTS = ROOT / "scripts"
TINY = "--dataset fake --image-size 8 --batch-size 4 --nz 5 --ngf 4 --ndf 4 --device cpu".split()
train, generate = main_of("train"), main_of("generate")


def contents():
    """Every file below the current folder with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refuse(main, capsys, *arguments):
    """Run a command line that must end with status 2 and one line of error, and change no file; gives the line."""
    before = contents()
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
        lines = 1
    except SystemExit as exit:  # argparse prints its usage first
        status, lines = exit.code, None
    message = capsys.readouterr().err
    assert status == 2, message
    assert contents() == before
    if lines:
        assert message.startswith("error: ") and message.count("\n") == lines, message
    return message


def start(*arguments, script="train.py", **variables):
    """The process of a command line of its own."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
