"""Weights in the dtype that the kernels compute in, cast once for each update and not at each use."""

from contextlib import contextmanager

import torch

from fastgan import backend

_NAME = "_fastgan_weight_copy"


class WeightCopies:
    """Copies of the weights of some convolutions, for mixed precision: within `in_use` fused modules read them.

    Whoever holds them calls `refresh` after each change of the weights.

    Args:
        convolutions: modules with a parameter `weight`; those that compute theirs (parametrizations) are left out.
        dtype: of the copies.
    """

    def __init__(self, convolutions, dtype):
        self._modules = [module for module in convolutions if "weight" in module._parameters]
        self._copies = [torch.empty_like(module.weight, dtype=dtype) for module in self._modules]
        self._cast = None
        if self._modules and backend.select(self._modules[0].weight.device, dtype)[0] == "triton":
            from fastgan.kernels.cast import Cast

            self._cast = Cast()

    def refresh(self):
        """Cast all weights, in one launch where they have kept the layout that they had."""
        weights = [module.weight.detach() for module in self._modules]
        if self._cast is not None and self._cast.supports(weights, self._copies):
            self._cast(weights, self._copies)
        elif weights:
            torch._foreach_copy_(self._copies, weights)

    @contextmanager
    def in_use(self):
        """The copies are attributes of the modules only in here: outside of it nobody keeps them up to date."""
        for module, copy in zip(self._modules, self._copies, strict=True):
            module.__dict__[_NAME] = copy
        try:
            yield
        finally:
            for module in self._modules:
                module.__dict__.pop(_NAME, None)  # of a layer in two networks the other's may be gone already


def weight_copy(module):
    """The copy of a convolution's weight that is in use, or None."""
    return module.__dict__.get(_NAME)
