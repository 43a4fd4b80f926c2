"""Many tensors to another dtype in one launch."""

import torch
import triton
import triton.language as tl

from fastgan.kernels.addresses import Tables
from fastgan.kernels.launch import launch
from fastgan.kernels.pieces import wait_for_previous

BLOCK = 4096


@triton.jit
def cast_kernel(
    addresses_ptr,  # (tensors, 2) int64: of a source and of its target, 16-byte aligned
    blocks_ptr,  # (programs, 3) int64: which tensor, its first element here, its number of elements
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    MULTIPLE: tl.constexpr,  # of which all numbers of elements are: what lets the compiler move 16 bytes at a time
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    block = blocks_ptr + tl.program_id(0) * 3
    tensor, start, elements = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    source = tl.load(addresses_ptr + tensor * 2).to(tl.pointer_type(SOURCE))
    target = tl.load(addresses_ptr + tensor * 2 + 1).to(tl.pointer_type(TARGET))
    source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
    i = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    ok = i < tl.multiple_of(elements, MULTIPLE)
    tl.store(target + i, tl.load(source + i, mask=ok, other=0.0).to(TARGET), mask=ok)


_ELEMENT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Cast:
    """``cast(sources, targets)``: targets ← sources, each pair of one layout in memory, in one launch."""

    def __init__(self):
        self._tables = Tables(BLOCK)

    @staticmethod
    def supports(sources, targets):
        """Whether every pair is dense, of one layout, aligned, and the dtypes, of up to 32 bits, those of all pairs."""
        dtypes = {(source.dtype, target.dtype) for source, target in zip(sources, targets, strict=True)}
        if len(dtypes) != 1 or not set(dtypes.pop()) <= _ELEMENT.keys():
            return False
        return all(
            source.stride() == target.stride()
            and source.data_ptr() % 16 == target.data_ptr() % 16 == 0
            and (source.is_contiguous() or source.is_contiguous(memory_format=torch.channels_last))
            for source, target in zip(sources, targets, strict=True)
        )

    def __call__(self, sources, targets):
        addresses, blocks = self._tables(sources, targets)
        launch(
            cast_kernel,
            (len(blocks),),
            *(addresses, blocks),
            device=addresses.device,
            SOURCE=_ELEMENT[sources[0].dtype],
            TARGET=_ELEMENT[targets[0].dtype],
            MULTIPLE=16 if all(source.numel() % 16 == 0 for source in sources) else 1,
            BLOCK=BLOCK,
        )
