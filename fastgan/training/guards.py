"""What may end a run early: a signal, or numbers that are no longer finite."""

import signal
import threading

import torch


class Interrupt:
    """A context in which the first SIGINT (Ctrl-C) or SIGTERM only sets ``requested``; a second one acts as always."""

    def __init__(self):
        self.requested = False
        self.previous = {}

    def __enter__(self):
        # Python handles signals in the main thread only; elsewhere the caller has its own way to end a run.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number, frame):
        self.requested = True
        self._restore()

    def _restore(self):
        while self.previous:
            number, handler = self.previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that C code set

    def __exit__(self, *exception):
        self._restore()


class FirstNonFinite:
    """Remembers the first step whose losses were not finite, on the device, so that no step waits for the GPU."""

    def __init__(self, device):
        self.first = torch.zeros((), dtype=torch.int64, device=device)  # 0: none

    def watch(self, step, losses):
        """Look at the losses of one step."""
        bad = ~torch.isfinite(losses["loss_d"] + losses["loss_g"])
        self.first = torch.where(bad & (self.first == 0), step, self.first)

    def first_step(self):
        """The number of that step, or None. Waits for the device."""
        return int(self.first) or None

    @staticmethod
    def in_weights(train_step):
        """Whether a weight or a running statistic is not finite: the last update may have left what no loss shows yet.

        Waits for the device.
        """
        modules = (train_step.generator, train_step.discriminator)
        floats = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
        return not torch.stack([torch.isfinite(t).all() for t in floats]).all()
