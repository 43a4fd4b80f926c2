"""Adam for the networks of a training step, whose weights are channels_last."""

import functools

import torch
from torch.optim import optimizer as optimizers

from fastgan.backend import select

# With any of these torch's own code computes an update.
_OPTIONS = ("weight_decay", "amsgrad", "maximize", "differentiable")
# How an update is computed belongs to the device, and not to a saved run.
_OF_THE_DEVICE = ("fused", "capturable", "foreach")
# The dictionaries of the hooks around every optimizer's step.
_HOOKS_OF_ALL = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks


class ContiguousAdam(torch.optim.Adam):
    """torch.optim.Adam that goes through channels_last tensors as they lie in memory: the same numbers, bit for bit.

    On a CPU the fused update first copies every gradient that is not contiguous, which takes as long as the update. A
    channels_last tensor seen as (N, H, W, C) is contiguous. And an update there calls PyTorch's operators itself: the
    Python around them takes as long as the update of a small network.
    """

    def zero_grad(self, set_to_none=True):
        """As torch's, without its profiler entry for each call, which takes longer than the rest."""
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def load_state_dict(self, state_dict):
        """torch's, of any Adam's state: what belongs to the device stays, and averages get the layouts they need.

        Raises:
            ValueError: an average has another shape than its parameter; torch would write beyond its memory.
        """
        given = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(given, params, strict=False):  # torch says it where there are more of one kind
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step" and value.shape != param.shape:
                    got, wanted = tuple(value.shape), tuple(param.shape)
                    raise ValueError(f"{name} of parameter {index} must have its shape {wanted}; got {got}")
        own = {name: self.param_groups[0][name] for name in _OF_THE_DEVICE}
        groups = [{**group, **own} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for state in self.state.values():
            state["step"] = state["step"].clone()  # the given one would count on, and be another state then
        follow_layouts(self)

    @staticmethod
    def profile_hook_step(step):
        """torch's decorator of every optimizer's step, for the profiler and for hooks, where there are any of them."""
        noted = torch.optim.Adam.profile_hook_step(step)

        @functools.wraps(step)
        def wrapper(self, *args, **kwargs):
            heard = torch.autograd._profiler_enabled() or self._optimizer_step_pre_hooks
            heard = heard or self._optimizer_step_post_hooks or any(_HOOKS_OF_ALL)
            return (noted if heard else step)(self, *args, **kwargs)

        return wrapper

    def step(self, closure=None):
        """torch's: one update; returns what `closure`, if any, returns."""
        if self._lie_otherwise():
            follow_layouts(self)
        with torch.no_grad():  # or views of parameters become part of a graph
            updates = [self._fused_lists(group) for group in self.param_groups] if closure is None else [None]
        if any(lists is None for lists in updates):
            step = torch.optim.Adam.step
            # From the first Adam on it has torch's hooks around it, which are around this method already.
            return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)
        with torch.no_grad():
            for group, (params, grads, averages, squares, steps) in zip(self.param_groups, updates, strict=True):
                (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
                options = dict(weight_decay=0.0, amsgrad=False, maximize=False)
                torch._foreach_add_(steps, 1)
                torch._fused_adam_(
                    params, grads, averages, squares, [], steps, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **options
                )

    def _lie_otherwise(self):
        """Whether a parameter got other memory, of another layout, since its averages were made."""
        averages = [(param, state["exp_avg"]) for param, state in self.state.items() if "exp_avg" in state]
        return any([average.stride() != param.stride() for param, average in averages])

    def _fused_lists(self, group):
        """(parameters, gradients, averages, averages of squares, steps) for the fused update; None: it is torch's."""
        numbers = (group["lr"], *group["betas"])
        if not group["fused"] or any(group[name] for name in _OPTIONS) or _is_scaled(self) or not group["params"]:
            return None
        if torch.compiler.is_compiling() or not all(isinstance(number, float) for number in numbers):
            return None
        dtype, lists = group["params"][0].dtype, ([], [], [], [], [])
        for param in group["params"]:
            grad, state = param.grad, self.state.get(param)
            if not state or type(grad) is not torch.Tensor or grad.is_sparse:
                return None
            if not (param.is_cpu and param.dtype == grad.dtype == dtype):
                return None
            tensors = _as_they_lie(param, grad, state["exp_avg"], state["exp_avg_sq"])
            for found, tensor in zip(lists, (*tensors, state["step"]), strict=True):
                found.append(tensor)
        return lists

    def _init_group(self, group, params_with_grad, *lists):
        has_complex = super()._init_group(group, params_with_grad, *lists)
        lists = [tensors for tensors in (params_with_grad, *lists[:-1]) if tensors]  # without amsgrad one stays empty
        for i, tensors in enumerate(zip(*lists, strict=True)):
            for found, tensor in zip(lists, _as_they_lie(*tensors), strict=True):
                found[i] = tensor
        return has_complex


def follow_layouts(optimizer):
    """Give averages the layouts of their parameters: a fused update goes through both in the order of memory."""
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and name != "step" and value.shape == param.shape:
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def _as_they_lie(param, grad, *averages):
    """These tensors of one shape, as (N, H, W, C) if that is how the parameter lies.

    A gradient that somebody assigned may lie another way: torch's fused update would go through it in another order.
    """
    strides = param.stride()
    if grad.stride() != strides and any(
        [size > 1 and mine != own for size, mine, own in zip(param.shape, grad.stride(), strides, strict=True)]
    ):
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    tensors = (param, grad, *averages)
    if param.dim() == 4 and all([tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors]):
        return [tensor.permute(0, 2, 3, 1) for tensor in tensors]
    return tensors


def _is_scaled(optimizer):
    """Whether gradients have a GradScaler's factor, for one step."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


class KernelAdam(ContiguousAdam):
    """The same by our kernel, where kernels run; its state is torch's.

    torch's gives each block of threads 65,536 numbers: the weights of a DCGAN keep less than half of a large GPU busy.
    What our kernel has no code for, amsgrad or the scale of gradients in float16 say, torch computes.
    """

    _updates = None  # of each group, made when it is needed: a copy of an optimizer has its state and nothing else

    def _fused_lists(self, group):
        lists = super()._fused_lists(group)
        return None if lists and self._is_for_kernel(group, lists[0][0]) else lists

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        params, *averages, _, steps = lists
        if params and self._is_for_kernel(group, params[0]):
            from fastgan.kernels.adam import AdamUpdate

            if AdamUpdate.supports(params, *averages, steps):
                i = next(i for i, own in enumerate(self.param_groups) if own is group)
                self._updates = self._updates or {}
                update = self._updates.setdefault(i, AdamUpdate())
                update(params, *averages, steps, lr=group["lr"], betas=group["betas"], eps=group["eps"])
                for done in lists:
                    done.clear()  # nothing is left to torch
        return has_complex

    def _is_for_kernel(self, group, param):
        lr = group["lr"]
        return (
            select(param.device, param.dtype)[0] == "triton"
            and not any(group[name] for name in _OPTIONS)
            and not _is_scaled(self)
            and (not isinstance(lr, torch.Tensor) or (lr.dtype == torch.float32 and lr.device == param.device))
            and not any(isinstance(beta, torch.Tensor) for beta in group["betas"])  # compile-time constants to it
        )
