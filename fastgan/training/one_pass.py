"""One pass of a discriminator over [real; fake], and whether it gives the same numbers as one over each in turn."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgan.batch_groups import batch_groups
from fastgan.checks import in_short
from fastgan.fusing.layer_code import has_other_hooks, hooks_of, own_code
from fastgan.fusion import fused_groups
from fastgan.memory_format import fastest_format
from fastgan.random_numbers import random_numbers_kept
from fastgan.training.weights import wants_default_layout

# What PyTorch's layers decide by that may be set later: whether they are fused, mix images or draw random numbers.
_SETTINGS = ("momentum", "padding_mode", "padding", "dilation", "groups", "p")
# Of each kind, to try it on. Pieces of 2, 4 or 8 images, with statistics of their own, then hold both kinds.
TRIAL_IMAGES = 7
TOLERANCE = 1e-6
_ON_MORE = "which images share a batch, on chance, or on the calls before it (as of a spectral_norm in training)"


def stacked(real_images, fake_images):
    """[real; fake] in channels_last and in the dtype of the fake ones, each read and written once."""
    size = (len(real_images) + len(fake_images), *fake_images.shape[1:])
    options = dict(device=fake_images.device, memory_format=fastest_format(fake_images))
    images = torch.empty(size, dtype=fake_images.dtype, **options)
    images[: len(real_images)] = real_images
    images[len(real_images) :] = fake_images
    return images


def trial_key(discriminator, real_images):
    """(number of images to try with, what the discriminator's modules are): as long as this is equal, so far as one can
    see without a trial, an answer of `one_pass_obstacle` holds."""
    seen, modules = [], [discriminator]
    for module in modules:  # and, as they come, what they hold: it is asked at each step, so by the shortest way
        modules += [each for each in module._modules.values() if each is not None]
        own = module.__dict__
        hooks = hooks_of(module)
        hooks = [list(each.values()) for each in hooks] if any(hooks) else None
        kind = type(module)
        code = kind, getattr(kind, "forward", None), own_code(own)
        of_torch = kind.__module__.startswith("torch.nn.")
        settings = [*map(own.get, _SETTINGS)] if of_torch else _settings(own) + _class_flags(kind)
        if any([_has_grad_hooks(parameter) for parameter in own["_parameters"].values()]):
            settings.append("hooks of gradients")
        seen.append((module, code, module.training, hooks, settings))
    return min(len(real_images), TRIAL_IMAGES), seen


def _has_grad_hooks(parameter):
    return parameter is not None and bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _settings(attributes, kinds=(bool, int, float, str)):
    """What somebody's own module may decide by: the flags and numbers among its attributes."""
    return [each for each in attributes.items() if type(each[1]) in kinds or isinstance(each[1], np.generic)]


def _class_flags(kind):
    """The same of its class, and those that it comes from. Whole numbers there are counters as a rule."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return [flag for each in own for flag in _settings(vars(each), (bool, float, str))]


def one_pass_obstacle(discriminator, real_images, fake_images):
    """Why one pass over both kinds of images would not equal two passes; None if it does.

    Tries both ways on copies, in float64: their logits, gradients and what they leave in the discriminator's buffers
    (running statistics, say) must agree. So whatever mixes the images of a batch or draws random numbers shows, and
    what backward runs again.

    Args:
        discriminator: module from images to logits; it and the global random generators stay as they are.
        real_images, fake_images: (N, C, H, W) each.
    """
    return _known_obstacle(discriminator) or _tried_obstacle(discriminator, real_images, fake_images)


def _known_obstacle(discriminator):
    """What a trial is not needed for, or would not show."""
    for name, module in discriminator.named_modules():
        if has_other_hooks(module):  # and a trial would call them, too
            return f"{name or type(module).__name__} has hooks, which are for each pass"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            return f"the BatchNorm {name} averages over all batches (momentum=None), and each half would be one"
        # Each process would get an answer of its own, by what it is sent in between.
        if isinstance(module, DistributedDataParallel) and module.will_sync_module_buffers():
            return "DistributedDataParallel sends its buffers at each pass"
    for name, parameter in discriminator.named_parameters():
        if _has_grad_hooks(parameter):  # which copies do not have
            return f"{name} has hooks, for the gradient of each pass"
    return None


def _tried_obstacle(discriminator, real_images, fake_images):
    # Copies, because somebody's discriminator may write to them.
    real, fake = (images[:TRIAL_IMAGES].detach().to(torch.float64, copy=True) for images in (real_images, fake_images))
    versions = real._version, fake._version
    try:
        together, apart = (copy.deepcopy(discriminator).double() for _ in range(2))
        for model in (together, apart):
            model.zero_grad()
    except Exception as error:  # the older weight_norm keeps a weight that torch does not copy; a lock, say
        return f"it cannot be copied to try it ({in_short(error)})"
    try:
        with torch.enable_grad(), random_numbers_kept() as drawn:
            with batch_groups(2):
                logits, grads = _learn(together, torch.cat([real, fake]))
            if not logits.dim() or len(logits) != len(real) + len(fake):
                return f"its logits have shape {tuple(logits.shape)}: the first axis is not the images'"
            of_real, _ = _learn(apart, real)
            of_fake, expected_grads = _learn(apart, fake)
            expected = torch.cat([of_real, of_fake])
            if drawn():
                return "it draws random numbers"
            if (real._version, fake._version) != versions:
                return "it changes its images in place"
    except Exception as error:  # it wants a dtype, or a number of images, of its own
        if wants_default_layout(error):
            raise
        return f"it cannot be tried on {len(real)} images of each kind in float64 ({in_short(error)})"
    difference = _difference((together, logits, grads), (apart, expected, expected_grads))
    if difference is None:
        return None
    names = ", ".join(name or type(module).__name__ for name, module in _stock_batch_norms(discriminator))
    return difference + (f": BatchNorm runs unfused in {names}" if names else "")


def _learn(model, images):
    """(logits, gradients of all parameters in one tensor: for the sum of the logits' squares, added to those before).

    So they are compared beside the largest: a bias before BatchNorm has one of rounding errors only.
    """
    logits = model(images)
    if logits.requires_grad:
        logits.square().sum().backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), torch.cat([logits.new_zeros(1), *grads]).detach()


def _difference(one_pass, two_passes):
    """How one pass differs from two, each (model, logits, gradients); None if they agree."""
    (together, logits, grads), (apart, expected, expected_grads) = one_pass, two_passes
    if not _close(logits, expected):
        return f"its logits depend on {_ON_MORE}"
    for name, left in together.named_buffers():
        if not _close(left.double(), apart.get_buffer(name).double()):
            return f"it leaves another {name}"
    if not _close(grads, expected_grads):
        return f"its gradients depend on {_ON_MORE}"
    return None


def _close(ours, theirs):
    if not theirs.numel():
        return True
    largest = theirs.nan_to_num().abs().amax().item()
    return torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)


def _stock_batch_norms(model):
    """(path, module) of the BatchNorms in no fused group: they run by themselves, and take a batch as a whole."""
    fused = {id(module) for group in fused_groups(model).values() for module in group.modules}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in fused:
            yield name, module
