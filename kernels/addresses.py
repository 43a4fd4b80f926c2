"""For kernels over the elements of many tensors: tables in GPU memory that say where those are."""

import threading
from contextlib import contextmanager

import torch

# .captured: of a thread within `filled_after_capture`, all tables that it asked for, and what is to be filled.
_of_thread = threading.local()


@contextmanager
def filled_after_capture():
    """Around a capture of a CUDA graph, which cannot copy from the host: tables of this thread are filled at its end.

    Yields the list of them. Whoever replays the graph keeps it: the graph knows no more of a table than its address.
    """
    tables, unfilled = _of_thread.captured = [], []
    try:
        yield tables
    except BaseException:
        for owner, _ in unfilled:
            owner.forget()
        raise
    finally:
        _of_thread.captured = None
    for owner, rows in unfilled:
        owner.table.copy_(_host(rows, owner.table.device), non_blocking=True)


def _host(rows, device):
    """The rows in memory from which a copy to the device need not be waited for."""
    return torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class _Table:
    """A table, kept until it is to say something else."""

    def __init__(self):
        self.forget()

    def forget(self):
        self._key = self.table = self._spare = None

    def of(self, key, rows, device):
        """The table that holds `rows()`, made anew when `key` is another."""
        if captured := getattr(_of_thread, "captured", None):
            return self._in_capture(key, rows, *captured)
        if key != self._key:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "this capture of a CUDA graph would copy addresses from memory that replays do not have any more: "
                    "let the TrainStep capture itself, with cuda_graph=True"
                )
            self._key, self.table = key, _host(rows(), device).to(device, non_blocking=True)
        if self._spare is None or self._spare.shape != self.table.shape:
            self._spare = torch.empty_like(self.table)
        return self.table

    def _in_capture(self, key, rows, tables, unfilled):
        # Memory that is allocated within a capture may be what earlier kernels of the graph write to, at each replay.
        if key != self._key:
            rows = rows()
            if self._spare is None or self._spare.shape != (len(rows), len(rows[0])):
                raise RuntimeError(
                    "before a CUDA graph is captured, call this once with as many tensors of these sizes"
                )
            self._key, self.table, self._spare = key, self._spare, None
            unfilled.append((self, rows))
        tables.append(self.table)
        return self.table


class Tables:
    """tables(*lists), lists of tensors where the i-th have one size each → two tables, int64:

    addresses (tensors, lists), and blocks (programs, 3): which tensor, its first element here, its number of elements.
    They are kept for calls with the same tensors, or tensors of the same sizes.

    Args:
        block: elements of a program.
    """

    def __init__(self, block):
        self._block = block
        self._addresses, self._blocks = _Table(), _Table()

    def __call__(self, first, *lists):
        device = first[0].device
        addresses = [[tensor.data_ptr() for tensor in row] for row in zip(first, *lists, strict=True)]
        sizes = [tensor.numel() for tensor in first]
        return (
            self._addresses.of(addresses, lambda: addresses, device),
            self._blocks.of(sizes, lambda: self._blocks_of(sizes), device),
        )

    def _blocks_of(self, sizes):
        return [(i, start, size) for i, size in enumerate(sizes) for start in range(0, size, self._block)]
