"""Adam for the networks of a training step, whose weights are channels_last."""

import torch


class ContiguousAdam(torch.optim.Adam):
    """torch.optim.Adam that goes through channels_last tensors as they lie in memory: the same numbers, bit for bit.

    On a CPU the fused update first copies every gradient that is not contiguous, which takes as long as the update. A
    channels_last tensor seen as (N, H, W, C) is contiguous.
    """

    def _init_group(self, group, params_with_grad, *lists):
        has_complex = super()._init_group(group, params_with_grad, *lists)
        lists = [tensors for tensors in (params_with_grad, *lists) if tensors]  # without amsgrad one stays empty
        for i, parameter in enumerate(params_with_grad):
            shaped_alike = [tensors for tensors in lists if tensors[i].shape == parameter.shape]
            # All of them or none: a gradient that was assigned may lie in memory another way.
            if all(tensors[i].is_contiguous(memory_format=torch.channels_last) for tensors in shaped_alike):
                for tensors in shaped_alike:
                    tensors[i] = tensors[i].permute(0, 2, 3, 1)
        return has_complex
