"""Residual codes: a vector is the sum of one codeword from each stage, in each channel group.

``x̂ = Σ_r C_r[code_r]``. Stages are fitted and encoded one after the other, each on what the ones
before it left over. Greedily a vector takes the nearest codeword of each stage; a beam keeps the
best few partial sums instead, as in faiss's ResidualQuantizer. `refit` then improves all stages
together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, UInt

from gsrq_jax import joint
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.kernels import cluster as kernels
from gsrq_jax.kernels import devices, mosaic_gpu_encode
from gsrq_jax.kmeans import (
    AxisName,
    Implementation,
    Rule,
    ShapeUpdate,
    assign,
    cell_sums,
    cluster,
    default_chunk,
    scores,
)
from gsrq_jax.packing import code_dtype
from gsrq_jax.spec import ResidualSpec, check_beam

RIDGE = 0.1  # the best of 0.01, 0.1 and 1 on held-out keys and values, 16 points a cell
CODES = "codes"  # name by which a rematerialisation policy can save what `encode` returns
MOST_UNKNOWNS = 16384  # of a refit, whose equations then take a gibibyte
_FLOATS = 2**24  # that encoding holds of scores at a time, unless told


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FitReport:
    """How well each number of stages reproduces the points it was fitted to.

    Every field is ``[*lead, groups, stages]``; entry ``r`` is for stages ``0 … r`` together, coded
    as `encode` codes with these stages alone.

    Attributes:
        error: weighted energy of the residual relative to that of the points.
        cosine: weighted mean cosine between a point and its reconstruction.
        dead: codewords of stage ``r`` alone whose cell is then empty, int32.
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
        "beam",
        "refits",
        "ridge",
        "chunk",
        "axis_name",
        "problem_axis",
        "batch_size",
        "implementation",
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
    beam: int = 1,
    refits: int = 0,
    ridge: float = RIDGE,
    chunk: int | None = None,
    axis_name: AxisName = None,
    problem_axis: AxisName = None,
    batch_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*lead groups stages k g"], FitReport]:
    """Codewords of all stages and groups, each problem of ``lead`` on its own (GSRQ, paper).

    Beam and refits are ours. With a beam, a stage is learned on what the best partial sum of the
    stages before it leaves of each point. (faiss's default is all of them: beam times the points
    and the time of clustering. The best one is what the code of so many stages leaves, and the
    refits adapt all stages to the codes that the beam ends with.)

    Args:
        rng: key.
        points: ``[*lead, n, d]``, any float type; with ``axis_name`` this device's share of them.
        spec: the code; ``spec.dim`` is ``d``.
        weights: ``[*lead, n]``, or ``[*lead, n, groups]`` where each group of a point has its own;
            not negative. What has weight 0 may hold anything.
        rule: ``gskm`` (paper), ``kmeans`` or ``spherical``; see `gsrq_jax.kmeans`. Stages of two
            codewords are fitted jointly instead, by `gsrq_jax.joint`, which makes no use of
            ``rng``, ``rule``, ``shape_update``, ``warmup``, ``ridge`` and ``implementation``.
        shape_update: for ``gskm``.
        iterations: passes over the points in each stage, after the spherical start; of two
            codewords rounds of encoding and least squares.
        warmup: passes of the spherical start; other rules than ``gskm`` spend them on their own.
        beam: of the encoder that the codewords are for, see `encode`.
        refits: times that points are coded and all stages fitted anew by `refit`. The codewords
            whose codes have the least error are returned, so refits make nothing worse.
        ridge: for `refit`.
        chunk: points handled at a time, for which ``chunk × (beam + 1) × K`` floats are held in
            each problem, and in refits ``chunk × stages × K``. None leaves it to
            `gsrq_jax.kmeans.default_chunk`, divided by the other factor.
        axis_name: mapped axis or axes over which the points are spread.
        problem_axis: mapped axis or axes over which the first axis of ``lead`` is spread.
        batch_size: problems (of ``lead`` and groups) solved together; None means all. 1 takes the
            least memory and is no slower on a CPU.
        implementation: of clustering and, without a beam, of coding; see `gsrq_jax.kmeans.kmeans`.

    Returns:
        ``[*lead, groups, stages, K, g]`` float32 codewords, and the report.

    Raises:
        InputError: if there are fewer points than codewords, the shapes do not fit, a number is
            out of range, or the rule is unknown.
    """
    *lead, n, d = points.shape
    if d != spec.dim:
        raise InputError(f"the spec is for {spec.dim} channels, but the points have {d}")
    check_beam(beam)
    at_least(1, iterations=iterations)
    if spec.codewords == 2:
        _check_joint(spec, n, refits)
    start = 1 if rule == "gskm" else 0
    at_least(start, warmup=warmup)
    at_least(0, refits=refits)
    if refits:
        _check_refit(spec.stages, spec.codewords, ridge)
    weights = _of_groups(weights, points, spec.groups).reshape(-1, n, spec.groups)
    if spec.codewords == 2:
        problem: Callable = functools.partial(
            _fit_jointly,
            spec=spec,
            beam=beam,
            rounds=iterations,
            chunk=chunk or _joint_chunk(len(weights) * spec.groups, spec.stages, beam),
            axis_name=axis_name,
        )
    else:
        problem = functools.partial(
            _fit_stages,
            spec=spec,
            beam=beam,
            refits=refits,
            ridge=ridge,
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
                implementation=implementation,
            ),
            chunk=chunk,
            implementation=implementation,
        )
    points = points.reshape(len(weights), n, spec.groups, spec.group)
    keys = _keys(rng, len(weights), spec.groups, problem_axis)

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


