"""Compile every kernel for a GPU that need not be there: `python tests/kernels/compile_kernels.py 90 80`.

Runs the operators on small CPU tensors with `launch` replaced, so what is compiled is what they would start, with the
argument types and compile-time constants that they would pass. Prints one JSON line a kernel: its name, target, dtype
and the matrix instructions in its PTX.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgan.kernels import batch_norm, data, down, losses, running, statistics, up, weight_grad

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_INTEGER_TYPES = {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
_MODULES = (batch_norm, data, down, losses, running, statistics, up, weight_grad)


def record(workload):
    """[(kernel, positional arguments, keyword arguments)] of every launch that `workload` makes."""
    launches = []

    def recorder(kernel, grid, *args, device, **options):
        launches.append((kernel, args, options))

    originals = {module: module.launch for module in _MODULES}
    for module in _MODULES:
        module.launch = recorder
    try:
        workload()
    finally:
        for module, original in originals.items():
            module.launch = original
    return launches


def compile_launch(kernel, args, options, capability):
    """The compiled kernel, typed and specialised as a launch with these arguments would be."""
    options = dict(options)
    compiler_options = dict(
        num_warps=options.pop("num_warps", 4), num_stages=options.pop("num_stages", 2), enable_fp_fusion=True
    )
    names = [parameter.name for parameter in kernel.params]
    constants = dict(options)
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        if value is None:
            constants[name], signature[name] = None, "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = (_TYPES | _INTEGER_TYPES)[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:  # Triton makes a constant of every integer argument that is one
            constants[name], signature[name] = 1, "constexpr"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(options, "constexpr"))
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler_options)


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

        # The generator's last layer and the discriminator's first: three channels, an activation, no statistics.
        image = torch.empty(batch, 3, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        to_image = torch.empty(64, 3, 4, 4, dtype=dtype)
        up.up(high, to_image, (32, 32), activation="tanh", **where)
        down.down(image, to_image, (16, 16), activation="leaky_relu", slope=0.2, **where)
        vector = torch.empty(64)
        down.down(image, to_image, (16, 16), batch_norm=(vector,) * 4, eps=1e-5, activation="relu", **where)

        act = dict(activation="relu", slope=0.0)
        batch_norm.normalize_activate(high, vector, vector, vector, vector, **act)
        batch_norm.batch_norm_grad(high, high, vector, vector, vector, vector, batch_statistics=True, **act)
        batch_norm.activation_input_grad(image, image, activation="tanh", slope=0.0)
        tiles = statistics.TileStatistics.empty(2, 300, 64, low.device)  # enough tiles to be merged in two stages
        statistics.merge_statistics(tiles, 1e-5)
        running.update_running(vector, vector, torch.empty(2, 64), torch.empty(2, 64), 0.1)
        losses.bce(torch.empty(batch, dtype=dtype), torch.empty(batch, dtype=dtype), 1.0, 0.0)
        losses.bce(torch.empty(batch, dtype=dtype), None, 1.0, 0.0)

        images, order = torch.empty(2 * batch, 32, 32, 3, dtype=torch.uint8), torch.empty(2 * batch, dtype=torch.int32)
        drawn = torch.empty(data.programs(batch, images), dtype=torch.int32)
        data.next_batch(images, order, None, drawn, batch, dtype)
        data.next_batch(images, order, order.to(torch.uint8), drawn, batch, dtype)

    return run


def main(capabilities):
    for dtype in _TYPES:
        launches = record(workload(dtype))
        for capability in capabilities:
            for kernel, args, options in launches:
                compiled = compile_launch(kernel, args, options, capability)
                ptx = compiled.asm["ptx"]
                matrix = sorted({word for word in ("wgmma.mma_async", "mma.sync") if word in ptx})
                print(
                    json.dumps(
                        dict(
                            kernel=kernel.__name__,
                            target=f"sm_{capability}",
                            dtype=str(dtype).removeprefix("torch."),
                            matrix_instructions=matrix,
                            cubin_bytes=len(compiled.asm["cubin"]),
                        )
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
