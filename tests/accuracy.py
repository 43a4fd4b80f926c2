"""The one tolerance of the kernel tests: at most twice the error that stock PyTorch makes in the same precision."""

import torch


def error(actual, reference):
    """Largest difference from the float64 reference, in units of the reference's largest value (at least 1)."""
    return ((actual.double() - reference).abs().max() / reference.abs().max().clamp(min=1.0)).item()


def assert_as_accurate_as_stock(name, ours, stock, reference, computed_in=None, units=16):
    """error(ours) ≤ 2 · error(stock) + some units in the last place of the largest value; NaN never passes.

    Args:
        ours, stock: results in the precision under test.
        reference: the same in float64.
        computed_in: the dtype of what a float32 result was computed from, if another: stock may be right by chance in
            a few numbers, so one rounding of that is allowed as well.
        units: how many of the last place.
    """
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
    allowed = 2 * error(stock, reference) + units * torch.finfo(ours.dtype).eps
    if computed_in is not None:
        allowed += torch.finfo(computed_in).eps / 2
    assert error(ours, reference) <= allowed, f"{name}: error {error(ours, reference):.2e}, allowed {allowed:.2e}"
