"""Global memory, which is the tensors that a kernel was given, and a block's shared memory with who touched it when."""

import ctypes

import numpy as np

from tests.emulator.program import PTXError

NOBODY, MANY = -1, -2


def _check_alignment(addresses, size):
    if (addresses % size).any():
        raise PTXError(f"a misaligned access: {size} bytes at an address that is no multiple of {size}")


class _Region:
    """The bytes from a tensor's first element to its last, and who touched them.

    Attributes:
        readers, writers: for each byte the block that did so, NOBODY or MANY.
        loads, stores: [(first bytes, size, warps)] of the running block since its last barrier.
    """

    def __init__(self, tensor):
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self.start, self.end = tensor.data_ptr(), tensor.data_ptr() + size
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self.start), np.uint8) if size else None
        self.readers, self.writers = np.full(size, NOBODY, np.int32), np.full(size, NOBODY, np.int32)
        self.loads, self.stores = [], []

    def check_races(self, block):
        """What the block's warps did since its last barrier, among each other and beside earlier blocks; forget it."""
        if self.loads and self.stores:
            readers = np.zeros(len(self.bytes), np.uint32)
            for first, size, warps in self.loads:
                np.bitwise_or.at(readers, _cells(first, size), _bits(warps)[:, None])
            for first, size, warps in self.stores:
                if (readers[_cells(first, size)] & ~_bits(warps)[:, None]).any():
                    raise self.race("a warp writes what another one reads, with no barrier in between,")
        for first, size, _ in self.loads:
            cells = _cells(first, size)
            if not np.isin(self.writers[cells], (NOBODY, block)).all():
                raise self.race("a block reads what another one writes,")
            before = self.readers[cells]
            self.readers[cells] = np.where((before == NOBODY) | (before == block), block, MANY)
        for first, size, _ in self.stores:
            cells = _cells(first, size)
            if not np.isin(self.readers[cells], (NOBODY, block)).all():
                raise self.race("a block writes what another one reads,")
            self.writers[cells] = block
        self.loads, self.stores = [], []

    def race(self, what):
        return PTXError(f"a race: {what} in the tensor of {self.shape} {self.dtype}")


def _cells(first, size):
    return first[:, None] + np.arange(size)


def _bits(warps):
    """Sets of warps, a bit each."""
    return np.left_shift(np.uint32(1), warps.astype(np.uint32))


class GlobalMemory:
    """The tensors' bytes; there is nothing around them.

    Blocks run in any order, and so do warps between two barriers: of two that touch the same byte none may write it.
    Atomic operations may; they name no warps.
    """

    def __init__(self, tensors):
        self._regions = [_Region(tensor) for tensor in tensors]
        self._block = 0

    def load(self, addresses, size, warps=None):
        """(n, size) bytes at the addresses that threads of the n warps read."""
        data = np.empty((len(addresses), size), np.uint8)
        for region, here, first in self._found(addresses, size):
            data[here] = region.bytes[_cells(first, size)]
            if warps is not None:
                region.loads.append((first, size, warps[here]))
        return data

    def store(self, addresses, data, warps=None):
        size = data.shape[1]
        for region, here, first in self._found(addresses, size):
            cells = _cells(first, size)
            others = (region.writers[cells] != NOBODY) & (region.writers[cells] != self._block)
            if warps is not None and (others & (region.bytes[cells] != data[here])).any():
                raise region.race("blocks write different values to the same byte")
            region.bytes[cells] = data[here]
            if warps is not None:
                region.stores.append((first, size, warps[here]))

    def barrier(self):
        for region in self._regions:
            region.check_races(self._block)

    def end_block(self):
        self.barrier()
        self._block += 1

    def _found(self, addresses, size):
        """(region, which of the addresses lie in it, their first bytes there) for each region with any."""
        _check_alignment(addresses, size)
        left = np.arange(len(addresses))
        for region in self._regions:
            if not len(left):
                return
            inside = (addresses[left] >= region.start) & (addresses[left] + size <= region.end)
            if inside.any():
                here = left[inside]
                yield region, here, addresses[here] - region.start
                left = left[~inside]
        if len(left):
            raise PTXError(self._outside(int(addresses[left[0]]), size))

    def _outside(self, address, size):
        message = f"an access of {size} bytes outside of all tensors"
        if not self._regions:
            return message
        near = min(self._regions, key=lambda region: max(region.start - address, address + size - region.end))
        return (
            f"{message}: nearest is one of {near.shape} {near.dtype}, {near.end - near.start} bytes, "
            f"and the access is at byte {address - near.start} from its beginning"
        )


