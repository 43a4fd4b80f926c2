"""fastgan: DCGANs trained with fused Triton kernels, and the fused layers for any PyTorch GAN."""

from fastgan import functional, models
from fastgan.explanation import explain
from fastgan.fusion import fuse, unfuse

__version__ = "0.1.0"

__all__ = ["explain", "functional", "fuse", "models", "unfuse"]
