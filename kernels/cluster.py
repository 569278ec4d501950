"""What a sweep of k-means is made of, in plain jnp, and whether a GPU has it fused.

`gsrq_jax.kernels.mosaic_gpu_cluster` has both functions as kernels for Hopper GPUs.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from gsrq_jax.kernels import mosaic_gpu_cluster
from gsrq_jax.kernels.errors import InputError

Implementation = Literal["xla", "mosaic_gpu"]


def fused(
    implementation: Implementation | None, points: int, channels: int, codewords: int
) -> bool:
    """Whether so many points can be clustered by the kernels for GPUs, and are to be.

    Args:
        implementation: ``mosaic_gpu``, the kernels, or ``xla``. None is the kernels where they can
            be had, but not where the partitioner of `jax.set_mesh` may spread the points: it does
            not know the kernels and would gather them. See `either` for what is left to decide.
        points: their number.
        channels: of each.
        codewords: their number.

    Raises:
        InputError: if the implementation is unknown, or the kernels are asked for and are not for
            such points, such a device or such a version of jax.
    """
    if implementation not in (None, *get_args(Implementation)):
        names = ", ".join(get_args(Implementation))
        raise InputError(f"unknown implementation {implementation!r}; choose one of {names}")
    if implementation == "xla" or (implementation is None and partitioned()):
        return False
    try:
        like = jax.ShapeDtypeStruct((1, points, channels), jnp.float32)
        mosaic_gpu_cluster.check_supported(like, codewords)
    except InputError:
        if implementation is None:
            return False
        raise
    return True


def partitioned() -> bool:
    """Whether arrays may be spread over axes that no `jax.shard_map` has."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def either(
    implementation: Implementation | None, kernels: Callable, plain: Callable, *arrays: Any
) -> Any:
    """What the kernels make of arrays or plain jnp does, where `fused` has said yes.

    None is the kernels in what is compiled for a GPU, for on a machine that has one a program may
    be for its CPU; that is known once it is lowered.
    """
    if implementation is None:
        return lax.platform_dependent(*arrays, cuda=kernels, default=plain)
    return kernels(*arrays)


def nearest(
    points: Float[Array, "P n d"], codewords: Float[Array, "P K d"], *, unit: bool = False
) -> tuple[Int[Array, "P n"], Float[Array, "P n"], Float[Array, "P n"]]:
    """The nearest codeword of each point, its score and the point's squared length.

    Args:
        points: float32.
        codewords: float32.
        unit: whether scores are those of the points' directions.

    Returns:
        Codes (int32), scores ``2⟨x, c⟩ − ‖c‖²`` and ``‖x‖²``.
    """
    square = jnp.sum(jnp.square(points), -1)
    if unit:
        points = points / jnp.maximum(jnp.sqrt(square), mosaic_gpu_cluster.TINY)[..., None]
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    scores = 2 * exact("pnd,pkd->pnk", points, codewords)
    scores = scores - jnp.sum(jnp.square(codewords), -1)[:, None]
    return jnp.argmax(scores, -1).astype(jnp.int32), jnp.max(scores, -1), square


def cell_sums(
    points: Float[Array, "P n d"],
    code: Int[Array, "P n"],
    factors: Float[Array, "P F n"],
    numbers: Float[Array, "P 2 n"],
    codewords: int,
) -> tuple[Float[Array, "P F K d"], Float[Array, "P 2 K"]]:
    """Sums over the cells of points times factors, and of two numbers of each point.

    Args:
        points: float32.
        code: the cell of each point, below K.
        factors: of each kind of sums.
        numbers: added up as they are.
        codewords: cells, K.
    """
    hot = (code[..., None] == jnp.arange(codewords)).astype(jnp.float32)
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    sums = exact("pfnk,pnd->pfkd", factors[..., None] * hot[:, None], points)
    return sums, exact("pnk,pfn->pfk", hot, numbers)
