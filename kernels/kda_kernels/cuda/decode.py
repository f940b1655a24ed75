"""Decode: one token for each sequence, from the packed projections to the gated output in one launch.

One program serves one (token, head): it reads the head's state once, tile by tile, into registers, and writes it
back in place; nothing else of size is moved. The K axis of the tile is a pair (OUTER, INNER): a row's INNER keys sit in
neighbouring lanes, the OUTER ones in registers of one thread, so that the two sums over K are mostly additions within a
thread.

Arguments as the fields of `KdaInputs`, `KdaParams`, `KdaState` and `DecodeArgs`; strides in elements, one token or one
state apart, conv_token_stride one input of the convolution apart.
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import INTERPRETED, LOG2E, sigmoid, silu, softplus
from kda_kernels.interface import DecodeArgs

# Where the V axis of a state tile stands: Triton 3.6 spreads a warp's lanes over the first axis before the
# second, later versions over the second; OUTER belongs in the one that lanes take last.
VALUES_AT = 0 if tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6) else 1
MANY = 192  # programs, from which on several on a multiprocessor beat one with the whole state in its registers


def decode(args: DecodeArgs) -> None:
    """One token for each of T sequences.

    One launch, no allocation, no synchronisation: safe to capture in a CUDA graph. The values of `state_indices` are
    not checked: an index beyond the cache or used twice is the caller's error.
    """
    inputs, params, state, out = args.inputs, args.params, args.state, args.out
    num_tokens, heads, dim = inputs.qkv.shape[0], params.heads, params.head_dim
    if num_tokens == 0:
        return
    kda_decode_kernel[(heads, num_tokens)](
        *(inputs.qkv, inputs.g, inputs.beta, inputs.output_gate),
        *(params.conv_weight, params.A_log, params.dt_bias, params.norm_weight),
        *(state.conv, state.recurrent, args.state_indices, out),
        *(inputs.qkv.stride(0), inputs.g.stride(0), inputs.beta.stride(0), inputs.output_gate.stride(0)),
        *(state.conv.stride(0), state.conv.stride(1), state.recurrent.stride(0), out.stride(0)),
        params.norm_eps,
        heads,
        D=dim,
        W=params.conv_kernel_size,
        VALUES_AT=VALUES_AT,
        **_launch(num_tokens * heads, dim, state.recurrent.dtype.itemsize < 4),
    )


def _launch(programs: int, dim: int, narrow: bool, registers: int = 128) -> dict[str, int | bool]:
    """Tile of BV value rows and launch options, for a number of (token, head) programs.

    Few programs: the whole state in the registers of one, whose loads are then all in flight at once. Many:
    tiles so small that several programs fit on a multiprocessor, and load while others compute and store.
    """
    # Launched early, while the kernel before still runs (programmatic dependent launch): the start is hidden.
    early = not INTERPRETED.value
    options: dict[str, int | bool] = {"PDL": early, "launch_pdl": early}
    if programs <= MANY or dim < 128:
        return options | {"BV": dim, "INNER": min(dim, 32), "num_warps": max(1, min(4, dim * dim // 2048))}
    if narrow:
        return options | {"BV": 16, "INNER": 128, "num_warps": 4}
    return options | {"BV": 32, "INNER": 64, "num_warps": 4, "maxnreg": registers}


@triton.jit
def _conv_input(qkv, conv_state, at, qkv_stride, conv_token_stride, W: tl.constexpr):
    """Where input `at` of a sequence begins, counted from the oldest in `conv_state`; qkv: its first new token."""
    return tl.where(at < W - 1, conv_state + at * conv_token_stride, qkv + (at - (W - 1)) * qkv_stride)


@triton.jit
def _causal_conv1d(qkv, conv_state, weight, step, qkv_stride, conv_token_stride, D: tl.constexpr, W: tl.constexpr):
    """[D] convolution with SiLU of the inputs that end with new token `step`, fp32. Each thread loads its channels."""
    channel = tl.arange(0, D)
    y = tl.zeros([D], tl.float32)
    for tap in tl.static_range(W):
        x = tl.load(_conv_input(qkv, conv_state, tap + step, qkv_stride, conv_token_stride, W) + channel)
        y += x.to(tl.float32) * tl.load(weight + channel * W + tap).to(tl.float32)
    return silu(y)


@triton.jit
def _store_conv_state(qkv, conv_state, target, step, qkv_stride, conv_token_stride, D: tl.constexpr, W: tl.constexpr):
    """Store in `target`, which may be `conv_state`, the inputs that end with new token `step`, without the oldest."""
    channel = tl.arange(0, D)
    for tap in tl.static_range(1, W):
        x = tl.load(_conv_input(qkv, conv_state, tap + step, qkv_stride, conv_token_stride, W) + channel)
        tl.store(target + (tap - 1) * conv_token_stride + channel, x)


@triton.jit
def _add_each(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _gates(g, beta, output_gate, dt_bias, A_log, norm_weight, D: tl.constexpr, BV: tl.constexpr):
    """alpha [D] and beta of a token and head, and [TILES, BV] what its normalised output is multiplied by."""
    place = tl.arange(0, D // BV)[:, None] * BV + tl.arange(0, BV)[None, :]
    channel = tl.arange(0, D)
    z = tl.load(g + channel).to(tl.float32)
    z += tl.load(dt_bias + channel).to(tl.float32)
    rate = tl.exp2(tl.load(A_log).to(tl.float32) * LOG2E) * LOG2E
    alpha = tl.exp2(-rate * softplus(z))
    b = sigmoid(tl.load(beta).to(tl.float32))
    scale = sigmoid(tl.load(output_gate + place).to(tl.float32))
    return alpha, b, scale * tl.load(norm_weight + place).to(tl.float32)


@triton.jit
def _state_offsets(D: tl.constexpr, INNER: tl.constexpr, BV: tl.constexpr, VALUES_AT: tl.constexpr):
    """Offsets of the first tile within the state of a head."""
    key = tl.arange(0, D // INNER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    return tl.expand_dims(tl.expand_dims(tl.arange(0, BV) * D, 1), 1 - VALUES_AT) + tl.expand_dims(key, VALUES_AT)


@triton.jit
def _recurrent_step(
    tile, source, target, q, k, v, alpha, b,
    D: tl.constexpr, INNER: tl.constexpr, BV: tl.constexpr, VALUES_AT: tl.constexpr,
):  # fmt: skip
    """One token through the state of a head (docs/kda.md section 4), from cells at `source` to cells at `target`.

    q, k, v: after the convolution; tile: the first one of `source`. Returns o [TILES, BV] and the last new tile.
    """
    OUTER: tl.constexpr = D // INNER
    KEYS_AT: tl.constexpr = 1 - VALUES_AT
    TILES: tl.constexpr = D // BV
    qq, kk, qk = tl.reduce((q * q, k * k, q * k), 0, _add_each)
    q_scale, k_scale = tl.rsqrt(qq + 1e-6) * (D**-0.5), tl.rsqrt(kk + 1e-6)
    q *= q_scale
    k *= k_scale
    qk *= q_scale * k_scale
    q_row = tl.expand_dims(tl.reshape(q, (OUTER, INNER)), VALUES_AT)
    k_row = tl.expand_dims(tl.reshape(k, (OUTER, INNER)), VALUES_AT)
    decay = tl.expand_dims(tl.reshape(alpha, (OUTER, INNER)), VALUES_AT)
    v_tiles = tl.reshape(v, (TILES, BV))
    o = tl.zeros([TILES, BV], tl.float32)
    for i in range(TILES):
        S = tile.to(tl.float32) * decay
        if i + 1 < TILES:  # the next tile is on its way before this one is stored
            tile = tl.load(source + BV * D)
        here = tl.arange(0, TILES)[:, None] == i
        # Both sums are over the decayed state S', before the write: S^T q = S'^T q + beta e (k . q).
        predicted = tl.sum(tl.sum(S * k_row, KEYS_AT), 1)
        seen = tl.sum(tl.sum(S * q_row, KEYS_AT), 1)
        error = b * (tl.sum(tl.where(here, v_tiles, 0.0), 0) - predicted)
        S += tl.expand_dims(tl.expand_dims(error, 1), KEYS_AT) * k_row
        written = S.to(target.dtype.element_ty)
        tl.store(target, written)
        o += tl.where(here, (seen + error * qk)[None, :], 0.0)
        source += BV * D
        target += BV * D
        if TILES == 1:
            tile = written
    return o, tile


@triton.jit
def _gated_norm(o, scale, out, norm_eps, D: tl.constexpr, BV: tl.constexpr):
    """The gated norm (docs/kda.md section 5) of o [TILES, BV]."""
    o *= tl.rsqrt(tl.sum(tl.sum(o * o, 1), 0) / D + norm_eps) * scale
    place = tl.arange(0, D // BV)[:, None] * BV + tl.arange(0, BV)[None, :]
    tl.store(out + place, o.to(out.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=["state_indices"])
def kda_decode_kernel(
    qkv, g, beta, output_gate, conv_weight, A_log, dt_bias, norm_weight, conv_state, recurrent_state,
    state_indices, out, qkv_stride, g_stride, beta_stride, output_gate_stride,
    conv_state_stride, conv_token_stride, recurrent_state_stride, out_stride, norm_eps, heads,
    D: tl.constexpr, INNER: tl.constexpr, W: tl.constexpr, VALUES_AT: tl.constexpr, BV: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    P, first = heads * D, head * D
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    state_index = tl.load(state_indices + token).to(tl.int64)
    if state_index <= 0:
        tl.store(out + token * out_stride + first + tl.arange(0, D), tl.zeros([D], out.dtype.element_ty))
        return

    # The first tile of the state: everything below until its first use hides behind these loads.
    cell = recurrent_state + state_index * recurrent_state_stride + first * D + _state_offsets(D, INNER, BV, VALUES_AT)
    tile = tl.load(cell)
    qkv += token * qkv_stride + first
    conv_state += state_index * conv_state_stride + first
    weight = conv_weight + first * W
    q = _causal_conv1d(qkv, conv_state, weight, 0, qkv_stride, conv_token_stride, D, W)
    k = _causal_conv1d(qkv + P, conv_state + P, weight + P * W, 0, qkv_stride, conv_token_stride, D, W)
    v = _causal_conv1d(qkv + 2 * P, conv_state + 2 * P, weight + 2 * P * W, 0, qkv_stride, conv_token_stride, D, W)
    alpha, b, scale = _gates(
        g + token * g_stride + first, beta + token * beta_stride + head,
        output_gate + token * output_gate_stride + first, dt_bias + first, A_log + head, norm_weight, D, BV,
    )  # fmt: skip
    for part in tl.static_range(3):
        window = conv_state + part * P
        _store_conv_state(qkv + part * P, window, window, 0, qkv_stride, conv_token_stride, D, W)
    o, tile = _recurrent_step(tile, cell, cell, q, k, v, alpha, b, D, INNER, BV, VALUES_AT)
    _gated_norm(o, scale, out + token * out_stride + first, norm_eps, D, BV)
