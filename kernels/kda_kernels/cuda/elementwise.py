"""Device functions that the kernels share: activations and the gate, all in fp32."""

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which gives the right 0.

    The square of a reciprocal square root is a reciprocal without a division's many instructions.
    """
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))
    return root * root


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)). Where exp(x) is small, 1 + exp(x) would lose it, and a slow decay would drift."""
    e = tl.exp2(x * LOG2E)
    small = e * (1.0 - e * (0.5 - e * (1.0 / 3.0)))
    return tl.where(x > 20.0, x, tl.where(e < 0.015625, small, log2(1.0 + e) * (1.0 / LOG2E)))


@triton.jit
def log2(x):
    """For normal x; one instruction, where Triton's own takes two dozen."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def decay_between(a, b, dtype: tl.constexpr):
    """exp2(-|a - b|), opaque to the compiler: it would compute it anew for each layout that needs it.

    Two at a time, where the dtype is fp16: one instruction then converts both.
    """
    if INTERPRETED or dtype != tl.float16:
        return tl.exp2(-tl.abs(a - b)).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 s, t;
            sub.f32 s, $1, $3;
            sub.f32 t, $2, $4;
            abs.f32 s, s;
            abs.f32 t, t;
            neg.f32 s, s;
            neg.f32 t, t;
            ex2.approx.ftz.f32 s, s;
            ex2.approx.ftz.f32 t, t;
            cvt.rn.f16x2.f32 $0, t, s;
            }
            """,
            "=r,f,f,f,f",
            [a, b],
            dtype=tl.float16,
            is_pure=False,
            pack=2,
        )


@triton.jit
def power_of_two(x):
    """The power of two next above x, 1 for x = 0."""
    return tl.where(x > 0, tl.exp2(tl.ceil(log2(tl.maximum(x, 1e-30)))), 1.0)
