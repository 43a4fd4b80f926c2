"""Triton kernels, and the functions that launch them. They know tensors and strides only.

Throughout, the two ends of a strided convolution are called *low* and *high* after their resolution:

    low   (N, H, W, A)      the output of a convolution, the input of a transposed one
    high  (N, Ho, Wo, B)    the input of a convolution, the output of a transposed one
    weight (A, B, KH, KW)   the shape in which PyTorch keeps both Conv2d's and ConvTranspose2d's weight

`up` computes high from low, `down` computes low from high, `weight_grad` computes the weight's gradient from both.
Activations are channels_last in memory; weights are read through their strides (channels_last is fastest).

Where to find what:

    up.py, down.py, weight_grad.py    the matrix kernels; narrow.py (up), single.py (down) and weight_grad_narrow.py are
                                      theirs for layers of few channels
    patches.py                        an image's patches, picked from rows that are loaded once
    pieces.py, backward_epilogue.py   what they are made of: tiles, epilogues, statistics; the same for the way back
    epilogue.py, batch_norm.py, statistics.py, running.py   passes of their own, beside cuDNN and after a convolution
    losses.py, adam.py, cast.py, data.py   the rest of a training step; addresses.py: many tensors in one launch
    launch.py, offline.py             tiles, and how kernels are started; how they are compiled without a GPU
"""
