"""What defines a layer, convolution + BatchNorm + activation, besides its tensors."""

from typing import NamedTuple

from fastgan.ops.layer_checks import check_conv_bn_act


class LayerSpec(NamedTuple):
    """All that defines a fused layer but its tensors: what the operators, their reference and the checks take."""

    transposed: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    activation: str | None
    slope: float  # of leaky_relu
    batch_norm: bool  # whether it has one
    activation_first: bool = False  # before BatchNorm
    batch_statistics: bool = False  # whether its BatchNorm takes the batch's own
    momentum: object = 0.0  # a number, or a 0-dim tensor
    eps: float = 0.0
    batch_groups: int = 1  # equal parts of the batch with statistics of their own
    process_group: object = None  # of torch.distributed, whose processes share statistics
    name: str | None = None  # in what is said of bad input
    checked: bool = False  # whether `check` has passed for the tensors that it is given with

    def conv_args(self):
        """(transposed, stride, padding, output_padding): the order in which the operators take them."""
        return self.transposed, self.stride, self.padding, self.output_padding

    def before(self):
        """(activation, slope) before BatchNorm."""
        return (self.activation, self.slope) if self.activation_first else (None, 0.0)

    def after(self):
        """(activation, slope) after BatchNorm, or of a layer without one."""
        return (None, 0.0) if self.activation_first else (self.activation, self.slope)

    def check(self, x, weight, *vectors):
        """Raise ValueError or TypeError for what the operators cannot take."""
        try:
            check_conv_bn_act(x, weight, *vectors, layer=self)
        except (ValueError, TypeError) as error:
            if self.name is None:
                raise
            raise type(error)(f"layer {self.name!r}: {error}") from error
