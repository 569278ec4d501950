"""Attention over codes in a kernel's layout by whatever can do it here."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, UInt32

from gsrq_jax.kernels import devices, mosaic_gpu, mosaic_gpu_planes, mosaic_gpu_recent, reference
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.reference import Recent

Implementation = Literal["fused", "reference"]
Part = tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]
Parts = tuple[Float[Array, "P B T H q d"], Float[Array, "P B T H q"]]


def attend_tiles(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_tiles: UInt32[Array, "B H N tiles kw"],
    value_tiles: UInt32[Array, "B H N tiles vw"],
    key_codewords: Float[Array, "H 1 R K d"],
    value_codewords: Float[Array, "H 1 S 16 d"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
    fills: int = 1,
    recent: Recent | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> Part:
    """`gsrq_jax.kernels.reference.attend_tiles`, by the implementation of that name.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None is one of zeros.
        inv_freq: rotary frequencies.
        key_tiles: see `gsrq_jax.kernels.tiles.keys_to_tiles`.
        value_tiles: see `gsrq_jax.kernels.tiles.values_to_tiles`.
        key_codewords: of this layer.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
        recent: exact tokens in the same softmax; what is returned is all of it.
        dtype: of the values that are returned.
        implementation: ``fused``, the GPU kernel, or ``reference``, plain jnp. None takes the
            kernel where it is supported, and else the reference with a warning that says why,
            once for each reason.

    Raises:
        InputError: if the implementation asked for is unknown or does not support this.
    """
    arrays = (query, mean, inv_freq, key_tiles, value_tiles, key_codewords, value_codewords, blocks)
    return _by(
        implementation,
        functools.partial(
            mosaic_gpu.check_supported, *arrays, stride=stride, every=every, fills=fills
        ),
        functools.partial(mosaic_gpu.attend_tiles, *arrays, recent=recent, dtype=dtype),
        _with(query, recent, dtype, functools.partial(reference.attend_tiles, *arrays)),
        {"first": first, "stride": stride, "every": every, "fills": fills},
    )


def attend_planes(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_planes: UInt32[Array, "B H/s N tiles R"],
    value_planes: UInt32[Array, "B H/s N tiles S"],
    key_codewords: Float[Array, "H 1 R 2 d"],
    value_codewords: Float[Array, "H 1 S 2 d"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
    fills: int = 1,
    recent: Recent | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> Part:
    """Attend as `gsrq_jax.kernels.reference.attend_planes` does, by one implementation or another.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None is one of zeros.
        inv_freq: rotary frequencies.
        key_planes: see `gsrq_jax.kernels.planes.keys_to_planes`.
        value_planes: see `gsrq_jax.kernels.planes.values_to_planes`.
        key_codewords: of this layer.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
        recent: exact tokens in the same softmax; what is returned is all of it.
        dtype: of the values that are returned.
        implementation: ``fused``, the GPU kernel, or ``reference``, plain jnp. None takes the
            kernel where it is supported, and else the reference with a warning that says why,
            once for each reason.

    Returns:
        The softmax-weighted values (0 where there are none) and the log-sum-exp of the scores
        (-inf there).

    Raises:
        InputError: if the implementation asked for is unknown or does not support this.
    """
    arrays = query, mean, inv_freq, key_planes, value_planes, key_codewords, value_codewords, blocks
    how = {"stride": stride, "every": every, "fills": fills}
    plain = _with(query, recent, dtype, functools.partial(reference.attend_planes, *arrays))
    if devices.on_tpu():
        from gsrq_jax.kernels import mosaic_tpu_planes  # takes as long to import as all the rest

        check = functools.partial(
            mosaic_tpu_planes.check_supported, query, key_planes, value_planes
        )
        kernel = functools.partial(mosaic_tpu_planes.attend_planes, *arrays)
        return _by(
            implementation,
            check,
            _with(query, recent, dtype, kernel),
            plain,
            {"first": first, **how},
        )
    return _by(
        implementation,
        functools.partial(mosaic_gpu_planes.check_supported, *arrays, **how),
        functools.partial(mosaic_gpu_planes.attend_planes, *arrays, recent=recent, dtype=dtype),
        plain,
        {"first": first, **how},
    )


def attend_words(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_words: Int32[Array, "B H N n 128"],
    value_words: Int32[Array, "B H N m 128"],
    key_codewords: Float[Array, "H G R K g"],
    value_codewords: Float[Array, "H G R K g"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
    recent: Recent | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> Part:
    """The same over codes in the TPU kernel's layout, see `gsrq_jax.kernels.words`."""
    from gsrq_jax.kernels import mosaic_tpu  # takes as long to import as all the rest

    arrays = (query, mean, inv_freq, key_words, value_words, key_codewords, value_codewords, blocks)
    return _by(
        implementation,
        functools.partial(mosaic_tpu.check_supported, query, *arrays[3:7]),
        _with(query, recent, dtype, functools.partial(mosaic_tpu.attend_words, *arrays)),
        _with(query, recent, dtype, functools.partial(reference.attend_words, *arrays)),
        {"first": first, "stride": stride, "every": every},
    )


def attend_recent(
    query: Float[Array, "B T H q d"],
    recent: Recent,
    *,
    implementation: Implementation | None = None,
) -> Parts:
    """`gsrq_jax.kernels.reference.attend_recent`, in P parts.

    Args:
        query: scaled queries, float32.
        recent: keys and values.
        implementation: ``fused``, the GPU kernel, or ``reference``, plain jnp. None takes the
            kernel where it is supported, and else, silently, the reference.

    Raises:
        InputError: if the implementation asked for is unknown or does not support this.
    """
    if implementation is None:
        implementation = "fused" if mosaic_gpu_recent.supported(query, recent) else "reference"
    return _by(
        implementation,
        lambda: None,
        functools.partial(mosaic_gpu_recent.attend_recent, query, recent),
        functools.partial(reference.attend_recent, query, recent),
        {},
    )


def _with(
    query: Array, recent: Recent | None, dtype: DTypeLike, part: Callable[..., Part]
) -> Callable[..., Part]:
    """``part`` and the exact tokens in one softmax."""

    def both(**where: Any) -> Part:
        beside = recent and reference.attend_recent(query, recent)
        return reference.with_beside(part(**where), beside, dtype)

    return both


def _by(
    implementation: Implementation | None,
    check: Callable[[], Any],
    fused: Callable[..., Part],
    plain: Callable[..., Part],
    where: dict[str, Any],
) -> Part:
    match implementation:
        case "fused":
            return fused(**where)
        case "reference":
            return plain(**where)
        case None:
            try:
                check()
            except InputError as error:
                _say(str(error))
                return plain(**where)
            return fused(**where)
    raise InputError(f"unknown implementation {implementation!r}; choose 'fused' or 'reference'")


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"{reason} (the reference is used)", stacklevel=4)
