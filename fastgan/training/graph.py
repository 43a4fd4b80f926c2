"""A training step as one CUDA graph: hundreds of launches become one."""

import gc
from contextlib import contextmanager

import torch

from fastgan.kernels.addresses import filled_after_capture
from fastgan.memory_format import fastest_format

WARMUP_STEPS = 3  # before the capture: compilation, cuDNN's choice of algorithms, the optimizers' state


@contextmanager
def capturing(graph, **options):
    """torch.cuda.graph(graph, **options), which other graphs do not disturb and which disturbs nothing if it fails."""
    # A graph that is garbage would invalidate the capture, were it collected within (pytorch#161037).
    gc.collect()
    enabled, current = gc.isenabled(), torch.cuda.current_stream()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except BaseException:
        # A capture that failed may leave its stream the current one, and the generator of torch before 2.13 as if it
        # went on: that would draw nothing more. With another state it does, but no more in step with earlier graphs.
        torch.cuda.set_stream(current)
        if torch.__version__ < "2.13":
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        raise
    finally:
        if enabled:
            gc.enable()


class StepGraph:
    """Calls a step as it is a few times, then captures it and replays the capture.

    Every call is a whole step of training, the first ones too. A capture repeats what was launched, not what Python
    decided: whoever changes the networks or the optimizers in kind (not in value) starts again with `forget`.

    Args:
        step: function of a batch of images (N, ...), or of None, that returns {name: 0-dim tensor}. Whatever it
            reads must stay where it is in memory.
        device: the CUDA device.
    """

    def __init__(self, step, device):
        self._step, self._device = step, device
        self._warmup_stream = torch.cuda.Stream(device)  # one for all of them, which then use the same memory
        self.forget()

    def forget(self):
        """Drop the capture; the next calls warm up and capture anew."""
        self._graph = self._images = self._losses = self._tables = self._kind = None
        self._warmups = 0

    @property
    def captured(self):
        return self._graph is not None

    def __call__(self, images):
        """One step. Images of another shape or dtype than the captured ones take the step as it is."""
        kind = None if images is None else (images.shape, images.dtype)
        if self._graph is None:
            if kind != self._kind:  # what is captured has run as often: a last, smaller batch is not
                self._kind, self._warmups = kind, 0
            if self._warmups < WARMUP_STEPS:
                self._warmups += 1
                return self._aside(images)
            self._capture(images)
        if kind != self._kind:
            return self._step(images)
        if images is not None:
            self._images.copy_(images)
        self._graph.replay()
        # Copied, because the next replay writes to the same place.
        return dict(zip(self._names, self._losses.clone().unbind(), strict=True))

    def _aside(self, images):
        """The step on a stream of its own, as capture wants its warm-up."""
        stream, current = self._warmup_stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return self._step(images)
        finally:  # also of a step that failed: the caller may go on, with what it had started still to run
            current.wait_stream(stream)

    def _capture(self, images):
        # In the layout that the step computes in, or a copy more is made, and kept, within it.
        self._images = None if images is None else images.clone(memory_format=fastest_format(images))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        try:
            # On a stream of this device: torch's own for captures is of the device that captured first. Other threads
            # go on preparing batches meanwhile.
            with (
                filled_after_capture() as self._tables,
                torch.cuda.device(self._device),
                capturing(graph, stream=torch.cuda.Stream(self._device), capture_error_mode="thread_local"),
            ):
                losses = self._step(self._images)
                self._losses = torch.stack(list(losses.values()))
        except BaseException as error:
            self.forget()  # the tables of this capture were never filled
            if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                "the step cannot be captured in a CUDA graph: something in it waits for the GPU or depends on values "
                "there (.item(), a data-dependent branch); cuda_graph=False trains it as it is"
            ) from error
        self._graph, self._names = graph, list(losses)
