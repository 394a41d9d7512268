"""
Fused kernels in Triton: attention, linear cross-entropy, RMSNorm, SwiGLU, RoPE, AdamW, each forward and backward.

A GPU computes far faster than it reads memory (an H100: some 300 operations for each byte), and plain PyTorch writes the result
of every operation to memory, where the next one reads it again. A fused kernel reads its inputs once, keeps what lies between in
registers, and writes its result once. That makes the small operations as fast as a copy, and it is what spares attention and the
loss the tables that do not fit: S × S scores for every head, and N × V logits.

Every operation stands here as a formula, as a few lines of plain PyTorch (the twin, named ..._reference), and as a kernel behind a
function with the twin's signature, which differentiates, autocasts and compiles (torch.compile sees one node, and no graph breaks):

    out = flash_attention(q, k, v, causal=True)              # q (B, Hq, S, D), k and v (B, Hkv, S, D)
    loss = linear_cross_entropy(hidden, head, targets)       # (N, hidden_size), (V, hidden_size), (N)
    model = Transformer(config, ops=Ops(flash_attention, rms_norm, swiglu, rope, linear_cross_entropy))      # see model.py

Where there is no GPU, or no Triton, the same names run the twins (which take more: float64, larger heads, a second backward pass).
With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, in NumPy, in float32 and float16.

    python kernels.py                # on a GPU `errors` and `times`, without one `errors` and `compile`; --json FILE keeps the figures
    python kernels.py errors         # each kernel against float64, interpreted where there is no GPU
    python kernels.py compile        # what becomes of it on an H100: registers, shared memory, spills; needs none
    python kernels.py times          # GB/s and TFLOP/s, beside PyTorch's own and torch.compile's
    python kernels.py sweep          # attention over sequence lengths and head sizes, time and memory

The file needs PyTorch alone (2.6 or later), for the kernels Triton (3.2 or later), and no other file of this project. Limits: heads
of 128, rows of 32,768 in rms_norm; linear_cross_entropy is differentiated once. Left out: decoding with a cache (see sample.py),
dropout inside attention, 8-bit numbers.
"""
import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                                                      # the twins serve
    triton, jit = None, lambda function: function

    class tl:
        constexpr = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ------------------------------------------------------------------------------------------------------------------
# What all operations share

def fused(x: Tensor) -> bool:
    """Whether kernels run on this tensor's device; the twins do otherwise."""
    return triton is not None and (x.is_cuda or INTERPRETED and x.device.type == "cpu")


def check(name: str, fits: bool, problem: str, **tensors: Tensor | None):
    """ValueError unless `fits`: the function's name, what it wants, and what it was given."""
    if not fits:
        given = ", ".join(f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
                          for key, t in tensors.items() if t is not None)
        raise ValueError(f"{name}: {problem}; given {given}")


def check_alike(name: str, **tensors: Tensor):
    """ValueError unless the tensors hold floats, on one device. The kernels leave float64 out, the twins take it."""
    some = [*tensors.values()]
    check(name, all(t.device == some[0].device for t in some), "all tensors must be on one device", **tensors)
    check(name, all(t.dtype in FLOATS or t.is_floating_point() and not fused(t) for t in some),
          "dtypes must be float32, bfloat16 or float16", **tensors)


def check_product(name: str, dtype: torch.dtype):
    """ValueError for what the interpreter would get wrong (seen with Triton 3.7.1: errors of 10⁹)."""
    if INTERPRETED and dtype == torch.bfloat16:
        raise ValueError(f"{name}: Triton's interpreter multiplies bfloat16 matrices wrongly; take float32 or float16 with TRITON_INTERPRET=1")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products take x: autocast's where it is on, x's own otherwise."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows_dense(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, as kernels read it; a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """Room for a result of x's shape, in x's order of dimensions where that leaves the last one contiguous."""
    room = torch.empty_like(x)
    return room if room.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def as_rows(x: Tensor) -> Tensor:
    """x (..., N) as (rows, N) with the last stride 1 and any other, where it lies if it can be seen so, else copied."""
    return rows_dense(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def tile(columns: int, size: int) -> dict:
    """A tile of about `size` elements (powers of two) for rows of `columns`, so that short rows share a program."""
    width = triton.next_power_of_2(max(columns, 1))
    return {"ROWS": max(1, size // width), "COLUMNS": width}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's takes ten microseconds on the host.)"""
    return -(-a // b)


def operator(function):
    """`function` as an operator of PyTorch's library: one node for torch.compile, which does not look into it; `.plain` is the function."""
    definition = torch.library.custom_op(f"flatlm::{function.__name__.strip('_')}", function, mutates_args=())
    definition.plain = function
    return definition


COMPILED = None                                                          # a list while kernels are to be compiled and not run


def launch(kernel, programs, *arguments, **settings):
    """Run so many programs of a kernel (or what a function makes of the tiles that were chosen) on the grid's first axis, as the others
    stop at 65,535, and on the GPU of its first argument."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            if COMPILED is not None:
                done = kernel.warmup(*arguments, grid=(1,), **settings)
                COMPILED.extend(done if isinstance(done, list) else [done])                          # as many as tiles to choose from
            else:
                kernel[programs if callable(programs) else (programs,)](*arguments, **settings)


def multiprocessors(device: torch.device) -> int:
    """How many there are; without a GPU a few for the interpreter, an H200's for the compiler's report."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1


# ------------------------------------------------------------------------------------------------------------------
# What moves bytes: RMSNorm, SwiGLU, RoPE
#
# A few operations per number read: these kernels take as long as their bytes take to travel. So each reads every input once
# and writes every output once, computes in float32 in registers, rounds once, and has 16 bytes per load of a thread and some
# 64 bytes or more per thread under way, since a GPU's memory answers after most of a microsecond (at 4 TB/s that is 25 KB on
# its way to each multiprocessor at any time). Offsets of rows are 64-bit: a large tensor has more than 2^31 elements.

# RMSNorm, rows x of N:   r = 1 / sqrt(mean(x²) + eps)      y = x r w
#     with g = dy w:      dx = r (g - x r mean(g x r))      dw = Σ over rows of dy x r

def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(autocast_dtype(x))


@jit
def _rms_norm_kernel(x, weight, y, rows, x_stride, eps, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < N)
    row = row.to(tl.int64)
    a = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a, 1, keep_dims=True) / N + eps)
    w = tl.load(weight + column, mask=column < N, other=0).to(tl.float32)
    tl.store(y + row * N + column, a * r * w, mask=inside)


