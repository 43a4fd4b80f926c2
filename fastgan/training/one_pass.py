"""Whether a discriminator gives the same numbers on [real; fake] in one pass as on each of them in turn."""

import copy

import torch
from torch import nn

from fastgan.batch_groups import batch_groups

IMAGES = 8  # of each kind, to try it on
TOLERANCE = 1e-6


def one_pass_obstacle(discriminator, real_images, fake_images):
    """Why one pass over both kinds of images would not equal two passes; None if it does.

    Tries both ways on copies, in float64: their logits and what they leave in the discriminator's buffers (running
    statistics, say) must agree. So whatever mixes the images of a batch or draws random numbers shows.

    Args:
        discriminator: module from images to logits; it and the global random generators stay as they are.
        real_images, fake_images: (N, C, H, W) each.
    """
    for name, module in discriminator.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            return f"the BatchNorm {name} averages over all batches (momentum=None), and each half would be one"
    real, fake = (images[:IMAGES].detach().double() for images in (real_images, fake_images))
    try:
        together, apart = (copy.deepcopy(discriminator).double() for _ in range(2))
    except RuntimeError as error:  # the older weight_norm keeps a weight that torch does not copy
        return f"it cannot be copied to try it ({str(error).partition('.')[0]})"
    devices = [real.device] if real.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        with batch_groups(2):
            logits = together(torch.cat([real, fake]))
        if len(logits) != len(real) + len(fake):
            return f"its logits have shape {tuple(logits.shape)}: the first axis is not the images'"
        expected = torch.cat([apart(real), apart(fake)])
    names = ", ".join(name or type(module).__name__ for name, module in _stock_batch_norms(discriminator))
    hint = f": BatchNorm runs unfused in {names}" if names else ""
    if not _close(logits, expected):
        return "its logits depend on which images share a batch, or on chance" + hint
    for name, left in together.named_buffers():
        if not _close(left.double(), apart.get_buffer(name).double()):
            return f"it leaves another {name}" + hint
    return None


def _close(ours, theirs):
    if not theirs.numel():
        return True
    largest = theirs.nan_to_num().abs().amax().item()
    return torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)


def _stock_batch_norms(model):
    """BatchNorms that are called by themselves, which a hook shows on a fused model only for those left out."""
    from fastgan.fusion import fused_groups

    fused = {id(module) for group in fused_groups(model).values() for module in group.modules}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in fused:
            yield name, module
