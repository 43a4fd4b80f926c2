"""Cases for the fused convolutions in which every two values of different properties meet at least once."""

import random
from itertools import combinations
from typing import NamedTuple

_VALUES = dict(
    transposed=(False, True),
    kernel=(1, 3, 4, 5, 7),
    stride=(1, 2),
    padding=(0, 1, 2),
    output_padding=(0, 1),
    in_channels=(1, 3, 18),
    out_channels=(1, 5, 17),
    size=((4, 4), (5, 7)),
    activation=("relu", "leaky_relu", "tanh", "sigmoid", None),
    activation_first=(False, True),
    batch_norm=(True, False),
    bias=(True, False),
    training=(True, False),
    memory=("contiguous", "channels_last", "sliced"),
    dtype=("float32", "float16"),
)


class Case(NamedTuple):
    transposed: bool
    kernel: int
    stride: int
    padding: int
    output_padding: int
    in_channels: int
    out_channels: int
    size: tuple
    activation: str | None
    activation_first: bool
    batch_norm: bool
    bias: bool
    training: bool
    memory: str
    dtype: str

    def is_valid(self):
        if self.output_padding and (not self.transposed or self.output_padding >= self.stride):
            return False
        if self.activation_first and not (self.activation and self.batch_norm):
            return False
        return all(self._out(n) >= 2 for n in self.size)

    def _out(self, n):
        if self.transposed:
            return (n - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding
        return (n + 2 * self.padding - self.kernel) // self.stride + 1

    def pairs(self):
        return set(combinations(self._asdict().items(), 2))

    def __str__(self):
        return "-".join(str(value).replace(" ", "") for value in self)


def pairwise_cases(seed=0):
    """Valid Cases, a few dozen, that hold every pair of values that any valid case can hold."""
    rng = random.Random(seed)

    def completions(pair, tries):
        for _ in range(tries):
            case = Case(**{**{name: rng.choice(values) for name, values in _VALUES.items()}, **dict(pair)})
            if case.is_valid():
                yield case

    options = {name: [(name, value) for value in values] for name, values in _VALUES.items()}
    wanted = {(a, b) for x, y in combinations(options, 2) for a in options[x] for b in options[y]}
    cases = []
    for pair in sorted(wanted, key=repr):
        if pair not in wanted:
            continue
        # The completion that meets the most pairs not met yet; a pair without any cannot be had.
        best = max(completions(pair, 60), key=lambda case: len(case.pairs() & wanted), default=None)
        if best is not None:
            cases.append(best)
            wanted -= best.pairs()
    return cases
