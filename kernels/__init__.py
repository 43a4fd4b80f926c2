"""Triton kernels, and the functions that launch them. They know tensors and strides only.

Throughout, the two ends of a strided convolution are called *low* and *high* after their resolution:

    low   (N, H, W, A)      the output of a convolution, the input of a transposed one
    high  (N, Ho, Wo, B)    the input of a convolution, the output of a transposed one
    weight (A, B, KH, KW)   the shape in which PyTorch keeps both Conv2d's and ConvTranspose2d's weight

`up` computes high from low, `down` computes low from high, `weight_grad` computes the weight's gradient from both.
Activations are channels_last in memory; weights are read through their strides (channels_last is fastest).
"""
