"""Round to nearest on a uniform grid: int8, int4, KIVI.

A group of numbers keeps its minimum and the width of its grid, both float16, and for each number
the nearest grid point: ``x̂ = minimum + width · code`` with ``width = (maximum − minimum) / (2^b −
1)``.

KIVI ("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024, arXiv 2402.02750)
groups keys along tokens, channel by channel, and values along channels, token by token: keys have
a few channels of large size, values do not. Keys are taken after RoPE, groups are of 32 numbers, so
2 bits cost 3 with the group's two float16 numbers. Its residual of 128 exact tokens is the cache's
window. KIVI-1 is the same with one bit, which its authors report to fail.

``int8`` (one group a token and head) and ``int4`` (groups of 32 channels) round keys and values of
each token, the usual baseline.

Where this differs from KIVI's code: a group's keys are encoded with their block, not when 32 tokens
have come; sinks and window are the cache's, as for all methods.
"""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsrq_jax import packing
from gsrq_jax.codec import Codes
from gsrq_jax.errors import InputError
from gsrq_jax.spec import CacheSpec


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one kind of vector is rounded.

    Attributes:
        bits: of a number's code, 1 to 8.
        along: what the numbers of a group are: ``channels`` of a token or ``tokens`` of a channel.
        group: numbers of a group.
    """

    bits: int
    along: Literal["channels", "tokens"]
    group: int


@dataclasses.dataclass(frozen=True)
class UniformSpec(CacheSpec):
    """A cache of uniformly rounded numbers.

    Attributes:
        dim: channels of a head.
        key, value: their grids.

    ``block``, ``window`` and ``sinks`` are those of `CacheSpec`.

    Raises:
        InputError: if a grid does not fit.
    """

    dim: int
    key: Grid
    value: Grid

    def __post_init__(self):
        super().__post_init__()
        for grid in (self.key, self.value):
            if not 1 <= grid.bits <= 8:
                raise InputError(f"a grid has 1 to 8 bits, got {grid.bits}")
            if grid.along not in ("channels", "tokens"):
                raise InputError(f"groups go along channels or tokens, not {grid.along!r}")
            length = self._shape(grid)[1]
            if grid.group < 1 or length % grid.group:
                raise InputError(
                    f"groups of {grid.group} do not divide {length} {grid.along}; choose another "
                    "group or block"
                )

    @classmethod
    def rounded(
        cls, bits: float, head_dim: int, *, group: int | None = None, **fields: Any
    ) -> Self:
        """Keys and values token by token, in groups of ``group`` channels (None: the head)."""
        grid = Grid(int(bits), "channels", head_dim if group is None else group)
        return cls(head_dim, grid, grid, **fields)

    @classmethod
    def kivi(cls, bits: float, head_dim: int, *, group: int = 32, **fields: Any) -> Self:
        """KIVI: keys channel by channel, values token by token."""
        key, value = Grid(int(bits), "tokens", group), Grid(int(bits), "channels", group)
        return cls(head_dim, key, value, **fields)

    @property
    def head_dim(self) -> int:
        """Channels of a key or value vector."""
        return self.dim

    @property
    def bits(self) -> float:
        """Nominal bits a number, without the grids."""
        return (self.key.bits + self.value.bits) / 2

    def _shape(self, grid: Grid) -> tuple[int, int]:
        """Rows and the axis along which groups go."""
        return (self.dim, self.block) if grid.along == "tokens" else (self.block, self.dim)

    def code_shapes(self) -> tuple[Codes, Codes]:
        """Packed ``codes`` uint8, ``least`` and ``width`` float16; ``[rows, …]`` each."""

        def shapes(grid: Grid) -> Codes:
            rows, length = self._shape(grid)
            scale = jax.ShapeDtypeStruct((rows, length // grid.group), jnp.float16)
            packed = -(-length * grid.bits // 8)
            codes = jax.ShapeDtypeStruct((rows, packed), jnp.uint8)
            return {"codes": codes, "least": scale, "width": scale}

        return shapes(self.key), shapes(self.value)

    def __str__(self) -> str:
        def grid(g: Grid) -> str:
            return f"{g.bits} bit in groups of {g.group} {g.along}"

        both = (
            grid(self.key)
            if self.key == self.value
            else f"keys {grid(self.key)}, values {grid(self.value)}"
        )
        return (
            f"uniform, {both}, head {self.dim}, blocks of {self.block}, window {self.window}, "
            f"sinks {self.sinks}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform:
    """The codec of `UniformSpec`; it learns nothing and is the same for all layers."""

    spec: UniformSpec = dataclasses.field(metadata={"static": True})

    def encode(
        self,
        k: Float[Array, "*lead b H d"],
        v: Float[Array, "*lead b H d"],
        positions: Int[Array, "*lead b"],
    ) -> tuple[Codes, Codes]:
        """See `gsrq_jax.codec.Codec.encode`."""
        return _encode(k, self.spec.key), _encode(v, self.spec.value)

    def decode(
        self, key_codes: Codes, value_codes: Codes, positions: Int[Array, "*lead b"]
    ) -> tuple[Float[Array, "*lead b H d"], Float[Array, "*lead b H d"]]:
        """See `gsrq_jax.codec.Codec.decode`."""
        s = self.spec

        def decode(codes: Codes, grid: Grid) -> Array:
            return _decode(codes, grid, s._shape(grid)[1])

        return decode(key_codes, s.key), decode(value_codes, s.value)


def _encode(x: Array, grid: Grid) -> Codes:
    x = jnp.moveaxis(x.astype(jnp.float32), -3, -1 if grid.along == "tokens" else -2)
    groups = x.reshape(*x.shape[:-1], -1, grid.group)  # [*lead, H, rows, groups, group]
    top = 2**grid.bits - 1
    least = groups.min(-1).astype(jnp.float16)
    width = ((groups.max(-1) - least.astype(jnp.float32)) / top).astype(jnp.float16)
    low, step = (a.astype(jnp.float32)[..., None] for a in (least, width))
    codes = jnp.clip(jnp.round((groups - low) / jnp.where(step > 0, step, 1)), 0, top)
    packed = packing.pack(codes.astype(jnp.uint8).reshape(x.shape), grid.bits)
    return {"codes": packed, "least": least, "width": width}


def _decode(codes: Codes, grid: Grid, length: int) -> Array:
    numbers = packing.unpack(codes["codes"], length, grid.bits).astype(jnp.float32)
    groups = numbers.reshape(*numbers.shape[:-1], -1, grid.group)
    low, step = (codes[name].astype(jnp.float32)[..., None] for name in ("least", "width"))
    x = (low + step * groups).reshape(numbers.shape)
    return jnp.moveaxis(x, -1 if grid.along == "tokens" else -2, -3)
