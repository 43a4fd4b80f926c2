"""PTX's types as NumPy's. A register holds bits; each instruction says what it takes them for."""

import functools

import numpy as np

TYPES = {
    "pred": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # NumPy has no such numbers: as_floats and from_floats compute them
    "tf32": np.dtype("u4"),
}


def unsigned(dtype):
    return np.dtype(f"u{dtype.itemsize}")


def reinterpret(values, dtype):
    """The low bits of the values as another type: more of them than there are are zeros, or a signed number's sign."""
    if values.dtype == dtype:
        return values
    if np.bool_ in (values.dtype, dtype):
        raise TypeError("a predicate is no number")
    if values.dtype.itemsize != dtype.itemsize:
        values = values.astype(np.dtype(f"{'i' if values.dtype.kind == 'i' else 'u'}{dtype.itemsize}"))
    return values.view(dtype)


@functools.cache
def immediate(text, dtype):
    """The constant that an operand such as -1, 0x7773U or 0f3F800000 stands for."""
    if dtype == np.bool_:
        return np.bool_(int(text, 0))
    if text[:2] in ("0f", "0d"):
        number = int(text[2:], 16)
    else:
        number = int(text.rstrip("U"), 0)
    bits = np.array(number & (1 << 8 * dtype.itemsize) - 1, unsigned(dtype))
    return bits.view(dtype)[()]


def as_floats(bits, type_):
    """Float32 (float64 of f64) of the bits of numbers; of a TF32 number those that matrix units drop are dropped."""
    if type_ == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_ == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    values = bits.view(TYPES[type_])
    return values.astype(np.float32) if type_ == "f16" else values


def from_floats(values, type_):
    """The bits of float32 (or float64) numbers, rounded to the nearest of the type: f16, bf16 or f32."""
    if type_ != "bf16":
        values = values.astype(TYPES[type_])
        return values.view(unsigned(values.dtype))
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # of the last place; ties go to the even
    return np.where(np.isnan(values), np.uint32(0x7FFF), (bits + half) >> np.uint32(16)).astype(np.uint16)
