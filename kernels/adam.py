"""Adam's update (Kingma and Ba 2015, arXiv:1412.6980) of many tensors in two launches."""

import torch
import triton
import triton.language as tl

from fastgan.kernels.addresses import Tables
from fastgan.kernels.launch import launch, next_power_of_2
from fastgan.kernels.pieces import wait_for_previous

BLOCK = 2048


@triton.jit
def _power(BASE: tl.constexpr, exponents):
    """BASE to non-negative integers, in float64: in float32 most of 1 − β^t would be rounding where t is small."""
    power = tl.full(exponents.shape, 1.0, tl.float64)
    square = tl.full(exponents.shape, BASE, tl.float64)
    for _ in range(25):  # the bits of the largest number that counting in float32 comes to, 2^24
        power = tl.where(exponents % 2 == 1, power * square, power)
        square *= square
        exponents = exponents // 2
    return power


@triton.jit
def adam_factors_kernel(
    addresses_ptr,  # (tensors, 5) int64, of which the last is that of a number of steps, 0-dim float32
    factors_ptr,  # (tensors, 2) float32: lr / (1 − β1^t) and 1 / √(1 − β2^t)
    lr,  # a number, or 0-dim float32
    tensors,
    LR_IN_MEMORY: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One more step of each tensor, and what its elements have in common then."""
    wait_for_previous()
    i = tl.arange(0, BLOCK)
    ok = i < tensors
    steps_ptr = tl.load(addresses_ptr + i * 5 + 4, mask=ok, other=0).to(tl.pointer_type(tl.float32))
    steps = tl.load(steps_ptr, mask=ok, other=0.0) + 1.0
    tl.store(steps_ptr, steps, mask=ok)
    rate = tl.load(lr) if LR_IN_MEMORY else lr
    t = steps.to(tl.int32)
    step_size = rate / (1.0 - _power(BETA1, t)).to(tl.float32)
    inverse_root = 1.0 / tl.sqrt_rn((1.0 - _power(BETA2, t)).to(tl.float32))
    tl.store(factors_ptr + i * 2, step_size, mask=ok)
    tl.store(factors_ptr + i * 2 + 1, inverse_root, mask=ok)


@triton.jit
def adam_kernel(
    addresses_ptr,  # (tensors, 5) int64: of a parameter, its gradient, the averages of that and its square, its steps
    blocks_ptr,  # (programs, 3) int64: which tensor, its first element here, its number of elements
    factors_ptr,  # (tensors, 2) float32
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    block = blocks_ptr + tl.program_id(0) * 3
    tensor, start, elements = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    i = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    row, factors = addresses_ptr + tensor * 5, factors_ptr + tensor * 2
    if start + BLOCK <= elements:  # nearly all, and 16 bytes at a time: of a mask the compiler knows no such thing
        _update(row, factors, i, None, BETA1, BETA2, EPS)
    else:
        _update(row, factors, i, i < elements, BETA1, BETA2, EPS)


@triton.jit
def _update(row, factors, i, ok, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """The elements i that are ok (None: all of them) of the tensors whose addresses are in `row`."""
    step_size, inverse_root = tl.load(factors), tl.load(factors + 1)
    param_ptr, grad_ptr = _elements(row, i), _elements(row + 1, i)
    exp_avg_ptr, exp_avg_sq_ptr = _elements(row + 2, i), _elements(row + 3, i)
    other = None if ok is None else 0.0
    param, grad = tl.load(param_ptr, mask=ok, other=other), tl.load(grad_ptr, mask=ok, other=other)
    exp_avg, exp_avg_sq = tl.load(exp_avg_ptr, mask=ok, other=other), tl.load(exp_avg_sq_ptr, mask=ok, other=other)
    exp_avg += (grad - exp_avg) * (1.0 - BETA1)
    exp_avg_sq = exp_avg_sq * BETA2 + grad * grad * (1.0 - BETA2)
    param -= step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) * inverse_root + EPS)
    tl.store(param_ptr, param, mask=ok)
    tl.store(exp_avg_ptr, exp_avg, mask=ok)
    tl.store(exp_avg_sq_ptr, exp_avg_sq, mask=ok)


@triton.jit
def _elements(address_ptr, i):
    """Pointers to the elements i of the tensor whose address, 16-byte aligned, is there."""
    return tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(tl.float32)), 16) + i


class AdamUpdate:
    """``update(params, grads, exp_avgs, exp_avg_sqs, steps, lr=…, betas=…, eps=…)``: one step of Adam, in place.

    The i-th of the first four lists are of one size, and each number of steps, 0-dim, counts this step too. All are
    float32, contiguous and on one device.
    """

    def __init__(self):
        self._tables = Tables(BLOCK)

    @staticmethod
    def supports(*lists):
        """Whether it takes these five lists: plain float32 tensors, contiguous, on one device, aligned (but the steps).

        A tensor subclass need not have its numbers at its `data_ptr()`.
        """
        device = lists[0][0].device
        return all(
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device == device
            and tensor.is_contiguous()
            for tensors in lists
            for tensor in tensors
        ) and all(tensor.data_ptr() % 16 == 0 for tensors in lists[:-1] for tensor in tensors)

    def __call__(self, params, *others, lr, betas, eps):
        addresses, blocks = self._tables(params, *others)
        tensors, device = len(params), addresses.device
        factors = torch.empty((tensors, 2), dtype=torch.float32, device=device)
        decay = dict(BETA1=betas[0], BETA2=betas[1])
        launch(
            adam_factors_kernel,
            (1,),
            *(addresses, factors, lr, tensors),
            device=device,
            num_warps=1,  # where tensors are fewer than threads some threads are two's: none reads what another wrote
            LR_IN_MEMORY=isinstance(lr, torch.Tensor),
            **decay,
            BLOCK=next_power_of_2(tensors),
        )
        launch(
            adam_kernel,
            (len(blocks),),
            *(addresses, blocks, factors),
            device=device,
            num_warps=8,
            **decay,
            EPS=eps,
            BLOCK=BLOCK,
        )
