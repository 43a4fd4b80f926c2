"""Comparing whole networks, of any number of inputs and results, by everything that a training step shows of them."""

import torch
from torch.utils._pytree import tree_leaves

from tests.pairs import assert_close


def one_step(model, inputs, seed=0):
    """(results, gradients, state after it) of one call and one backward; the seed is for dropout."""
    model.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    results = tree_leaves(model(*inputs))
    # A different weight for each number; the mean of none of them is zero.
    weighted = [(out * torch.linspace(-1, 2, out.numel()).to(out).reshape(out.shape)).sum() for out in results]
    sum(weighted).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return [out.detach() for out in results], gradients, {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_steps(ours, theirs, inputs, compare=assert_close):
    """Two training steps and one in eval give the same results, gradients, statistics and numbers of batches.

    Args:
        ours, theirs: the networks, in the same state.
        inputs: a function that draws a list of inputs.
        compare: asserts that two nests of tensors are the same.
    """
    for seed, training in enumerate((True, True, False)):
        torch.manual_seed(seed)
        drawn = inputs()
        step, expected = (one_step(network.train(training), drawn, seed) for network in (ours, theirs))
        compare(step, expected)


def assert_equal(ours, theirs):
    """The same to the last bit."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
