"""Whether a file is a table of measured convolutions."""

import warnings
from pathlib import Path

from fastgan.ops.tables import read_table


def why_no_table(path, gpu=None):
    """Why a file is no table (of ``gpu``, if that is given), in words; None where it is one, or is not there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_table(Path(path), gpu)
    return str(caught[0].message).partition(f"{path}: ")[2] if caught else None
