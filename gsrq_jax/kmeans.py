"""Clustering of vectors into codewords: one Lloyd loop, three centroid rules.

`kmeans` is the baseline, `spherical` clusters directions, `gskm` is the paper's gain-shape k-means
(GSRQ, arXiv 2607.01065): a codeword is ``g·u`` with ``‖u‖ = 1``, the shape learned from directions
and the gain from projections, so that averaging in high dimension does not shorten codewords.

Points are read in chunks, so no array of points × codewords exists beyond a chunk, and everything
is summed in float32. All functions work under ``jit``, ``vmap``, ``pmap`` and ``shard_map``; with
``axis_name`` each device holds a share of the points and all of them end with the same centroids.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gsrq_jax.errors import InputError, at_least
from gsrq_jax.kernels import cluster as kernels
from gsrq_jax.kernels import mosaic_gpu_cluster
from gsrq_jax.kernels.cluster import Implementation
from gsrq_jax.kernels.precision import in_pieces

Rule = Literal["kmeans", "spherical", "gskm"]
ShapeUpdate = Literal["unit", "raw"]
AxisName = str | tuple[str, ...] | None
Totals = dict[str, Array]

LEAST_GAIN = 1e-4
TERMS = 4096
"""Of a sum over points, as many as are added up in one product."""
_TINY = float(jnp.finfo(jnp.float32).tiny)
_exact_dot = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KMeansResult:
    """The best iterate of a clustering, and how it came about.

    Attributes:
        centroids: ``[K, d]`` float32.
        objective: weighted mean squared error of these centroids; for `spherical` that of the
            points' directions.
        dead: cells of these centroids without any weight, int32.
        angle: weighted mean of ``1 − cos`` between a point and its centroid.
        counts: ``[K]`` weight in each cell.
        history: ``[iterations]`` objective of every iterate; ``objective`` is the least of them.
    """

    centroids: Array
    objective: Array
    dead: Array
    angle: Array
    counts: Array
    history: Array


@functools.partial(
    jax.jit,
    static_argnames=("codewords", "iterations", "chunk", "axis_name", "implementation"),
    inline=True,
)
def kmeans(
    rng: PRNGKeyArray,
    points: Float[Array, "n d"],
    codewords: int,
    weights: Float[Array, " n"] | None = None,
    *,
    init: Float[Array, "k d"] | None = None,
    iterations: int = 15,
    chunk: int | None = None,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> KMeansResult:
    """Weighted k-means: a centroid is the weighted mean of its cell.

    Args:
        rng: key of the initial draw and of what re-seeds empty cells.
        points: ``[n, d]``, any float type; with ``axis_name`` this device's share, the same number
            on every device. Points of weight 0 may hold anything, NaN too.
        codewords: centroids to find, ``K``.
        weights: ``[n]``, not negative; None means all equal.
        init: ``[K, d]`` centroids to start from; by default random points, drawn by weight.
        iterations: passes over the points, each judging an iterate and computing the next.
        chunk: points handled at a time; None leaves it to `default_chunk`.
        axis_name: mapped axis or axes over which the points are spread.
        implementation: of a pass: ``xla``, or ``mosaic_gpu`` for the kernels for Hopper GPUs
            (`gsrq_jax.kernels.mosaic_gpu_cluster`): float32 in three of the four products of
            bfloat16 pieces, by which 7 codes in a million differ; ``chunk`` does not count there,
            and there are no derivatives. None is the kernels on Hopper GPUs where they take the
            shapes (`gsrq_jax.kernels.cluster.fused`), and ``xla`` anywhere else.

    Returns:
        The best iterate.

    Raises:
        InputError: if there are more codewords than points, or shapes do not fit.
    """
    return _cluster(
        rng,
        points,
        weights,
        codewords,
        init,
        "kmeans",
        iterations,
        chunk,
        axis_name,
        implementation,
    ).result


@functools.partial(
    jax.jit,
    static_argnames=("codewords", "iterations", "chunk", "axis_name", "implementation"),
    inline=True,
)
def spherical(
    rng: PRNGKeyArray,
    points: Float[Array, "n d"],
    codewords: int,
    weights: Float[Array, " n"] | None = None,
    *,
    init: Float[Array, "k d"] | None = None,
    iterations: int = 15,
    chunk: int | None = None,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> KMeansResult:
    """Weighted k-means of directions ``x/‖x‖`` with unit centroids; zero vectors do not count.

    Arguments, result and errors are those of `kmeans`.
    """
    return _cluster(
        rng,
        points,
        weights,
        codewords,
        init,
        "spherical",
        iterations,
        chunk,
        axis_name,
        implementation,
    ).result


@functools.partial(
    jax.jit,
    static_argnames=(
        "codewords",
        "shape_update",
        "iterations",
        "warmup",
        "chunk",
        "axis_name",
        "implementation",
    ),
    inline=True,
)
def gskm(
    rng: PRNGKeyArray,
    points: Float[Array, "n d"],
    codewords: int,
    weights: Float[Array, " n"] | None = None,
    *,
    init: Float[Array, "k d"] | None = None,
    shape_update: ShapeUpdate = "unit",
    iterations: int = 10,
    warmup: int = 5,
    chunk: int | None = None,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> KMeansResult:
    """Weighted gain-shape k-means (paper): codewords ``g·u``, one gain for each codeword.

    Starts from `spherical` directions with the mean norm of each cell as gain. A shape becomes
    ``normalise(Σ w·x/‖x‖)`` over its cell, its gain the weighted mean of ``⟨x, u⟩``, at least 1e-4.

    Args:
        shape_update: ``unit`` as above (paper), or ``raw``, ``normalise(Σ w·x)`` (authors' figure
            code), which makes the fixed point that of `kmeans`.
        iterations: passes after the start.
        warmup: passes of the spherical start; not used if ``init`` is given.

    The other arguments, the result and the errors are those of `kmeans`.
    """
    rule = _gskm_rule(shape_update)
    if init is None:
        start = _cluster(
            rng,
            points,
            weights,
            codewords,
            None,
            "spherical",
            warmup,
            chunk,
            axis_name,
            implementation,
        )
        gains = start.totals["norm"] / jnp.maximum(start.totals["count"], _TINY)
        init = jnp.maximum(gains, LEAST_GAIN)[:, None] * start.result.centroids
    return _cluster(
        rng, points, weights, codewords, init, rule, iterations, chunk, axis_name, implementation
    ).result


def cluster(
    rng: PRNGKeyArray,
    points: Float[Array, "n d"],
    codewords: int,
    weights: Float[Array, " n"] | None = None,
    *,
    rule: Rule = "gskm",
    shape_update: ShapeUpdate = "unit",
    iterations: int = 10,
    warmup: int = 5,
    chunk: int | None = None,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> KMeansResult:
    """The rule's function on these points, with as many passes whatever the rule.

    ``warmup + iterations`` passes go to `kmeans` and `spherical`, which have no spherical start.

    Raises:
        InputError: if the rule is unknown, or what the rule's function raises.
    """
    options = {"chunk": chunk, "axis_name": axis_name, "implementation": implementation}
    if rule == "gskm":
        return gskm(
            rng,
            points,
            codewords,
            weights,
            shape_update=shape_update,
            iterations=iterations,
            warmup=warmup,
            **options,
        )
    if rule not in get_args(Rule):
        raise InputError(f"unknown rule {rule!r}; choose one of {', '.join(get_args(Rule))}")
    plain = kmeans if rule == "kmeans" else spherical
    return plain(rng, points, codewords, weights, iterations=warmup + iterations, **options)


def default_chunk(codewords: int) -> int:
    """Points to handle at a time, for so many codewords.

    As many as have 2 MB of scores on a CPU, whose cache then holds them, and 32 MB elsewhere: a GPU
    that is given less waits for the next kernel most of the time.
    """
    floats = 2**19 if jax.default_backend() == "cpu" else 2**23
    return max(1, floats // codewords)


def scores(
    points: Float[Array, "*lead n d"], centroids: Float[Array, "*lead k d"]
) -> Float[Array, "*lead n k"]:
    """``2⟨x, c⟩ − ‖c‖²``: the squared length of a point less its squared distance from each."""
    products = 2 * _exact_dot("...nd,...kd->...nk", points, centroids)
    return products - jnp.sum(jnp.square(centroids), -1)[..., None, :]


def nearest(
    points: Float[Array, "*lead n d"], centroids: Float[Array, "*lead k d"]
) -> tuple[Int[Array, "*lead n"], Float[Array, "*lead n"]]:
    """Index of the nearest centroid and its score (see `scores`).

    Holds ``[*lead, n, k]`` floats; `assign` is the chunked form.
    """
    found = scores(points, centroids)
    return jnp.argmax(found, -1).astype(jnp.int32), jnp.max(found, -1)


@functools.partial(jax.jit, static_argnames=("chunk", "implementation"), inline=True)
def assign(
    points: Float[Array, "n d"],
    centroids: Float[Array, "k d"],
    chunk: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Nearest centroid of each point, and the squared distance to it.

    Args:
        points: ``[n, d]``, any float type.
        centroids: ``[K, d]``.
        chunk: points handled at a time; None leaves it to `default_chunk`.
        implementation: as `kmeans` has it.

    Returns:
        ``[n]`` int32 codes and ``[n]`` float32 squared errors.

    Raises:
        InputError: if the implementation is unknown or not for these shapes or this device, or for
            a chunk below 1.
    """
    n, d = points.shape
    chunk = default_chunk(len(centroids)) if chunk is None else chunk
    at_least(1, chunk=chunk)

    def of_chunk(x: Array) -> tuple[Array, Array]:
        x = x.astype(jnp.float32)
        code, score = nearest(x, centroids.astype(jnp.float32))
        return code, jnp.maximum(jnp.sum(jnp.square(x), -1) - score, 0)

    def plain(points: Array) -> tuple[Array, Array]:
        code, error = lax.map(of_chunk, _chunks(points, chunk))
        return code.reshape(-1)[:n], error.reshape(-1)[:n]

    def fused(points: Array) -> tuple[Array, Array]:
        code, score, square = _nearest_fused(points.astype(jnp.float32), centroids)
        return code, jnp.maximum(square - score, 0)

    if kernels.fused(implementation, n, d, len(centroids)):
        return kernels.either(implementation, fused, plain, points)
    return plain(points)