def _keys(rng: Array, problems: int, groups: int, axis: AxisName) -> Array:
    """``[problems, groups]`` keys of this device's problems, whatever the number of devices."""
    if axis is None:
        return jax.random.split(rng, (problems, groups))
    keys = jax.random.split(rng, (problems * lax.axis_size(axis), groups))
    return lax.dynamic_slice_in_dim(keys, problems * lax.axis_index(axis), problems)


def _fit_stages(
    rng: Array,
    points: Array,
    weights: Array,
    *,
    spec: ResidualSpec,
    beam: int,
    refits: int,
    ridge: float,
    axis_name: AxisName,
    cluster: Callable,
    chunk: int | None,
    implementation: Implementation | None,
) -> tuple[Array, FitReport]:
    """One problem: ``[n, g]`` points to ``[R, K, g]`` codewords."""

    def total(x: Array) -> Array:
        x = jnp.sum(jnp.where(weights > 0, weights * x, 0))
        return x if axis_name is None else lax.psum(x, axis_name)

    points, weights = _without_unweighted(points, weights)
    energy, weight = total(jnp.sum(jnp.square(points), -1)), total(jnp.ones_like(weights))

    def walk(steps: Array, codewords_of: Callable) -> tuple[Array, Array, FitReport]:
        """Codewords, codes ``[n, R]`` and report of all stages, those before coding the points for
        the next; ``codewords_of(step, residual)`` learns a stage or looks it up."""

        def stage(state: tuple[Array, ...], step: tuple[Array, Any]):
            number, residual, error, codes, words = step[0], *state
            centroids = codewords_of(step[1], residual)

            def extend(points: Array, residual: Array, error: Array, codes: Array):
                # Residuals of the whole beam exist in a chunk only.
                if beam > 1:
                    sums = decode(codes.reshape(-1, 1, spec.stages), words[None])
                    residuals = points[:, None] - sums.reshape(*error.shape, -1)
                else:
                    residuals = residual[:, None]
                residuals, error, parent, code = _expand(residuals, error, centroids)
                codes = jnp.take_along_axis(codes, parent[..., None], 1)
                codes = codes.at[..., number].set(code.astype(codes.dtype))
                best = jnp.argmin(error, -1)[:, None]
                residual = jnp.take_along_axis(residuals, best[..., None], 1)[:, 0]
                return residual, error, codes, jnp.take_along_axis(code, best, 1)[:, 0]

            n, d = points.shape
            if beam == 1 and kernels.fused(implementation, n, d, spec.codewords):
                code, _ = assign(residual, centroids, implementation=implementation)
                residual = residual - centroids[code]
                error = jnp.sum(jnp.square(residual), -1)[:, None]
                codes = codes.at[:, 0, number].set(code.astype(codes.dtype))
            else:
                size = chunk or max(1, default_chunk(spec.codewords) // _slots(beam))
                residual, error, codes, code = _in_chunks(
                    extend, size, points, residual, error, codes
                )
            words = words.at[number].set(centroids)
            count = cell_sums(weights[:, None], code, spec.codewords)
            report = FitReport(
                error=_ratio(total(jnp.sum(jnp.square(residual), -1)), energy),
                cosine=_ratio(total(_cosine(points, points - residual)), weight),
                dead=jnp.sum(
                    (count if axis_name is None else lax.psum(count, axis_name)) <= 0,
                    dtype=jnp.int32,
                ),
            )
            return (residual, error, codes, words), report

        error = _first_errors(points, beam)
        # Zeros made from the data vary over the same mesh axes as what replaces them.
        codes = jnp.zeros_like(error, code_dtype(spec.code_bits))
        codes = jnp.broadcast_to(codes[..., None], (*codes.shape, spec.stages))
        shape = spec.stages, spec.codewords, spec.group
        words = jnp.broadcast_to(jnp.zeros_like(energy), shape)
        (_, error, codes, words), report = lax.scan(
            stage, (points, error, codes, words), (jnp.arange(spec.stages), steps)
        )
        best = jnp.argmin(error, -1)[:, None, None]
        return words, jnp.take_along_axis(codes, best, 1)[:, 0], report

    def learn(key: Array, residual: Array) -> Array:
        return cluster(key, residual, weights=weights).centroids

    words, codes, report = walk(jax.random.split(rng, spec.stages), learn)
    if not refits:
        return words, report

    def again(state: tuple, _: None) -> tuple[tuple, None]:
        words, codes, best = state
        words = _refit(points, codes, words, weights, ridge, chunk, axis_name)
        codes, report = walk(words, lambda words, _: words)[1:]
        better = report.error[-1] < best[1].error[-1]
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (words, report), best)
        return (words, codes, best), None

    (_, _, best), _ = lax.scan(again, (words, codes, (words, report)), length=refits)
    return best


