"""Greedy encoding of vectors by residual codewords, fused, on TPUs: Pallas Mosaic TPU (ours).

One grid step takes some tokens of one head (or channel group of it), tokens along the lanes, and
goes through all stages: scores ⟨residual, c⟩ − ½‖c‖² on the MXU, the best codeword of each token,
its one-hot column, and by a product with that the codeword itself, to be taken from the residual.
Neither scores nor residuals leave the chip; what is written are codes.

Each float32 number stands as 3 bfloat16 pieces: scores are 6 products of them, as exact as float32
is, and the sum of a codeword's pieces is the codeword. docs/kernels-tpu.md says what it costs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt8

from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_tpu import LANES, SUBLANES, _pieces, varying

TOKENS = 2048
"""Of a grid step."""
PIECES = 3
CODEWORDS = 256
"""That a stage may have."""
MEMORY = 48 * 2**20
"""Bytes of vector memory that it may take, of 64 MiB (v5p) or 128 (v5e, v6e)."""


def _kernel(
    x_ref,  # [d, tokens]
    word_ref,  # [R, 3·K, d] bfloat16, piece after piece
    column_ref,  # [R, d, 3·K], the same transposed
    norm_ref,  # [R, K, 1], half the squared lengths
    code_ref,  # [R, tokens] int32
    left_ref,  # [d, tokens]
):
    stages, K = norm_ref.shape[:2]
    tokens = x_ref.shape[1]
    left_ref[...] = x_ref[...]

    def stage(r, _):
        scores = -norm_ref[r]
        # The smallest terms first.
        for i, piece in reversed(list(enumerate(_pieces(left_ref[...], PIECES)))):
            part = jnp.dot(
                word_ref[r, : (PIECES - i) * K, :], piece, preferred_element_type=jnp.float32
            )
            for j in reversed(range(PIECES - i)):
                scores = scores + part[j * K : (j + 1) * K]
        row = jax.lax.broadcasted_iota(jnp.int32, (K, tokens), 0)
        best = jnp.max(scores, axis=0, keepdims=True)
        code = jnp.min(jnp.where(scores == best, row, K), axis=0, keepdims=True)
        code_ref[pl.ds(r, 1), :] = code
        hot = jnp.where(row == code, 1.0, 0.0).astype(jnp.bfloat16)
        left_ref[...] -= jnp.dot(
            column_ref[r], jnp.concatenate([hot] * PIECES), preferred_element_type=jnp.float32
        )
        return 0

    jax.lax.fori_loop(0, stages, stage, 0)


def encode_columns(
    x: Float[Array, "P d n"],
    codewords: Float[Array, "P R K d"],
    *,
    tokens: int = TOKENS,
    interpret: bool = False,
) -> Int32[Array, "P R n"]:
    """The kernel itself, for P problems; d and K multiples of 8.

    Args:
        x: float32 vectors, one a column.
        codewords: float32; those that fill up K are NaN.
        tokens: of a grid step, a multiple of 128.
        interpret: whether to run in TPU interpret mode, without a TPU.
    """
    P, d, n = x.shape
    tokens = min(tokens, -(-n // LANES) * LANES)
    R, K = codewords.shape[1:3]
    norms = jnp.sum(jnp.square(codewords), axis=-1, keepdims=True) / 2
    norms = jnp.where(jnp.isnan(norms), jnp.inf, norms)
    words = jnp.concatenate(_pieces(jnp.nan_to_num(codewords), PIECES), axis=2)

    def of_problem(*shape):
        return pl.BlockSpec((None, *shape), lambda p, i: (p, *(0,) * len(shape)))

    def columns(rows):
        return pl.BlockSpec((None, rows, tokens), lambda p, i: (p, 0, i))

    return pl.pallas_call(
        _kernel,
        grid=(P, -(-n // tokens)),
        in_specs=[
            columns(d),
            of_problem(R, PIECES * K, d),
            of_problem(R, d, PIECES * K),
            of_problem(R, K, 1),
        ],
        out_specs=columns(R),
        out_shape=jax.ShapeDtypeStruct((P, R, n), jnp.int32, manual_axis_type=varying(x, words)),
        scratch_shapes=[pltpu.VMEM((d, tokens), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=MEMORY
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="encode",
    )(x, words, jnp.swapaxes(words, 2, 3), norms)


@functools.partial(jax.jit, static_argnames=("tokens", "interpret"))
def encode(
    x: Float[Array, "*lead n d"],
    codewords: Float[Array, "*lead groups stages k g"],
    *,
    tokens: int = TOKENS,
    interpret: bool = False,
) -> UInt8[Array, "*lead n groups stages"]:
    """`gsrq_jax.residual.encode`, greedy, as a TPU kernel.

    Args:
        x: vectors, any float type.
        codewords: of each lead, at most 256 a stage.
        tokens: vectors of a grid step, a multiple of 128; fewer where there are not so many.
        interpret: whether to run in TPU interpret mode, without a TPU.

    Raises:
        InputError: for more codewords.
    """
    *lead, n, _ = x.shape
    groups, stages, k, group = codewords.shape[-4:]
    if k > CODEWORDS:
        raise InputError(f"the encoder for TPUs takes at most {CODEWORDS} codewords, got {k}")
    problems = math.prod(lead) * groups
    columns = jnp.moveaxis(x.astype(jnp.float32).reshape(*lead, n, groups, group), -3, -1)
    more = -group % SUBLANES
    columns = jnp.pad(columns.reshape(problems, group, n), ((0, 0), (0, more), (0, 0)))
    words = codewords.astype(jnp.float32).reshape(problems, stages, k, group)
    words = jnp.pad(words, ((0, 0),) * 3 + ((0, more),))
    words = jnp.pad(words, ((0, 0), (0, 0), (0, -k % SUBLANES), (0, 0)), constant_values=jnp.nan)
    codes = encode_columns(columns, words, tokens=tokens, interpret=interpret)
    codes = codes.astype(jnp.uint8).reshape(*lead, groups, stages, n)
    return jnp.moveaxis(codes, -1, -3)
