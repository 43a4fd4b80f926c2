"""BatchNorm whose statistics are of the batches of all processes in a torch.distributed group, as nn.SyncBatchNorm's.

Gradients of γ and β stay those of the process's own batch, for DistributedDataParallel to average. There are no
gradients of gradients, and torch.compile breaks its graph here. All processes have to run the same implementation.

Source: torch.nn.SyncBatchNorm; Chan, Golub & LeVeque 1979 for putting statistics together.
"""

import torch
import torch.distributed as dist

from fastgan.ops import batch_norm
from fastgan.ops.implementations import channels_last
from fastgan.wanted import refuse_second_order

_eager = torch.compiler.disable(reason="what processes tell each other stays outside of compiled graphs")


@_eager
def share_statistics(mean, var, rows, eps, process_group):
    """The statistics of all processes' batches from those of each.

    Args:
        mean, var: (groups, C): of this process's batch of that many equal parts, var unbiased.
        rows: values per channel in each of the parts; other processes may have more or fewer.

    Returns:
        mean, 1/sqrt(biased variance + eps) and the unbiased variance, (groups, C); their counts of values, (groups, 1).
    """
    return _merge(_all_gather(_pack(mean, var * (rows - 1), rows), process_group), eps)


def _pack(mean, m2, rows):
    """(groups, 2·C + 1): one tensor for one collective."""
    return torch.cat([mean, m2, torch.full_like(mean[:, :1], rows)], 1)


def _merge(parts, eps):
    """Chan's rule over what the processes packed, (processes, groups, 2·C + 1), in the order of their ranks."""
    channels = parts.shape[-1] // 2
    mean, m2, count = parts.split([channels, channels, 1], -1)
    total = count.sum(0)
    # Averaging differences from the first mean keeps the digits that averaging large means would lose.
    merged = mean[0] + (count * (mean - mean[0])).sum(0) / total
    m2 = (m2 + count * (mean - merged) ** 2).sum(0)
    return merged, (m2 / total + eps).rsqrt(), m2 / (total - 1).clamp(min=1), total


def _all_gather(tensor, process_group):
    """(processes, *shape of the tensor)."""
    found = tensor.new_empty((dist.get_world_size(process_group), *tensor.shape))
    dist.all_gather(list(found.unbind()), tensor.contiguous(), group=process_group)
    return found


_WHO = "BatchNorms with the statistics of several processes"


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, mean, invstd, gamma, beta, count, activation, slope, process_group):
        ctx.act, ctx.process_group = dict(activation=activation, slope=slope), process_group
        ctx.save_for_backward(y, mean, invstd, gamma, beta, count)
        return batch_norm.batch_norm_act(y, mean, invstd, gamma, beta, True, activation, slope)

    @staticmethod
    def backward(ctx, dout):
        from fastgan.kernels.batch_norm import batch_norm_grad_sums, batch_norm_input_grad

        refuse_second_order(_WHO)
        y, mean, invstd, gamma, beta, count = ctx.saved_tensors
        tensors = (channels_last(dout), channels_last(y), mean, invstd, gamma, beta)
        sums = batch_norm_grad_sums(*tensors, **ctx.act)
        dy = None
        if ctx.needs_input_grad[0]:
            of_all = sums.clone()
            dist.all_reduce(of_all, group=ctx.process_group)
            dy = batch_norm_input_grad(*tensors, of_all, count, **ctx.act)
        return dy, None, None, *batch_norm.vector_grads(sums, gamma, beta, *ctx.needs_input_grad[3:5]), *[None] * 4


@_eager
def batch_norm_act(y, mean, invstd, gamma, beta, count, activation, slope, process_group):
    """act(γ·(y − mean)·invstd + β), differentiable in y, γ and β, with what `share_statistics` gave.

    y's gradient is the one through the statistics of all processes as well, for the sum of their losses.
    """
    return _BatchNormAct.apply(y, mean, invstd, gamma, beta, count, activation, slope, process_group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, process_group):
        ctx.process_group = process_group
        return _all_gather(tensor, process_group)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_order(_WHO)
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.process_group)
        return grad[dist.get_rank(ctx.process_group)], None


@_eager
def batch_norm_reference(y, gamma, beta, eps, groups, process_group):
    """(γ·(y − mean)·invstd + β, mean, unbiased variance) with the statistics of all processes, in plain torch."""
    wide = y if y.dtype == torch.float64 else y.float()
    wide = wide.reshape(groups, -1, *y.shape[1:])  # (groups, N / groups, C, H, W)
    var, mean = torch.var_mean(wide, (1, 3, 4), correction=0)
    rows = wide[0].numel() // y.shape[1]
    mean, invstd, var, _ = _merge(_AllGather.apply(_pack(mean, var * rows, rows), process_group), eps)
    out = (wide - mean[:, None, :, None, None]) * invstd[:, None, :, None, None]
    out = out.flatten(0, 1)
    if gamma is not None:
        out = out * gamma.to(out.dtype)[:, None, None]
    if beta is not None:
        out = out + beta.to(out.dtype)[:, None, None]
    return out.to(y.dtype), mean.detach(), var.detach()