def _without_unweighted(points: Array, weights: Array) -> tuple[Array, Array]:
    """Points in float32, 0 where they weigh nothing, and weights of at least 0."""
    points = jnp.where((weights > 0)[:, None], points, 0).astype(jnp.float32)
    return points, jnp.where(weights > 0, weights, 0)


def _fit_jointly(
    _: Array,
    points: Array,
    weights: Array,
    *,
    spec: ResidualSpec,
    beam: int,
    rounds: int,
    chunk: int,
    axis_name: AxisName,
) -> tuple[Array, FitReport]:
    """One problem, by `joint.fit`, on as many of the points as are enough for the stages.

    The report is of these points, and of the first stages as they are coded with all.
    """

    def total(x: Array) -> Array:
        x = jnp.sum(weights * x, axis=-1)
        return x if axis_name is None else lax.psum(x, axis_name)

    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    stride = max(1, devices * len(points) // (joint.POINTS * spec.stages))
    points, weights = _without_unweighted(points[::stride], weights[::stride])
    words, bits = joint.fit(
        *(points, weights, spec.stages),
        rounds=rounds,
        beam=beam,
        chunk=chunk,
        axis_name=axis_name,
    )
    energy, weight = total(jnp.sum(jnp.square(points), -1)), total(jnp.ones_like(weights))

    def stage(left: Array, step: tuple[Array, Array]) -> tuple[Array, FitReport]:
        words, bit = step
        left = left - words[bit]
        found = jnp.stack([total(bit == 0), total(bit == 1)])
        return left, FitReport(
            error=_ratio(total(jnp.sum(jnp.square(left), -1)), energy),
            cosine=_ratio(total(_cosine(points, points - left)), weight),
            dead=jnp.sum(found <= 0, dtype=jnp.int32),
        )

    _, report = lax.scan(stage, points, (words, bits.T))
    return words, report


def _joint_chunk(problems: int, stages: int, beam: int) -> int:
    """Vectors of each problem that are encoded jointly at a time."""
    return max(1, 4 * _FLOATS // (problems * stages * (beam + 1)))


def _check_joint(spec: ResidualSpec, points: int, refits: int) -> None:
    if refits:
        raise InputError(
            "stages of 2 codewords are fitted together in every round; leave out refits"
        )
    if spec.stages > joint.MOST_BITS * spec.group:
        raise InputError(
            f"of 2 codewords there are at most {joint.MOST_BITS} stages a channel, got "
            f"{spec.stages} for {spec.group} channels"
        )
    if points < 2:
        raise InputError("a fit of 2 codewords a stage needs two points or more")


@functools.partial(jax.jit, static_argnames=("ridge", "chunk", "axis_name"))
def refit(
    x: Float[Array, "*lead n d"],
    codes: UInt[Array, "*lead n groups stages"],
    codewords: Float[Array, "*lead groups stages k g"],
    weights: Float[Array, "*lead n"] | Float[Array, "*lead n groups"] | None = None,
    *,
    ridge: float = RIDGE,
    chunk: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*lead groups stages k g"]:
    """All stages anew for fixed codes, by weighted least squares of each group (ours).

    Minimises ``Σ w‖x − Σ_r C_r[code_r]‖²`` plus ``ridge`` times the mean weight of a cell times the
    squared distance from the present codewords, in which codewords that no point uses stay.
    Codewords that rounding would make worse on the first sum are returned as they were.

    Args:
        x: ``[*lead, n, d]``, any float type; with ``axis_name`` this device's share of them.
        codes: ``[*lead, n, groups, stages]`` as `encode` gives them.
        codewords: ``[*lead, groups, stages, K, g]``, the present ones.
        weights: as for `fit`. What has weight 0 may hold anything.
        ridge: pull towards the present codewords, above 0. It is needed: a constant can move from
            one stage to another, so the equations without it are singular.
        chunk: vectors handled at a time, for which ``chunk × stages × K`` floats are held in each
            problem, beside ``(stages × K)²`` for its equations; None as for `fit`.
        axis_name: mapped axis or axes over which the vectors are spread.

    Returns:
        ``[*lead, groups, stages, K, g]`` float32.

    Raises:
        InputError: if the shapes do not fit, ``ridge`` is not positive, or there are more than
            16384 codewords over all stages of a group.
    """
    *lead, n, groups, stages = codes.shape
    k, group = codewords.shape[-2:]
    if (*lead, groups, stages) != codewords.shape[:-2] or (*lead, n, groups * group) != x.shape:
        raise InputError(
            f"codewords of shape {codewords.shape} do not fit codes of shape {codes.shape} for "
            f"vectors of shape {x.shape}: leading axes, vectors, groups and stages must be equal"
        )
    _check_refit(stages, k, ridge)
    weights = _of_groups(weights, x, groups)

    def of_group(x: Array, codes: Array, words: Array, weights: Array) -> Array:
        x = jnp.where((weights > 0)[:, None], x, 0).astype(jnp.float32)
        words = words.astype(jnp.float32)
        return _refit(x, codes, words, weights, ridge, chunk, axis_name)

    of_groups = jax.vmap(of_group, in_axes=(1, 1, 0, 1))
    new = jax.vmap(of_groups)(
        x.reshape(-1, n, groups, group),
        codes.reshape(-1, n, groups, stages),
        codewords.reshape(-1, *codewords.shape[-4:]),
        weights.reshape(-1, n, groups),
    )
    return new.reshape(codewords.shape)


def _refit(
    points: Array,
    codes: Array,
    words: Array,
    weights: Array,
    ridge: float,
    chunk: int | None,
    axis_name: AxisName,
) -> Array:
    """One problem: ``[n, g]`` points of codes ``[n, R]`` and ``[R, K, g]`` words to such words."""
    stages, k, group = words.shape
    chunk = chunk or default_chunk(stages * k)
    weights = jnp.where(weights > 0, weights, 0).astype(jnp.float32)

    def left_by(words: Array) -> Array:
        return points - decode(codes[:, None], words[None])

    def summed(x: Any) -> Any:
        return x if axis_name is None else lax.psum(x, axis_name)

    def objective(left: Array) -> Array:
        return summed(jnp.sum(weights * jnp.sum(jnp.square(left), -1)))

    def by_rows(sums: tuple[Array, Array], at: Array, w: Array, left: Array) -> tuple[Array, Array]:
        gram, moment = sums
        return (
            gram.at[at[:, :, None], at[:, None, :]].add(w[:, None, None]),
            moment.at[at].add((w[:, None] * left)[:, None]),
        )

    def by_product(
        sums: tuple[Array, Array], at: Array, w: Array, left: Array
    ) -> tuple[Array, Array]:
        words = jnp.arange(stages * k).reshape(stages, k)
        hot = (at[..., None] == words).astype(jnp.float32).reshape(len(w), -1)
        both = w[:, None] * jnp.concatenate([hot, left], axis=1)
        new = jnp.matmul(hot.T, both, precision=lax.Precision.HIGHEST)
        return sums[0] + new[:, : stages * k], sums[1] + new[:, stages * k :]

    def add(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        return lax.platform_dependent(sums, *part, cpu=by_rows, default=by_product), None

    left = left_by(words)
    at = codes.astype(jnp.int32) + k * jnp.arange(stages)
    zero = jnp.zeros_like(left[0, 0] + weights[0])
    sums = jnp.broadcast_to(zero, (stages * k,) * 2), jnp.broadcast_to(zero, (stages * k, group))
    sums, _ = lax.scan(add, sums, jax.tree.map(lambda x: _chunked(x, chunk), (at, weights, left)))
    gram, moment = summed(sums)
    pull = ridge * jnp.mean(jnp.diagonal(gram))
    factor = jax.scipy.linalg.cho_factor(
        gram + pull * jnp.eye(stages * k, dtype=gram.dtype), lower=True
    )
    new = words + jax.scipy.linalg.cho_solve(factor, moment).reshape(words.shape)
    return jnp.where(objective(left_by(new)) < objective(left), new, words)


def _check_refit(stages: int, codewords: int, ridge: float) -> None:
    if not ridge > 0:
        raise InputError(f"ridge must be above 0, got {ridge}")
    if stages * codewords > MOST_UNKNOWNS:
        raise InputError(
            f"{stages} stages of {codewords} codewords are too many to fit together, "
            f"{MOST_UNKNOWNS} codewords at most; take fewer or no refits"
        )


def _of_groups(weights: Array | None, points: Array, groups: int) -> Array:
    """Weights of each group of ``[*lead, n, d]`` points: ``[*lead, n, groups]``."""
    each = (*points.shape[:-1], groups)
    if weights is None:
        weights = jnp.ones(each[:-1])
    weights = weights.astype(jnp.float32)  # whatever jax_enable_x64 says
    if weights.shape not in (each, each[:-1]):
        raise InputError(
            f"weights must have the shape {each[:-1]}, one a point, or {each}, one a group of it, "
            f"got {weights.shape}"
        )
    return weights if weights.ndim == len(each) else jnp.broadcast_to(weights[..., None], each)


@functools.partial(jax.jit, static_argnames=("beam", "chunk"))
def encode(
    x: Float[Array, "*lead n d"],
    codewords: Float[Array, "*lead groups stages k g"],
    *,
    beam: int = 1,
    chunk: int | None = None,
) -> UInt[Array, "*lead n groups stages"]:
    """Codes of vectors: greedy, or the best that a beam search over the stages finds.

    Stages of two codewords are encoded jointly, see `gsrq_jax.joint.encode`. Of more codewords a
    beam keeps the ``beam`` partial sums nearest to the vector and extends each by every codeword
    of the next stage. The greedy path is followed beside it, so that no vector's code is worse
    than its greedy one. Equal distances are decided for the better partial sum, then for the
    lower codeword. On TPUs the greedy search is one kernel, and with bfloat16 codewords of 64 or
    128 channels on Hopper GPUs, too.

    Args:
        x: ``[*lead, n, d]``, any float type.
        codewords: ``[*lead, groups, stages, K, g]``, ``groups·g = d``, ``K`` at most 65536.
        beam: partial sums kept, 1 to 32; 1 is greedy: the nearest codeword of each stage in turn.
        chunk: vectors (of each lead) handled at a time, for which ``[*lead, groups, chunk, K]``
            floats are held, ``beam + 1`` times as many with a beam, and without one those of up
            to `_AHEAD` codewords. None means as many as make 64 MiB, over all leads and groups, or
            one.

    Returns:
        ``[*lead, n, groups, stages]`` uint8, or uint16 where ``K`` is above 256.

    Raises:
        InputError: if the shapes do not fit, or ``beam`` or ``chunk`` is out of range.
    """
    *lead, _, d = x.shape
    *code_lead, groups, _, k, group = codewords.shape
    if d != groups * group or lead != code_lead or k > 65536:
        raise InputError(
            f"codewords of shape {codewords.shape} cannot encode vectors of shape {x.shape}: "
            "leading axes must be equal, groups × group must be the vector's size, K at most 65536"
        )
    check_beam(beam)
    at_least(1, chunk=chunk)
    x, codewords = lax.stop_gradient((x, codewords))
    if k == 2:
        return checkpoint_name(_encode_jointly(x, codewords, beam, chunk), CODES)
    if beam == 1 and k <= 256 and devices.on_tpu():
        from gsrq_jax.kernels import mosaic_tpu_encode  # takes longer to import than all of this

        return checkpoint_name(mosaic_tpu_encode.encode(x, codewords), CODES)
    plain = functools.partial(_encode, beam=beam, chunk=chunk)
    if beam == 1 and _by_kernel(x, codewords):
        codes = kernels.either(None, mosaic_gpu_encode.encode, plain, x, codewords)
    else:
        codes = plain(x, codewords)
    return checkpoint_name(codes, CODES)


def _encode_jointly(x: Array, codewords: Array, beam: int, chunk: int | None) -> Array:
    """`encode` of two codewords a stage."""
    *lead, n, _ = x.shape
    *_, groups, stages, _, group = codewords.shape
    problems = math.prod(lead) * groups
    split = jnp.moveaxis(x.reshape(-1, n, groups, group), 2, 1).reshape(problems, n, group)
    encode = functools.partial(
        joint.encode, beam=beam, chunk=chunk or _joint_chunk(problems, stages, beam)
    )
    bits = jax.vmap(encode)(split, codewords.reshape(problems, stages, 2, group))
    return jnp.moveaxis(bits.reshape(*lead, groups, n, stages), -3, -2)


def _by_kernel(x: Array, codewords: Array) -> bool:
    """Whether a Hopper GPU's kernel is to encode these."""
    if kernels.partitioned():
        return False
    try:
        mosaic_gpu_encode.check_supported(x, codewords)
    except InputError:
        return False
    return True


def _encode(
    x: Float[Array, "*lead n d"],
    codewords: Float[Array, "*lead groups stages k g"],
    *,
    beam: int,
    chunk: int | None,
) -> UInt[Array, "*lead n groups stages"]:
    """`encode` in plain jnp."""
    *lead, _, _ = x.shape
    groups, _, k, group = codewords.shape[-4:]
    by_stage = jnp.moveaxis(codewords.astype(jnp.float32), -3, 0)  # [R, *lead, G, K, g]
    dtype = code_dtype((k - 1).bit_length())

    def of_chunk(x: Array) -> Array:
        """``[c, *lead, d]`` to ``[c, *lead, G, R]``."""
        x = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], groups, group), 0, -2)
        if beam == 1 and _stages_at_once(by_stage) > 1:
            return jnp.moveaxis(_greedy(x, by_stage, dtype), (-1, 0), (0, -1))

        def stage(state: tuple[Array, Array], words: Array):
            residuals, error, parent, code = _expand(*state, words)
            return (residuals, error), (parent.astype(jnp.uint8), code.astype(dtype))

        def back(slot: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
            parent, code = (jnp.take_along_axis(x, slot, -1) for x in step)
            return parent.astype(slot.dtype), code

        error = _first_errors(x, beam)  # [*lead, G, c, S]
        residuals = jnp.broadcast_to(x[..., None, :], (*error.shape, group))
        (_, error), (parents, codes) = lax.scan(stage, (residuals, error), by_stage)
        if beam > 1:
            best = jnp.argmin(error, -1, keepdims=True)
            _, codes = lax.scan(back, best, (parents, codes), reverse=True)
        return jnp.moveaxis(codes[..., 0], (-1, 0), (0, -1))

    if chunk is None:
        held = k * (_slots(beam) if beam > 1 else _stages_at_once(by_stage))
        chunk = max(1, _FLOATS // (math.prod(lead) * groups * held))
    codes = _in_chunks(of_chunk, chunk, jnp.moveaxis(x, -2, 0))
    return jnp.moveaxis(codes, 0, -3)


_AHEAD = 64  # codewords of stages whose scores a greedy search makes at once, but on a CPU


def _stages_at_once(by_stage: Array) -> int:
    if jax.default_backend() == "cpu":  # whose cache holds what is read again
        return 1
    return max(1, min(len(by_stage), _AHEAD // by_stage.shape[-2]))


def _greedy(
    x: Float[Array, "*lead n g"], by_stage: Float[Array, "R *lead K g"], dtype: jnp.dtype
) -> UInt[Array, "R *lead n"]:
    """Codes ``[R, *lead, n]``, the nearest codeword of each stage in turn.

    Of few codewords several stages are scored by one product. What the codewords chosen on the way
    change in the scores of those that follow are products of codewords, so that vectors are read
    and changed once for all of these stages.
    """
    stages, *lead, k, group = by_stage.shape
    ahead = _stages_at_once(by_stage)
    spare = [(0, -stages % ahead)] + [(0, 0)] * (by_stage.ndim - 1)
    together = jnp.pad(by_stage, spare).reshape(-1, ahead, *lead, k, group)

    def step(residual: Array, words: Array) -> tuple[Array, Array]:  # words [ahead, *lead, K, g]
        flat = jnp.moveaxis(words, 0, -3).reshape(*lead, ahead * k, group)
        gains = scores(residual, flat)
        exact = lax.Precision.HIGHEST
        changes = 2 * jnp.einsum("...kd,...ld->...kl", flat, flat, precision=exact)
        parts = [slice(i * k, (i + 1) * k) for i in range(ahead)]

        def row(table: Array, code: Array) -> Array:
            index = code[..., None].astype(jnp.int32)
            return jnp.take_along_axis(table, index, -2, mode="promise_in_bounds")

        codes: list[Array] = []
        for own in parts:
            gain = gains[..., own]
            for before, code in zip(parts, codes, strict=False):
                gain = gain - row(changes[..., before, own], code)
            codes.append(jnp.argmax(gain, -1).astype(dtype))
        for of_stage, code in zip(words, codes, strict=True):
            residual = residual - row(of_stage, code)
        return residual, jnp.stack(codes)

    _, codes = lax.scan(step, x, together)
    return codes.reshape(-1, *codes.shape[2:])[:stages]


# The beam: slots 0 … beam − 1 hold partial sums, best first, and one more the greedy one. (A beam
# of 1 is the greedy one alone.) A slot of infinite error holds none.


def _slots(beam: int) -> int:
    return beam + 1 if beam > 1 else 1


def _first_errors(x: Array, beam: int) -> Array:
    """``[*lead, n, S]`` squared errors of the empty sum for ``[*lead, n, g]`` vectors."""
    slot = jnp.arange(_slots(beam))
    real = (slot == 0) | (slot == len(slot) - 1)
    return jnp.where(real, jnp.sum(jnp.square(x), -1, keepdims=True), jnp.inf)


def _expand(residuals: Array, error: Array, words: Array) -> tuple[Array, Array, Array, Array]:
    """One stage of the search.

    Args:
        residuals: ``[*lead, n, S, g]`` of the sums in the slots.
        error: ``[*lead, n, S]``, their squared lengths, infinite for empty slots.
        words: ``[*lead, K, g]``.

    Returns:
        residuals and errors of the extended sums, the slot ``[*lead, n, S]`` that each extends,
        and the codeword that it adds.
    """
    *lead, n, slots, group = residuals.shape
    k, beam = words.shape[-2], slots - 1
    gain = scores(residuals.reshape(*lead, n * slots, group), words)
    gain = gain.reshape(*lead, n, slots, k)
    code = jnp.argmax(gain[..., beam:, :], -1)
    parent = jnp.full_like(code, beam)
    real = jnp.full_like(code, True, bool)
    if beam:
        distance = error[..., :beam, None] - gain[..., :beam, :]
        rows = _top_of_rows(-distance.reshape(-1, beam * k), beam)
        top, index = (x.reshape(*lead, n, beam) for x in rows)
        code = jnp.concatenate([index % k, code], -1)
        parent = jnp.concatenate([index // k, parent], -1)
        real = jnp.concatenate([top > -jnp.inf, real], -1)
    added = _take(words, code.reshape(*lead, n * slots)).reshape(residuals.shape)
    if beam:  # without one each sum extends itself, and is changed in place
        residuals = jnp.take_along_axis(residuals, parent[..., None], -2)
    residuals = residuals - added
    error = jnp.where(real, jnp.sum(jnp.square(residuals), -1), jnp.inf)
    return residuals, error, parent, code


def _top_of_rows(x: Array, k: int) -> tuple[Array, Array]:
    """``lax.top_k`` of ``[rows, n]``, with two axes under any ``vmap``.

    For more of them XLA has no kernel of its own on a GPU (TopkSpecializer), and sorts. Long rows
    are first cut down to the k parts of the largest maxima, in which the k largest entries are.
    """

    @jax.custom_batching.custom_vmap
    def top(x: Array) -> tuple[Array, Array]:
        rows, n = x.shape
        if n % _PART or n < 4 * k * _PART:
            values, index = lax.top_k(x, k)
            return values, index
        parts = x.reshape(rows, -1, _PART)
        which = jnp.sort(lax.top_k(jnp.max(parts, axis=-1), k)[1], axis=-1)
        chosen = jnp.take_along_axis(parts, which[..., None], axis=1)
        values, at = lax.top_k(chosen.reshape(rows, -1), k)
        return values, jnp.take_along_axis(which, at // _PART, axis=1) * _PART + at % _PART

    @top.def_vmap
    def of_all(
        size: int, batched: list[bool], x: Array
    ) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        values, index = top(x.reshape(-1, x.shape[-1]))
        shape = (size, -1, k)
        return (values.reshape(shape), index.reshape(shape)), (True, True)

    return top(x)


_PART = 32  # neighbours of which first only the largest is looked at


def _chunked(x: Array, chunk: int) -> Array:
    """``[chunks, at most chunk, …]`` with zeros at the end."""
    count = max(1, -(-len(x) // chunk))
    size = -(-len(x) // count)
    padding = [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])


def _in_chunks(f: Callable, chunk: int, *arrays: Array) -> Any:
    """``f(*arrays)``, row by row of their first axis, a chunk of rows at a time."""
    n = len(arrays[0])
    if chunk >= n:
        return f(*arrays)
    found = lax.map(lambda parts: f(*parts), [_chunked(x, chunk) for x in arrays])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found)


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
    if codewords.shape[-2] == 2:
        x = joint.decode(jnp.swapaxes(codes, -3, -2), codewords)  # [*lead, G, n, g]
        return jnp.swapaxes(x, -3, -2).reshape(*lead, n, -1).astype(dtype)
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
