"""The GAN losses on logits, in one kernel with their gradients; `fastgan.functional` is where to call them from."""

import functools

import torch
from torch.nn import functional as F

from fastgan import backend
from fastgan.checks import check_loss, check_loss_of_parts
from fastgan.ops import losses


def discriminator_bce(real_logits, fake_logits, *, real_target=1.0, fake_target=0.0, return_means=False):
    """The discriminator's loss: mean BCE of the real logits against one target plus that of the fake ones.

    With the default targets it is mean softplus(−real) + mean softplus(fake), which is
    −log D(x) − log(1 − D(G(z))) of Goodfellow et al. 2014 (arXiv:1406.2661) with D = σ(logits). Working on logits
    it never overflows nor loses its gradient.

    Args:
        real_logits, fake_logits: of any shapes, also different ones; floating point.
        real_target, fake_target: in [0, 1]; 0.9 for the real one is the usual label smoothing.
        return_means: also return the means of σ(real_logits) and σ(fake_logits), without gradient.

    Returns:
        The loss, 0-dim float32 (float64 for float64 logits); with `return_means` (loss, D(x), D(G(z))).

    Raises:
        ValueError, TypeError: an empty or non-floating set of logits, different devices, or a target outside [0, 1].
    """
    check_loss(
        dict(real_logits=real_logits, fake_logits=fake_logits), dict(real_target=real_target, fake_target=fake_target)
    )
    if not (_has_kernel(real_logits) and _has_kernel(fake_logits)):
        loss = _bce_reference(real_logits, real_target) + _bce_reference(fake_logits, fake_target)
        return (loss, _mean_sigmoid(real_logits), _mean_sigmoid(fake_logits)) if return_means else loss
    loss, means, _ = losses.bce(real_logits, fake_logits, float(real_target), float(fake_target), False)
    return (loss, means[0], means[1]) if return_means else loss


def generator_bce(fake_logits):
    """The generator's non-saturating loss, mean −log σ(fake_logits) = mean softplus(−fake_logits).

    Args:
        fake_logits: D(G(z)) before any sigmoid, of any shape.

    Returns:
        0-dim float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an empty or non-floating set of logits.

    Source: Goodfellow et al. 2014 (arXiv:1406.2661), section 3.
    """
    check_loss(dict(fake_logits=fake_logits), {})
    if not _has_kernel(fake_logits):
        return _bce_reference(fake_logits, 1.0)
    return losses.bce(fake_logits, None, 1.0, 0.0, False)[0]


def backward_bce(logits, targets, scaler, *, means=True):
    """Backward from the mean BCE of each equal part of `logits` against its target, added: for the training step.

    Args:
        logits: differentiable, of any shape; one part or two along the first dimension, one after the other.
        targets: of each part, in [0, 1].
        scaler: a torch.amp.GradScaler, enabled or not.
        means: whether the mean probabilities are wanted.

    Returns:
        (the loss, the mean σ of each part…), without gradients.

    Raises:
        ValueError, TypeError: empty or non-floating logits, ones that have no equal parts, or a target outside [0, 1].
    """
    check_loss_of_parts(logits, targets)
    # Loss and gradient come together: from the loss on, autograd would multiply that by one and put its parts together.
    if not _has_kernel(logits):
        loss, sigmoids, grads = _bce_and_gradient(logits, targets, means)
    else:
        real, *fake = logits.detach().reshape(-1).chunk(len(targets))
        real_target, fake_target = (*map(float, targets), 0.0)[:2]
        # A loss scale comes before they are rounded: 1/N is small in float16.
        as_logits = not scaler.is_enabled()
        loss, sigmoids, grads = losses.bce(real, fake[0] if fake else None, real_target, fake_target, as_logits)
    logits.backward(scaler.scale(grads).to(logits.dtype).view_as(logits))
    return loss, *sigmoids[: len(targets) * means]


def backward_bce_of_torch(logits, targets, scaler, *, means=True):
    """`backward_bce` by the losses of torch, whatever FASTGAN_BACKEND says."""
    check_loss_of_parts(logits, targets)
    parts = logits.chunk(len(targets)) if len(targets) > 1 else (logits,)
    loss = functools.reduce(torch.add, map(_bce_reference, parts, targets))
    scaler.scale(loss).backward()
    return loss.detach(), *map(_mean_sigmoid, parts if means else ())


@torch.no_grad()
def _bce_and_gradient(logits, targets, means):
    """(the loss, the mean σ of each part if `means`, the loss's gradient for the logits), as the kernel gives them.

    By fewer operators than autograd takes: of numbers as few as these it is what counts.
    """
    logits = _at_least_float32(logits)
    target = torch.full_like(logits, targets[0])
    if len(targets) > 1:
        target[len(logits) // 2 :].fill_(targets[1])
    loss, sigmoids = F.binary_cross_entropy_with_logits(logits, target), logits.sigmoid()
    return (
        loss * len(targets) if len(targets) > 1 else loss,
        sigmoids.reshape(len(targets), -1).mean(1) if means else (),
        sigmoids.sub(target).div_(logits.numel() // len(targets)),
    )


def _has_kernel(logits):
    return backend.may_run_kernels(logits) and backend.select(logits.device, logits.dtype)[0] == "triton"


def _bce_reference(logits, target):
    logits = _at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _mean_sigmoid(logits):
    return _at_least_float32(logits.detach()).sigmoid().mean()


def _at_least_float32(logits):
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
