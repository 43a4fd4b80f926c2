"""Adam for the networks of a training step, whose weights are channels_last."""

import torch

from fastgan.backend import select


class ContiguousAdam(torch.optim.Adam):
    """torch.optim.Adam that goes through channels_last tensors as they lie in memory: the same numbers, bit for bit.

    On a CPU the fused update first copies every gradient that is not contiguous, which takes as long as the update. A
    channels_last tensor seen as (N, H, W, C) is contiguous.
    """

    def _init_group(self, group, params_with_grad, *lists):
        has_complex = super()._init_group(group, params_with_grad, *lists)
        lists = [tensors for tensors in (params_with_grad, *lists) if tensors]  # without amsgrad one stays empty
        for i, parameter in enumerate(params_with_grad):
            if parameter.dim() != 4:
                continue
            shaped_alike = [tensors for tensors in lists if tensors[i].shape == parameter.shape]
            # All of them or none: a gradient that was assigned may lie in memory another way.
            if all(tensors[i].is_contiguous(memory_format=torch.channels_last) for tensors in shaped_alike):
                for tensors in shaped_alike:
                    tensors[i] = tensors[i].permute(0, 2, 3, 1)
        return has_complex


class KernelAdam(ContiguousAdam):
    """The same by our kernel, where kernels run; its state is torch's.

    torch's gives each block of threads 65,536 numbers: the weights of a DCGAN keep less than half of a large GPU busy.
    What our kernel has no code for, amsgrad or the scale of gradients in float16 say, torch computes.
    """

    _update = None  # made when it is needed: a copy of an optimizer has its state and nothing else

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        params, *averages, _, steps = lists
        if params and self._is_for_kernel(group, params[0]):
            from fastgan.kernels.adam import AdamUpdate

            if AdamUpdate.can(params, *averages, steps):
                self._update = self._update or AdamUpdate()
                self._update(params, *averages, steps, lr=group["lr"], betas=group["betas"], eps=group["eps"])
                for done in lists:
                    done.clear()  # nothing is left to torch
        return has_complex

    def _is_for_kernel(self, group, param):
        lr = group["lr"]
        return (
            select(param.device, param.dtype)[0] == "triton"
            and not any(group[name] for name in ("weight_decay", "amsgrad", "maximize", "differentiable"))
            and getattr(self, "grad_scale", None) is None  # a GradScaler's, for one step, as found_inf is
            and getattr(self, "found_inf", None) is None
            and (not isinstance(lr, torch.Tensor) or (lr.dtype == torch.float32 and lr.device == param.device))
            and not any(isinstance(beta, torch.Tensor) for beta in group["betas"])  # compile-time constants to it
        )
