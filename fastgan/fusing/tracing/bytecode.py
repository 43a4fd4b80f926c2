"""What a function's bytecode does, as far as a trace of it depends on that: CPython's, of Python 3.10 and newer."""

import dis
import functools
import types
from dataclasses import dataclass, field

# They do nothing by themselves.
_PLAIN = frozenset(["CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL", "PUSH_NULL", "NOT_TAKEN"])


@dataclass
class Facts:
    """What a code object, and those in it, use."""

    # The keys are in the order of the code, so that the same reason is given each time.
    chains: dict = field(default_factory=dict)  # ("torch", "nn", "ReLU"): a global name and the attributes after it
    named_by_super: dict = field(default_factory=dict)
    asks_for_none: bool = False  # whether something other than an attribute or a parameter is None
    asks_for_none_given: bool = False  # whether a parameter is
    asks_self: bool = False  # whether an attribute of self is another constant
    problem: str = ""


def instructions_of(code):
    """The instructions of a code object, without those that do nothing by themselves."""
    return [i for i in dis.get_instructions(code) if i.opname not in _PLAIN]


@functools.lru_cache(maxsize=1024)
def facts_of(code, outer=None):
    """The Facts of a code object. `outer`: the names of outer functions' variables; without, of those that it uses."""
    facts = Facts()
    outer = frozenset(code.co_freevars) if outer is None else outer
    instructions = instructions_of(code)
    written = {name for i in instructions if i.opname.startswith("STORE_FAST") for name in _as_tuple(i.argval)}
    given = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - written
    for at, instruction in enumerate(instructions):
        facts.problem = facts.problem or _problem(instructions, at, outer)
        if instruction.opname == "IS_OP" and instructions[at - 1].argval is not None:
            facts.asks_self = True
        asked = _asked_for_none(instructions, at)
        if asked in given:
            facts.asks_for_none_given = True
        elif asked is not None:
            facts.asks_for_none = True
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            facts.chains[_chain(instructions, at)] = True
            if instruction.argval == "super":
                name = _named_by_super(instructions, at)
                facts.problem = facts.problem or ("" if name else "it uses super in a way of its own")
                facts.named_by_super[name] = True
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = facts_of(constant, outer)
            facts.chains |= inner.chains
            facts.named_by_super |= inner.named_by_super
            facts.asks_for_none |= inner.asks_for_none or inner.asks_for_none_given
            facts.asks_self |= inner.asks_self
            facts.problem = facts.problem or inner.problem
    return facts


def _chain(instructions, at):
    """A global name that is loaded, with the attributes that are looked up on it one after the other."""
    attributes = []
    for following in instructions[at + 1 :]:
        if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        attributes.append(following.argval)
    before = instructions[at - 1] if at else None
    if before is not None and before.opname == "LOAD_GLOBAL" and before.argval == "super" and not attributes:
        attributes = ["super"]
    return instructions[at].argval, *attributes


def _problem(instructions, at, outer):
    """Why a trace does not stand for code with this instruction."""
    instruction = instructions[at]
    kind, value = instruction.opname, instruction.argval
    before = instructions[at - 1] if at else instruction
    if kind in ("STORE_ATTR", "DELETE_ATTR"):
        return f"it sets {'self' if is_attribute_of('self', instructions, at) else ''}.{value}"
    if kind in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        return f"it sets the global {value}"
    if kind in ("STORE_DEREF", "DELETE_DEREF") and value in outer:
        return f"it sets {value}, a variable of an outer function"
    if kind in ("IMPORT_NAME", "LOAD_BUILD_CLASS") or kind.startswith("MATCH_"):
        return "it imports, defines classes or matches patterns"
    # A stand-in is another object than the one that an operation would return, True or a small number say.
    if kind == "IS_OP" and not (
        before.opname == "LOAD_CONST" and (before.argval is None or _asks_self(instructions, at))
    ):
        return "it asks whether two are the same object"
    if kind == "SETUP_FINALLY" or (kind == "PUSH_EXC_INFO" and instructions[at + 1].opname != "WITH_EXCEPT_START"):
        return "it catches exceptions"
    if kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and value.startswith("__") and value.endswith("__"):
        # A module's own way to look up its children, by which some do: `reads.py` sees to it.
        by_name = value == "__getattr__" and is_attribute_of("self", instructions, at)
        return "" if by_name else f"it uses {value}"
    return ""


def _asks_self(instructions, at):
    """Whether it is an attribute of self that is asked to be a constant."""
    return instructions[at - 2].opname == "LOAD_ATTR" and is_attribute_of("self", instructions, at - 2)


def _asked_for_none(instructions, at):
    """What an instruction asks to be None: None if it does not, or of an attribute; the name of a variable, or ""."""
    kind, before = instructions[at].opname, instructions[at - 1] if at else None
    if kind == "IS_OP" and before.argval is None:
        before = instructions[at - 2]
    elif not (kind.startswith("POP_JUMP") and kind.endswith("NONE")):
        return None
    if before.opname == "LOAD_ATTR":
        return None
    return _as_tuple(before.argval)[-1] if before.opname.startswith("LOAD_FAST") else ""


def _as_tuple(name_or_names):
    """The variables of an instruction that may be two in one."""
    return name_or_names if isinstance(name_or_names, tuple) else (name_or_names,)


def is_attribute_of(name, instructions, at):
    """Whether the attribute that is loaded or set is one of the variable of that name."""
    holder = instructions[at - 1]
    if holder.opname in ("SWAP", "ROT_TWO"):  # self.x += 1
        loads = (i for i in range(at - 1, 1, -1) if instructions[i].opname == "LOAD_ATTR")
        holder = next((instructions[i - 2] for i in loads if instructions[i].argval == instructions[at].argval), holder)
    return holder.opname.startswith("LOAD_FAST") and name == _as_tuple(holder.argval)[-1]


def _named_by_super(instructions, at):
    """The method in `super().method` or `super(Name, self).method`; "" where super is used otherwise."""
    for i in range(at + 1, len(instructions)):
        if instructions[i].opname == "LOAD_SUPER_ATTR":
            return instructions[i].argval
        if instructions[i].opname.startswith("CALL"):
            following = instructions[i + 1]
            return following.argval if following.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""
    return ""