def check_finite(points: Array, weights: Array | None = None, name: str = "samples") -> None:
    """Refuses NaN and infinity where they would count. Not for use inside ``jit``.

    Args:
        points: ``[..., n, d]``.
        weights: ``[..., n]``; points of weight 0 may hold anything.
        name: what the points are, for the message.

    Raises:
        InputError: naming the first bad vector, or a weight that is negative or not finite.
    """
    bad = ~jnp.isfinite(points).all(-1)
    if weights is not None:
        wrong = ~(jnp.isfinite(weights) & (weights >= 0))
        if wrong.any():
            raise InputError(
                f"the weights of {name} must be finite and not negative, but {_first(wrong)}"
            )
        bad &= weights > 0
    if bad.any():
        raise InputError(
            f"{name} hold NaN or infinity: {_first(bad)}; find where they come from, "
            "or give them weight 0"
        )


def _first(flags: Array) -> str:
    where = tuple(int(i[0]) for i in jnp.nonzero(flags, size=1))
    return f"{int(flags.sum())} of {flags.size} are bad, the first at {list(where)}"


# The loop


@dataclasses.dataclass(frozen=True)
class _Clustering:
    result: KMeansResult
    totals: Totals


def _cluster(
    rng: Array,
    points: Array,
    weights: Array | None,
    codewords: int,
    init: Array | None,
    rule: str,
    iterations: int,
    chunk: int | None,
    axis_name: AxisName,
    implementation: Implementation | None,
) -> _Clustering:
    n, d = points.shape
    chunk = default_chunk(codewords) if chunk is None else chunk
    weights = jnp.ones(n, jnp.float32) if weights is None else weights.astype(jnp.float32)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if codewords > n * devices:
        raise InputError(
            f"{codewords} codewords need as many points, got {n * devices}; "
            "give more samples or take fewer codewords"
        )
    if weights.shape != (n,):
        raise InputError(f"{n} points need {n} weights, got an array of shape {weights.shape}")
    if init is not None and init.shape != (codewords, d):
        raise InputError(f"init must have the shape {(codewords, d)}, got {init.shape}")
    if iterations < 1 or chunk < 1:
        raise InputError(f"iterations ({iterations}) and chunk ({chunk}) must be at least 1")

    counted = weights > 0
    points = jnp.where(counted[:, None], points, 0)
    weights = jnp.where(counted, weights, 0)
    chunks = _chunks(points, chunk), _chunks(weights, chunk)

    def plain(centroids: Array) -> tuple[Totals, Array]:
        totals, mass = _sweep(chunks, centroids, rule)
        return totals, mass[:n]

    sweep: Callable[[Array], tuple[Totals, Array]] = plain
    if kernels.fused(implementation, n, d, codewords):
        more = -n % mosaic_gpu_cluster.EIGHT
        eights = jnp.pad(points.astype(jnp.float32), ((0, more), (0, 0)))
        padded = jnp.pad(weights, (0, more))

        def fused(centroids: Array) -> tuple[Totals, Array]:
            totals, mass = _fused_sweep(eights, padded, centroids, rule)
            return totals, mass[:n]

        sweep = functools.partial(kernels.either, implementation, fused, plain)

    # One draw of noise serves the start and every re-seeding, for what is drawn changes with the
    # errors. It depends on a point's place among all devices' points, not on how many they are.
    first = 0 if axis_name is None else n * lax.axis_index(axis_name)
    noise = jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(rng, i), dtype=jnp.float32))(
        first + jnp.arange(n)
    )

    def draw(mass: Array, wanted: Array | None = None) -> Array:
        scores = jnp.log(mass) + noise
        return _project(_top_points(scores, points, codewords, axis_name, wanted), rule)

    start = draw(weights) if init is None else _project(init.astype(jnp.float32), rule)
    nothing = jnp.zeros_like(start[:, 0])
    best = {
        "centroids": start,
        "objective": jnp.full_like(start[0, 0], jnp.inf),
        "angle": jnp.zeros_like(start[0, 0]),
        "count": nothing,
        "norm": nothing,
    }

    def iterate(carry: tuple[Array, Totals], _: None) -> tuple[tuple[Array, Totals], Array]:
        centroids, best = carry
        totals, mass = sweep(centroids)
        if axis_name is not None:
            totals = lax.psum(totals, axis_name)
        weight = jnp.maximum(totals["count"].sum(), _TINY)
        here = {
            "centroids": centroids,
            "objective": totals["error"] / weight,
            "angle": totals["angle"] / weight,
            "count": totals["count"],
            "norm": totals["norm"],
        }
        # Written so that NaN is taken, and seen.
        better = ~(here["objective"] >= best["objective"])
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), here, best)

        dead = totals["count"] <= 0
        seeds = draw(mass, dead.sum())[jnp.cumsum(dead) - 1]
        centroids = jnp.where(dead[:, None], seeds, _update(totals, centroids, rule))
        return (centroids, best), here["objective"]

    (_, best), history = lax.scan(iterate, (start, best), length=iterations)
    result = KMeansResult(
        centroids=best["centroids"],
        objective=best["objective"],
        dead=jnp.sum(best["count"] <= 0, dtype=jnp.int32),
        angle=best["angle"],
        counts=best["count"],
        history=history,
    )
    return _Clustering(result, best)