class SharedMemory:
    """A block's shared memory, and for each byte which warps have read and written it since the last barrier.

    Warps run in any order between two barriers, so of two that touch the same byte in between none may write it.
    """

    def __init__(self, size, warps):
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN, whatever the floating-point type
        self._set = np.dtype(np.uint8 if warps <= 8 else np.uint32)  # sets of warps, a bit each
        self._readers, self._writers = np.zeros(size, self._set), np.zeros(size, self._set)
        self._awaited = np.zeros(size, np.bool_)  # a copy into it is on its way
        self._unfenced = np.zeros(size, np.bool_)  # stored since the last fence: wgmma may not see it

    def barrier(self):
        self._readers[:] = 0
        self._writers[:] = 0

    def fence(self):
        self._unfenced[:] = False

    def load(self, addresses, size, warps):
        """(n, size) bytes at the addresses that threads of the n warps read."""
        cells = self._cells(addresses, size)
        self._check_read(cells, ~self._bit(warps)[:, None])
        self._mark(self._readers, cells, warps)
        return self.bytes[cells]

    def load_for_wgmma(self, addresses, size, warps):
        """(n, size) bytes that all of the warps of a group read together."""
        cells = self._cells(addresses, size)
        self._check_read(cells, ~self._set.type(0))
        if self._unfenced[cells].any():
            raise PTXError("wgmma reads what stores wrote, without fence.proxy.async in between")
        self._readers[cells] |= np.bitwise_or.reduce(self._bit(warps))
        return self.bytes[cells]

    def store(self, addresses, data, warps):
        cells = self._cells(addresses, data.shape[1])
        self._check_write(cells, warps)
        self.bytes[cells] = data
        self._check_agreement(cells, data, warps)
        self._mark(self._writers, cells, warps)
        self._unfenced[cells] = True

    def begin_copy(self, addresses, size, warps):
        """A copy of each warp may write its bytes from now on. Returns what `end_copy` takes."""
        cells = self._cells(addresses, size)
        self._check_write(cells, warps)
        self._mark(self._writers, cells, warps)
        self.bytes[cells] = 0xFF
        self._awaited[cells] = True
        return cells, warps

    def end_copy(self, copy, data):
        """The copy's warps have waited for it; others see it after the next barrier."""
        cells, warps = copy
        self._awaited[cells] = False
        self.bytes[cells] = data
        self._check_agreement(cells, data, warps)
        self._mark(self._writers, cells, warps)
        self._unfenced[cells] = False  # Triton 3.6 has no fence between these copies and wgmma, 3.8 has

    def _bit(self, warps):
        return np.left_shift(1, warps).astype(self._set)

    def _cells(self, addresses, size):
        if (addresses < 0).any() or (addresses + size > len(self.bytes)).any():
            raise PTXError(
                f"an access outside of shared memory: bytes {addresses.min()} to {addresses.max() + size - 1} "
                f"of {len(self.bytes)}"
            )
        _check_alignment(addresses, size)
        return addresses[:, None] + np.arange(size)

    def _check_read(self, cells, others):
        if self._awaited[cells].any():
            raise PTXError("shared memory is read before the copy into it was waited for")
        if (self._writers[cells] & others).any():
            raise PTXError("a race: a warp reads what another one writes, with no barrier in between")

    def _check_write(self, cells, warps):
        if self._awaited[cells].any():
            raise PTXError("shared memory is written before the copy into it was waited for")
        others = ~self._bit(warps)[:, None]
        if (self._readers[cells] & others).any():
            raise PTXError("a race: a warp writes what another one reads, with no barrier in between")
        if (self._writers[cells] & others).any():
            raise PTXError("a race: two warps write the same byte, with no barrier in between")

    def _check_agreement(self, cells, data, warps):
        """Of several warps that one instruction makes write the same byte, all must write the same.

        Lanes of one warp need not: they may hold a sum that differs in its last bit, and any of them is right.
        """
        lost = (self.bytes[cells] != data).any(1)
        for warp in np.unique(warps[lost]):
            mine = cells[warps == warp].ravel()
            last = self.bytes.copy()
            last[mine] = data[warps == warp].ravel()
            if (last[mine] != self.bytes[mine]).any():
                raise PTXError("a race: warps write different values to the same byte at once")

    @staticmethod
    def _mark(sets, cells, warps):
        for warp in np.unique(warps):
            sets[cells[warps == warp]] |= sets.dtype.type(1 << warp)
