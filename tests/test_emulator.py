"""The emulator of PTX: that it computes what the instructions say, and refuses what a GPU would not forgive."""

import re
import struct

import pytest
import torch

from tests.emulator.block import run
from tests.emulator.program import Program, PTXError

HEADER = """
.visible .entry kernel(
    .param .u64 kernel_param_0,
    .param .u64 kernel_param_1,
    .param .u32 kernel_param_2
)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r1, [kernel_param_2];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd1, %rd1, %rd3;  // of x and of out: this thread's element
    add.s64 %rd2, %rd2, %rd3;
{body}
    ret;
}}
"""


def emulate(body, x, out, number=0, *, threads=64, grid=(1,), shared=0):
    program = Program(HEADER.format(threads=threads, body=body))
    run(program, grid, (x, out, number), (x, out), shared)
    return out


def refused(message, *args, **options):
    with pytest.raises(PTXError, match=message):
        emulate(*args, **options)


def test_threads_that_a_predicate_leaves_out_do_nothing():
    body = """
    mov.b32 %r3, 0;
    setp.lt.u32 %p1, %r2, %r1;
    @%p1 ld.global.b32 %r3, [%rd1];
    add.f32 %r3, %r3, 0f3F800000;
    setp.ne.b32 %p2, %r2, 5;
    @!%p1 mov.pred %p2, 0;
    @%p2 st.global.b32 [%rd2], %r3;
    """
    x, out = torch.randn(40), torch.full((64,), -7.0)
    expected = torch.cat([x + 1, out[40:]])
    expected[5] = -7
    assert torch.equal(emulate(body, x, out, number=40), expected)


def test_loop_and_grid():
    body = """
    mov.u32 %r3, %ctaid.y;
    mov.b32 %r4, 0;
$again:
    add.s32 %r4, %r4, %r1;
    add.s32 %r1, %r1, -1;
    setp.gt.s32 %p1, %r1, 0;
    @%p1 bra $again;
    mul.wide.u32 %rd4, %r3, 256;
    add.s64 %rd2, %rd2, %rd4;
    st.global.b32 [%rd2], %r4;
    """
    out = torch.zeros(3, 64, dtype=torch.int32)
    emulate(body, out, out, number=10, grid=(1, 2))
    assert (out[:2] == 55).all() and (out[2] == 0).all()


def bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize(
    "instructions, given, expected",
    (
        ("mul.hi.s32 %r4, %r3, 3;", -(2**31), -2),
        ("mul.lo.s32 %r4, %r3, %r3;", 70000, 70000**2 % 2**32),
        ("mad.wide.s32 %rd4, %r3, 4, %rd5; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r4, %rd4;", -1, -1),
        ("div.s32 %r4, %r3, 2;", -7, -3),
        ("rem.s32 %r4, %r3, 4;", -7, -3),
        ("shr.s32 %r4, %r3, 40;", -7, -1),
        ("shr.u32 %r4, %r3, 32;", -7, 0),
        ("shf.l.wrap.b32 %r4, %r3, 7, 4;", 0xABC00001, 0x7A),
        ("shf.r.wrap.b32 %r4, %r3, 7, 36;", 0xABC00001, 0x7ABC0000),  # by 4: wrapped
        ("bar.warp.sync -1; bfe.u32 %r4, %r3, 4, 8;", 0xABC3, 0xBC),
        ("bfe.s32 %r4, %r3, 4, 8;", 0xABC3, 0xBC - 256),
        ("bfi.b32 %r4, -1, %r3, 8, 4;", 0x10001, 0x10F01),
        ("prmt.b32 %r4, %r3, 0, 0x7B10U;", 0x80112233, 0x00FF2233),
        ("cvt.u16.u32 %rs1, %r3; mov.b32 %r4, {%rs1, 7};", 0x12345, 0x72345),
        ("mov.b32 {_, %rs1}, %r3; cvt.s32.s16 %r4, %rs1;", 0x8001FFFF, 0x8001 - 65536),
        ("cvt.s8.s32 %rs1, %r3; cvt.s32.s16 %r4, %rs1;", 0x1F0, -16),
        ("add.s16x2 %r4, %r3, 0x20001;", 0x7000FFFF, 0x70020000),
        ("add.f16x2 %r4, %r3, 0x3C004000;", 0x3C00C200, 0x4000BC00),
        ("sub.bf16x2 %r4, %r3, 0x3F804000;", 0x3F80C000, 0x0000C080),
        ("popc.b32 %r4, %r3;", 0xF00F0001, 9),
        ("cvt.rn.f32.s32 %r4, %r3;", -3, bits(-3.0)),
        ("cvt.rzi.s32.f32 %r4, %r3;", bits(-2.75), -2),
        ("mov.b64 %rd4, 0d4008000000000000; mul.f64 %rd4, %rd4, %rd4; cvt.rn.f32.f64 %r4, %rd4;", 0, bits(9.0)),
        (  # 9 − 2^−40 − 9, of which float32 would have nothing left
            "sub.f64 %rd4, 0d4022000000000000, 0d3D70000000000000; add.f64 %rd4, %rd4, 0dC022000000000000;"
            "setp.eq.s32 %p1, %r3, 0; selp.f64 %rd4, %rd4, 0d0000000000000000, %p1; cvt.rn.f32.f64 %r4, %rd4;",
            0,
            bits(-(2.0**-40)),
        ),
        ("cvt.rn.f16x2.f32 %r4, %r3, 0f3F800000;", bits(-2.0), 0xC0003C00),
        ("cvt.rn.bf16.f32 %rs1, %r3; cvt.f32.bf16 %r4, %rs1;", 0x3F808000, 0x3F800000),  # ties go to the even
        ("cvt.rn.bf16.f32 %rs1, %r3; cvt.f32.bf16 %r4, %rs1;", 0x3F818000, 0x3F820000),
        ("setp.ne.f32 %p1, %r3, %r3; selp.b32 %r4, 1, 2, %p1;", bits(float("nan")), 2),  # ordered: not of NaN
        ("setp.leu.f32 %p1, %r3, %r3; selp.b32 %r4, 1, 2, %p1;", bits(float("nan")), 1),
        ("setp.gt.f16x2 %p1|%p2, %r3, 0; selp.b32 %r4, 1, 0, %p1; @%p2 add.s32 %r4, %r4, 2;", 0x3C00BC00, 2),
        ("max.f32 %r4, %r3, 0f40000000;", bits(float("nan")), bits(2.0)),
        ("shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; sub.s32 %r4, %r4, %r2; mul.lo.s32 %r4, %r4, %r4;", 0, 1),
    ),
)
def test_arithmetic(instructions, given, expected):
    body = f"mov.b64 %rd5, 0; ld.global.b32 %r3, [%rd1]; {instructions} st.global.b32 [%rd2], %r4;"
    x, out = torch.full((64,), (given + 2**31) % 2**32 - 2**31, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    assert (emulate(body, x, out) == (expected + 2**31) % 2**32 - 2**31).all()


def test_access_outside_of_a_tensor():
    body = ".loc 1 12 3 // file.py:12:3\n ld.global.b32 %r3, [%rd1];\n st.global.b32 [%rd2], %r3;"
    x = torch.randn(100)
    assert torch.equal(emulate(body, x[:64], torch.zeros(64)), x[:64])
    # Beyond its end there is memory, but not this tensor's.
    where = r"outside of all tensors(.|\n)*ld\.global.*file\.py:12:3(.|\n)*block \(0, 0, 0\)"
    refused(where, body, x[:63], torch.zeros(64))
    refused(r"outside of all tensors(.|\n)*st\.global", body, torch.zeros(64), x[:63])


def test_access_outside_of_shared_memory():
    body = "shl.b32 %r3, %r2, 2; st.shared.b32 [%r3+4], %r2;"
    x = torch.zeros(64)
    emulate(body, x, x, shared=260)
    refused("outside of shared memory", body, x, x, shared=256)
    below = "shl.b32 %r3, %r2, 2; sub.s32 %r3, %r3, 8; st.shared.b32 [%r3+{}], %r2;"  # the sum counts, of 32 bits
    emulate(below.format(8), x, x, shared=256)
    refused("outside of shared memory", below.format(4), x, x, shared=256)


def test_misaligned_vector():
    body = "setp.eq.b32 %p1, %r2, %r1; @%p1 ld.global.v2.b32 {%r3, %r4}, [%rd1]; @%p1 st.global.b32 [%rd2], %r4;"
    x = torch.randn(64)
    assert emulate(body, x, torch.zeros(64), number=2)[2] == x[3]
    refused("misaligned", body, x, torch.zeros(64), number=3)


def test_race_between_warps():
    # Words of this thread and of a partner, which is in the other warp.
    partners = "shl.b32 %r3, %r2, 2; sub.s32 %r4, 252, %r3;"
    write, read, barrier = "st.shared.b32 [%r3], %r2;", "ld.shared.b32 %r5, [%r4];", "bar.sync 0;"
    out = torch.zeros(64, dtype=torch.int32)

    emulate(partners + write + barrier + read + barrier + write + "st.global.b32 [%rd2], %r5;", out, out, shared=256)
    assert torch.equal(out, torch.arange(63, -1, -1, dtype=torch.int32))
    refused(r"reads what another one writes(.|\n)*ld\.shared", partners + write + read, out, out, shared=256)
    refused(r"writes what another one reads(.|\n)*st\.shared", partners + read + write, out, out, shared=256)
    write_partner = "st.shared.b32 [%r4], 0;"
    refused("two warps write the same byte", partners + write + write_partner, out, out, shared=256)

    within_a_warp = "shl.b32 %r3, %r2, 2; xor.b32 %r4, %r3, 124;"
    emulate(within_a_warp + write + read + write_partner, out, out, shared=256)


def test_warps_that_write_the_same_byte_at_once():
    x = torch.zeros(64)
    emulate("st.shared.b32 [4], 7;", x, x, shared=8)
    emulate("and.b32 %r3, %r2, 31; st.shared.b32 [4], %r3;", x, x, shared=8)  # any lane's, but the same in both warps
    refused("different values", "shr.u32 %r3, %r2, 5; st.shared.b32 [4], %r3;", x, x, shared=8)


def test_race_between_warps_in_global_memory():
    """What a warp writes, with another one that reads it: before the next barrier either may come first."""
    read, barrier = "ld.global.b32 %r3, [%rd1];", "bar.sync 0;"
    write, write_later = "st.global.b32 [%rd2], %r3;", "st.global.b32 [%rd2+128], %r3;"
    x = torch.randn(96)
    emulate(read + write, x, x)  # each its own
    emulate(read + barrier + write_later, x, x)
    refused("a warp writes what another one reads", read + write_later, x, x)
    refused("a warp writes what another one reads", write_later + read, x, x)
    # The upper warp does again what the lower one does, and only that one stores.
    lower = "and.b32 %r3, %r2, 31; setp.eq.b32 %p1, %r3, %r2; shl.b32 %r3, %r3, 2; cvt.u64.u32 %rd3, %r3;"
    lower += "add.s64 %rd4, %rd5, %rd3; ld.global.b32 %r3, [%rd4]; {} @%p1 st.global.b32 [%rd4], %r3;"
    whole = "ld.param.b64 %rd5, [kernel_param_1];"
    refused("a warp writes what another one reads", whole + lower.format(""), x, x)
    emulate(whole + lower.format(barrier), x, x)


def test_race_between_blocks():
    read, write = "ld.global.b32 %r3, [%rd1];", "st.global.b32 [%rd2], %r3;"
    x, out = torch.randn(64), torch.zeros(64)
    emulate(read + write, x, out, grid=(2,))  # both write the same
    refused("a block (reads|writes) what another one (reads|writes)", read + write, x, x, grid=(2,))
    number = "mov.u32 %r3, %ctaid.x;"
    refused("blocks write different values", number + write, x, out, grid=(2,))
    emulate(number + "red.global.gpu.relaxed.add.u32 [%rd2], %r3;", x, out, grid=(2,))


COPY = """
    shl.b32 %r3, %r2, 2;
    setp.lt.u32 %p1, %r2, %r1;
    selp.b32 %r4, 4, 0, %p1;
    cp.async.ca.shared.global [%r3+0], [%rd1+0], 0x4, %r4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r3+256], [%rd1+0], 0x4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 %r5, [%r3];
    st.global.b32 [%rd2], %r5;
"""


def test_copy_that_is_not_waited_for():
    x, out = torch.randn(64), torch.zeros(64)
    expected = torch.cat([x[:40], torch.zeros(24)])
    assert torch.equal(emulate(COPY, x, out, number=40, shared=512), expected)
    not_awaited = "read before the copy"
    refused(not_awaited, COPY.replace("wait_group 1", "wait_group 2"), x, out, number=40, shared=512)
    refused(not_awaited, COPY.replace("ld.shared.b32 %r5, [%r3]", "ld.shared.b32 %r5, [%r3+256]"), x, out, shared=512)
    refused("written before the copy", COPY + "st.shared.b32 [%r3+256], 0;", x, out, shared=512)
    # Other warps see it after a barrier only.
    other = "xor.b32 %r3, %r3, 128; ld.shared.b32 %r5, [%r3];"
    refused("race", COPY + other, x, out, shared=512)
    emulate(COPY + "bar.sync 0;" + other, x, out, shared=512)


def test_threads_that_branch_differently():
    body = "setp.lt.u32 %p1, %r2, %r1; @%p1 bra $end; st.global.b32 [%rd2], 0f3F800000;\n$end:"
    x = torch.zeros(64)
    assert (emulate(body, x, torch.zeros(64), number=0) == 1).all()
    assert (emulate(body, x, torch.zeros(64), number=64) == 0).all()
    refused(r"branch differently(.|\n)*bra \$end", body, x, x, number=32)


@pytest.mark.parametrize("opcode", ("mystery.b32", "add.sat.s32", "cvt.rz.f32.s32", "ld.global.acquire.b32"))
def test_unknown_instruction(opcode):
    x = torch.zeros(64)
    refused(rf"does not know this instruction(.|\n)*{opcode} %r3, %r4", f"{opcode} %r3, %r4;", x, x)


# x into shared memory, 16 bytes a thread: first all threads, then, at MORE, the first 16. Leaves %rd2 at a thread's 16
# bytes of out, and %r3 at its own in shared memory.
OPERANDS = """
    shl.b32 %r3, %r2, 4;
    shl.b64 %rd4, %rd3, 2;
    sub.s64 %rd1, %rd1, %rd3;
    sub.s64 %rd2, %rd2, %rd3;
    add.s64 %rd1, %rd1, %rd4;
    add.s64 %rd2, %rd2, %rd4;
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];
    st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7};
    setp.lt.u32 %p1, %r2, 16;
    @%p1 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1+MORE];
    @%p1 st.shared.v4.b32 [%r3+MORE], {%r4, %r5, %r6, %r7};
"""


def test_mma():
    """One warp: a (16, 16) matrix by ldmatrix times an (16, 8) one by its transposing form."""
    multiply = """
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];
    and.b32 %r8, %r3, 255;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r8+512];
    mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {%r20, %r21, %r22, %r23}, \
{%r10, %r11, %r12, %r13}, {%r14, %r15}, {0f3F800000, 0f3F800000, 0f3F800000, 0f3F800000};
    st.global.v4.b32 [%rd2], {%r20, %r21, %r22, %r23};
    """
    body = OPERANDS.replace("MORE", "512") + multiply
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
        # Four 8×8 matrices, of which the second one is below the first.
        packed = torch.cat([a.view(2, 8, 2, 8).permute(2, 0, 1, 3).flatten(), b.flatten()])
        out = emulate(body.replace("TYPE", name), packed, torch.zeros(8, 4, 2, 2), threads=32, shared=768)
        expected = a.float() @ b.float() + 1
        torch.testing.assert_close(out.permute(2, 0, 1, 3).reshape(16, 8), expected)


WGMMA = """
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %rd5, DESCRIPTOR_A;
    mov.b64 %rd6, DESCRIPTOR_B;
    mov.pred %p2, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd5, %rd6, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.b32 [%rd2], {%r10, %r11, %r12, %r13};
"""


def descriptor(start, leading, stride):
    """Of a matrix without swizzling: `leading` bytes from 8 columns to the next 8, `stride` from 8 rows to the next."""
    return str(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32)


WGMMA = WGMMA.replace("DESCRIPTOR_A", descriptor(0, 128, 256)).replace("DESCRIPTOR_B", descriptor(2048, 128, 256))
WGMMA = OPERANDS.replace("MORE", "2048") + WGMMA


def wgmma_operands():
    """a (64, 16) and b (8, 16), and both as they lie in memory: pieces of 8 rows and 16 bytes."""
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    return a, b, torch.cat([matrix.view(-1, 8, 2, 8).permute(0, 2, 1, 3).flatten() for matrix in (a, b)])


def test_wgmma():
    a, b, packed = wgmma_operands()
    out = emulate(WGMMA, packed, torch.zeros(4, 8, 4, 2, 2), threads=128, shared=2304)
    out = out.permute(0, 3, 1, 2, 4).reshape(64, 8)
    torch.testing.assert_close(out, a.float() @ b.float().T)


@pytest.mark.parametrize(
    "without, message",
    (
        ("wgmma.wait_group.sync.aligned 0;", r"%r10 is read before wgmma(.|\n)*st\.global"),
        ("wgmma.commit_group.sync.aligned;", r"%r10 is read before wgmma(.|\n)*st\.global"),
        ("fence.proxy.async.shared::cta;", r"without fence\.proxy\.async(.|\n)*wgmma"),
        ("bar.sync 0;", r"a race(.|\n)*wgmma"),
    ),
)
def test_wgmma_that_lacks_something(without, message):
    *_, packed = wgmma_operands()
    assert without in WGMMA
    refused(message, WGMMA.replace(without, ""), packed, torch.zeros(512), threads=128, shared=2304)


def test_wait_for_all_groups_of_wgmma_but_the_last():
    *_, packed = wgmma_operands()
    begin = re.search(r"wgmma\.mma_async[^;]*;\s*wgmma\.commit_group[^;]*;", WGMMA).group()
    second = begin.replace("{%r10, %r11, %r12, %r13}", "{%r20, %r21, %r22, %r23}")
    body = WGMMA.replace(begin, f"{begin} {second}").replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1")
    options = dict(threads=128, shared=2304)
    assert torch.equal(
        emulate(body, packed, torch.zeros(512), **options), emulate(WGMMA, packed, torch.zeros(512), **options)
    )
    refused("%r20 is read before wgmma", body + "mov.b32 %r1, %r20;", packed, torch.zeros(512), **options)
    refused("%r20 is written before wgmma", body + "mov.b32 %r20, 0;", packed, torch.zeros(512), **options)


def test_wgmma_whose_operands_are_overwritten():
    """It multiplies when it is waited for, the latest that may be."""
    *_, packed = wgmma_operands()
    overwrite = "bar.sync 0; st.shared.v4.b32 [%r3], {0, 0, 0, 0}; fence.proxy.async.shared::cta; bar.sync 0;"
    body = WGMMA.replace("wgmma.wait_group", f"{overwrite} wgmma.wait_group")
    assert not emulate(body, packed, torch.ones(512), threads=128, shared=2304).any()