def _sweep(chunks: tuple[Array, Array], centroids: Array, rule: str) -> tuple[Totals, Array]:
    """Sums over the cells, and the weighted error of each point; those beyond the last are 0."""
    k, d = centroids.shape
    summed = _summed(rule)

    def add(totals: Totals, chunk: tuple[Array, Array]) -> tuple[Totals, Array]:
        x, w = chunk
        x = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(x), -1))
        direction = x / jnp.maximum(norm, _TINY)[:, None]
        size = norm
        if rule == "spherical":
            w, x, size = jnp.where(norm > 0, w, 0), direction, jnp.ones_like(norm)
        code, score = nearest(x, centroids)
        error, angle = _fit_of(w, size, score, code, centroids)
        vectors = {"point": x, "direction": direction}
        each = [vectors[name] for name in summed] + [norm[:, None], jnp.ones_like(x[:, :1])]
        *sums, norm, count = jnp.split(
            cell_sums(w[:, None] * jnp.concatenate(each, 1), code, k),
            [*range(d, len(summed) * d + 1, d), len(summed) * d + 1],
            axis=1,
        )
        new = dict(zip(summed, sums, strict=True)) | {
            "norm": norm[:, 0],
            "count": count[:, 0],
            "error": error.sum(),
            "angle": angle.sum(),
        }
        return jax.tree.map(jnp.add, totals, new), error

    x, w = chunks
    # Zeros made from the data vary over the same mesh axes as what is added to them.
    zero = jnp.zeros_like(x[0, 0, 0], jnp.float32) + jnp.zeros_like(w[0, 0])
    shapes = {name: (k, d) for name in summed} | {"norm": (k,), "count": (k,)}
    zeros = {name: jnp.broadcast_to(zero, shape) for name, shape in shapes.items()}
    totals, error = lax.scan(add, zeros | {"error": zero, "angle": zero}, chunks)
    return totals, error.reshape(-1)


