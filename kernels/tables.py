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
        table.copy_(_host(rows, table.device), non_blocking=True)


def _table(rows, device):
    if _late is None:
        return _host(rows, device).to(device, non_blocking=True)
    table = torch.empty((len(rows), len(rows[0])), dtype=torch.int64, device=device)
    _late.append((table, rows))
    return table


def _host(rows, device):
    """The rows in memory from which a copy to the device need not be waited for."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")


class Tables:
    """tables(*lists), lists of tensors where the i-th have one size each → two tables, int64:

    addresses (tensors, lists), and blocks (programs, 3): which tensor, its first element here, its number of elements.
    They are kept for calls with the same tensors, or tensors of the same sizes.

    Args:
        block: elements of a program.
    """

    def __init__(self, block):
        self._block = block
        self._addresses = self._blocks = (None, None)  # what it was made of, the table

    def __call__(self, first, *lists):
        device = first[0].device
        addresses = [[tensor.data_ptr() for tensor in row] for row in zip(first, *lists, strict=True)]
        sizes = [tensor.numel() for tensor in first]
        if _late is not None:
            return _table(addresses, device), _table(self._blocks_of(sizes), device)
        if addresses != self._addresses[0]:
            self._addresses = addresses, _table(addresses, device)
        if sizes != self._blocks[0]:
            self._blocks = sizes, _table(self._blocks_of(sizes), device)
        return self._addresses[1], self._blocks[1]

    def _blocks_of(self, sizes):
        return [(i, start, size) for i, size in enumerate(sizes) for start in range(0, size, self._block)]
