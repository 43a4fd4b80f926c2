"""Instructions that compute registers from registers, each thread for itself.

Approximations (`approx`, `full`) are computed as exactly as the others, and subnormal numbers stay with `ftz`.
"""

import numpy as np

from tests.emulator.program import PTXError, instruction, vector
from tests.emulator.types import TYPES, as_floats, from_floats, unsigned

_INTEGER = r"[bus](16|32|64)"
_TWO = dict(add=np.add, sub=np.subtract, xor=np.bitwise_xor, **{"and": np.bitwise_and, "or": np.bitwise_or})
_ONE = {"not": np.invert, "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "sqrt": np.sqrt}
_WIDE = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
_COMPARE = dict(eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal)


@instruction(rf"(add|sub)\.({_INTEGER}|f16|f32|f64)|(and|or|xor)\.(pred|{_INTEGER})")
def two_operands(block, op):
    to, *values = op.operands
    block.write(to, _TWO[op.name](*(block.read(value, op.type) for value in values)))


@instruction(r"(min|max)\.([us](16|32|64)|f32)")
def extreme(block, op):
    to, *values = op.operands
    if op.type == "f32":  # of a number and NaN: the number
        function = dict(min=np.fmin, max=np.fmax)[op.name]
    else:
        function = dict(min=np.minimum, max=np.maximum)[op.name]
    block.write(to, function(*(block.read(value, op.type) for value in values)))


@instruction(r"(add|sub)\.(s16|f16|bf16)x2")
def two_halves(block, op):
    to, *values = op.operands
    a, b = (np.ascontiguousarray(block.read(value, "b32")).view(np.uint16) for value in values)
    type_ = op.type.removesuffix("x2")
    if type_ == "s16":
        result = _TWO[op.name](a, b)
    else:
        result = from_floats(_TWO[op.name](as_floats(a, type_), as_floats(b, type_)), type_)
    block.write(to, result.view(np.uint32))


@instruction(rf"not\.(pred|{_INTEGER})|(neg|abs)\.(s(16|32|64)|f32)|ex2\.approx(\.ftz)?\.f32|sqrt\.rn\.f32")
def one_operand(block, op):
    to, value = op.operands
    block.write(to, _ONE[op.name](block.read(value, op.type)))


@instruction(r"abs\.(f16|bf16)")
def absolute_half(block, op):
    to, value = op.operands
    block.write(to, block.read(value, "b16") & np.uint16(0x7FFF))


@instruction(r"popc\.b32")
def count_bits(block, op):
    to, value = op.operands
    bytes_ = np.ascontiguousarray(block.read(value, "b32")).view(np.uint8).reshape(-1, 4)
    block.write(to, np.unpackbits(bytes_, axis=1).sum(1).astype(np.uint32))


def _product(block, op):
    """Of operands 1 and 2: the low or the high half of its bits, or all of them."""
    a, b = (block.read(value, op.type) for value in op.operands[1:3])
    if "wide" not in op.modifiers and "hi" not in op.modifiers:
        return a * b
    wide = _WIDE[op.type]
    product = a.astype(wide) * b.astype(wide)
    return product if "wide" in op.modifiers else (product >> wide(8 * a.itemsize)).astype(a.dtype)


@instruction(r"mul\.((lo|hi|wide)\.[us](16|32)|lo\.[us]64|f32|f64)")
def multiply(block, op):
    block.write(op.operands[0], _product(block, op))


@instruction(r"mad\.((lo|wide)\.[us](16|32)|lo\.[us]64)")
def multiply_add(block, op):
    product = _product(block, op)
    block.write(op.operands[0], product + block.read(op.operands[3], f"b{8 * product.itemsize}").view(product.dtype))


@instruction(r"fma\.rn(\.ftz)?\.f32")
def fused_multiply_add(block, op):
    to, *values = op.operands
    a, b, c = (block.read(value, "f32").astype(np.float64) for value in values)
    block.write(to, (a * b + c).astype(np.float32))


@instruction(r"div\.((full|rn)\.f32|[us](16|32))")
def divide(block, op):
    a, b = (block.read(value, op.type) for value in op.operands[1:])
    if op.type == "f32":
        return block.write(op.operands[0], a / b)
    remainder = np.fmod(a, np.where(b == 0, 1, b))
    block.write(op.operands[0], ((a - remainder) // np.where(b == 0, 1, b)).astype(a.dtype))  # rounds towards zero


@instruction(r"rem\.[us](16|32)")
def remainder(block, op):
    a, b = (block.read(value, op.type) for value in op.operands[1:])
    block.write(op.operands[0], np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype))


@instruction(r"(shl\.b|shr\.[bus])(16|32|64)")
def shift(block, op):
    to, value, by = op.operands
    value, by = block.read(value, op.type), block.read(by, "u32")
    most = np.uint32(8 * value.itemsize - 1)
    function = np.left_shift if op.name == "shl" else np.right_shift
    shifted = function(value, np.minimum(by, most).astype(value.dtype))
    if value.dtype.kind == "u":
        shifted = np.where(by > most, 0, shifted).astype(value.dtype)
    block.write(to, shifted)


@instruction(r"shf\.[lr]\.wrap\.b32")
def funnel_shift(block, op):
    """32 of the 64 bits of two registers, the second above the first: the upper ones to the left, else the lower."""
    to, *operands = op.operands
    low, high, by = (block.read(operand, "u32").astype(np.uint64) for operand in operands)
    both, by = high << np.uint64(32) | low, by & np.uint64(31)
    shifted = (both << by) >> np.uint64(32) if "l" in op.modifiers else both >> by
    block.write(to, shifted.astype(np.uint32))


@instruction(r"bfe\.[us](32|64)")
def extract_bits(block, op):
    to, value, start, length = op.operands
    bits = TYPES[op.type].itemsize * 8
    value = block.read(value, op.type)
    start, length = (block.read(operand, "u32") & 0xFF for operand in (start, length))
    end = start + length
    if (length == 0).any() or (end > bits).any():
        raise PTXError("the emulator does not know fields of no bits, or beyond the last")
    value = value << (bits - end).astype(value.dtype)  # the field's last bit comes to the top, where the sign is
    block.write(to, value >> (bits - length).astype(value.dtype))


@instruction(r"bfi\.b32")
def insert_bits(block, op):
    to, a, b, start, length = op.operands
    a, b = block.read(a, "b32"), block.read(b, "b32")
    field = np.uint32((1 << int(length, 0)) - 1 << int(start, 0))
    block.write(to, b & ~field | a << np.uint32(int(start, 0)) & field)


@instruction(r"prmt\.b32")
def permute_bytes(block, op):
    """Each byte of the result is one of eight, or its sign eight times, as four bits of the selector say."""
    to, *operands = op.operands
    a, b, selector = (block.read(operand, "u32") for operand in operands)
    both = np.stack([a, b], 1).view(np.uint8)
    picks = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    picked = np.take_along_axis(both, (picks & 7).astype(np.intp), 1)
    picked = np.where(picks & 8, np.where(picked & 0x80, 0xFF, 0), picked).astype(np.uint8)
    block.write(to, picked.view(np.uint32)[:, 0])


@instruction(r"selp\.(b16|b32|b64|f32|f64)")
def select(block, op):
    to, yes, no, condition = op.operands
    block.write(to, np.where(block.read(condition, "pred"), block.read(yes, op.type), block.read(no, op.type)))


def _compare(how, a, b):
    """With a u behind it, a comparison of floats holds for NaN too; `ne` without it does not."""
    result = _COMPARE[how[:2]](a, b)
    if a.dtype.kind != "f":
        return result
    unordered = np.isnan(a) | np.isnan(b)
    return result | unordered if how.endswith("u") else result & ~unordered


@instruction(rf"setp\.(eq|ne|lt|le|gt|ge)\.{_INTEGER}|setp\.(eq|ne|lt|le|gt|ge)u?\.(f16|bf16|f32)")
def compare(block, op):
    to, *values = op.operands
    a, b = (block.read(value, op.type) for value in values)
    if "f" in op.type:
        a, b = as_floats(a, op.type), as_floats(b, op.type)
    block.write(to, _compare(op.modifiers[0], a, b))


@instruction(r"setp\.(eq|ne|lt|le|gt|ge)u?\.(f16|bf16)x2")
def compare_halves(block, op):
    to, *values = op.operands
    a, b = (np.ascontiguousarray(block.read(value, "b32")).view(np.uint16) for value in values)
    type_ = op.type.removesuffix("x2")
    result = _compare(op.modifiers[0], as_floats(a, type_), as_floats(b, type_)).reshape(-1, 2)
    for i, half in enumerate(to.split("|")):
        block.write(half, result[:, i])


@instruction(r"cvt\.[us](8|16|32|64)\.[us](8|16|32|64)|cvt\.rn\.f32\.[us](16|32)|cvt\.rzi\.s32\.f32")
def convert_integer(block, op):
    to, value = op.operands
    block.write(to, block.read(value, op.type).astype(TYPES[op.modifiers[-2]]))


@instruction(r"cvt\.f32\.b?f16|cvt\.rn\.(b?f16\.f32|f32\.f64)")
def convert_float(block, op):
    to, value = op.operands
    block.write(to, from_floats(as_floats(block.read(value, op.type), op.type), op.modifiers[-2]))


@instruction(r"cvt\.rn\.b?f16x2\.f32")
def convert_to_halves(block, op):
    to, high, low = op.operands
    both = np.stack([block.read(low, "f32"), block.read(high, "f32")], 1)
    block.write(to, from_floats(both, op.modifiers[-2].removesuffix("x2")).view(np.uint32)[:, 0])


@instruction(rf"mov\.(pred|{_INTEGER})")
def move(block, op):
    """One register into another; or several into a wider one and back, of which the first are the low bits."""
    to, value = op.operands
    dtype = TYPES[op.type]
    if value.startswith("{"):
        parts = vector(value)
        part = f"b{8 * dtype.itemsize // len(parts)}"
        block.write(to, np.stack([block.read(one, part) for one in parts], 1).view(unsigned(dtype))[:, 0])
    elif to.startswith("{"):
        parts = vector(to)
        values = np.ascontiguousarray(block.read(value, op.type)).view(f"u{dtype.itemsize // len(parts)}")
        for i, one in enumerate(parts):
            block.write(one, values.reshape(-1, len(parts))[:, i].copy())
    else:
        block.write(to, block.read(value, op.type))
