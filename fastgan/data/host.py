"""Batches from the host's memory, read and sent ahead of the step that takes them."""

import queue
import threading
import time
from collections import deque

import torch

from fastgan.data.batches import batches, scale

_SLOTS = 3  # batches on their way to a GPU: one that a step takes, one that is being sent, one that is being read


class HostImages:
    """The batches of a data set that ``batches`` gives, scaled, on ``device``.

    For a GPU a thread reads batches into pinned memory, and a stream of its own sends each of them while the step
    before computes. For a CPU they are read when a step asks: there is no other processor that could go on meanwhile,
    and ``workers`` decode ahead there too.

    Args:
        dataset, batch_size, seed, flip, first_step, workers: as for ``batches``.
        device: where the batches go.
        dtype: of the batches; they are scaled in float32 and then rounded.

    Raises:
        ValueError: an argument that is not allowed, or fewer images than one batch.
    """

    def __init__(self, dataset, batch_size, *, device, dtype=torch.float32, seed, flip=False, first_step=0, workers=0):
        device, self.dtype = torch.device(device), dtype
        read = batches(dataset, batch_size, seed=seed, first_step=first_step, workers=workers, flip=flip)
        shape = (batch_size, dataset.nc, dataset.image_size, dataset.image_size)
        self._batches = _SentToGpu(read, shape, device) if device.type == "cuda" else _ReadWhenAsked(read)

    def before_step(self):
        """The images of the next step: (batch_size, nc, S, S) in [−1, 1], in channels_last memory.

        Raises:
            ValueError: no picture can be read.
        """
        return self._batches.next(self._finish)

    def _finish(self, images):
        return scale(images).to(dtype=self.dtype, memory_format=torch.channels_last)

    def seconds_waited(self):
        """How long steps have waited for images since this was asked last.

        On a GPU it is the time for which its stream stood still for them, of those steps that it has done already.
        """
        return self._batches.seconds_waited()

    def close(self):
        """End the reading."""
        self._batches.close()


class _ReadWhenAsked:
    def __init__(self, read):
        self._read, self._waited = read, 0.0

    def next(self, finish):
        start = time.perf_counter()
        images = next(self._read)
        self._waited += time.perf_counter() - start
        return finish(images)

    def seconds_waited(self):
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self):
        self._read.close()


class _ReadAhead:
    """A thread that reads batches into `buffers` before they are asked for.

    It never calls CUDA: another thread that did would spoil the capture of a CUDA graph.
    """

    def __init__(self, read, buffers):
        self._read = read
        self._free, self._filled = queue.SimpleQueue(), queue.SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        self._error = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fastgan-data", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            for batch in self._read:
                buffer = self._free.get()
                if self._closed:
                    break
                buffer.copy_(batch)
                self._filled.put(buffer)
        except BaseException as error:  # it is raised where the batch is asked for
            self._filled.put(error)
        finally:
            self._read.close()

    def take(self, wait=True):
        """The next batch, in one of the buffers. Without waiting, None if it is not there yet, or cannot be read.

        Raises:
            whatever reading this batch has raised.
        """
        if self._error is None:
            try:
                filled = self._filled.get(block=wait)
            except queue.Empty:
                return None
            if not isinstance(filled, BaseException):
                return filled
            self._error = filled  # for good: the thread has ended
        if wait:
            raise self._error
        return None

    def give_back(self, buffer):
        """Let a buffer be overwritten."""
        self._free.put(buffer)

    def close(self):
        """End the thread, after the batch that it is reading."""
        self._closed = True
        self._free.put(None)
        self._thread.join()


class _SentToGpu:
    def __init__(self, read, shape, device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        slots = [_Slot(shape, device) for _ in range(_SLOTS)]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # whose memory the slots may have been
        self._slots = {id(slot.pinned): slot for slot in slots}
        self._ahead = _ReadAhead(read, [slot.pinned for slot in slots])
        self._taken = self._coming = None
        self._waits = deque()
        self._waited = 0.0

    def next(self, finish):
        current = torch.cuda.current_stream(self._device)
        asked, came = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        asked.record(current)
        if self._taken is not None:
            # This also keeps the host from running ahead of the GPU by more than the slots.
            self._taken.sent.synchronize()
            self._ahead.give_back(self._taken.pinned)
            self._taken = None
        slot = self._coming or self._send(self._ahead.take())
        self._coming = None
        current.wait_event(slot.sent)
        came.record(current)
        images = finish(slot.on_gpu)
        slot.read.record(current)
        self._taken = slot
        ready = self._ahead.take(wait=False)
        if ready is not None:
            self._coming = self._send(ready)
        self._waits.append((asked, came))
        self._add_up()
        return images

    def _send(self, pinned):
        slot = self._slots[id(pinned)]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.read)  # until what was there before has been used
            slot.on_gpu.copy_(pinned, non_blocking=True)
            slot.sent.record(self._stream)
        return slot

    def _add_up(self):
        while self._waits and self._waits[0][1].query():
            asked, came = self._waits.popleft()
            self._waited += asked.elapsed_time(came) / 1000

    def seconds_waited(self):
        self._add_up()
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self):
        self._ahead.close()
        self._stream.synchronize()


class _Slot:
    """A batch on its way to the GPU, and how far it is: `sent` to the GPU, `read` there."""

    def __init__(self, shape, device):
        self.pinned = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.on_gpu = torch.empty(shape, dtype=torch.uint8, device=device)
        self.sent, self.read = torch.cuda.Event(), torch.cuda.Event()
