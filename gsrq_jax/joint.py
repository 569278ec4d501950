"""Residual codes of two codewords a stage, fitted and encoded jointly (ours).

With two codewords a stage a vector is ``b + Σ_r s_r v_r`` with signs ``s_r``: ``v_r`` is half the
difference of a stage's codewords, ``b`` the sum of their means. Such stages are worth little if
each is learned on what the ones before it left. Here all of them are fitted together, by weighted
least squares, to signs that are chosen together.

The encoder is the M-algorithm of communication over several antennas. A triangular factor of the
vectors' Gram matrix turns the squared error into a sum over stages, whose r-th term depends on
the first r signs alone. So signs are decided stage by stage, and the ``beam`` best beginnings are
kept. A multiple of the identity is added to the Gram matrix. It changes all errors by the same
number, and keeps stages whose vectors are nearly dependent from being decided by noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from gsrq_jax.kmeans import AxisName

POINTS = 512
"""Points for each stage that are enough for a fit."""
_RIDGE = 1e-4  # of the equations, relative to their mean diagonal: halves of a stage may be rare
_LEAST = 1e-6  # the smallest multiple of the Gram matrix's mean diagonal that is added to it
_BLOCK = 8  # stages between two products with all signs so far
_EXACT = lax.Precision.HIGHEST
Summed = Callable[[Array], Array]  # over all devices that have a share of the points


def signed(
    codewords: Float[Array, "*lead R 2 d"],
) -> tuple[Float[Array, "*lead d"], Float[Array, "*lead R d"]]:
    """Split codewords into the offset ``b`` and the vectors ``v`` that signs multiply, float32."""
    low, high = jnp.moveaxis(codewords.astype(jnp.float32), -2, 0)
    return jnp.sum(low + high, axis=-2) / 2, (high - low) / 2


def codewords_of(
    offset: Float[Array, "*lead d"], vectors: Float[Array, "*lead R d"]
) -> Float[Array, "*lead R 2 d"]:
    """Build the codewords that `signed` splits; all of the offset lies in the first stage."""
    pairs = jnp.stack([-vectors, vectors], axis=-2)
    return pairs.at[..., 0, :, :].add(offset[..., None, :])


def decode(
    bits: UInt8[Array, "*lead n R"], codewords: Float[Array, "*lead R 2 d"]
) -> Float[Array, "*lead n d"]:
    """Sum the coded codewords by one product, float32; differentiable in ``codewords``."""
    low, high = jnp.moveaxis(codewords.astype(jnp.float32), -2, 0)
    moved = jnp.matmul(bits.astype(jnp.float32), high - low, precision=_EXACT)
    return jnp.sum(low, axis=-2)[..., None, :] + moved


def encode(
    x: Float[Array, "n d"],
    codewords: Float[Array, "R 2 d"],
    *,
    beam: int,
    chunk: int | None = None,
) -> UInt8[Array, "n R"]:
    """Choose the signs of all stages together, by the M-algorithm.

    Stages are decided in their order; a fit puts the longest vectors first.

    Args:
        x: vectors.
        codewords: of all stages.
        beam: beginnings that are kept; 1 decides each sign for good (successive cancellation).
        chunk: vectors handled at a time, for which ``beam × R`` floats are held; None is all.
    """
    offset, vectors = signed(codewords)
    vectors = jnp.pad(vectors, ((0, -len(vectors) % _BLOCK), (0, 0)))
    lower, whiten = _triangular(vectors)

    def of_chunk(x: Array) -> Array:
        target = jnp.matmul(whiten, (x.astype(jnp.float32) - offset).T, precision=_EXACT)
        return _signs(target, lower, beam).T

    n, stages = len(x), len(codewords)
    count = -(-n // (chunk or max(n, 1)))
    if count <= 1:
        return of_chunk(x)[:, :stages]
    size = -(-n // count)
    parts = jnp.pad(x, ((0, count * size - n), (0, 0))).reshape(count, size, -1)
    return lax.map(of_chunk, parts).reshape(count * size, -1)[:n, :stages]


def _triangular(vectors: Float[Array, "R d"]) -> tuple[Float[Array, "R R"], Float[Array, "R d"]]:
    """Factor ``V Vᵀ + λ = Lᵀ L`` with a lower triangular ``L``, and make ``L⁻ᵀ V``.

    ``‖x − Vᵀ s‖²`` is ``‖L⁻ᵀ V x − L s‖²`` up to a number that no sign changes.
    """
    back = vectors[::-1]
    gram = jnp.matmul(back, back.T, precision=_EXACT)
    # At many stages a channel the estimate would leave float32 too few digits.
    least = _LEAST * jnp.mean(jnp.diagonal(gram)) + jnp.finfo(jnp.float32).tiny
    pull = jnp.maximum(_noise(vectors), least)
    gram = gram + pull * jnp.eye(len(back), dtype=gram.dtype)
    # LAPACK hangs or crashes where several devices of a CPU call it at once, as in decoding.
    upper, whiten = lax.platform_dependent(gram, back, cpu=_eliminated, default=_by_lapack)
    return upper[::-1, ::-1], whiten[::-1]


def _by_lapack(
    gram: Float[Array, "R R"], right: Float[Array, "R d"]
) -> tuple[Float[Array, "R R"], Float[Array, "R d"]]:
    """Factor ``G = Uᵀ U`` with an upper triangular ``U``, and make ``U⁻ᵀ B``."""
    factor = lax.linalg.cholesky(gram)
    return factor.T, lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)


def _eliminated(
    gram: Float[Array, "R R"], right: Float[Array, "R d"]
) -> tuple[Float[Array, "R R"], Float[Array, "R d"]]:
    """Do as `_by_lapack`, by elimination row by row."""
    size = len(gram)

    def row(left: Array, index: Array) -> tuple[Array, Array]:
        own = lax.dynamic_index_in_dim(left, index, keepdims=False)
        own = jnp.where(jnp.arange(left.shape[1]) < index, 0, own) / jnp.sqrt(own[index])
        return left - own[:size, None] * own, own

    _, rows = lax.scan(row, jnp.concatenate([gram, right], axis=1), jnp.arange(size))
    return rows[:, :size], rows[:, size:]


def _noise(vectors: Float[Array, "R d"]) -> Float[Array, ""]:
    """Estimate the mean squared error a channel: that of white vectors at this rate."""
    stages, dim = vectors.shape
    left = 4.0 ** (-stages / dim)
    return jnp.sum(jnp.square(vectors)) / dim * left / (1 - left)


def _signs(
    target: Float[Array, "R n"], lower: Float[Array, "R R"], beam: int
) -> UInt8[Array, "R n"]:
    """Find signs, as bits, of small ``‖target − lower · signs‖²`` for each column."""
    stages, n = target.shape
    slots = jnp.arange(beam)

    def block(state: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        error, signs = state
        rows = lax.dynamic_slice_in_dim(lower, first, _BLOCK)
        square = lax.dynamic_slice_in_dim(rows, first, _BLOCK, axis=1)
        done = jnp.einsum("kr,mrn->mkn", rows, signs, precision=_EXACT)
        left = lax.dynamic_slice_in_dim(target, first, _BLOCK) - done  # [beam, block, n]
        # The slot that each beginning had before this block, then the bits that it got in it.
        path = jnp.broadcast_to(slots[:, None] << _BLOCK, error.shape)
        for stage in range(_BLOCK):
            here, left = left[:, 0], left[:, 1:]
            up, down = (jnp.square(here - s * square[stage, stage]) for s in (1, -1))
            if beam == 1:
                bit, error = up <= down, error + jnp.minimum(up, down)
            else:
                error, best = _smallest(jnp.concatenate([error + up, error + down]), beam)
                bit, parent = best < beam, best % beam
                path = jnp.take_along_axis(path, parent, axis=0)
                left = jnp.take_along_axis(left, parent[:, None], axis=0)
            path = path | (bit.astype(path.dtype) << stage)
            sign = jnp.where(bit, 1.0, -1.0)[:, None]
            left = left - sign * square[stage + 1 :, stage][None, :, None]
        if beam > 1:
            signs = jnp.take_along_axis(signs, (path >> _BLOCK)[:, None], axis=0)
        new = (path[:, None] >> jnp.arange(_BLOCK)[:, None]) & 1
        new = (2 * new - 1).astype(signs.dtype)
        return (error, lax.dynamic_update_slice_in_dim(signs, new, first, axis=1)), None

    # Made from the data, so that they vary over the same mesh axes.
    zero = jnp.zeros_like(target)
    error = jnp.where(slots == 0, 0.0, jnp.inf)[:, None] + zero[0]
    signs = jnp.broadcast_to(zero, (beam, stages, n))
    (_, signs), _ = lax.scan(block, (error, signs), jnp.arange(0, stages, _BLOCK))
    return (signs[0] > 0).astype(jnp.uint8)


def _smallest(x: Float[Array, "m n"], count: int) -> tuple[Float[Array, "k n"], Array]:
    """The ``count`` smallest of each column in rising order, the first of equals, and their rows.

    Ranks by comparison: a sort of many short columns is slow on every device.
    """
    row = jnp.arange(len(x))
    earlier = (row[:, None] > row)[..., None]
    rank = jnp.sum((x < x[:, None]) | ((x == x[:, None]) & earlier), axis=1)
    hit = rank == jnp.arange(count)[:, None, None]  # [k, m, n]
    return jnp.sum(jnp.where(hit, x, 0), axis=1), jnp.sum(jnp.where(hit, row[:, None], 0), axis=1)


def fit(
    points: Float[Array, "n d"],
    weights: Float[Array, " n"],
    stages: int,
    *,
    rounds: int,
    beam: int,
    chunk: int | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "R 2 d"], UInt8[Array, "n R"]]:
    """Fit all stages together: encode, then weighted least squares, in turn.

    The start is a scalar quantiser of each principal axis, with bits by variance. All rounds but
    the last two take every so-manieth point, `POINTS` for each stage.

    Args:
        points: float32, finite where ``weights`` is not 0; with ``axis_name`` this device's share.
        weights: not negative.
        stages: of the code.
        rounds: of encoding and least squares, at least 1.
        beam: of the encoder.
        chunk: points encoded at a time; None is all.
        axis_name: mapped axis or axes over which the points are spread.

    Returns:
        Codewords, longest vectors first, and the points' bits by them.
    """

    def summed(x: Array) -> Array:
        return x if axis_name is None else lax.psum(x, axis_name)

    def again(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        # The last time only encodes: one encoder in the program, which compiles in a third.
        words, _ = state
        bits = encode(points, words, beam=beam, chunk=chunk)
        new = _least_squares(points, weights, bits, summed)
        return jnp.where(number < rounds, new, words), bits

    words = codewords_of(*_scalar_start(points, weights, stages, summed))
    bits = jnp.broadcast_to((0 * weights[:, None]).astype(jnp.uint8), (len(points), stages))
    return lax.fori_loop(0, rounds + 1, again, (words, bits))


def _least_squares(points: Array, weights: Array, bits: Array, summed: Summed) -> Array:
    """Codewords of least weighted squared error for these bits, sorted by length."""
    signs = 2 * bits.astype(jnp.float32) - 1
    signs = jnp.concatenate([signs, jnp.ones((len(signs), 1), jnp.float32)], axis=1)
    weighted = signs * weights[:, None]
    gram = summed(jnp.matmul(weighted.T, signs, precision=_EXACT))
    moment = summed(jnp.matmul(weighted.T, points, precision=_EXACT))
    pull = _RIDGE * jnp.mean(jnp.diagonal(gram)) + jnp.finfo(jnp.float32).tiny
    factor = jax.scipy.linalg.cho_factor(gram + pull * jnp.eye(len(gram), dtype=gram.dtype))
    found = jax.scipy.linalg.cho_solve(factor, moment)
    vectors = found[:-1]
    vectors = vectors[jnp.argsort(-jnp.sum(jnp.square(vectors), axis=-1))]
    return codewords_of(found[-1], vectors)


# Optimal uniform quantisers of a unit Gaussian with 0, 1 … bits: squared error, half a step.
_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 8.714e-5)
_HALF_STEP = (0.0, 0.7980, 0.4978, 0.2930, 0.1676, 0.0941, 0.0520, 0.0284, 0.0154)
MOST_BITS = len(_ERROR) - 1
"""Bits that the start gives to a principal axis at most; so stages are at most as many times d."""


def _scalar_start(
    points: Array, weights: Array, stages: int, summed: Summed
) -> tuple[Float[Array, " d"], Float[Array, "R d"]]:
    """Offset and vectors of a scalar quantiser of each principal axis, longest vectors first.

    Bits go one by one to where the next one takes away most of the error.
    """
    total = jnp.maximum(summed(jnp.sum(weights)), jnp.finfo(jnp.float32).tiny)
    mean = summed(jnp.matmul(weights, points, precision=_EXACT)) / total
    left = points - mean
    moment = summed(jnp.matmul((left * weights[:, None]).T, left, precision=_EXACT)) / total
    variance, axes = jnp.linalg.eigh(moment)
    variance = jnp.maximum(variance, jnp.finfo(jnp.float32).tiny)
    error = jnp.asarray(_ERROR)
    gains = jnp.append(error[:-1] - error[1:], -jnp.inf)

    def give(_: Array, bits: Array) -> Array:
        return bits.at[jnp.argmax(variance * gains[bits])].add(1)

    # Zeros made from the data vary over the same mesh axes as what replaces them.
    bits = lax.fori_loop(0, stages, give, jnp.zeros_like(variance, jnp.int32))
    power = jnp.arange(MOST_BITS)
    lengths = jnp.sqrt(variance) * jnp.asarray(_HALF_STEP)[bits]
    lengths = jnp.where(power < bits[:, None], lengths[:, None] * 2.0**power, -1)
    order = jnp.argsort(-lengths.reshape(-1))[:stages]
    vectors = axes.T[order // MOST_BITS] * lengths.reshape(-1)[order][:, None]
    return mean, vectors
