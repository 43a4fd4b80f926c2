"""PTX as text made into a list of instructions, and the table of those that the emulator knows."""

import functools
import re
from typing import NamedTuple

from tests.emulator.types import TYPES


class PTXError(Exception):
    """The program does what PTX does not allow, or something that the emulator does not know."""


class Instruction(NamedTuple):
    """`@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];`"""

    opcode: str  # "ld.global.v2.b32"
    operands: tuple  # ("{%r1, %r2}", "[%rd1+8]")
    guard: str | None  # "%p1": only the threads in which it holds take part,
    negated: bool  # or only those in which it does not
    source: str  # "up.py:123:8", where the compiler says it

    @property
    def name(self):
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self):
        return self.opcode.split(".")[1:]

    @property
    def type(self):
        """Of its operands: the last of the modifiers."""
        return self.opcode.rpartition(".")[2]

    def __str__(self):
        operands = ", ".join(self.operands)
        operands = operands if len(operands) <= 80 else f"{operands[:77]}..."
        return f"{self.opcode} {operands}".strip() + (f" ({self.source})" if self.source else "")


class Program:
    """One kernel.

    Attributes:
        name: of the kernel.
        threads: of a block.
        parameters: [(type, name)] in their order.
        registers: {the prefix of a register's name: its dtype}.
        instructions, labels: [Instruction], and {a label's name: the index of the instruction after it}.
    """

    def __init__(self, ptx):
        self.name = re.search(r"\.entry (\w+)", ptx).group(1)
        header, body = re.search(r"\.entry \w+(.*?)\n\{(.*?)\n\}", ptx, re.DOTALL).groups()
        self.threads = int(re.search(r"\.reqntid (\d+)", header).group(1))
        self.parameters = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+),?\n", header)
        declared = re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)
        self.registers = {prefix: TYPES[type_] for type_, prefix in declared}
        self.instructions, self.labels = [], {}
        source = ""
        for line in body.splitlines():
            if place := re.match(r"\s*\.loc\b.*// *(\S+)", line):
                source = place.group(1)
            self._parse(line.partition("//")[0], source)

    def _parse(self, line, source):
        for statement in line.split(";"):
            statement = statement.strip()
            while label := re.match(r"(\$\w+):\s*", statement):
                self.labels[label.group(1)] = len(self.instructions)
                statement = statement[label.end() :]
            if statement and not statement.startswith("."):
                guard, opcode, operands = re.match(r"(@!?%\w+)?\s*(\S+)\s*(.*)", statement).groups()
                negated = guard is not None and guard[1] == "!"
                guard = None if guard is None else guard.lstrip("@!")
                self.instructions.append(Instruction(opcode, tuple(split(operands)), guard, negated, source))


def split(operands):
    """The parts between commas, of which those within braces and brackets count for none."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{[])+", operands)]


def vector(operand):
    """The registers in braces; or the one that is there without any."""
    return split(operand.strip("{} "))


_KNOWN = []


def instruction(pattern):
    """Makes of `function(block, instruction)` what executes the instructions whose opcode matches.

    The pattern says all that the function takes into account: another modifier makes an instruction unknown.
    """

    def register(function):
        _KNOWN.append((re.compile(pattern), function))
        return function

    return register


@functools.cache
def executes(opcode):
    """The function for an opcode."""
    for pattern, function in _KNOWN:
        if pattern.fullmatch(opcode):
            return function
    raise PTXError("the emulator does not know this instruction")
