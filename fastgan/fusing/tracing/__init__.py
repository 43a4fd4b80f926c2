"""A forward as a torch.fx graph that stands for every call of one kind, or the reason why there is none.

trace.py      runs a forward on stand-ins, after the others have looked at it
code.py       which functions such a trace can stand for; bytecode.py: what their code does
reads.py      what a forward looks up on modules
changes.py    whether modules that it calls may change that
watching.py   whether all that a trace depends on is as it was
"""
