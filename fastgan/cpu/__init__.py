"""Convolutions on a CPU where PyTorch's own way is slow.

convolution.py    what a layer calls
choice.py         for which parts of which convolutions matrix products are faster
products.py       those products
capabilities.py   what kind of CPU it is
"""
