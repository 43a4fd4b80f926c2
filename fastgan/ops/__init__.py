"""The operators: custom operators over the kernels, each with its autograd rule and its plain-torch reference."""