def _fused_sweep(
    points: Array, weights: Array, centroids: Array, rule: str
) -> tuple[Totals, Array]:
    """`_sweep` by the kernels for GPUs."""
    unit, summed = rule == "spherical", _summed(rule)
    code, score, square = _nearest_fused(points, centroids, unit=unit)
    norm = jnp.sqrt(square)
    if unit:
        weights = jnp.where(norm > 0, weights, 0)
    size = jnp.ones_like(norm) if unit else norm
    error, angle = _fit_of(weights, size, score, code, centroids)
    factors = {"point": weights, "direction": weights / jnp.maximum(norm, _TINY)}
    sums, numbers = mosaic_gpu_cluster.cell_sums(
        points[None],
        code[None],
        jnp.stack([factors[name] for name in summed])[None],
        jnp.stack([weights * norm, weights])[None],
        len(centroids),
    )
    totals = dict(zip(summed, sums[0], strict=True)) | {
        "norm": numbers[0, 0],
        "count": numbers[0, 1],
        "error": error.sum(),
        "angle": angle.sum(),
    }
    return totals, error


def _nearest_fused(
    points: Array, centroids: Array, unit: bool = False
) -> tuple[Array, Array, Array]:
    """Codes, scores and squared lengths of one problem's points."""
    found = mosaic_gpu_cluster.nearest(points[None], centroids.astype(jnp.float32)[None], unit=unit)
    code, score, square = (x[0] for x in found)
    return code, score, square


