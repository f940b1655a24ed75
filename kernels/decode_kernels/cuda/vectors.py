"""Vectors and rows of matrices whose length is no power of two: a HEAD that is one, and a masked TAIL."""

import triton
import triton.language as tl


def split(length: int) -> tuple[int, int]:
    """HEAD, the largest power of two within `length`, and TAIL, the smallest that holds the rest (at least 16).

    A length that is a power of two is all HEAD but for a TAIL of 16, which is masked off.
    """
    head = 1 << (length.bit_length() - 1)
    return head, max(16, triton.next_power_of_2(length - head))


@triton.jit
def load_rows(matrix, row, rows, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows `row` [BN] of a matrix [rows, K]: ([BN, HEAD], [BN, TAIL]). Rows at and beyond `rows` are zeros."""
    start = matrix + row[:, None] * K
    inside = row[:, None] < rows
    at = HEAD + tl.arange(0, TAIL)[None, :]
    head = tl.load(start + tl.arange(0, HEAD)[None, :], mask=inside, other=0.0)
    tail = tl.load(start + at, mask=inside & (at < K), other=0.0)
    return head, tail


@triton.jit
def load_vector(vector, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[K] as fp32: ([HEAD], [TAIL])."""
    at = HEAD + tl.arange(0, TAIL)
    head = tl.load(vector + tl.arange(0, HEAD))
    tail = tl.load(vector + at, mask=at < K, other=0.0)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def store_vector(vector, head, tail, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    at = HEAD + tl.arange(0, TAIL)
    tl.store(vector + tl.arange(0, HEAD), head.to(vector.dtype.element_ty))
    tl.store(vector + at, tail.to(vector.dtype.element_ty), mask=at < K)


@triton.jit
def product(x, y):
    """x * y, for a sum over the last axis.

    Where a thread has one product alone it is rounded by itself: fused with what comes from another thread, as the
    compiler would, each of the two had another sum, and which of them is kept is not defined.
    """
    if x.shape[-1] <= 128:
        return tl.fma(x, y, 0.0)
    else:
        return x * y


@triton.jit
def dot_rows(row_head, row_tail, head, tail):
    """The products of rows [BN, K] with a vector [K]: [BN], summed in fp32."""
    first = tl.sum(product(row_head.to(tl.float32), head[None, :]), axis=1)
    return first + tl.sum(product(row_tail.to(tl.float32), tail[None, :]), axis=1)


@triton.jit
def scale_below_two(most):
    """A power of two that brings a magnitude of `most` to between 1 and 2, and its inverse; of 0 any."""
    exponent = most.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = tl.where(exponent == 0, 1.0, exponent.to(tl.float32, bitcast=True))
    return 1.0 / inverse, inverse


@triton.jit
def sum_in_halves(weights, x):
    """weights [..., K] of at most eight bits times x, fp16 [..., K] below 2, summed over K, in fp32.

    Products and sums of eight are fp16, two in an instruction: below 2 * 448 * 8, rounded to 2^-11 of themselves.
    """
    terms = weights.to(tl.float16) * x
    eights = tl.reshape(terms, terms.shape[:-1] + [terms.shape[-1] // 8, 8])  # noqa: RUF005 (Triton has no star)
    return tl.sum(tl.sum(eights, len(eights.shape) - 1).to(tl.float32), len(terms.shape) - 1)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def add(x, residual, K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ADD: tl.constexpr):
    """x + residual of a token, rounded to the dtype of x, as fp32; without ADD, x."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    head, tail = load_vector(x, K, HEAD, TAIL)
    if ADD:
        more_head, more_tail = load_vector(residual, K, HEAD, TAIL)
        head, tail = rounded(head + more_head, DTYPE), rounded(tail + more_tail, DTYPE)
    return head, tail


@triton.jit
def rms_scale(head, tail, eps, K: tl.constexpr):
    """What RMSNorm multiplies a vector by. Taken out of a product with the vector, it does not stand in its way."""
    return tl.rsqrt((tl.sum(product(head, head)) + tl.sum(product(tail, tail))) / K + eps)
