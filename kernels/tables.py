"""For kernels over the elements of many tensors: tables in GPU memory that say where those are."""

from contextlib import contextmanager

import torch

_late = None  # within `filled_after_capture`: what is to be filled


@contextmanager
def filled_after_capture():
    """Around the capture of a CUDA graph, which cannot copy from the host: tables made within are filled at its end.

    Yields their list. Whoever replays the graph keeps it: the graph knows no more of a table than its address.
    """
    global _late
    _late = tables = []
    try:
        yield tables
    finally:
        _late = None
    for table, rows in tables:
        table.copy_(_on(torch.device("cpu"), rows))


def _table(rows, device):
    if _late is None:
        return _on(device, rows)
    table = torch.empty((len(rows), len(rows[0])), dtype=torch.int64, device=device)
    _late.append((table, rows))
    return table


def _on(device, rows):
    return torch.tensor(rows, dtype=torch.int64, device=device)


class Tables:
    """tables(*lists), lists of tensors where the i-th have one size each → two tables, int64:

    addresses (tensors, lists), and blocks (programs, 3): which tensor, its first element here, its number of elements.
    Calls with the same tensors get the same tables.

    Args:
        block: elements of a program.
    """

    def __init__(self, block):
        self._block = block
        self._known = self._tables = None

    def __call__(self, first, *lists):
        addresses = [[tensor.data_ptr() for tensor in row] for row in zip(first, *lists, strict=True)]
        if _late is not None or addresses != self._known:
            blocks = [
                (i, start, tensor.numel())
                for i, tensor in enumerate(first)
                for start in range(0, tensor.numel(), self._block)
            ]
            tables = [_table(rows, first[0].device) for rows in (addresses, blocks)]
            if _late is not None:
                return tables
            self._known, self._tables = addresses, tables
        return self._tables
