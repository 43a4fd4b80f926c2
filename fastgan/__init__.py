"""fastgan: DCGANs trained with fused Triton kernels, and the fused layers for any PyTorch GAN."""

from fastgan import functional, models

__version__ = "0.1.0"

__all__ = ["functional", "models"]
