"""Convolutions on a CPU where PyTorch's own way is slow.

convolution.py   for which of them something else is faster
products.py      as matrix products
"""
