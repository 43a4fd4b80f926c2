"""What kind of CPU this is, as far as that decides what computes a convolution."""

import functools

import torch

# Half precisions, and what multiplies them: Intel's tiles (AMX) and vectors (AVX-512), as torch.cpu.get_capabilities
# calls them.
HALF_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}


@functools.cache
def cpu_kind():
    """What was measured: "Intel" or "AMD", with AVX-512; "x86 without AVX-512"; "other" was not."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return "other"
    if not has.get("avx512_f"):
        return "x86 without AVX-512"
    return next((maker for maker in ("Intel", "AMD") if maker in has.get("cpu_name", "")), "other")


def lacks_avx512():
    """Whether PyTorch's convolutions have the code for x86 CPUs without AVX-512: in bfloat16 slow code."""
    return cpu_kind() == "x86 without AVX-512"


@functools.cache
def gains_in_float32(dtype, trains):
    """Whether the CPU convolves numbers of a half precision faster as float32, conversions included.

    Without instructions for them oneDNN converts each number again and again (4 to 5 times float32's time) or, before
    AVX-512, PyTorch's slow convolutions are all there is (5 times and more): so it is on a Xeon if oneDNN is told to
    use no others. Intel's AVX-512 for bfloat16 takes up to twice float32's time there, and for weight gradients in
    float16 hundreds of times; forward alone it is the faster one where images are few. AMD's is faster than float32.
    Of other CPUs than x86 nothing is known.
    """
    if dtype not in HALF_INSTRUCTIONS:
        return False
    has = torch.cpu.get_capabilities()
    matrices, vectors = HALF_INSTRUCTIONS[dtype]
    if has.get("architecture") != "x86_64" or has.get(matrices):
        return False
    return not has.get(vectors) or (trains and cpu_kind() == "Intel")
