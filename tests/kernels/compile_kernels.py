"""Compile every kernel for a GPU that need not be there: `python tests/kernels/compile_kernels.py 90 80`.

With `--tiles rows` it is the matrix kernels in every tile that a tuner may choose, with `--tiles positions` those that
have such of one position; `--dtype bfloat16` is for one dtype.

Runs the operators on small CPU tensors, starting nothing, so what is compiled is what they would start, with the
argument types and compile-time constants that they would pass. Prints one JSON line a kernel: its name, target, dtype,
tile, the matrix instructions and the widths of asynchronous copies in its PTX, registers, stack and shared memory.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton

from fastgan.kernels import (
    adam,
    batch_norm,
    cast,
    data,
    down,
    epilogue,
    losses,
    narrow,
    running,
    single,
    statistics,
    up,
    weight_grad,
    weight_grad_narrow,
)
from fastgan.kernels.launch import TILES
from fastgan.kernels.offline import compile_launch, compiling_for, record

MATRIX_KERNELS = ("up_kernel", "up_narrow_kernel", "down_kernel", "weight_grad_kernel", "weight_grad_narrow_kernel")
_DTYPES = ("float32", "float16", "bfloat16")


def workload(dtype, batch=8):
    """Every kernel once: a DCGAN's middle layers, its image layer, both losses, batches with and without mirroring."""

    def run():
        low = torch.empty(batch, 128, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
        high = torch.empty(batch, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.empty(128, 64, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
        where = dict(stride=(2, 2), padding=(1, 1), precision="tf32")
        up.up(low, weight, (16, 16), statistics=True, **where)
        down.down(high, weight, (8, 8), statistics=True, **where)
        weight_grad.weight_grad(low, high, weight, **where)
        # Statistics of activated values, by the epilogue and by the pass after cuDNN.
        leaky = dict(activation="leaky_relu", slope=0.2)
        up.up(low, weight, (16, 16), statistics=True, **leaky, **where)
        down.down(high, weight, (8, 8), statistics=True, **leaky, **where)
        statistics.tile_statistics(high)
        statistics.tile_statistics(high, torch.empty(64), **leaky)

        # The generator's first layer: one position, a plain product.
        latent, first = torch.empty(8 * batch, 100, 1, 1, dtype=dtype), torch.empty(100, 64, 4, 4, dtype=dtype)
        up.up(latent, first, (4, 4), stride=(1, 1), padding=(0, 0), precision="tf32", statistics=True)

        # The generator's last layer and the discriminator's first: three channels, an activation, no statistics.
        image = torch.empty(batch, 3, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        to_image = torch.empty(64, 3, 4, 4, dtype=dtype)
        up.up(high, to_image, (32, 32), activation="tanh", **where)
        down.down(image, to_image, (16, 16), activation="leaky_relu", slope=0.2, **where)
        weight_grad.weight_grad(high, image, to_image, **where)
        # The discriminator's last: one channel, of whole images and of patches.
        last = torch.empty(1, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
        down.down(high, last, (1, 1), stride=(1, 1), padding=(0, 0), precision="tf32")
        down.down(high, last[..., :4, :4], (15, 15), **dict(where, stride=(1, 1)))
        # Gradients on their way back through an activation too.
        up.up(low, weight, (16, 16), activated=high, **leaky, **where)
        up.up(high, to_image, (32, 32), activated=image, activation="tanh", **where)
        down.down(high, weight, (8, 8), activated=low, activation="relu", **where)
        # And to the sums of BatchNorm's backward: of two groups, of one position, of an image's wide end.
        vector, vectors, wide = torch.empty(64), (torch.empty(2, 64),) * 2, (torch.empty(1, 128),) * 2
        up.up(low, weight, (16, 16), normalized=(high, *vectors, vector, vector), **leaky, **where)
        down.down(high, weight, (8, 8), normalized=(low, *wide, None, None), **leaky, **where)
        one, to_one = torch.empty(8 * batch, 16, 1, 1, dtype=dtype), torch.empty(16, 64, 4, 4, dtype=dtype)
        of_one = (torch.empty(8 * batch, 64, 4, 4, dtype=dtype), *(torch.empty(1, 64),) * 2, vector, vector)
        up.up(one, to_one, (4, 4), stride=(1, 1), padding=(0, 0), precision="tf32", normalized=of_one, **leaky)
        down.down(image, to_image, (16, 16), batch_norm=(vector,) * 4, eps=1e-5, activation="relu", **where)

        act = dict(activation="relu", slope=0.0)
        batch_norm.normalize_activate(high, vector, vector, vector, vector, **act)
        batch_norm.batch_norm_grad(high, high, vector, vector, vector, vector, batch_statistics=True, **act)
        batch_norm.batch_norm_grad_sums(high, high, vector, vector, vector, vector, dz=high, **act)
        epilogue.conv_epilogue_(high, bias=vector, batch_norm=(vector,) * 4, eps=1e-5, **act)
        batch_norm.activation_input_grad(image, image, activation="tanh", slope=0.0)
        tiles = statistics.TileStatistics.empty(2, 300, 64, low.device)  # enough tiles to be merged in two stages
        statistics.merge_statistics(tiles, 1e-5)
        running.update_running(vector, vector, torch.empty(2, 64), torch.empty(2, 64), None, 0.1)
        cast.Cast()([torch.empty(64, 8)], [torch.empty(64, 8, dtype=dtype)])
        five = [[torch.empty(64, 8)] for _ in range(4)] + [[torch.empty(())]]
        adam.AdamUpdate()(*five, lr=torch.empty(()), betas=(0.5, 0.999), eps=1e-8)
        losses.bce(torch.empty(batch, dtype=dtype), torch.empty(batch, dtype=dtype), 1.0, 0.0, dtype)
        losses.bce(torch.empty(batch, dtype=dtype), None, 1.0, 0.0)

        images, order = torch.empty(2 * batch, 32, 32, 3, dtype=torch.uint8), torch.empty(2 * batch, dtype=torch.int32)
        drawn = torch.empty(data.programs(batch, images), dtype=torch.int32)
        data.next_batch(images, order, None, drawn, batch, dtype)
        data.next_batch(images, order, order.to(torch.uint8), drawn, batch, dtype)

    return run


def every_tile(dtype):
    """The matrix kernels at a middle layer's sizes, with statistics, in each tile; and an image's kernel."""

    def run():
        low, high, weight, vectors = _middle_layer(dtype)
        for tile in TILES[dtype.itemsize]:
            where = dict(stride=(2, 2), padding=(1, 1), precision="tf32", tile=tile)
            up.up(low, weight, (16, 16), statistics=True, **where)
            down.down(high, weight, (8, 8), statistics=True, **where)
            weight_grad.weight_grad(low, high, weight, **where)
            where.update(activation="leaky_relu", slope=0.2)
            up.up(low, weight, (16, 16), normalized=(high, *vectors), **where)
            down.down(high, weight, (8, 8), normalized=(low, *vectors), **where)
        for tile in narrow.TILES[dtype.itemsize]:
            up.up(low, weight[:, :3], (16, 16), **dict(where, tile=tile, activation="tanh"))
        for tile in single.TILES:
            down.down(high, weight[:1], (8, 8), **dict(where, tile=tile))
        image = torch.empty(512, 3, 16, 16, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        for tile in weight_grad_narrow.TILES[dtype.itemsize]:
            where = dict(stride=(2, 2), padding=(1, 1), precision="tf32", tile=tile)
            weight_grad.weight_grad(low, image, weight[:, :3], **where)
        for tile in down.PATCH_TILES[dtype.itemsize]:
            where.update(tile=tile)
            down.down(image, weight[:, :3], (8, 8), statistics=True, **where)
            down.down(image, weight[:, :3], (8, 8), normalized=(low, *vectors), activation="relu", **where)

    return [one for one in record(run) if one.kernel != "sum_rows_kernel"]


def every_tile_of_positions(dtype):
    """`up` and `down` at a middle layer's sizes, in each tile whose rows are one position of many images."""

    def run():
        low, high, weight, vectors = _middle_layer(dtype)
        for tile in {tile[:4]: tile for tile in TILES[dtype.itemsize]}.values():  # stages take no registers
            where = dict(stride=(2, 2), padding=(1, 1), precision="tf32", tile=tile._replace(by_position=True))
            leaky = dict(activation="leaky_relu", slope=0.2)
            up.up(low, weight, (16, 16), statistics=True, **where)
            down.down(high, weight, (8, 8), statistics=True, **where)
            up.up(low, weight, (16, 16), normalized=(high, *vectors), **leaky, **where)
            down.down(high, weight, (8, 8), normalized=(low, *vectors), **leaky, **where)

    return record(run)


def _middle_layer(dtype):
    """(low, high, weight, BatchNorm's vectors for either end), of two groups, without data."""
    low, high = (torch.empty(512, 256, size, size, dtype=dtype, device="meta") for size in (8, 16))
    weight = torch.empty(256, 256, 4, 4, dtype=dtype, device="meta")
    vectors = [torch.empty(shape, device="meta") for shape in ((2, 256), (2, 256), (256,), (256,))]
    return *(tensor.to(memory_format=torch.channels_last) for tensor in (low, high, weight)), vectors


_TILED = {"rows": every_tile, "positions": every_tile_of_positions}


def report(launch, capability, reads_code):
    with compiling_for(capability):
        compiled = compile_launch(launch)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def told_by(tool, option):
            tool = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = told_by("cuobjdump", "--dump-resource-usage")
        code = told_by("nvdisasm", "--print-code") if reads_code else None  # half a second
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    keys = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return dict(
        kernel=launch.kernel,
        target=f"sm_{capability}",
        tile=[launch.options.get(key) for key in keys],
        matrix_instructions=sorted({word for word in ("wgmma.mma_async", "mma.sync") if word in ptx}),
        copy_bytes=sorted({int(size, 16) for size in re.findall(r"cp\.async\.c\S+ [^;]*?, (0x\w+)", ptx)}),
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        cubin_bytes=len(compiled.asm["cubin"]),
        waits_first="griddepcontrol.wait" in ptx if code is None else _waits_first(code),
    )


def _waits_first(code):
    """Whether the kernel waits for the end of the one before it, before it branches and before it touches memory.

    Looked for in what the GPU executes: ptxas need not keep the order of PTX.
    """
    others = re.search(r"\s(LDG|STG|LDGSTS|LD|ST|ATOMG?|REDG?|CCTL|U?BLKCP|UTMA\w*|BRA|EXIT)[.\s;]", code)
    return others is not None and 0 <= code.find("ACQBULK") < others.start()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="+", type=int, metavar="CAPABILITY", help="90 for sm_90")
    parser.add_argument("--dtype", choices=_DTYPES, help="all three of them by default")
    parser.add_argument("--tiles", choices=_TILED, help="the matrix kernels in every tile")
    options = parser.parse_args()
    for name in [options.dtype] if options.dtype else _DTYPES:
        dtype = getattr(torch, name)
        for launch in _TILED[options.tiles](dtype) if options.tiles else record(workload(dtype)):
            for capability in options.capabilities:
                reads_code = name == "bfloat16" and capability == 90 and not options.tiles
                row = report(launch, capability, reads_code)
                print(json.dumps(dict(row, dtype=name)), flush=True)


if __name__ == "__main__":
    main()