def _fit_of(
    weights: Array, size: Array, score: Array, code: Array, centroids: Array
) -> tuple[Array, Array]:
    """Weighted squared error and ``1 − cos`` of points of these lengths; 0 where one of them is."""
    error = weights * jnp.maximum(size * size - score, 0)
    reach = jnp.sqrt(jnp.sum(jnp.square(centroids), -1))[code]
    product = 2 * size * reach
    cosine = (score + reach * reach) / jnp.maximum(product, _TINY)
    return error, jnp.where(product > 0, weights * (1 - cosine), 0)


def _summed(rule: str) -> tuple[str, ...]:
    """The vectors whose sums over the cells make the rule's centroids."""
    if rule == "gskm-unit":
        return "point", "direction"
    return ("direction",) if rule == "spherical" else ("point",)


def _update(totals: Totals, centroids: Array, rule: str) -> Array:
    """The next centroids; those of empty cells mean nothing."""
    if rule != "spherical":
        mean = totals["point"] / jnp.maximum(totals["count"], _TINY)[:, None]
    if rule == "kmeans":
        return mean
    shape = _unit(totals["point"] if rule == "gskm-raw" else totals["direction"])
    # Directions that cancel exactly leave a cell the shape that it had.
    shape = jnp.where(jnp.any(shape != 0, -1, keepdims=True), shape, _unit(centroids))
    if rule == "spherical":
        return shape
    gain = jnp.sum(mean * shape, -1, keepdims=True)
    return jnp.maximum(gain, LEAST_GAIN) * shape


def _project(x: Array, rule: str) -> Array:
    """Points as centroids of the rule."""
    if rule == "kmeans":
        return x
    shape = _unit(x)
    if rule == "spherical":
        return shape
    return jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True)), LEAST_GAIN) * shape


def _gskm_rule(shape_update: str) -> str:
    if shape_update not in get_args(ShapeUpdate):
        raise InputError(f"unknown shape_update {shape_update!r}; choose unit or raw")
    return f"gskm-{shape_update}"


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True)), _TINY)


