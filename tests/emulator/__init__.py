"""Running what Triton compiles for a GPU without one: its PTX, in NumPy.

A grid's blocks run one after the other, and all threads of a block at once: a register is a vector of a value a thread.
What a GPU leaves undefined, or forgives by chance, is an error here that names the instruction and its source line.
"""