@jit
def _rms_norm_backward_kernel(x, weight, dy, dx, partial, rows, x_stride, dy_stride, eps, N: tl.constexpr,
                             ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + column, mask=column < N, other=0).to(tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    # two programs are all that a multiprocessor's registers hold, too few to hide how long a read takes: so it begins blocks ahead
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        inside, there, row = (row < rows) & (column < N), row < rows, row.to(tl.int64)
        a = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
        b = tl.load(dy + row * dy_stride + column, mask=inside, other=0).to(tl.float32)
        # the row is here anyway, so r is not saved; 0 in rows beyond the last, where eps = 0 would make it infinite
        r = tl.where(there, tl.rsqrt(tl.sum(a * a, 1, keep_dims=True) / N + eps), 0)
        a *= r
        g = b * w
        tl.store(dx + row * N + column, r * (g - a * (tl.sum(g * a, 1, keep_dims=True) / N)), mask=inside)
        dw += b * a
    tl.store(partial + tl.program_id(0).to(tl.int64) * N + column, tl.sum(dw, 0, keep_dims=True), mask=column < N)


@jit
def _rms_norm_backward_wide_kernel(x, weight, dy, dx, partial, rows, x_stride, dy_stride, eps, N: tl.constexpr,
                                  COLUMNS: tl.constexpr):
    """For rows that registers cannot hold: in pieces, read again from the cache, where dw is added up too. (The sums over the
    row make the threads wait for each other, so none reads a piece of dw before it is written.)"""
    partial += tl.program_id(0).to(tl.int64) * N
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.full((), row, tl.int64)
        squares, products = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        for start in tl.range(0, N, COLUMNS, num_stages=3):
            column = start + tl.arange(0, COLUMNS)
            a = tl.load(x + at * x_stride + column, mask=column < N, other=0).to(tl.float32)
            b = tl.load(dy + at * dy_stride + column, mask=column < N, other=0).to(tl.float32)
            squares += a * a
            products += a * b * tl.load(weight + column, mask=column < N, other=0).to(tl.float32)
        r = tl.rsqrt(tl.sum(squares) / N + eps)
        mean = tl.sum(products) / N * r
        for start in tl.range(0, N, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            a = tl.load(x + at * x_stride + column, mask=column < N).to(tl.float32) * r
            b = tl.load(dy + at * dy_stride + column, mask=column < N).to(tl.float32)
            w = tl.load(weight + column, mask=column < N).to(tl.float32)
            tl.store(dx + at * N + column, r * (b * w - a * mean), mask=column < N)
            tl.store(partial + column, tl.load(partial + column, mask=column < N) + b * a, mask=column < N)


@operator
def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y, flat, size = torch.empty(x.shape, dtype=dtype, device=x.device), as_rows(x), tile(len(weight), 4096)
    launch(_rms_norm_kernel, cdiv(len(flat), size["ROWS"]) if x.numel() else 0, flat, weight.contiguous(), y, len(flat),
           flat.stride(0), eps, N=len(weight), **size, num_warps=min(32, size["ROWS"] * size["COLUMNS"] // 1024))
    return y


@operator
def _rms_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each of a few programs per multiprocessor takes many blocks of rows, so that few partial sums of dw are left."""
    dx, N = torch.empty(x.shape, dtype=x.dtype, device=x.device), len(weight)
    flat, dy, size, wide_rows = as_rows(x), as_rows(dy), tile(N, 4096), N > 8192
    kernel = _rms_norm_backward_wide_kernel if wide_rows else _rms_norm_backward_kernel
    stages = 3 if N * x.element_size() <= 16384 else 2                   # what is read ahead must fit smaller cards' 99 KB of shared memory too
    size = {"COLUMNS": 4096} if wide_rows else {**size, "STAGES": stages}
    programs = min(cdiv(len(flat), size.get("ROWS", 1)), 2 * multiprocessors(x.device)) if x.numel() else 0
    partial = (torch.zeros if wide_rows else torch.empty)(programs, N, dtype=torch.float32, device=x.device)
    launch(kernel, programs, flat, weight.contiguous(), dy, dx, partial, len(flat), flat.stride(0), dy.stride(0), eps, N=N,
           **size, num_warps=size.get("ROWS", 1) * size["COLUMNS"] // 512)
    return dx, partial.sum(0).to(weight.dtype)


def _save_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


_rms_norm.register_fake(lambda x, weight, eps, dtype: torch.empty(x.shape, dtype=dtype, device=x.device))
_rms_norm_backward.register_fake(lambda x, weight, dy, eps: (torch.empty(x.shape, dtype=x.dtype, device=x.device),
                                                            torch.empty(weight.shape, dtype=weight.dtype, device=x.device)))
_rms_norm.register_autograd(lambda ctx, dy: (*_rms_norm_backward(*ctx.saved_tensors, dy, ctx.eps), None, None),
                              setup_context=_save_rms_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467): x (..., N) with
    N up to 32,768, weight (N). In float32, rounded once to x's dtype, or to autocast's where it is on, since a product
    reads it next. ValueError for shapes, dtypes or devices that do not fit."""
    check_alike("rms_norm", x=x, weight=weight)
    check("rms_norm", x.dim() > 0 and weight.shape == x.shape[-1:], "weight must have the size of x's last dimension",
          x=x, weight=weight)
    if not fused(x):
        return rms_norm_reference(x, weight, eps)
    check("rms_norm", len(weight) <= 32768, "a row must fit into one program, give at most 32,768 columns", x=x, weight=weight)
    return _rms_norm(x, weight, eps, autocast_dtype(x))


# SwiGLU, s = sigmoid(gate):   y = gate s up      dgate = dy up s (1 + gate (1 - s))      dup = dy gate s

def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes."""
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


@jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile of a matrix: row and column numbers, and which of them exist."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@jit
def _swiglu_kernel(gate, up, out, rows, columns, gate_stride, up_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _place(rows, columns, ROWS, COLUMNS)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    tl.store(out + row * columns + column, g * tl.sigmoid(g) * u, mask=inside)


@jit
def _swiglu_backward_kernel(gate, up, dy, dgate, dup, rows, columns, gate_stride, up_stride, dy_stride,
                           ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _place(rows, columns, ROWS, COLUMNS)
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    d = tl.load(dy + row * dy_stride + column, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + row * columns + column, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(dup + row * columns + column, d * g * s, mask=inside)


def _over_matrix(kernel, inputs: list[Tensor], outputs: list[Tensor]):
    """Run an elementwise kernel over tensors of one shape, as one long row where all are contiguous."""
    flat = all(t.is_contiguous() for t in inputs)
    inputs = [t.view(1, -1) if flat else as_rows(t) for t in inputs]
    rows, columns = inputs[0].shape
    size = tile(min(columns, 2048), 2048)               # 128 threads of 16 elements: two loads of 16 bytes from each input
    programs = cdiv(rows, size["ROWS"]) * cdiv(columns, size["COLUMNS"])
    launch(kernel, programs, *inputs, *outputs, rows, columns, *(t.stride(0) for t in inputs), **size, num_warps=4)


@operator
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _over_matrix(_swiglu_kernel, [gate, up], [out])
    return out


@operator
def _swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _over_matrix(_swiglu_backward_kernel, [gate, up, dy], [dgate, dup])
    return dgate, dup


_swiglu.register_fake(lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device))
_swiglu_backward.register_fake(lambda gate, up, dy: tuple(
    torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)))
_swiglu.register_autograd(lambda ctx, dy: _swiglu_backward(*ctx.saved_tensors, dy),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), of one shape and dtype, in float32, rounded once. Halves of one product
    are read where they lie. ValueError for shapes, dtypes or devices that do not fit."""
    check_alike("swiglu", gate=gate, up=up)
    check("swiglu", gate.shape == up.shape and gate.dtype == up.dtype, "give both one shape and dtype", gate=gate, up=up)
    return _swiglu(gate, up) if fused(gate) else swiglu_reference(gate, up)


# RoPE turns the pair (a, b) = (x_i, x_(i + D/2)) by its position's angle:   (a cos - b sin, b cos + a sin)
# A turn's transpose is the turn back, so the backward pass is the same kernel with -sin.

def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rope` computes."""
    first, second = wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@jit
def _rope_kernel(x, cos, sin, out, heads, positions, x_batch, x_head, x_position, out_batch, out_head, out_position, table_batch,
                HALF: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr):
    # programs of the same positions stand side by side, so that the tables are in the cache
    groups, blocks = tl.cdiv(heads, HEADS), tl.cdiv(positions, POSITIONS)
    block, batch = tl.program_id(0) // groups % blocks, (tl.program_id(0) // groups // blocks).to(tl.int64)
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)[:, None, None]
    position = block * POSITIONS + tl.arange(0, POSITIONS)[None, :, None]
    column = tl.arange(0, WIDTH)[None, None, :]
    known = (position < positions) & (column < HALF)
    inside = (head < heads) & known
    head, position = head.to(tl.int64), position.to(tl.int64)
    table = batch * table_batch + position * HALF + column                           # (1, POSITIONS, WIDTH): for all heads
    c = tl.load(cos + table, mask=known, other=0).to(tl.float32)
    s = tl.load(sin + table, mask=known, other=0).to(tl.float32)
    if BACK:
        s = -s
    x += batch * x_batch + head * x_head + position * x_position + column
    out += batch * out_batch + head * out_head + position * out_position + column
    a = tl.load(x, mask=inside).to(tl.float32)
    b = tl.load(x + HALF, mask=inside).to(tl.float32)
    tl.store(out, a * c - b * s, mask=inside)
    tl.store(out + HALF, b * c + a * s, mask=inside)


@operator
def _rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x, cos, sin = rows_dense(x), cos.contiguous(), sin.contiguous()
    out, (batch, heads, positions, D) = empty_like(x), x.shape
    size = {"HEADS": min(4, triton.next_power_of_2(max(heads, 1))), "WIDTH": triton.next_power_of_2(max(D // 2, 1))}
    size["POSITIONS"] = max(1, 4096 // (size["HEADS"] * size["WIDTH"]))      # a thread has 8 columns of each half of 4 heads
    programs = batch * cdiv(positions, size["POSITIONS"]) * cdiv(heads, size["HEADS"]) if x.numel() else 0
    launch(_rope_kernel, programs, x, cos, sin, out, heads, positions, *x.stride()[:3], *out.stride()[:3],
           0 if cos.dim() == 2 else cos.stride(0), HALF=D // 2, BACK=back, **size, num_warps=4)
    return out


def _save_rope(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


_rope.register_fake(lambda x, cos, sin, back: empty_like(rows_dense(x)))
_rope.register_autograd(lambda ctx, dy: (_rope(dy, *ctx.saved_tensors, not ctx.back), None, None, None),
                          setup_context=_save_rope)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, S, D) with the pairs (x_i, x_(i + D/2)) turned by their positions' angles (Su et al. 2021, arXiv 2104.09864); cos
    and sin (S, D // 2), or (B, 1, S, D // 2) where rows stand at different positions, in float32 or x's dtype. In float32,
    rounded once; the result has the strides of a dense x (of (B, S, H, D) transposed, for one). The tables have no gradients.
    ValueError for shapes, dtypes or devices that do not fit."""
    check_alike("rope", x=x, cos=cos, sin=sin)
    fits = x.dim() == 4 and x.shape[-1] % 2 == 0 and cos.shape == sin.shape and cos.shape in (
        (x.shape[2], x.shape[3] // 2), (x.shape[0], 1, x.shape[2], x.shape[3] // 2))
    check("rope", fits, "x must be (B, H, S, D) with D even, cos and sin (S, D // 2) or (B, 1, S, D // 2)", x=x, cos=cos, sin=sin)
    check("rope", cos.dtype == sin.dtype and cos.dtype in (torch.float32, x.dtype), "give cos and sin in float32 or x's dtype",
          x=x, cos=cos, sin=sin)
    check("rope", not (cos.requires_grad or sin.requires_grad), "cos and sin get no gradient, detach them", x=x, cos=cos, sin=sin)
    return _rope(x, cos, sin, False) if fused(x) else rope_reference(x, cos, sin)


# ------------------------------------------------------------------------------------------------------------------
# Attention: out_i = Σ_j softmax_j(s_ij) v_j, with scores s_ij = q_i · k_j · scale
#
# Tiles of queries meet tiles of keys, one after the other, and the S × S scores exist a tile at a time (Dao et al. 2022, arXiv
# 2205.14135; Dao 2023, arXiv 2307.08691). As the softmax's denominator is only known at the end, a running maximum m of the scores
# seen so far and a running sum l of exp(s - m) stand in for it; when m grows, what was summed before fades by exp(m_old - m_new):
#
#     for each tile of keys:   m' = max(m, max_j s)    p = exp(s - m')    l = l · exp(m - m') + Σ_j p    acc = acc · exp(m - m') + p v
#     out = acc / l            the log-sum-exp L = m + log l is kept for the backward pass
#
# Backward, p = exp(s - L) is at hand at once when a tile's scores are computed again. With g the gradient of out:
#
#     dv_j = Σ_i p_ij g_i      dp_ij = g_i · v_j      ds_ij = p_ij (dp_ij - delta_i)      delta_i = Σ_j p_ij dp_ij = g_i · out_i
#     dq_i = scale Σ_j ds_ij k_j                      dk_j = scale Σ_i ds_ij q_i
#
# dq sums over keys, dk and dv over queries: two passes, each of which keeps its sums in registers and computes p for itself. That is
# 9 matrix products for the 7 that are counted; one pass with atomic additions of dq would be 7, but its sums would come out
# differently each time. All exponentials are powers of two, which is what the chip has: exp(x) = 2^(x · log2 e).
#
# Which keys a tile of queries can see, and which of those all its queries see, is known before the loop: tiles outside the first
# range are never touched, and inside the second nothing is masked.

def flash_attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None, window: int | None = None,
                              softcap: float | None = None, document_ids: Tensor | None = None, key_lengths: Tensor | None = None) -> Tensor:
    """What `flash_attention` computes, with all scores in memory."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))                    # (B, Hq, S_k, D)
    if key_lengths is not None:                                                                      # padding may hold anything, NaN too
        padding = (torch.arange(k.shape[2], device=k.device) >= key_lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    scores = wide(q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)                 # (B, Hq, S_q, S_k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = q.shape[2], k.shape[2]
    key = torch.arange(keys, device=q.device)                                                        # (S_k)
    query = torch.arange(keys - queries, keys, device=q.device)[:, None]                             # (S_q, 1)
    visible = (key <= query if causal else torch.ones_like(key <= query))[None, None]                # (1, 1, S_q, S_k)
    if window is not None:
        visible = visible & (key > query - window)
    if document_ids is not None:
        visible = visible & (document_ids[:, None, keys - queries:, None] == document_ids[:, None, None, :])
    if key_lengths is not None:
        visible = visible & (key < key_lengths[:, None, None, None])
    scores = scores.masked_fill(~visible, float("-inf"))
    if key_lengths is not None:                                                                      # rows that see nothing come out as zeros
        blind = ~visible.any(-1, keepdim=True)
        return (torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0).to(v.dtype) @ v)
    return torch.softmax(scores, -1).to(v.dtype) @ v


@jit
def _document_bounds(ids, bounds, positions, GRAIN: tl.constexpr):
    """The least and the greatest id of each GRAIN positions."""
    program, grains = tl.program_id(0), tl.cdiv(positions, GRAIN)
    at = program % grains * GRAIN + tl.arange(0, GRAIN)
    own = tl.load(ids + (program // grains).to(tl.int64) * positions + tl.minimum(at, positions - 1))
    tl.store(bounds + program.to(tl.int64) * 2, tl.min(own))
    tl.store(bounds + program.to(tl.int64) * 2 + 1, tl.max(own))


@jit
def _document_ranges(bounds, ranges, grains, GRAIN: tl.constexpr, CHUNK: tl.constexpr):
    """For each grain four numbers, in positions: where the first grain begins, and the last one ends, that may hold one of its ids; and the
    same of the grains that hold nothing but its one id, if it has one only and they stand side by side, else an empty range."""
    program = tl.program_id(0)
    low, high = tl.load(bounds + program.to(tl.int64) * 2), tl.load(bounds + program.to(tl.int64) * 2 + 1)
    bounds += (program // grains).to(tl.int64) * grains * 2
    first, end, inner_first, inner_end, count = grains, 0, grains, 0, 0
    for start in range(0, grains, CHUNK):
        at = start + tl.arange(0, CHUNK)
        lows = tl.load(bounds + 2 * at, mask=at < grains, other=0)
        highs = tl.load(bounds + 2 * at + 1, mask=at < grains, other=0)
        near, same = (at < grains) & (lows <= high) & (highs >= low), (at < grains) & (lows == high) & (highs == low)
        first, end = tl.minimum(first, tl.min(tl.where(near, at, grains))), tl.maximum(end, tl.max(tl.where(near, at + 1, 0)))
        inner_first = tl.minimum(inner_first, tl.min(tl.where(same, at, grains)))
        inner_end = tl.maximum(inner_end, tl.max(tl.where(same, at + 1, 0)))
        count += tl.sum(same.to(tl.int32))
    together = count == inner_end - inner_first
    ranges += program.to(tl.int64) * 4
    tl.store(ranges, first * GRAIN)
    tl.store(ranges + 1, end * GRAIN)
    tl.store(ranges + 2, tl.where(together, inner_first * GRAIN, grains * GRAIN))
    tl.store(ranges + 3, tl.where(together, inner_end * GRAIN, 0))


@jit
def _narrow(start, inner_start, inner_end, end, ranges, first, last, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """The ranges [start, end) and, inside, [inner_start, inner_end) cut down to where the documents of positions first to last lie."""
    grain = first // GRAIN + tl.arange(0, 2 * (BLOCK // GRAIN))
    own = grain <= last // GRAIN
    start = tl.maximum(start, tl.min(tl.load(ranges + 4 * grain, mask=own, other=2147483647)))
    end = tl.minimum(end, tl.max(tl.load(ranges + 4 * grain + 1, mask=own, other=0)))
    inner_start = tl.maximum(inner_start, tl.max(tl.load(ranges + 4 * grain + 2, mask=own, other=0)))
    inner_end = tl.minimum(inner_end, tl.min(tl.load(ranges + 4 * grain + 3, mask=own, other=2147483647)))
    return start, inner_start, inner_end, end


@jit
def _in_tiles(start, inner_start, inner_end, end, TILE: tl.constexpr):
    """The ranges in whole tiles: where the first begins, how many need masks in front of the inner range, the inner range's begin and
    number of tiles, and how many need masks in all. Tile i of those with masks begins at `_masked_tile`."""
    start = start // TILE * TILE
    inner_start, inner_end = tl.cdiv(inner_start, TILE) * TILE, inner_end // TILE * TILE
    inside = inner_start < inner_end
    inner_start, inner_end = tl.where(inside, inner_start, start), tl.where(inside, inner_end, start)
    left = (inner_start - start) // TILE
    return start, left, inner_start, (inner_end - inner_start) // TILE, left + tl.maximum(0, tl.cdiv(end - inner_end, TILE))


@jit
def _masked_tile(i, start, left, inner_start, inner, TILE: tl.constexpr):
    """Where the i-th tile with a mask begins: there are `left` before the inner range, the others behind it."""
    return tl.where(i < left, start + i * TILE, inner_start + (inner + i - left) * TILE)


@jit
def _key_tiles(first, queries, keys, batch, ranges, lengths, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, GRAIN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The tiles of keys that M queries from row `first` on look at, as `_in_tiles` says it, and the number of keys that are there."""
    low, high = first + keys - queries, tl.minimum(first + M, queries) - 1 + keys - queries          # positions of first and last query
    length = keys
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
    start, inner_start, inner_end, end = 0, 0, length, length
    if CAUSAL:
        inner_end, end = tl.minimum(inner_end, low + 1), tl.minimum(end, high + 1)
    if WINDOW:
        start, inner_start = tl.maximum(0, low - window + 1), tl.maximum(0, high - window + 1)
    if DOCUMENTS:
        ranges += batch * tl.cdiv(keys, GRAIN) * 4
        start, inner_start, inner_end, end = _narrow(start, inner_start, inner_end, end, ranges, low, high, GRAIN, M)
    start, left, inner_start, inner, masked = _in_tiles(start, inner_start, inner_end, end, N)
    return length, start, left, inner_start, inner, masked


@jit
def _tile(matrix, start, stride, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Rows start to start + TILE of a matrix (rows, D), zeros beyond its edges: (TILE, BLOCK_D). Not MASKED: all the rows are there."""
    row, d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    at = matrix + start.to(tl.int64) * stride + row[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(at, mask=(start + row < rows)[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@jit
def _store_tile(matrix, tile, start, stride, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """The opposite of `_tile`."""
    row, d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    at = matrix + start.to(tl.int64) * stride + row[:, None] * stride + d[None, :]
    tl.store(at, tile.to(matrix.dtype.element_ty), mask=(start + row < rows)[:, None] & (d < D)[None, :])


@jit
def _visible(query, key, length, window, query_ids, key_ids, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Where queries may look at keys; positions and ids as a row and a column, either way round."""
    visible = key < length
    if CAUSAL:
        visible &= key <= query
    if WINDOW:
        visible &= key > query - window
    if DOCUMENTS:
        visible &= query_ids == key_ids
    return visible


@jit
def _tanh(x):
    """By powers of two; near 0, where their difference would lose its digits, by the series."""
    square = x * x
    series = x * (1 - square * (0.33333333 - square * (0.13333333 - square * 0.053968254)))
    return tl.where(square < 0.01, series, 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1))            # (e^2x - 1) / (e^2x + 1)


@jit
def _scaled(scores, scale, cap, CAP: tl.constexpr):
    """Scores, and the factor that is still to be multiplied for powers of two; with a cap, scores are tanh(s / cap)."""
    factor = scale * 1.4426950408889634                                  # log2 e
    if CAP:
        scores = _tanh(scores * (scale / cap))
        factor = cap * 1.4426950408889634
    return scores, factor


GRAIN = 16                               # positions: documents are looked up by so many at a time, the smallest tile


class Tuned:
    """A kernel for whose tiles (M queries, N keys, warps, stages of loads under way) Triton measures those that `tiles` has for the kind of
    call and the head's size, and keeps the fastest for calls with the same switches, head size and dtype, and about as many keys (up to
    1,024, 8,192, or more). Kinds: float32, "rich" for what needs more registers (a cap, documents, lengths), "plain". With eight warps
    a program reads keys for twice as many queries; with four, two or three programs share a multiprocessor, and while one multiplies
    the other takes exponentials. All were chosen by compiling: none spills registers. The interpreter's are small, so that small
    inputs meet all edges."""

    def __init__(self, kernel, tiles: dict[tuple, list]):
        self.kernel, self.tiles, self.tuner = kernel, tiles, None

    def __getitem__(self, grid):
        return partial(self.kernel[grid], M=32, N=16) if INTERPRETED else self.tuned()[grid]

    def warmup(self, *arguments, **settings) -> list:
        """Compile with all the tiles that fit."""
        return self.tuned().warmup(*arguments, **settings)

    def tuned(self):
        """Triton's tuner; made when it is wanted, as some versions look for a GPU at once."""
        config = lambda m, n, warps, stages: triton.Config({"M": m, "N": n}, num_warps=warps, num_stages=stages)

        def fitting(configs, named, **options):
            rich = options["CAP"] or options["DOCUMENTS"] or options["LENGTHS"]
            kind = "float32" if named["q"].dtype == torch.float32 else "rich" if rich else "plain"
            return [config(*tile) for tile in self.tiles[kind, options["BLOCK_D"]]]

        if self.tuner is None:
            key = "BLOCK_D CAUSAL WINDOW CAP DOCUMENTS LENGTHS SIZE".split()
            self.tuner = triton.autotune([config(*tile) for some in self.tiles.values() for tile in some], key,
                                         prune_configs_by={"early_config_prune": fitting})(self.kernel)
        return self.tuner


@jit
def _attend(acc, top, total, seen, q, k, v, start, length, query, query_ids, ids, k_row, v_row, scale, cap, window,
            D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
            DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys more: acc (M, BLOCK_D), the running maximum `top`, sum and whether anything was seen (M)."""
    keys = _tile(k, start, k_row, length, D, BLOCK_D, N, MASKED)
    scores, factor = _scaled(tl.dot(q, tl.trans(keys), input_precision="tf32x3"), scale, cap, CAP)    # (M, N)
    if MASKED:
        key = start + tl.arange(0, N)
        key_ids = tl.load(ids + key, mask=key < length, other=0)[None, :] if DOCUMENTS else 0
        visible = _visible(query[:, None], key[None, :], length, window, query_ids, key_ids, CAUSAL, WINDOW, DOCUMENTS)
        scores = tl.where(visible, scores, float("-inf"))
        if LENGTHS:
            seen = tl.maximum(seen, tl.max(visible.to(tl.int32), 1))
    elif LENGTHS:
        seen = tl.full(seen.shape, 1, tl.int32)
    new = tl.maximum(top, tl.max(scores, 1) * factor)
    shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row may see nothing of this tile, nor of those before
    p = tl.exp2(scores * factor - shift[:, None])
    fade = tl.exp2(top - shift)
    values = _tile(v, start, v_row, length, D, BLOCK_D, N, MASKED)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="tf32x3")
    return acc, new, total * fade + tl.sum(p, 1), seen


FORWARD_TILES = {
    ("plain", 16): [(128, 64, 4, 3)], ("plain", 32): [(128, 64, 4, 3)],
    ("plain", 64): [(128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3)], ("plain", 128): [(128, 64, 8, 3), (64, 64, 4, 3)],
    ("rich", 16): [(64, 32, 4, 3)], ("rich", 32): [(64, 32, 4, 3)],
    ("rich", 64): [(128, 32, 8, 3), (64, 32, 4, 3)], ("rich", 128): [(128, 32, 8, 3), (64, 32, 4, 3)],
    ("float32", 16): [(64, 32, 4, 2)], ("float32", 32): [(64, 32, 4, 2)],
    ("float32", 64): [(32, 32, 4, 2)], ("float32", 128): [(16, 16, 4, 2)]}


@partial(Tuned, tiles=FORWARD_TILES)
@jit
def _attention_forward(q, k, v, out, lse, ids, ranges, lengths, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                       o_batch, o_head, o_row, heads, groups, queries, keys, scale, cap, window,
                       D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
                       DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, SIZE: tl.constexpr, GRAIN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """out and log-sum-exp of M queries of one head."""
    program, tiles = tl.program_id(0), tl.cdiv(queries, M)
    first = (tiles - 1 - program % tiles) * M                            # the last queries see most keys, and begin; the short programs fill up
    batch, head = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    row = first + tl.arange(0, M)
    query = row + keys - queries
    length, start, left, inner_start, inner, masked = _key_tiles(first, queries, keys, batch, ranges, lengths, window, CAUSAL, WINDOW,
                                                                 DOCUMENTS, LENGTHS, GRAIN, M, N)
    k += batch * k_batch + head // groups * k_head
    v += batch * v_batch + head // groups * v_head
    q = _tile(q + batch * q_batch + head * q_head, first, q_row, queries, D, BLOCK_D, M, True)
    query_ids = 0
    if DOCUMENTS:
        ids += batch * keys
        query_ids = tl.load(ids + query, mask=row < queries, other=0)[:, None]

    acc, total = tl.zeros((M, BLOCK_D), tl.float32), tl.zeros((M,), tl.float32)
    top, seen = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.int32)
    for i in tl.range(0, inner):
        acc, top, total, seen = _attend(acc, top, total, seen, q, k, v, inner_start + i * N, length, query, query_ids, ids, k_row, v_row,
                                        scale, cap, window, D, BLOCK_D, CAUSAL, WINDOW, CAP, DOCUMENTS, LENGTHS, N, False)
    for i in tl.range(0, masked):
        at = _masked_tile(i, start, left, inner_start, inner, N)
        acc, top, total, seen = _attend(acc, top, total, seen, q, k, v, at, length, query, query_ids, ids, k_row, v_row,
                                        scale, cap, window, D, BLOCK_D, CAUSAL, WINDOW, CAP, DOCUMENTS, LENGTHS, N, True)

    acc = acc / total[:, None]
    log_total = top + tl.log2(total)
    if LENGTHS:                                                          # only then can a row see nothing: it sees itself otherwise
        acc = tl.where((seen == 1)[:, None], acc, 0.0)
    _store_tile(out + batch * o_batch + head * o_head, acc, first, o_row, queries, D, BLOCK_D, M)
    tl.store(lse + (batch * heads + head) * queries + row, log_total, mask=row < queries)


@jit
def _query_step(dq, q, g, lse, delta, k, v, start, length, query, query_ids, ids, k_row, v_row, scale, cap, window,
                D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
                DOCUMENTS: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """What one tile of keys gives to dq (M, BLOCK_D)."""
    keys = _tile(k, start, k_row, length, D, BLOCK_D, N, MASKED)
    values = _tile(v, start, v_row, length, D, BLOCK_D, N, MASKED)
    scores, factor = _scaled(tl.dot(q, tl.trans(keys), input_precision="tf32x3"), scale, cap, CAP)    # (M, N)
    p = tl.exp2(scores * factor - lse[:, None])
    if MASKED:
        key = start + tl.arange(0, N)
        key_ids = tl.load(ids + key, mask=key < length, other=0)[None, :] if DOCUMENTS else 0
        p = tl.where(_visible(query[:, None], key[None, :], length, window, query_ids, key_ids, CAUSAL, WINDOW, DOCUMENTS), p, 0.0)
    ds = p * (tl.dot(g, tl.trans(values), input_precision="tf32x3") - delta[:, None])
    if CAP:
        ds *= 1 - scores * scores                                        # tanh' = 1 - tanh²
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="tf32x3")


QUERY_TILES = {
    ("plain", 16): [(128, 64, 4, 3)], ("plain", 32): [(128, 64, 4, 3)],
    ("plain", 64): [(128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3)], ("plain", 128): [(128, 64, 8, 2), (64, 32, 4, 3)],
    ("rich", 16): [(64, 64, 4, 3)], ("rich", 32): [(64, 64, 4, 3)],
    ("rich", 64): [(128, 64, 8, 3), (64, 32, 4, 3)], ("rich", 128): [(128, 32, 8, 2), (64, 32, 4, 2)],
    ("float32", 16): [(64, 32, 4, 2)], ("float32", 32): [(64, 32, 4, 2)],
    ("float32", 64): [(32, 32, 4, 2)], ("float32", 128): [(16, 32, 8, 1)]}


@partial(Tuned, tiles=QUERY_TILES)
@jit
def _attention_backward_q(q, k, v, out, g, dq, lse, delta, ids, ranges, lengths, q_batch, q_head, q_row, k_batch, k_head, k_row,
                          v_batch, v_head, v_row, o_batch, o_head, o_row, g_batch, g_head, g_row, dq_batch, dq_head, dq_row,
                          heads, groups, queries, keys, scale, cap, window,
                          D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
                          DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, SIZE: tl.constexpr, GRAIN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """dq of M queries of one head, and on the way their delta, which the other pass needs too."""
    program, tiles = tl.program_id(0), tl.cdiv(queries, M)
    first = (tiles - 1 - program % tiles) * M
    batch, head = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    row = first + tl.arange(0, M)
    query = row + keys - queries
    length, start, left, inner_start, inner, masked = _key_tiles(first, queries, keys, batch, ranges, lengths, window, CAUSAL, WINDOW,
                                                                 DOCUMENTS, LENGTHS, GRAIN, M, N)
    k += batch * k_batch + head // groups * k_head
    v += batch * v_batch + head // groups * v_head
    q = _tile(q + batch * q_batch + head * q_head, first, q_row, queries, D, BLOCK_D, M, True)
    g = _tile(g + batch * g_batch + head * g_head, first, g_row, queries, D, BLOCK_D, M, True)
    o = _tile(out + batch * o_batch + head * o_head, first, o_row, queries, D, BLOCK_D, M, True)
    rows = (batch * heads + head) * queries + row
    deltas = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + rows, deltas, mask=row < queries)
    lse = tl.load(lse + rows, mask=row < queries, other=float("inf"))
    query_ids = 0
    if DOCUMENTS:
        ids += batch * keys
        query_ids = tl.load(ids + query, mask=row < queries, other=0)[:, None]

    acc = tl.zeros((M, BLOCK_D), tl.float32)
    for i in tl.range(0, inner):
        acc = _query_step(acc, q, g, lse, deltas, k, v, inner_start + i * N, length, query, query_ids, ids, k_row, v_row,
                          scale, cap, window, D, BLOCK_D, CAUSAL, WINDOW, CAP, DOCUMENTS, N, False)
    for i in tl.range(0, masked):
        at = _masked_tile(i, start, left, inner_start, inner, N)
        acc = _query_step(acc, q, g, lse, deltas, k, v, at, length, query, query_ids, ids, k_row, v_row,
                          scale, cap, window, D, BLOCK_D, CAUSAL, WINDOW, CAP, DOCUMENTS, N, True)
    _store_tile(dq + batch * dq_batch + head * dq_head, acc * scale, first, dq_row, queries, D, BLOCK_D, M)


@jit
def _key_step(dk, dv, k, v, q, g, lse, delta, start, queries, length, offset, key, key_ids, ids, q_row, g_row, scale, cap, window,
              D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
              DOCUMENTS: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr):
    """What one tile of queries gives to dk and dv (N, BLOCK_D). Scores stand transposed, (N, M), as both products want them."""
    q = _tile(q, start, q_row, queries, D, BLOCK_D, M, MASKED)
    g = _tile(g, start, g_row, queries, D, BLOCK_D, M, MASKED)
    row = start + tl.arange(0, M)
    if MASKED:
        lse = tl.load(lse + row, mask=row < queries, other=float("inf"))
        delta = tl.load(delta + row, mask=row < queries, other=0.0)
    else:
        lse, delta = tl.load(lse + row), tl.load(delta + row)
    scores, factor = _scaled(tl.dot(k, tl.trans(q), input_precision="tf32x3"), scale, cap, CAP)
    p = tl.exp2(scores * factor - lse[None, :])
    if MASKED:
        query_ids = tl.load(ids + row + offset, mask=row < queries, other=0)[None, :] if DOCUMENTS else 0
        p = tl.where(_visible(row[None, :] + offset, key[:, None], length, window, query_ids, key_ids, CAUSAL, WINDOW, DOCUMENTS), p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="tf32x3")
    ds = p * (tl.dot(v, tl.trans(g), input_precision="tf32x3") - delta[None, :])
    if CAP:
        ds *= 1 - scores * scores
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3"), dv


KEY_TILES = {
    ("plain", 16): [(64, 64, 4, 3)], ("plain", 32): [(64, 64, 4, 3)],
    ("plain", 64): [(64, 128, 8, 3), (64, 64, 4, 3)], ("plain", 128): [(32, 128, 8, 3), (16, 64, 4, 3)],
    ("rich", 16): [(64, 64, 4, 3)], ("rich", 32): [(64, 64, 4, 3)],
    ("rich", 64): [(64, 128, 8, 3), (32, 64, 4, 3)], ("rich", 128): [(32, 128, 8, 1), (16, 128, 8, 2)],
    ("float32", 16): [(32, 64, 4, 2)], ("float32", 32): [(32, 64, 4, 2)],
    ("float32", 64): [(16, 32, 4, 2)], ("float32", 128): [(32, 16, 8, 1)]}


@partial(Tuned, tiles=KEY_TILES)
@jit
def _attention_backward_kv(q, k, v, g, dk, dv, lse, delta, ids, ranges, lengths, q_batch, q_head, q_row, k_batch, k_head, k_row,
                           v_batch, v_head, v_row, g_batch, g_head, g_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
                           heads, groups, queries, keys, scale, cap, window,
                           D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
                           DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, SIZE: tl.constexpr, GRAIN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """dk and dv of N keys of one key-value head, summed over the query heads that share it."""
    program, tiles, key_heads = tl.program_id(0), tl.cdiv(keys, N), heads // groups
    first = program % tiles * N                                          # the first keys are seen by most queries
    batch, key_head = (program // tiles // key_heads).to(tl.int64), (program // tiles % key_heads).to(tl.int64)
    offset = keys - queries                                              # positions of queries, less their rows
    key = first + tl.arange(0, N)
    last = tl.minimum(first + N, keys) - 1
    length, key_ids = keys, 0
    start, inner_start, inner_end, end = offset, offset, keys, keys      # positions of the queries that see these keys, and all of them
    if LENGTHS:                  # keys that are padding get p of their own, wrong ones, but their gradients are overwritten by zeros
        length = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
        end = tl.where(first < length, keys, 0)
    if CAUSAL:
        start, inner_start = tl.maximum(start, first), tl.maximum(inner_start, last)
    if WINDOW:
        inner_end, end = tl.minimum(inner_end, first + window), tl.minimum(end, last + window)
    if DOCUMENTS:
        ids += batch * keys
        ranges += batch * tl.cdiv(keys, GRAIN) * 4
        key_ids = tl.load(ids + key, mask=key < keys, other=0)[:, None]
        start, inner_start, inner_end, end = _narrow(start, inner_start, inner_end, end, ranges, first, last, GRAIN, N)
    start, left, inner_start, inner, masked = _in_tiles(start - offset, inner_start - offset, tl.minimum(inner_end, end) - offset, end - offset, M)
    k = _tile(k + batch * k_batch + key_head * k_head, first, k_row, length, D, BLOCK_D, N, True)
    v = _tile(v + batch * v_batch + key_head * v_head, first, v_row, length, D, BLOCK_D, N, True)

    dk_acc, dv_acc = tl.zeros((N, BLOCK_D), tl.float32), tl.zeros((N, BLOCK_D), tl.float32)
    q += batch * q_batch + key_head * groups * q_head
    g += batch * g_batch + key_head * groups * g_head
    lse += (batch * heads + key_head * groups) * queries
    delta += (batch * heads + key_head * groups) * queries
    for i in tl.range(0, groups * inner):                                # the tiles of one head, then of the next in the group
        head = (i // inner).to(tl.int64)
        dk_acc, dv_acc = _key_step(dk_acc, dv_acc, k, v, q + head * q_head, g + head * g_head, lse + head * queries, delta + head * queries,
                                   inner_start + i % inner * M, queries, length, offset, key, key_ids, ids, q_row, g_row, scale, cap, window,
                                   D, BLOCK_D, CAUSAL, WINDOW, CAP, DOCUMENTS, M, False)
    for i in tl.range(0, groups * masked):
        head, at = (i // masked).to(tl.int64), _masked_tile(i % masked, start, left, inner_start, inner, M)
        dk_acc, dv_acc = _key_step(dk_acc, dv_acc, k, v, q + head * q_head, g + head * g_head, lse + head * queries, delta + head * queries,
                                   at, queries, length, offset, key, key_ids, ids, q_row, g_row, scale, cap, window,
                                   D, BLOCK_D, CAUSAL, WINDOW, CAP, DOCUMENTS, M, True)
    if LENGTHS:
        dk_acc, dv_acc = tl.where((key < length)[:, None], dk_acc, 0.0), tl.where((key < length)[:, None], dv_acc, 0.0)
    _store_tile(dk + batch * dk_batch + key_head * dk_head, dk_acc * scale, first, dk_row, keys, D, BLOCK_D, N)
    _store_tile(dv + batch * dv_batch + key_head * dv_head, dv_acc, first, dv_row, keys, D, BLOCK_D, N)


def _attention_options(q: Tensor, k: Tensor, causal: bool, window: int, softcap: float, ids: Tensor | None, lengths: Tensor | None) -> dict:
    """What a kernel is compiled for: what is off leaves no trace in it."""
    return dict(D=q.shape[-1], BLOCK_D=max(16, triton.next_power_of_2(q.shape[-1])), CAUSAL=causal, WINDOW=window > 0, CAP=softcap > 0,
                DOCUMENTS=ids is not None, LENGTHS=lengths is not None, SIZE=(k.shape[2] > 1024) + (k.shape[2] > 8192), GRAIN=GRAIN)


@operator
def _ranges_of(ids: Tensor) -> Tensor:
    """See `_document_ranges`: (B, S / GRAIN, 4). An operator of its own: a compiler makes them once for all layers."""
    batch, grains = len(ids), cdiv(ids.shape[1], GRAIN)
    bounds, ranges = ids.new_empty(batch, grains, 2), ids.new_empty(batch, grains, 4, dtype=torch.int32)
    launch(_document_bounds, batch * grains, ids, bounds, ids.shape[1], GRAIN=GRAIN, num_warps=1)
    launch(_document_ranges, batch * grains, bounds, ranges, grains, GRAIN=GRAIN, CHUNK=256)
    return ranges


@_ranges_of.register_fake
def _(ids):
    return ids.new_empty(len(ids), cdiv(ids.shape[1], GRAIN), 4, dtype=torch.int32)


def _strides(*tensors: Tensor) -> list[int]:
    """Elements from one batch, head and row to the next, of each."""
    return [stride for t in tensors for stride in t.stride()[:3]]


@operator
def _flash_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, ranges: Tensor | None, lengths: Tensor | None, causal: bool,
                     scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    """out, and the log-sum-exps (B, Hq, S_q) in powers of two; a window or cap of 0 is none."""
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    out, lse = empty_like(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    launch(_attention_forward, lambda meta: (batch * heads * cdiv(queries, meta["M"]),), q, k, v, out, lse, ids, ranges, lengths,
           *_strides(q, k, v, out), heads, heads // key_heads, queries, keys, scale, softcap, window,
           **_attention_options(q, k, causal, window, softcap, ids, lengths))
    return out, lse


@_flash_attention.register_fake
def _(q, k, v, ids, ranges, lengths, causal, scale, window, softcap):
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator
def _flash_attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor | None, ranges: Tensor | None,
                              lengths: Tensor | None, causal: bool, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of the gradient g of out."""
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    g, delta = rows_dense(g), torch.empty_like(lse)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    shared = heads, heads // key_heads, queries, keys, scale, softcap, window
    options = _attention_options(q, k, causal, window, softcap, ids, lengths)
    launch(_attention_backward_q, lambda meta: (batch * heads * cdiv(queries, meta["M"]),), q, k, v, out, g, dq, lse, delta, ids,
           ranges, lengths, *_strides(q, k, v, out, g, dq), *shared, **options)
    launch(_attention_backward_kv, lambda meta: (batch * key_heads * cdiv(keys, meta["N"]),), q, k, v, g, dk, dv, lse, delta, ids,
           ranges, lengths, *_strides(q, k, v, g, dk, dv), *shared, **options)
    return dq, dk, dv


@_flash_attention_backward.register_fake
def _(g, q, k, v, out, lse, ids, ranges, lengths, causal, scale, window, softcap):
    return empty_like(q), empty_like(k), empty_like(v)


def _attention_context(ctx, inputs, output):
    q, k, v, ids, ranges, lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, ids, ranges, lengths)
    ctx.set_materialize_grads(False)                                     # nobody differentiates the log-sum-exps


def _attention_gradients(ctx, g, _):
    return *_flash_attention_backward(g, *ctx.saved_tensors, *ctx.options), *[None] * 7


_flash_attention.register_autograd(_attention_gradients, setup_context=_attention_context)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None, window: int | None = None,
                    softcap: float | None = None, document_ids: Tensor | None = None, key_lengths: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, in tiles (Dao 2023, arXiv 2307.08691), with gradients of q, k and v.

    q (B, Hq, S_q, D), k and v (B, Hkv, S_k, D) with Hq a multiple of Hkv, S_q ≤ S_k and D ≤ 128, all float32, bfloat16 or float16 (under
    autocast in autocast's dtype), any strides; the result is like q. Queries stand at the last S_q positions.

    causal: a query sees its own and earlier positions; else all. scale: 1/√D unless given. window: only so many latest positions,
    its own among them. softcap: scores s become softcap · tanh(s / softcap). document_ids (B, S_k), integers: only positions of
    the same id. key_lengths (B), integers: only the first so many keys of each row; the rest may hold anything, and gets zeros as
    gradients. Queries that may see nothing give zeros. ValueError for what does not fit together."""
    name, given = "flash_attention", dict(q=q, k=k, v=v, document_ids=document_ids, key_lengths=key_lengths)
    if autocasts(q) and all(t.is_floating_point() and t.dtype != torch.float64 for t in (q, k, v)):
        q, k, v = (t.to(autocast_dtype(t)) for t in (q, k, v))
    check_alike(name, q=q, k=k, v=v)
    check(name, q.dtype == k.dtype == v.dtype, "q, k and v must have one dtype", q=q, k=k, v=v)
    check(name, q.dim() == k.dim() == v.dim() == 4, "q, k and v must be (B, heads, S, D)", **given)
    (batch, heads, queries, size), (_, key_heads, keys, _) = q.shape, k.shape
    check(name, k.shape == v.shape and k.shape[0] == batch and k.shape[3] == size, "batch, head size, and all of k and v must agree", **given)
    check(name, key_heads > 0 and heads % key_heads == 0, "query heads must be a multiple of key-value heads", **given)
    check(name, queries <= keys, "there are more queries than keys, whose last positions they are", **given)
    check(name, 1 <= size <= (128 if fused(q) else math.inf), "kernels know head sizes of 1 to 128; use flash_attention_reference", **given)
    check(name, scale is None or 0 < scale < math.inf, f"scale is {scale}; it must be positive", **given)
    check(name, window is None or window >= 1, f"window is {window}; it must be at least 1, a position's own", **given)
    check(name, softcap is None or 0 < softcap < math.inf, f"softcap is {softcap}; it must be positive", **given)
    for key, shape, problem in (("document_ids", (batch, keys), "document_ids must be integers (B, S_k), int64 at most, on q's device"),
                                ("key_lengths", (batch,), "key_lengths must be integers (B), int64 at most, on q's device")):
        numbers = given[key]
        check(name, numbers is None or numbers.shape == shape and numbers.device == q.device and numbers.dtype in WHOLE, problem, **given)
    if not fused(q) or q.numel() == 0 or k.numel() == 0:
        return flash_attention_reference(q, k, v, causal, scale, window, softcap, document_ids, key_lengths)
    check_product(name, q.dtype)
    if size % 16:                                                        # zeros change no score, and even rows are read 16 bytes at a time
        q, k, v = (F.pad(t, (0, -size % 16)) for t in (q, k, v))
    whole = lambda t: t if t is None or t.dtype in (torch.int32, torch.int64) else t.to(torch.int32)
    ids, lengths = (None if t is None else whole(t).contiguous() for t in (document_ids, key_lengths))
    scale, window = size ** -0.5 if scale is None else scale, min(window or 0, keys)
    ranges = None if ids is None else _ranges_of(ids)
    out, _ = _flash_attention(rows_dense(q), rows_dense(k), rows_dense(v), ids, ranges, lengths, causal, float(scale), window, float(softcap or 0))
    return out[..., :size]


# ------------------------------------------------------------------------------------------------------------------
# The loss of the head: logits z = hidden @ weight.T, loss = mean over positions of logsumexp(z) - z_target
#
# The logits are by far the largest tensor of a training step: for 32,768 positions and a vocabulary of 128,256 in bfloat16 8.4 GB, and
# as much again for their gradients. Yet the gradient of a position's loss by its logits, softmax(z) - onehot(target), is at hand as
# soon as its logits are. So positions go through the head a twelfth at a time: a product makes their logits, a kernel turns these in
# place into gradients, two more products make those of hidden and weight, and the next chunk takes the same memory (in one piece:
# Wijmans et al. 2024, arXiv 2411.09009; in chunks, with the gradients made in the forward pass: Hsu et al. 2024, arXiv 2410.10989).
# That is three products, as many as the plain version has. The products of chunks by hidden and weight are the library's; the one
# that adds up over chunks is a kernel, as it has to add in float32.

def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, softcap: float | None = None,
                                   z_loss: float = 0.0) -> Tensor:
    """What `linear_cross_entropy` computes, with all logits in memory."""
    total, target_logit = linear_logsumexp_reference(hidden, weight, targets, softcap)
    counted = targets != ignore_index
    outside = counted & ((targets < 0) | (targets >= len(weight)))
    losses = (total - target_logit + z_loss * total.square()) * torch.ones_like(total).masked_fill(outside, float("nan"))
    return losses.where(counted, 0).sum() / counted.sum()


def linear_logsumexp_reference(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """What `linear_logsumexp` computes, with all logits in memory."""
    logits = wide(F.linear(hidden, weight))                                          # (..., V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    inside = (targets >= 0) & (targets < len(weight))
    target_logit = logits.gather(-1, targets.where(inside, 0)[..., None])[..., 0]
    return torch.logsumexp(logits, -1), target_logit.where(inside, float("-inf"))


@jit
def _cross_entropy(logits, targets, lse, target_logit, g_lse, g_target, padded, vocabulary, cap, z_loss, CAP: tl.constexpr,
                   GRADIENT: tl.constexpr, LANES: tl.constexpr):
    """Log-sum-exp and target's logit of one row of logits (-inf for a target that is not among them). With GRADIENT the row becomes, in place,
    (g_lse · (1 + 2 z_loss lse) · softmax + g_target · onehot) times the cap's slope; zeros, unread, where both gradients are zero.
    Rows are `padded` elements apart, a multiple of 64, so that no load is cut off within its 16 bytes."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * padded
    lanes = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]  # eight neighbours a thread: 16 bytes of bfloat16, one load
    factor = 1.4426950408889634                                          # log2 e
    row_g_lse, row_g_target = 1.0, 0.0
    if GRADIENT:
        row_g_lse, row_g_target = tl.load(g_lse + row), tl.load(g_target + row)
    if (row_g_lse == 0) & (row_g_target == 0):
        for start in range(0, padded, 8 * LANES):
            tl.store(logits + start + lanes, tl.zeros((LANES, 8), logits.dtype.element_ty), mask=start + lanes < padded)
        tl.store(lse + row, 0.0)
        tl.store(target_logit + row, 0.0)
    else:
        top, total = tl.full((LANES,), float("-inf"), tl.float32), tl.zeros((LANES,), tl.float32)
        for start in range(0, padded, 8 * LANES):                        # a running maximum and sum in each thread
            z = _capped(tl.load(logits + start + lanes, mask=start + lanes < padded, other=0.0).to(tl.float32), cap, CAP)
            z = tl.where(start + lanes < vocabulary, z, float("-inf"))
            new = tl.maximum(top, tl.max(z, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2((top - shift) * factor) + tl.sum(tl.exp2((z - shift[:, None]) * factor), 1)
            top = new
        highest = tl.max(top, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        row_lse = highest + tl.log2(tl.sum(total * tl.exp2((top - highest) * factor), 0)) / factor
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < vocabulary)
        target_z = _capped(tl.load(logits + tl.where(inside, target, 0)).to(tl.float32), cap, CAP)
        tl.store(lse + row, row_lse)
        tl.store(target_logit + row, tl.where(inside, target_z, float("-inf")))
        if GRADIENT:
            tl.debug_barrier()                                           # every thread has the target's logit before one overwrites it
            row_g_lse *= 1 + 2 * z_loss * row_lse
            for start in range(0, padded, 8 * LANES):
                at, held = logits + start + lanes, start + lanes < padded
                z = _capped(tl.load(at, mask=held, other=0.0).to(tl.float32), cap, CAP)
                gradient = row_g_lse * tl.exp2((z - row_lse) * factor) + tl.where(start + lanes == target, row_g_target, 0.0)
                if CAP:
                    gradient *= 1 - z * z / (cap * cap)                  # of cap · tanh(x / cap): 1 - tanh²
                tl.store(at, gradient.to(logits.dtype.element_ty), mask=held)


@jit
def _capped(z, cap, CAP: tl.constexpr):
    """cap · tanh(z / cap), or z."""
    return cap * _tanh(z / cap) if CAP else z


@jit
def _add_product(total, a, b, rows, columns, depth, a_stride, b_stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """One tile of total (rows, columns), float32, += aᵀ b, where a is (depth, rows) and b (depth, columns)."""
    program, across = tl.program_id(0), tl.cdiv(columns, N)              # neighbours share their part of a, which is the large one
    m, n, k = program // across * M + tl.arange(0, M), program % across * N + tl.arange(0, N), tl.arange(0, K)
    at, held = total + m[:, None].to(tl.int64) * columns + n[None, :], (m < rows)[:, None] & (n < columns)[None, :]
    a_at, b_at = k[:, None] * a_stride + m[None, :], k[:, None] * b_stride + n[None, :]
    acc = tl.load(at, mask=held, other=0.0)
    for i in range(0, tl.cdiv(depth, K)):
        here = (k < depth - i * K)[:, None]
        # a's rows are padded: what is read beyond its columns is not stored, and a mask that is even keeps loads 16 bytes wide
        a_tile = tl.load(a + a_at, mask=here & (m < a_stride)[None, :], other=0.0)
        b_tile = tl.load(b + b_at, mask=here & (n < columns)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a_tile), b_tile, acc, input_precision="tf32x3")
        a += K * a_stride
        b += K * b_stride
    tl.store(at, acc, mask=held)


def add_product_(total: Tensor, a: Tensor, b: Tensor):
    """total += aᵀ b in float32: total (rows, columns), a (depth, rows), b (depth, columns)."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b)
        return
    (depth, rows), columns = a.shape, b.shape[1]
    m, n, k = (32, 32, 16) if INTERPRETED else (128, 128, 64)            # two blocks on a multiprocessor: one loads while the other multiplies
    launch(_add_product, cdiv(rows, m) * cdiv(columns, n), total, a, b, rows, columns, depth, a.stride(0), b.stride(0), M=m, N=n, K=k,
           num_warps=4, num_stages=3)


def _through_head(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, dtype: torch.dtype, g_lse: Tensor | None = None,
                  g_target: Tensor | None = None, z_loss: float = 0.0, for_x: bool = False, for_weight: bool = False) -> tuple[Tensor, ...]:
    """Of x (N, hidden_size) and weight (V, hidden_size): log-sum-exp and target's logit of each position (N), and for those that want it
    what gradients g_lse · (1 + 2 z_loss lse) · softmax + g_target · onehot of the logits give to x and, in float32, to weight."""
    w, (count, vocabulary) = weight.to(dtype), (len(x), len(weight))
    rows = min(count, max(512, 64 * cdiv(count, 768)))                   # a twelfth of the positions, or 512
    padded = 64 * cdiv(vocabulary, 64)
    logits = x.new_empty(rows, padded, dtype=dtype)
    lse, target_logit = x.new_empty(count, dtype=torch.float32), x.new_empty(count, dtype=torch.float32)
    gradient = for_x or for_weight
    dx = torch.empty_like(x) if for_x else x.new_empty(0)
    dw = torch.zeros_like(weight, dtype=torch.float32) if for_weight else x.new_empty(0, dtype=torch.float32)
    for i in range(0, count, rows):
        part, n = slice(i, i + rows), min(rows, count - i)
        x_part, z = x[part].to(dtype), logits[:n, :vocabulary]
        torch.mm(x_part, w.T, out=z)
        gradients = (g_lse[part], g_target[part]) if gradient else (None, None)
        launch(_cross_entropy, n, z, targets[part], lse[part], target_logit[part], *gradients, padded, vocabulary, softcap, z_loss,
               CAP=softcap > 0, GRADIENT=gradient, LANES=16 if INTERPRETED else 512, num_warps=16)
        if for_x:
            dx[part] = z @ w
        if for_weight:
            add_product_(dw, z, x_part)
    return lse, target_logit, dx, dw


@operator
def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, softcap: float, z_loss: float, dtype: torch.dtype,
                          for_x: bool, for_weight: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, one over the number of targets that count, and the gradients of the sum of losses (empty where not wanted), which keep
    their digits in float16 until they meet the factor that loss scaling puts behind the mean."""
    counted = targets != ignore_index
    count = counted.sum(dtype=torch.float32)
    # a target outside the vocabulary makes everything NaN that it would have touched
    g_lse = counted.float().masked_fill(counted & ((targets < 0) | (targets >= len(weight))), float("nan"))
    lse, target_logit, dx, dw = _through_head(x, weight, targets, softcap, dtype, g_lse, -g_lse, z_loss, for_x, for_weight)
    losses = g_lse * (lse - target_logit + z_loss * lse.square())
    return losses.where(counted, 0).sum() / count, 1 / count.clamp(min=1), dx, dw


@_linear_cross_entropy.register_fake
def _(x, weight, targets, ignore_index, softcap, z_loss, dtype, for_x, for_weight):
    scalar, empty = lambda: x.new_empty((), dtype=torch.float32), lambda dtype: x.new_empty(0, dtype=dtype)
    return (scalar(), scalar(), torch.empty_like(x) if for_x else empty(x.dtype),
            torch.empty_like(weight, dtype=torch.float32) if for_weight else empty(torch.float32))


def _loss_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.wanted = inputs[1].dtype, inputs[-2:]
    ctx.set_materialize_grads(False)                                     # or autograd makes zeros as gradients of dx and dw


def _scale_(t: Tensor, factor: Tensor) -> Tensor:
    """t *= factor, a float32 number on the device. (It would be rounded to bfloat16 itself, were it multiplied by a tensor of that.)"""
    if t.dtype == torch.float32:
        return t.mul_(factor)
    for part in t.split(4096):
        part.copy_(part.float() * factor)
    return t


def _loss_gradients(ctx, g, *_):
    share, dx, dw = ctx.saved_tensors
    # in place: they are large, and wanted once (autograd notices a second time)
    dx, dw = (_scale_(t.detach(), g * share) if wanted else None for t, wanted in zip((dx, dw), ctx.wanted))
    return dx, dw if dw is None else dw.to(ctx.dtype), *[None] * 7


_linear_cross_entropy.register_autograd(_loss_gradients, setup_context=_loss_context)


@operator
def _linear_logsumexp(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _through_head(x, weight, targets, softcap, dtype)[:2]


@_linear_logsumexp.register_fake
def _(x, weight, targets, softcap, dtype):
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)


@operator
def _linear_logsumexp_backward(x: Tensor, weight: Tensor, targets: Tensor, g_lse: Tensor, g_target: Tensor, softcap: float,
                               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dx, dw = _through_head(x, weight, targets, softcap, dtype, g_lse.contiguous(), g_target.contiguous(), 0.0, True, True)[2:]
    return dx, dw.to(weight.dtype)


@_linear_logsumexp_backward.register_fake
def _(x, weight, targets, g_lse, g_target, softcap, dtype):
    return torch.empty_like(x), torch.empty_like(weight)


def _logsumexp_context(ctx, inputs, output):
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets)


def _logsumexp_gradients(ctx, g_lse, g_target):
    return *_linear_logsumexp_backward(*ctx.saved_tensors, g_lse, g_target, *ctx.options), *[None] * 3


_linear_logsumexp.register_autograd(_logsumexp_gradients, setup_context=_logsumexp_context)


def _check_head(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None):
    """ValueError for what does not fit together."""
    given = dict(hidden=hidden, weight=weight, targets=targets)
    check(name, hidden.device == weight.device == targets.device, "all tensors must be on one device", **given)
    fits = weight.dim() == 2 and len(weight) > 0 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1]
    check(name, fits, "hidden must be (..., hidden_size), and weight (V, hidden_size) with V at least 1", **given)
    check(name, targets.shape == hidden.shape[:-1], "there must be one target for each position of hidden", **given)
    check(name, targets.dtype in (torch.int32, torch.int64), "targets must be int64 or int32", **given)
    mixed = hidden.dtype != weight.dtype and not autocasts(hidden)
    check(name, not mixed, "hidden and weight must have one dtype, unless autocast is on", **given)
    check(name, all(t.dtype in FLOATS or not fused(t) and t.is_floating_point() for t in (hidden, weight)),
          "the dtype must be float32, bfloat16 or float16", **given)
    check(name, softcap is None or 0 < softcap < math.inf, f"softcap is {softcap}; it must be positive", **given)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, softcap: float | None = None,
                         z_loss: float = 0.0) -> Tensor:
    """Mean of -log softmax(hidden @ weight.T)[target] in nats over the targets that are not `ignore_index`, plus z_loss times the mean of
    logsumexp² (Chowdhery et al. 2022, arXiv 2204.02311); with `softcap` logits z count as softcap · tanh(z / softcap).

    hidden (..., hidden_size), weight (V, hidden_size), targets (...) of int64 or int32. The logits are there for a twelfth of the positions
    at a time (at least 512); products run in autocast's dtype where it is on, sums in float32. Both gradients are made in the forward
    pass, and handed out once: a second backward pass raises, whatever retain_graph says. NaN if no target counts, and NaN, with NaN
    gradients, if one lies outside the vocabulary. ValueError for what does not fit."""
    _check_head("linear_cross_entropy", hidden, weight, targets, softcap)
    if not fused(hidden) or hidden.numel() == 0:
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index, softcap, z_loss)
    check_product("linear_cross_entropy", autocast_dtype(weight))
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    x, y = hidden.reshape(-1, hidden.shape[-1]).contiguous(), targets.reshape(-1).contiguous()
    return _linear_cross_entropy(x, weight.contiguous(), y, ignore_index, float(softcap or 0), float(z_loss), autocast_dtype(weight), *wanted)[0]


def linear_logsumexp(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """logsumexp(hidden @ weight.T) and the target's logit of every position, each (...) in float32, with gradients: the same chunks as in
    `linear_cross_entropy`, but any function may follow, for one product more (logits are computed again in the backward pass).

    The difference, target's logit less log-sum-exp, is the target's log-probability. And a vocabulary can be split over ranks: each hands in its
    rows of `weight` and targets less the number of rows before them; where a target lies in another part its logit comes out as -inf.
    The whole log-sum-exp is that of the ranks' ones, the whole target logit their maximum."""
    _check_head("linear_logsumexp", hidden, weight, targets, softcap)
    if not fused(hidden) or hidden.numel() == 0:
        return linear_logsumexp_reference(hidden, weight, targets, softcap)
    check_product("linear_logsumexp", autocast_dtype(weight))
    x, y = hidden.reshape(-1, hidden.shape[-1]).contiguous(), targets.reshape(-1).contiguous()
    parts = _linear_logsumexp(x, weight.contiguous(), y, float(softcap or 0), autocast_dtype(weight))
    return parts[0].view(targets.shape), parts[1].view(targets.shape)


# ------------------------------------------------------------------------------------------------------------------
# AdamW:   m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²
#          p ← p - lr · wd · p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

def _bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - βᵗ, whose leading digits would cancel in float32 where β is near 1: at t = 1 and β = 0.9999 four of seven stay."""
    return -torch.expm1(t * math.log(max(beta, 1e-300)))


@torch.no_grad()
def adamw_step_reference(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
                         steps: list[Tensor], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
                         skip: Tensor | None = None):
    """What `adamw_step` does, tensor by tensor."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t, g = step + 1, g.float()
        new_m, new_v = m.lerp(g, 1 - beta1), v.lerp(g.square(), 1 - beta2)
        update = new_m / _bias_correction(beta1, t) / ((new_v / _bias_correction(beta2, t)).sqrt() + eps)
        for old, new in (step, t), (m, new_m), (v, new_v), (p, p.float() * (1 - lr * weight_decay) - lr * update):
            old.copy_(new if skip is None else torch.where(skip, old, new))


def _check_adamw(params: list, grads: list, exp_avgs: list, exp_avg_sqs: list, steps: list, skip: Tensor | None):
    """ValueError unless tensors that belong together lie alike: then their elements can be taken in the order of memory."""
    lengths = [len(some) for some in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    if len(set(lengths)) != 1:
        raise ValueError(f"adamw_step: params, grads, exp_avgs, exp_avg_sqs and steps must be of one length; given {lengths}")
    strange = [type(t).__name__ for some in (params, grads, exp_avgs, exp_avg_sqs, steps) for t in some if not isinstance(t, Tensor)]
    if strange:
        raise ValueError(f"adamw_step: the lists must hold tensors; given a {strange[0]} (leave out parameters without a gradient)")
    check("adamw_step", skip is None or not params or skip.dtype == torch.bool and skip.dim() == 0 and skip.device == params[0].device,
          "skip must be a bool without dimensions, on the parameters' device", **({} if skip is None else {"skip": skip, "param": (*params, skip)[0]}))
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps):
        if (p.shape == g.shape == m.shape == v.shape and p.is_contiguous() and g.is_contiguous() and m.is_contiguous() and v.is_contiguous()
                and p.dtype in FLOATS and g.dtype in FLOATS and m.dtype == v.dtype == step.dtype == torch.float32 and step.dim() == 0
                and params[0].device == p.device == g.device == m.device == v.device == step.device):
            continue                                                     # as nearly always: the host has hundreds to look at
        named = dict(param=p, grad=g, exp_avg=m, exp_avg_sq=v, step=step)
        good = (all(t.device == params[0].device for t in named.values()) and p.dtype in FLOATS and g.dtype in FLOATS
                and m.dtype == v.dtype == step.dtype == torch.float32 and p.shape == g.shape == m.shape == v.shape and step.dim() == 0)
        check("adamw_step", good, "give param, grad (floats), exp_avg and exp_avg_sq (float32) of one shape, and step (float32) without "
              "dimensions, all lists on one device", **named)
        if not all(t.is_contiguous() for t in (p, g, m, v)):
            dense = p.permute(sorted(range(p.dim()), key=p.stride, reverse=True)).is_contiguous()
            if not (dense and p.stride() == g.stride() == m.stride() == v.stride()):
                raise ValueError(f"adamw_step: param, grad, exp_avg and exp_avg_sq of {tuple(p.shape)} must be dense, with the "
                                 f"same strides; given {', '.join(str(t.stride()) for t in (p, g, m, v))}")


@jit
def _adamw_kernel(table, owners, rates, skip, new_m, new_v, eps, keep, P: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr,
                 CHUNK: tl.constexpr):
    table += tl.load(owners + tl.program_id(0)) * 8
    p = tl.load(table).to(tl.pointer_type(P))
    g = tl.load(table + 1).to(tl.pointer_type(G))
    m = tl.load(table + 2).to(tl.pointer_type(tl.float32))
    v = tl.load(table + 3).to(tl.pointer_type(tl.float32))
    count = tl.load(table + 4)
    if ALIGNED:                          # known to the compiler of arguments alone; these come out of a table
        p, g, m, v = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16), tl.multiple_of(v, 16)
        count = tl.multiple_of(count, 16)
    rates += tl.load(table + 5) * 2
    at = (tl.program_id(0) - tl.load(table + 7)) * CHUNK + tl.arange(0, CHUNK)
    go = at < count
    if skip is not None:
        go &= tl.load(skip) == 0
    a = tl.load(p + at, mask=go).to(tl.float32)
    d = tl.load(g + at, mask=go).to(tl.float32)
    e = tl.load(m + at, mask=go)
    f = tl.load(v + at, mask=go)
    e += new_m * (d - e)
    f += new_v * (d * d - f)
    tl.store(m + at, e, mask=go)
    tl.store(v + at, f, mask=go)
    tl.store(p + at, a * keep - tl.load(rates) * e / (tl.sqrt(f) * tl.load(rates + 1) + eps), mask=go)


@torch.no_grad()
def adamw_step(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
               steps: list[Tensor], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
               skip: Tensor | None = None):
    """One step of AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) for all tensors, in place: a launch for those of the
    same dtypes, one more for those of odd addresses or sizes. Parameters and gradients in float32, bfloat16 or float16, moments
    in float32; `steps`, of no dimension, in float32, are counted here. Where `skip`, a boolean on the device, is true nothing
    changes, steps included, whatever the gradients are. The host waits for nothing. ValueError for shapes, strides, dtypes or
    devices that do not fit."""
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, skip)
    if not params:
        return
    if not fused(params[0]):
        return adamw_step_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, skip)
    torch._foreach_add_(steps, 1.0 if skip is None else (~skip).float())
    t = torch.stack([*steps])
    rates = torch.stack((lr / _bias_correction(beta1, t), _bias_correction(beta2, t).rsqrt()), 1)                # (T, 2)
    groups = defaultdict(list)
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        row = [p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel()]
        groups[p.dtype, g.dtype, all(number % 16 == 0 for number in row)].append(row + [i, cdiv(p.numel(), 4096)])
    for (p_dtype, g_dtype, aligned), rows in groups.items():
        ends = itertools.accumulate(row[-1] for row in rows)
        rows = [(*row, end - row[-1]) for row, end in zip(rows, ends)]
        # from pinned memory, or the host would wait for the copy
        table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=p.is_cuda).to(p.device, non_blocking=True)
        # which tensor each program's chunk belongs to; made on the device, as a large model has a million chunks
        programs = sum(row[-2] for row in rows)
        owners = torch.repeat_interleave(table[:, 6], output_size=programs)
        launch(_adamw_kernel, programs, table, owners, rates, skip, 1.0 - beta1, 1.0 - beta2, float(eps), 1.0 - lr * weight_decay,
               P=getattr(tl, str(p_dtype)[6:]), G=getattr(tl, str(g_dtype)[6:]), ALIGNED=aligned, CHUNK=4096, num_warps=8)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])     # as in-place operations of PyTorch do


# ------------------------------------------------------------------------------------------------------------------
# python kernels.py errors: each kernel against its twin in float64

def relative_error(ours: Tensor, exact: Tensor) -> float:
    """‖ours - exact‖ / ‖exact‖; NaN where there is one."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def errors_of(function, twin, tensors: list[Tensor], **options) -> tuple[float, float]:
    """The error of function(*tensors), and the largest of the gradients' errors, against the twin in float64."""
    ours = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out, expected = function(*ours, **options), twin(*exact, **options)
    g = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, [t for t in ours if t.requires_grad], g),
                torch.autograd.grad(expected, [t for t in exact if t.requires_grad], g.double()))
    return relative_error(out, expected), max((relative_error(a, b) for a, b in pairs), key=lambda e: (math.isnan(e), e))


def error_cases(device: torch.device, dtype: torch.dtype, brief: bool):
    """(kernel, case, function, twin, tensors, options), of sizes that divide nothing; on a GPU larger ones. Brief: of attention, for each of
    whose cases there is much to compile, the first and the last."""
    gpu = device.type == "cuda"
    S, D, N, V = (1000, 64, 1500, 5001) if gpu else (75, 24, 70, 201)
    random = lambda *shape: torch.randn(shape, device=device, dtype=dtype)
    heads = lambda h, s, d=D: random(2, s, h, d).transpose(1, 2)                     # as the model has them
    documents = (torch.arange(S, device=device) // (S // 3)).expand(2, S)
    lengths = torch.tensor([S, S // 2], device=device)
    cases = (
            ("causal", (2, 2, S, D), {}), ("all positions", (2, 2, S, D), {"causal": False}), ("grouped heads", (4, 2, S, D), {}),
            ("the last queries", (2, 1, S // 3, D), {}), ("one query", (2, 1, 1, D), {}), ("head of 128", (1, 1, S, 128), {}),
            ("window", (2, 1, S, D), {"window": S // 4}), ("capped", (2, 1, S, D), {"softcap": 2.0}),
            ("documents", (2, 1, S, D), {"document_ids": documents}), ("lengths", (2, 1, S, D), {"key_lengths": lengths}),
            ("everything", (4, 2, S - 9, D), {"window": S // 2, "softcap": 5.0, "document_ids": documents, "key_lengths": lengths, "scale": 0.3}))
    for case, (h, kv, s, d), options in (cases[0], cases[-1]) if brief else cases:
        yield "flash_attention", case, flash_attention, flash_attention_reference, [heads(h, s, d), heads(kv, S, d), heads(kv, S, d)], options
    targets = torch.randint(V, (N,), device=device).where(torch.rand(N, device=device) > 0.2, -100)
    for case, options in (("mean loss", {}), ("capped, z-loss", {"softcap": 3.0, "z_loss": 0.01})):
        yield ("linear_cross_entropy", case, lambda h, w, **o: linear_cross_entropy(h, w, targets, **o),
               lambda h, w, **o: linear_cross_entropy_reference(h, w, targets, **o), [random(N, 40), random(V, 40)], options)
    both = lambda function: lambda h, w: torch.stack(function(h, w, targets.clamp(min=0)))
    yield "linear_logsumexp", "per token", both(linear_logsumexp), both(linear_logsumexp_reference), [random(N, 40), random(V, 40)], {}
    for size in (64, 1000):
        yield ("rms_norm", f"rows of {size}", lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5),
               [random(2, N, size), random(size)], {})
    yield "swiglu", "halves of a product", lambda x: swiglu(*x.chunk(2, -1)), lambda x: swiglu_reference(*x.chunk(2, -1)), [random(N, 200)], {}
    angles = torch.randn(S, D // 2, device=device) * 3
    yield ("rope", "transposed heads", lambda x: rope(x, angles.cos(), angles.sin()),
           lambda x: rope_reference(x, angles.cos().double(), angles.sin().double()), [heads(3, S)], {})


def adamw_error(device: torch.device, dtype: torch.dtype) -> float:
    """The error of three steps' changes of float32 parameters with gradients of `dtype`, against torch's AdamW in float64."""
    start = [torch.randn(shape, device=device) for shape in ((33, 65), (1000,), ())]
    ours, moments = [p.clone() for p in start], [[torch.zeros_like(p) for p in start] for _ in range(2)]
    exact = [p.double().requires_grad_() for p in start]
    peer = torch.optim.AdamW(exact, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    steps = [torch.zeros((), device=device) for _ in start]
    for _ in range(3):
        grads = [torch.randn_like(p).to(dtype) for p in start]
        adamw_step(ours, grads, *moments, steps, 0.01, 0.9, 0.95, 1e-8, 0.1)
        for p, g in zip(exact, grads):
            p.grad = g.double()
        peer.step()
    return max(relative_error(p - first, e.detach() - first) for p, e, first in zip(ours, exact, start))


def errors_command(device: torch.device, brief: bool = False) -> dict:
    """A table of errors, and its rows. bfloat16 products come out wrong in the interpreter, so that a CPU checks the other two. `brief`: see
    `error_cases`, which is so for all dtypes but the first in any case."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)                      # NumPy's, of what the interpreter computes and then masks
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32, torch.float16)
    rows = []
    for dtype in dtypes:
        for kernel, case, function, twin, tensors, options in tqdm_of([*error_cases(device, dtype, brief or dtype != dtypes[0])], "kernels"):
            forward, gradients = errors_of(function, twin, tensors, **options)
            rows.append({"kernel": kernel, "case": case, "dtype": str(dtype)[6:], "forward": forward, "gradients": gradients})
        rows.append({"kernel": "adamw_step", "case": "three steps", "dtype": str(dtype)[6:], "forward": adamw_error(device, dtype), "gradients": None})
    where = f"on {torch.cuda.get_device_name()}" if device.type == "cuda" else "interpreted on the CPU"
    print(f"errors against float64, ‖ours - exact‖ / ‖exact‖ ({where})")
    cases, shown = {}, lambda error: "-" if error is None else f"{error:.1e}"
    for row in rows:
        cases.setdefault((row["kernel"], row["case"]), {})[row["dtype"]] = f"{shown(row['forward'])}  {shown(row['gradients'])}"
    print_table([["kernel", "case", *(f"{str(dtype)[6:]}: forward, gradients" for dtype in dtypes)]] + [
        [*key, *(cells.get(str(dtype)[6:], "") for dtype in dtypes)] for key, cells in cases.items()])
    return {"errors": rows}


# ------------------------------------------------------------------------------------------------------------------
# python kernels.py compile: what becomes of every kernel on an H100, with none at hand

def compile_jobs() -> list:
    """(what, a call without arguments) for each kind of call that the kernels have settings for: inputs are on `meta`, so that there is
    nothing but shapes."""
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    jobs = []

    def attention(what, dtype, size, rich):
        q, out = (meta(2, 4096, 16, size, dtype=dtype).transpose(1, 2) for _ in range(2))
        k, lse = meta(2, 4096, 4, size, dtype=dtype).transpose(1, 2), meta(2, 16, 4096, dtype=torch.float32)
        ids, lengths, window, cap = (meta(2, 4096, dtype=torch.int64), meta(2, dtype=torch.int64), 1024, 50.0) if rich else (None, None, 0, 0.0)
        ranges = meta(2, 256, 4, dtype=torch.int32) if rich else None
        jobs.append((what, lambda: _flash_attention.plain(q, k, k, ids, ranges, lengths, True, size ** -0.5, window, cap)))
        jobs.append((what, lambda: _flash_attention_backward.plain(out, q, k, k, out, lse, ids, ranges, lengths, True, size ** -0.5, window, cap)))

    for size in (16, 32, 64, 128):
        attention(f"bfloat16, D {size}, causal", torch.bfloat16, size, False)
        attention(f"bfloat16, D {size}, everything on", torch.bfloat16, size, True)
        attention(f"float32, D {size}, everything on", torch.float32, size, True)

    jobs.append(("int64", lambda: _ranges_of.plain(meta(2, 4096, dtype=torch.int64))))

    def head(what, dtype, vocabulary, gradient, cap, z_loss):
        x, weight, targets = meta(512, 4096, dtype=dtype), meta(vocabulary, 4096, dtype=dtype), meta(512, dtype=torch.int64)
        g_lse = meta(512, dtype=torch.float32) if gradient else None
        jobs.append((what, lambda: _through_head(x, weight, targets, cap, dtype, g_lse, g_lse, z_loss, gradient, gradient)))

    head("bfloat16, V 128,256", torch.bfloat16, 128_256, True, 0.0, 0.0)
    head("bfloat16, V 50,257, capped, z-loss", torch.bfloat16, 50_257, True, 30.0, 1e-4)
    head("bfloat16, no gradients", torch.bfloat16, 128_256, False, 0.0, 0.0)
    head("float32, capped, z-loss", torch.float32, 50_257, True, 30.0, 1e-4)
    for dtype in (torch.bfloat16, torch.float32):
        for size in (128, 1024, 4096, 8192, 16384):
            x, weight, what = meta(8192, size, dtype=dtype), meta(size, dtype=dtype), f"{str(dtype)[6:]}, rows of {size:,}"
            jobs.append((what, lambda x=x, weight=weight: (_rms_norm.plain(x, weight, 1e-5, x.dtype), _rms_norm_backward.plain(x, weight, x, 1e-5))))
        halves = meta(8192, 2 * 14336, dtype=dtype).chunk(2, -1)
        jobs.append((f"{str(dtype)[6:]}, halves of a product", lambda halves=halves: (
            _swiglu.plain(*halves), _swiglu_backward.plain(*halves, meta(8192, 14336, dtype=halves[0].dtype)))))
        heads, angles = meta(8, 4096, 32, 128, dtype=dtype).transpose(1, 2), meta(4096, 64, dtype=torch.float32)
        jobs.append((f"{str(dtype)[6:]}, D 128", lambda heads=heads: _rope.plain(heads, angles, angles, False)))
        table, owners, rates = meta(300, 8, dtype=torch.int64), meta(1000, dtype=torch.int64), meta(300, 2, dtype=torch.float32)
        for aligned in (True, False):
            what, p = f"{str(dtype)[6:]} parameters, {'' if aligned else 'not '}aligned", getattr(tl, str(dtype)[6:])
            jobs.append((what, lambda aligned=aligned, p=p: launch(
                _adamw_kernel, 1000, table, owners, rates, meta(dtype=torch.bool), 0.1, 0.05, 1e-8, 0.999, P=p, G=p, ALIGNED=aligned,
                CHUNK=4096, num_warps=8)))
    return jobs


def pretend_h100():
    """Have Triton compile for sm_90 although no GPU is there to ask."""
    from triton.backends.compiler import GPUTarget
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
                                                     get_current_stream=lambda device=None: 0, get_benchmarker=lambda: None))


def describe(kernel, what: str) -> dict:
    """What a compiled kernel needs, as cuobjdump has it, and by which instructions it multiplies matrices."""
    names = kernel.src.fn.arg_names                                      # Triton 3.2 knows constants by name, later ones by position
    constants = {path if isinstance(path, str) else names[path[0]]: value for path, value in kernel.src.constants.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"kernel": kernel.src.fn.__name__.strip("_"), "what": what, "tile": " x ".join(str(constants[key]) for key in "MN" if "M" in constants),
            "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages, "registers": usage["REG"],
            "stack_bytes": usage["STACK"] + usage["LOCAL"], "shared_bytes": kernel.metadata.shared,
            "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"), "mma": kernel.asm["ptx"].count("mma.sync"), "dots": kernel.asm["ttir"].count("tt.dot")}


def compile_job(number: int) -> list[dict]:
    """Do one of `compile_jobs`."""
    global COMPILED
    pretend_h100()
    what, work = compile_jobs()[number]
    COMPILED = []
    work()
    kernels = {id(kernel): kernel for kernel in COMPILED}.values()                   # chunks and groups launch the same one again
    return [describe(kernel, what) for kernel in kernels]


def compile_command() -> dict:
    """A table of what all kernels compile to, and its rows."""
    count = len(compile_jobs())
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        rows = [row for rows in tqdm_of(pool.map(compile_job, range(count)), "kernels compiled", count) for row in rows]
    unique = {tuple(row.values()): row for row in rows}
    rows = sorted(unique.values(), key=lambda row: (row["kernel"], row["what"]))
    print("compiled for sm_90 (an H100 has 255 registers a thread, 227 KB of shared memory a block; stack bytes are spilled registers)")
    print_table([["kernel", "for", "tile", "warps", "stages", "registers", "stack bytes", "shared KB", "products by"]] + [
        [row["kernel"], row["what"], row["tile"] or "-", *(str(row[key]) for key in ("warps", "stages", "registers", "stack_bytes")),
         f"{row['shared_bytes'] / 1024:.1f}", "wgmma" if row["wgmma"] else "mma" if row["mma"] else "-"] for row in rows])
    return {"compile": rows}


# ------------------------------------------------------------------------------------------------------------------
# On a GPU: times

def unless_missing(work, peer: bool = False):
    """work(), or None if memory does not suffice, and from a peer whatever ails it, which is said."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        if not peer:
            raise
        print(f"left out: {str(error).strip().splitlines()[0]:.120}", file=sys.stderr)
        return None


def milliseconds(work, repeat: int = 50, peer: bool = False) -> float | None:
    """Median time of work() on the device, warm, the cache flushed before each run; None for None, and for what does not fit."""
    return work and unless_missing(lambda: triton.testing.do_bench(work, warmup=20, rep=repeat, return_mode="median"), peer)


def in_turns(contenders: dict, rounds: int = 3) -> dict:
    """Median milliseconds of each contender, and how often ours fits into it: the median of ratios within a round, in which all have
    their turn."""
    times = [{name: milliseconds(work, peer=name != "ours") for name, work in contenders.items()} for _ in range(rounds)]
    median = lambda values: sorted(values)[len(values) // 2] if None not in values else None
    ours = next(iter(contenders))
    return {name: {"milliseconds": median([t[name] for t in times]),
                   "ratio": median([t[name] / t[ours] if t[name] and t[ours] else None for t in times])} for name in contenders}


def peak_bytes(work) -> int | None:
    """Memory that work() takes at its peak beyond what was taken before; None for None, and for more than there is."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    done = work and unless_missing(lambda: (work(), True)[1], peer=True)
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return peak if done else None


def both_ways(function, tensors: list[Tensor]):
    """Work: function(*tensors), and the gradients of those tensors that want them."""
    wanted = [t for t in tensors if t.requires_grad]
    out = function(*(t.detach() for t in tensors))
    g = torch.randn_like(out)
    del out
    return lambda: torch.autograd.grad(function(*tensors), wanted, g)


def backward_alone(function, tensors: list[Tensor]):
    """Work: the gradients, again and again of one forward pass."""
    wanted, out = [t for t in tensors if t.requires_grad], function(*tensors)
    g = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, g, retain_graph=True)


def forward_alone(function, tensors: list[Tensor]):
    """Work: function(*tensors), with nothing kept for a backward pass."""
    tensors = [t.detach() for t in tensors]
    return lambda: function(*tensors)


def sdpa(backend: str):
    """PyTorch's causal attention by one of its back ends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention


def attention_operations(queries: int, size: int, heads: int, products: int) -> float:
    """Operations of so many products of causal attention (2 forward, 5 backward), half of whose scores are there."""
    return products * 2 * queries ** 2 * size * heads / 2


def time_cases():
    """(kernel, case, the way, function, its peers by name, tensors, operations or None, bytes or None); sizes far beyond the cache."""
    random = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for size in (64, 128):
        tensors = [random(1, 16, 16384, size) for _ in range(3)]
        peers = {"flash": sdpa("FLASH_ATTENTION"), "cuDNN": sdpa("CUDNN_ATTENTION"), "compiled": torch.compile(flash_attention_reference)}
        for way, products in ((forward_alone, 2), (both_ways, 7)):
            yield ("flash_attention", f"16 heads, S 16,384, D {size}, causal", way, flash_attention, peers, tensors,
                   attention_operations(16384, size, 16, products), None)
    N, hidden, V = 32768, 4096, 128_256
    targets = torch.randint(V, (N,), device="cuda")
    plain = lambda h, w: F.cross_entropy(F.linear(h, w).float(), targets)
    tensors = [random(N, hidden), (torch.randn(V, hidden, device="cuda") / hidden ** 0.5).bfloat16().requires_grad_()]
    yield ("linear_cross_entropy", f"N {N:,}, hidden {hidden:,}, V {V:,}", both_ways, lambda h, w: linear_cross_entropy(h, w, targets),
           {"PyTorch": plain, "compiled": torch.compile(plain)}, tensors, 6 * N * hidden * V, None)
    x, weight = random(32768, 4096), random(4096)
    norm = lambda x, w: rms_norm_reference(x, w, 1e-5)
    for way, passes in ((forward_alone, 2), (backward_alone, 3)):
        yield ("rms_norm", "32,768 x 4,096", way, lambda x, w: rms_norm(x, w, 1e-5),
               {"PyTorch": lambda x, w: F.rms_norm(x, (4096,), w, 1e-5), "compiled": torch.compile(norm)}, [x, weight], None, passes * 2 * x.numel())
    pair = [random(16384, 14336) for _ in range(2)]
    for way, passes in ((forward_alone, 3), (backward_alone, 5)):
        yield ("swiglu", "16,384 x 14,336", way, swiglu, {"PyTorch": lambda g, u: F.silu(g) * u, "compiled": torch.compile(swiglu_reference)}, pair, None,
               passes * 2 * pair[0].numel())
    heads, angles = random(8, 4096, 32, 128).transpose(1, 2).detach().requires_grad_(), torch.randn(4096, 64, device="cuda")
    tables = angles.cos(), angles.sin()
    for way in (forward_alone, backward_alone):
        plain = lambda x: rope_reference(x, *tables)
        yield ("rope", "8 x 32 heads x 4,096 x 128", way, lambda x: rope(x, *tables), {"PyTorch": plain, "compiled": torch.compile(plain)},
               [heads], None, 4 * heads.numel())


def adamw_times() -> dict:
    """Ours and torch's fused AdamW over a billion parameters in 304 tensors."""
    params = [torch.randn(4096, 800, device="cuda") for _ in range(304)]
    for p in params:
        p.grad = torch.randn_like(p)
    moments, steps = [[torch.zeros_like(p) for p in params] for _ in range(2)], [torch.zeros((), device="cuda") for _ in params]
    peers = {"PyTorch": torch.optim.AdamW(params, fused=True).step, "foreach": torch.optim.AdamW(params, foreach=True).step}
    return in_turns({"ours": lambda: adamw_step(params, [p.grad for p in params], *moments, steps, 1e-3, 0.9, 0.999, 1e-8, 0.01)} | peers) | {
        "bytes": 28 * sum(p.numel() for p in params)}


def ceilings() -> dict[str, float]:
    """What this GPU reaches: operations per second of a large bfloat16 product, bytes per second (in and out) of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2 ** 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return {"operations": 2 * 8192 ** 3 / milliseconds(lambda: a @ b, 200) * 1000,
            "bytes": 2 ** 32 / milliseconds(lambda: target.copy_(source), 100) * 1000}


def times_command() -> dict:
    """A table of times beside PyTorch's, and its rows."""
    top, rows = ceilings(), []
    for kernel, case, way, function, peers, tensors, operations, size in tqdm_of(time_cases(), "measured", 11):
        contenders = {name: unless_missing(lambda: way(f, tensors), name != "ours") for name, f in {"ours": function, **peers}.items()}
        row = {"kernel": kernel, "case": case, "way": way.__name__, "operations": operations, "bytes": size, **in_turns(contenders)}
        if kernel == "linear_cross_entropy":
            gradients = sum(t.numel() * t.element_size() for t in tensors)                           # which every version hands out
            row["peak_bytes"] = {name: work and (peak_bytes(work) or 0) - gradients for name, work in contenders.items()}
        rows.append(row)
        del contenders, tensors, peers, function
    rows.append({"kernel": "adamw_step", "case": "10⁹ float32 parameters, 304 tensors", "way": "one step", "operations": None} | adamw_times())
    print(f"times on {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; a product of large bfloat16 "
          f"matrices reaches {top['operations'] / 1e12:.0f} TFLOP/s, a copy {top['bytes'] / 1e12:.2f} TB/s")
    lines = [["kernel", "case", "", "ms", "rate", "of the ceiling", "the others' time over ours"]]
    for row in rows:
        kind = "operations" if row["operations"] else "bytes"
        names = [key for key, value in row.items() if isinstance(value, dict) and "ratio" in value and key != "ours"]
        rate = row[kind] / row["ours"]["milliseconds"] * 1000
        row["of_ceiling"] = rate / top[kind]
        lines.append([row["kernel"], row["case"], row["way"].replace("_", " "), f"{row['ours']['milliseconds']:.3f}",
                      f"{rate / 1e12:,.0f} TFLOP/s" if kind == "operations" else f"{rate / 1e9:,.0f} GB/s", f"{row['of_ceiling']:.0%}",
                      ", ".join(f"{name} " + (f"{row[name]['ratio']:.2f}" if row[name]["ratio"] else "n/a") for name in names)])
    print_table(lines)
    for row in rows:
        if "peak_bytes" in row:
            print(f"{row['kernel']}: memory at the peak, beyond inputs and gradients: " + ", ".join(
                f"{name} {f'{size / 1e9:.2f} GB' if size and size > 0 else 'out of memory'}" for name, size in row["peak_bytes"].items()))
    return {"times": rows, "ceilings": top}


def sweep_command() -> dict:
    """Attention, ours and plain PyTorch, over lengths and head sizes: times and peak memory, one batch of 16 causal heads in bfloat16."""
    rows, contenders = [], {"ours": flash_attention, "plain": flash_attention_reference}
    sizes = [(d, 2 ** s) for d in (16, 32, 64, 128) for s in range(7, 17)]
    for size, length in tqdm_of(sizes, "sizes"):
        for name, function in contenders.items():
            row = {"head_size": size, "sequence_length": length, "version": name}
            for key, way in (("forward", forward_alone), ("backward", backward_alone), ("both", both_ways)):
                tensors = [torch.randn(1, 16, length, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
                work = unless_missing(lambda: way(function, tensors))
                row[key], row[f"{key}_bytes"] = milliseconds(work, 30), peak_bytes(work)
            rows.append(row)
    print(f"attention on {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: 1 x 16 heads, causal, "
          "bfloat16; ms, and peak memory beyond the inputs")
    cell = lambda row, key: "out of memory" if row[key] is None else f"{row[key]:.3f}"
    lines = [["D", "S", "", "forward", "backward", "both", "TFLOP/s", "MB"]]
    for row in rows:
        rate = row["both"] and attention_operations(row["sequence_length"], row["head_size"], 16, 7) / row["both"] / 1e9
        lines.append([str(row["head_size"]), f"{row['sequence_length']:,}", row["version"], *(cell(row, key) for key in ("forward", "backward", "both")),
                      f"{rate:.1f}" if rate else "-", f"{row['both_bytes'] / 1e6:,.0f}" if row["both_bytes"] else "-"])
    print_table(lines)
    return {"sweep": rows}


# ------------------------------------------------------------------------------------------------------------------
# The command line

def tqdm_of(work, unit: str, total: int | None = None):
    """A progress bar, where someone looks at one and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return work
    return tqdm(work, total=total, desc=unit, leave=False, disable=None)


def print_table(rows: list[list[str]]):
    """Columns: words to the left, numbers to the right."""
    number = [all(re.fullmatch(r"[\d.,e+x%-]+( .*/s| {1,2}\S+)?|-|out of memory", cell.strip()) for cell in column[1:]) for column in zip(*rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("   ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, number)).rstrip())


def elsewhere(command: str, interpret: bool) -> dict:
    """Another process of this script does `command`, with the interpreter or without (a kernel is one or the other from its definition on);
    what it wrote as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    print(f"$ {'TRITON_INTERPRET=1 ' if interpret else ''}python kernels.py {command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "out.json")
        code = subprocess.run([sys.executable, __file__, command, "--json", file], env=environment).returncode
        if code:
            sys.exit(code)
        return json.loads(file.read_text())


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong argument is answered in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    """Check and measure the kernels."""
    parser = Parser(prog="kernels.py", allow_abbrev=False, description="Check and measure the kernels.",
                    formatter_class=argparse.RawDescriptionHelpFormatter, epilog=(
                        "errors   each kernel against its twin in float64; interpreted where there is no GPU\n"
                        "compile  registers, shared memory and spills on an H100; needs no GPU\n"
                        "times    on a GPU, beside PyTorch's and torch.compile's\n"
                        "sweep    on a GPU, attention over lengths and head sizes, time and memory"))
    parser.add_argument("command", nargs="?", choices=("errors", "compile", "times", "sweep"), metavar="command", help=(
        "one of those below; none: errors, then times on a GPU, or compile without one"))
    parser.add_argument("--json", metavar="FILE", help="write everything measured into this file too")
    args = parser.parse_args()
    try:
        if triton is None:
            raise ValueError("Triton is not installed, so that there are only the twins; pip install triton (on Linux)")
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no folder {Path(args.json).parent}")
        if args.json and Path(args.json).is_dir():
            raise ValueError(f"--json {args.json} is a folder; name a file")
        gpu = torch.cuda.is_available() and not INTERPRETED
        if args.command in ("times", "sweep") and not gpu:
            raise ValueError(f"{args.command} needs a GPU" + (", and no TRITON_INTERPRET" if INTERPRETED else "; `errors` and `compile` do without"))
        device = torch.device("cuda" if gpu else "cpu")
        results = {"machine": {"gpu": torch.cuda.get_device_name() if gpu else None, "torch": torch.__version__, "triton": triton.__version__}}
        for command in [args.command] if args.command else ["errors", "times"] if gpu else ["errors", "compile"]:
            away = command == "errors" and not (gpu or INTERPRETED) or command == "compile" and INTERPRETED
            if not args.command and not away:
                print(f"{'' if command == 'errors' else chr(10)}$ python kernels.py {command}", flush=True)
            if away:
                results[command] = elsewhere(command, interpret=command == "errors")[command]
            elif command == "errors":
                results |= errors_command(device, brief=gpu and not args.command)
            else:
                results |= {"compile": compile_command, "times": times_command, "sweep": sweep_command}[command]()
            if args.json:                                                # after each part, as one may be stopped
                temporary = Path(f"{args.json}.tmp.{os.getpid()}")
                temporary.write_text(json.dumps(results, indent=1) + "\n")
                temporary.replace(args.json)
    except (ValueError, OSError) as error:
        parser.exit(2, f"kernels.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "kernels.py: interrupted" + (f"; {args.json} has the parts that were done" if args.json else "") + "\n")


if __name__ == "__main__":
    main()
