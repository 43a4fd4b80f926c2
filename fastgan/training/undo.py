"""Undoing a training step that failed on its way."""

import copy

import torch

from fastgan.random_numbers import restore_rng, rng_state


class BeforeStep:
    """What a TrainStep was before a step that may fail as late as in the generator's backward.

    The discriminator has learned by then, and the generator has not.
    """

    def __init__(self, step):
        self._step, self._random = step, rng_state(step.device)
        self._of_generator = _TensorsKept(step.generator.modules(), "_buffers")
        self._of_discriminator = _TensorsKept(step.discriminator.modules(), "_buffers", "_parameters")
        # Not the optimizer's state_dict, which somebody's own may have only at times.
        self._averages = {parameter: copy.deepcopy(state) for parameter, state in step.optimizer_d.state.items()}
        self._scaler = step.scaler.state_dict()

    def restore(self):
        step = self._step
        self._of_generator.restore()
        self._of_discriminator.restore()
        step.optimizer_d.state.clear()
        step.optimizer_d.state.update(self._averages)
        step.scaler = torch.amp.GradScaler(step.device.type, enabled=step.scaler.is_enabled())  # it counts steps, too
        step.scaler.load_state_dict(self._scaler)
        restore_rng(self._random, step.device)


class _TensorsKept:
    """The tensors of some modules, to be put back where they were with the numbers that they had.

    Args:
        modules: iterable of nn.Module.
        kinds: "_parameters", "_buffers" or both.
    """

    def __init__(self, modules, *kinds):
        holders = [getattr(module, kind) for module in modules for kind in kinds]
        self._kept = [
            (holder, name, tensor, None if tensor is None else tensor.detach().clone())
            for holder in holders
            for name, tensor in holder.items()
        ]

    @torch.no_grad()
    def restore(self):
        """Put them back; a forward may have put other tensors in their places."""
        for holder, name, tensor, value in self._kept:
            holder[name] = tensor
            if tensor is not None:
                tensor.copy_(value)