def cell_sums(values: Array, code: Array, k: int) -> Array:
    """``[k, f]`` sums of ``[n, f]`` rows by code. Only the CPU is fast at adding row by row, and
    only there is the order of the additions fixed. Elsewhere they are a product with one-hots,
    which bfloat16 holds exactly as it holds a float32 in three pieces: `TERMS` terms at a time,
    beside each other, for of ``k × 3f`` numbers alone a GPU makes less than it can do at once."""

    def by_rows(values: Array, code: Array) -> Array:
        return jax.ops.segment_sum(values, code, k)

    def by_product(values: Array, code: Array) -> Array:
        n, f = values.shape
        parts = max(1, -(-n // TERMS))
        more = -n % parts
        values = jnp.pad(values, ((0, more), (0, 0))).reshape(parts, -1, f)
        code = jnp.pad(code, (0, more), constant_values=k).reshape(parts, 1, -1)
        one_hot = (code == jnp.arange(k)[:, None]).astype(jnp.bfloat16)
        pieces = jnp.concatenate(in_pieces(values, 3, jnp.bfloat16), axis=-1)
        sums = jnp.matmul(one_hot, pieces, preferred_element_type=jnp.float32)
        return sums.reshape(parts, k, 3, f).sum(axis=(0, 2))

    return lax.platform_dependent(values, code, cpu=by_rows, default=by_product)


def _chunks(x: Array, chunk: int) -> Array:
    """``[chunks, size, ...]`` with zeros at the end."""
    n = x.shape[0]
    count = -(-n // chunk)
    size = -(-n // count)
    padding = [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])


def _top_points(
    scores: Array, points: Array, k: int, axis_name: AxisName, wanted: Array | None
) -> Array:
    """``[k, d]`` float32 points of the highest scores over all devices, best first.

    Where only fewer have a score above −∞, the best one fills the rest. With ``wanted`` those after
    so many may be any.
    """
    top, index = _top(scores, min(k, len(scores)), wanted)
    if axis_name is None:
        rows = points[index].astype(jnp.float32)
    else:
        share = len(index)
        top, slot = lax.top_k(lax.all_gather(top, axis_name, tiled=True), k)
        mine = slot // share == lax.axis_index(axis_name)
        rows = points[index[slot % share]].astype(jnp.float32)
        # Flags are numbers like the rows, so that one exchange has both.
        rows, top = lax.psum(
            (jnp.where(mine[:, None], rows, 0), (mine & jnp.isfinite(top)).astype(jnp.float32)),
            axis_name,
        )
        return jnp.where(top[:, None] > 0, rows, rows[0])
    return jnp.where(jnp.isfinite(top)[:, None], rows, rows[0])


def _top(scores: Array, k: int, wanted: Array | None) -> tuple[Array, Array]:
    """The k highest scores and where they are, or with ``wanted`` at least so many."""
    if wanted is None:
        return lax.top_k(scores, k)

    def by_sorting(scores: Array, _: Array) -> tuple[Array, Array]:
        top, index = lax.top_k(scores, k)
        return top, index

    one_by_one = functools.partial(_top_one_by_one, k)
    return lax.platform_dependent(scores, wanted, cuda=one_by_one, default=by_sorting)


def _top_one_by_one(k: int, scores: Array, wanted: Array) -> tuple[Array, Array]:
    """`_top` by one pass for each that is wanted; what comes after them is −∞.

    For more than a few XLA sorts all scores on a GPU, which takes longer than the rest of a fused
    pass. Few or none are wanted: cells seldom die.
    """
    place = jnp.arange(len(scores))
    State = tuple[Array, Array, Array, Array, Array]

    def find(state: State) -> State:
        found, last, at, top, index = state
        left = (scores < last) | ((scores == last) & (place > at))
        at = jnp.argmax(jnp.where(left, scores, -jnp.inf)).astype(jnp.int32)
        last = jnp.where(left[at], scores[at], -jnp.inf)
        return found + 1, last, at, top.at[found].set(last), index.at[found].set(at)

    # Made from the scores, so that they vary over the same mesh axes.
    last, at = jnp.full_like(scores[0], jnp.inf), jnp.full_like(scores[0], -1, jnp.int32)
    top, index = jnp.broadcast_to(-last, k), jnp.broadcast_to(at + 1, k)
    most, start = jnp.minimum(wanted, k), jnp.zeros_like(wanted)
    done = lax.while_loop(lambda state: state[0] < most, find, (start, last, at, top, index))
    return done[3], done[4]
