"""Residual codes: a vector is the sum of one codeword from each stage, in each channel group.

``x̂ = Σ_r C_r[code_r]``. Stages are fitted and encoded greedily, each on what the ones before it
left over; whatever rule made the codewords, a vector takes the nearest one.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, UInt

from gsrq_jax.errors import InputError
from gsrq_jax.kmeans import CHUNK, AxisName, Rule, ShapeUpdate, assign, cluster, nearest
from gsrq_jax.packing import code_dtype
from gsrq_jax.spec import ResidualSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FitReport:
    """How well each number of stages reproduces the points it was fitted to.

    Every field is ``[*lead, groups, stages]``; entry ``r`` is for stages ``0 … r`` together.

    Attributes:
        error: weighted energy of the residual relative to that of the points.
        cosine: weighted mean cosine between a point and its reconstruction.
        dead: codewords of stage ``r`` alone whose cell is empty, int32.
    """

    error: Array
    cosine: Array
    dead: Array


@functools.partial(
    jax.jit,
    static_argnames=(
        "spec",
        "rule",
        "shape_update",
        "iterations",
        "warmup",
        "chunk",
        "axis_name",
        "batch_size",
    ),
)
def fit(
    rng: PRNGKeyArray,
    points: Float[Array, "*lead n d"],
    spec: ResidualSpec,
    weights: Float[Array, "*lead n"] | Float[Array, "*lead n groups"] | None = None,
    *,
    rule: Rule = "gskm",
    shape_update: ShapeUpdate = "unit",
    iterations: int = 10,
    warmup: int = 5,
    chunk: int = CHUNK,
    axis_name: AxisName = None,
    batch_size: int | None = None,
) -> tuple[Float[Array, "*lead groups stages k g"], FitReport]:
    """Codewords of all stages and groups, each problem of ``lead`` on its own (GSRQ, paper).

    Args:
        rng: key.
        points: ``[*lead, n, d]``, any float type; with ``axis_name`` this device's share of them.
        spec: the code; ``spec.dim`` is ``d``.
        weights: ``[*lead, n]``, or ``[*lead, n, groups]`` where each group of a point has its own;
            not negative. What has weight 0 may hold anything.
        rule: ``gskm`` (paper), ``kmeans`` or ``spherical``; see `gsrq_jax.kmeans`.
        shape_update: for ``gskm``.
        iterations: passes over the points in each stage, after the spherical start.
        warmup: passes of the spherical start; other rules than ``gskm`` spend them on their own.
        chunk: points handled at a time.
        axis_name: mapped axis or axes over which the points are spread.
        batch_size: problems (of ``lead`` and groups) solved together; None means all. 1 takes the
            least memory and is no slower on a CPU.

    Returns:
        ``[*lead, groups, stages, K, g]`` float32 codewords, and the report.

    Raises:
        InputError: if there are fewer points than codewords, the shapes do not fit, or the rule is
            unknown.
    """
    *lead, n, d = points.shape
    if d != spec.dim:
        raise InputError(f"the spec is for {spec.dim} channels, but the points have {d}")
    if weights is None:
        weights = jnp.ones(points.shape[:-1])
    each = (*points.shape[:-1], spec.groups)
    if weights.shape not in (each, each[:-1]):
        raise InputError(
            f"weights must have the shape {each[:-1]}, one a point, or {each}, one a group of it, "
            f"got {weights.shape}"
        )
    if weights.ndim < len(each):
        weights = jnp.broadcast_to(weights[..., None], each)
    problem = functools.partial(
        _fit_stages,
        spec=spec,
        axis_name=axis_name,
        cluster=functools.partial(
            cluster,
            codewords=spec.codewords,
            rule=rule,
            shape_update=shape_update,
            iterations=iterations,
            warmup=warmup,
            chunk=chunk,
            axis_name=axis_name,
        ),
        chunk=chunk,
    )
    weights = weights.reshape(-1, n, spec.groups)
    points = points.reshape(len(weights), n, spec.groups, spec.group)
    keys = jax.random.split(rng, (len(weights), spec.groups))

    def of_problem(problem_index: Array) -> tuple[Array, FitReport]:
        i, group = problem_index // spec.groups, problem_index % spec.groups
        return problem(keys[i, group], points[i, :, group], weights[i, :, group])

    problems = jnp.arange(len(weights) * spec.groups)
    if batch_size is None or batch_size >= len(problems):
        fitted = jax.vmap(of_problem)(problems)
    elif batch_size == 1:
        fitted = lax.map(of_problem, problems)
    else:
        fitted = lax.map(of_problem, problems, batch_size=batch_size)
    return jax.tree.map(lambda a: a.reshape(*lead, spec.groups, *a.shape[1:]), fitted)


def _fit_stages(
    rng: Array,
    points: Array,
    weights: Array,
    *,
    spec: ResidualSpec,
    axis_name: AxisName,
    cluster: Callable,
    chunk: int,
) -> tuple[Array, FitReport]:
    """One problem: ``[n, g]`` points to ``[R, K, g]`` codewords."""

    def total(x: Array) -> Array:
        x = jnp.sum(jnp.where(weights > 0, weights * x, 0))
        return x if axis_name is None else lax.psum(x, axis_name)

    points = jnp.where((weights > 0)[:, None], points, 0).astype(jnp.float32)
    energy, weight = total(jnp.sum(jnp.square(points), -1)), total(jnp.ones_like(weights))

    def stage(residual: Array, key: Array) -> tuple[Array, tuple[Array, FitReport]]:
        result = cluster(key, residual, weights=weights)
        code, _ = assign(residual, result.centroids, chunk)
        residual = residual - result.centroids[code]
        report = FitReport(
            error=_ratio(total(jnp.sum(jnp.square(residual), -1)), energy),
            cosine=_ratio(total(_cosine(points, points - residual)), weight),
            dead=result.dead,
        )
        return residual, (result.centroids, report)

    _, fitted = lax.scan(stage, points, jax.random.split(rng, spec.stages))
    return fitted


def encode(
    x: Float[Array, "*lead n d"],
    codewords: Float[Array, "*lead groups stages k g"],
    *,
    chunk: int | None = None,
) -> UInt[Array, "*lead n groups stages"]:
    """The nearest codeword of each stage in turn (greedy).

    Args:
        x: ``[*lead, n, d]``, any float type.
        codewords: ``[*lead, groups, stages, K, g]``, ``groups·g = d``, ``K`` at most 65536.
        chunk: vectors (of each lead) handled at a time; None means all at once, which holds
            ``[*lead, groups, n, K]`` floats.

    Returns:
        ``[*lead, n, groups, stages]`` uint8, or uint16 where ``K`` is above 256.

    Raises:
        InputError: if the shapes do not fit.
    """
    *lead, n, d = x.shape
    *code_lead, groups, _, k, group = codewords.shape
    if d != groups * group or lead != code_lead or k > 65536:
        raise InputError(
            f"codewords of shape {codewords.shape} cannot encode vectors of shape {x.shape}: "
            "leading axes must be equal, groups × group must be the vector's size, K at most 65536"
        )
    by_stage = jnp.moveaxis(codewords.astype(jnp.float32), -3, 0)  # [R, *lead, G, K, g]
    dtype = code_dtype((k - 1).bit_length())

    def of_chunk(x: Array) -> Array:
        x = x.astype(jnp.float32).reshape(*lead, -1, groups, group)

        def stage(residual: Array, words: Array) -> tuple[Array, Array]:
            code, _ = nearest(residual, words)
            return residual - _take(words, code), code.astype(dtype)

        _, codes = lax.scan(stage, jnp.swapaxes(x, -3, -2), by_stage)  # [R, *lead, G, n]
        return jnp.moveaxis(codes, (0, -2), (-1, -2))

    if chunk is None or chunk >= n:
        return of_chunk(x)
    count = -(-n // chunk)
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, count * chunk - n), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(*lead, count, chunk, d), -3, 0)
    codes = jnp.moveaxis(lax.map(of_chunk, chunks), 0, -4)
    return codes.reshape(*lead, count * chunk, *codes.shape[-2:])[..., :n, :, :]


def decode(
    codes: UInt[Array, "*lead n groups stages"],
    codewords: Float[Array, "*lead groups stages k g"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*lead n d"]:
    """The sum of the coded codewords; differentiable in ``codewords``.

    Args:
        codes: ``[*lead, n, groups, stages]`` as `encode` gives them.
        codewords: ``[*lead, groups, stages, K, g]``.
        dtype: of the result; sums are in float32.

    Returns:
        ``[*lead, n, groups·g]``.

    Raises:
        InputError: if the shapes do not fit.
    """
    *lead, n, groups, stages = codes.shape
    if codewords.shape[:-2] != (*lead, groups, stages):
        raise InputError(
            f"codewords of shape {codewords.shape} do not fit codes of shape {codes.shape}: "
            "leading axes, groups and stages must be equal"
        )
    by_stage = jnp.moveaxis(codewords.astype(jnp.float32), -3, 0)  # [R, *lead, G, K, g]
    codes_by_stage = jnp.swapaxes(jnp.moveaxis(codes, -1, 0), -1, -2)  # [R, *lead, G, n]

    def stage(x: Array, coded: tuple[Array, Array]) -> tuple[Array, None]:
        return x + _take(*coded), None

    first = _take(by_stage[0], codes_by_stage[0])
    x, _ = lax.scan(stage, first, (by_stage[1:], codes_by_stage[1:]))
    return jnp.swapaxes(x, -3, -2).reshape(*lead, n, -1).astype(dtype)


def _take(words: Array, code: Array) -> Array:
    """``[*lead, G, K, g]`` words and ``[*lead, G, n]`` codes to ``[*lead, G, n, g]``."""
    return jnp.take_along_axis(words, code[..., None].astype(jnp.int32), axis=-2)


def _ratio(part: Array, whole: Array) -> Array:
    return part / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def _cosine(a: Array, b: Array) -> Array:
    lengths = jnp.sqrt(jnp.sum(jnp.square(a), -1)) * jnp.sqrt(jnp.sum(jnp.square(b), -1))
    return _ratio(jnp.sum(a * b, -1), lengths)
