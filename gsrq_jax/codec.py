"""What turns keys and values of a block into codes and back: the interface of GSRQ and its peers.

A codec is a frozen pytree of learned arrays whose only static field is its spec. One cache, one
decode loop and one harness serve all of them.
"""

import dataclasses
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsrq_jax.errors import InputError
from gsrq_jax.spec import CacheSpec

Codes = Any
"""A pytree of arrays ``[*lead, H, *shape]``, shapes and dtypes those of `CacheSpec.code_shapes`."""


class Codec(Protocol):
    """One layer's codec, or a stack of them with a leading axis of layers on every array."""

    @property
    def spec(self) -> Any:
        """The `CacheSpec` of the caches that this codec fills; static."""

    def encode(
        self,
        k: Float[Array, "*lead b H d"],
        v: Float[Array, "*lead b H d"],
        positions: Int[Array, "*lead b"],
    ) -> tuple[Codes, Codes]:
        """Codes of one block each of rotated keys and of values.

        ``b`` is ``spec.block``; ``positions`` are consecutive, the first ``spec.sinks`` plus a
        multiple of ``b``.
        """

    def decode(
        self, key_codes: Codes, value_codes: Codes, positions: Int[Array, "*lead b"]
    ) -> tuple[Float[Array, "*lead b H d"], Float[Array, "*lead b H d"]]:
        """Rotated keys and values, float32, that the codes stand for."""


C = TypeVar("C", bound=Codec)


def respec(codec: C, **fields: Any) -> C:
    """The codec for caches with another ``window``, ``beam`` or ``layout`` of codes, other
    ``sinks`` or ``outliers``.

    Raises:
        InputError: for a field that the arrays depend on, or that the spec does not have.
    """
    names = ("window", "sinks", "beam", "outliers", "layout")
    free = [f.name for f in dataclasses.fields(codec.spec) if f.name in names]
    if not fields.keys() <= set(free):
        raise InputError(
            f"only {', '.join(free)} can change after fitting here, not {', '.join(sorted(fields))}"
        )
    spec = dataclasses.replace(codec.spec, **fields)
    return dataclasses.replace(codec, spec=spec)  # type: ignore[type-var]


def remembered(
    k: Float[Array, "B T H d"], v: Float[Array, "B T H d"], codec: Codec
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H d"]]:
    """Whole sequences from position 0 as one layer's codec would remember every token.

    Sinks come back as they are. The last block is filled up with its last token. Float32.
    Outliers are not among what is told apart here: they depend on how far a cache has coded.
    """
    spec = codec.spec
    batch, tokens = k.shape[:2]
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    blocks = -(-(tokens - spec.sinks) // spec.block)
    if blocks < 1:
        return k, v
    positions = spec.sinks + jnp.arange(blocks * spec.block).reshape(blocks, spec.block)
    fill = ((0, 0), (0, spec.sinks + blocks * spec.block - tokens), (0, 0), (0, 0))

    def split(x: Array) -> Array:  # [B, T, H, d] -> [B, N, b, H, d]
        x = jnp.pad(x, fill, mode="edge")[:, spec.sinks :]
        return x.reshape(batch, blocks, spec.block, *x.shape[2:])

    positions = jnp.broadcast_to(positions, (batch, *positions.shape))
    decoded = codec.decode(*codec.encode(split(k), split(v), positions), positions)

    def join(x: Array, old: Array) -> Array:
        old = old.reshape(batch, -1, *x.shape[2:])[:, : tokens - spec.sinks]
        return jnp.concatenate([x[:, : spec.sinks], old], axis=1)

    old_k, old_v = map(join, (k, v), decoded)
    return old_k, old_v


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedSpec(CacheSpec):
    """Of a cache whose blocks hold decoded float32 numbers; ``of`` says what they went through."""

    of: CacheSpec

    @property
    def head_dim(self) -> int:
        """Channels of a key or value vector."""
        return self.of.head_dim

    @property
    def bits(self) -> float:
        """Nominal bits a number of the codec that was applied."""
        return self.of.bits

    def code_shapes(self) -> tuple[Codes, Codes]:
        """A block of float32 vectors each."""
        shape = jax.ShapeDtypeStruct((self.block, self.head_dim), jnp.float32)
        return shape, shape

    def __str__(self) -> str:
        return f"{self.of} (kept decoded)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """A codec that keeps what another one's codes decode to: the same attention, more bytes.

    For measuring quality: blocks are decoded once instead of in every step.

    Attributes:
        codec: what keys and values go through.
        spec: made by `decoded`.
    """

    codec: Any
    spec: DecodedSpec = dataclasses.field(metadata={"static": True})

    def encode(self, k: Array, v: Array, positions: Array) -> tuple[Codes, Codes]:
        """See `Codec.encode`."""
        old_k, old_v = self.codec.decode(*self.codec.encode(k, v, positions), positions)
        return jnp.swapaxes(old_k, -3, -2), jnp.swapaxes(old_v, -3, -2)

    def decode(self, key_codes: Codes, value_codes: Codes, positions: Array) -> tuple[Array, Array]:
        """See `Codec.decode`."""
        return jnp.swapaxes(key_codes, -3, -2), jnp.swapaxes(value_codes, -3, -2)


def decoded(codec: Codec) -> Decoded:
    """``codec`` for a cache that keeps decoded numbers.

    Raises:
        InputError: if its cache keeps outliers exact, for a cache of decoded numbers has none.
    """
    s = codec.spec
    if getattr(s, "outliers", 0):
        raise InputError("a cache of decoded numbers has no outliers; keep codes, or none of them")
    return Decoded(codec, DecodedSpec(of=s, block=s.block, window=s.window, sinks=s.sinks))
