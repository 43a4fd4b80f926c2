"""What `fastgan.fuse` is made of.

patterns.py        which modules in a row may run as one operator: Groups
layer_code.py      whose code a layer runs: PyTorch's own, or hooks and patches
group_calls.py     runs groups, by operators or by their layers
layout.py          where stock's result is channels_last, so that ours is too
tracing/           what a forward does with its children, as a torch.fx graph, or why that cannot be told
graph_patterns.py  the groups in such a graph
graph_forward.py   what takes a forward's place: the graph with its groups as operators
"""
