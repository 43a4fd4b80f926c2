"""Measuring, on this GPU, which implementation of each convolution is the faster: `python -m fastgan.tune --help`."""
