"""How the codes of a block lie in a cache: one object for each layout, and the table of them.

A layout says which specs it takes, what a block of codes is, how codes come into it and out again,
and who attends to it. Where layers have stages of their own it also says what a stack stores. No
other module asks for a layout's name.

Shapes: B sequences, H KV heads (over those that share a code, where codes are meant), N blocks of b
tokens, G channel groups, R stages.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from gsrq_jax import packing
from gsrq_jax.errors import InputError
from gsrq_jax.kernels import decode, planes, tiles, words

if TYPE_CHECKING:
    from gsrq_jax.codebook import Codebooks
    from gsrq_jax.spec import QuantSpec, ResidualSpec

LayoutName = Literal["packed", "tiles", "words", "planes"]
Shapes = tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
Facts = Iterable[tuple[str, Any, tuple]]
"""What is asked of a spec, what it has, and what will do."""


class Layout:
    """What differs between layouts; an object has no state.

    Attributes:
        name: as `QuantSpec.layout` has it.
        kernel: what the kernel runs on that reads it; None where none does. With a kernel there is
            `attend`, else attention takes codes out of the layout.
        nested: whether the units of a code with fewer stages are the first of one with more.
    """

    name: LayoutName
    kernel: Literal["gpu", "tpu"] | None = None
    nested = True

    def check(self, spec: "QuantSpec") -> None:
        """Refuse a spec whose codes cannot lie like this.

        Raises:
            InputError: naming what does not fit, what would, and what was given.
        """
        for what, given, wanted in self._asked(spec):
            if given not in wanted:
                raise InputError(
                    f"layout {self.name!r} takes {' or '.join(map(str, wanted))} as {what}, got "
                    f"{given}; use layout 'packed' or other codebooks"
                )

    def _asked(self, spec: "QuantSpec") -> Facts:
        return ()

    def shapes(self, key: "ResidualSpec", value: "ResidualSpec", block: int) -> Shapes:
        """Give what the heads that share a code keep of one block of keys, and of values.

        Args:
            key: the code of a key.
            value: the code of a value.
            block: tokens.

        Returns:
            Shape and dtype of one array each.
        """
        raise NotImplementedError

    def pack(
        self,
        keys: UInt8[Array, "*lead b G R"],
        values: UInt8[Array, "*lead b G R"],
        spec: "QuantSpec",
    ) -> tuple[Array, Array]:
        """Put codeword indices into the layout.

        Args:
            keys: indices of the keys; ``b`` is any number of tokens that `check` takes as a block.
            values: indices of the values.
            spec: of the codes.

        Returns:
            Arrays ``[*lead, *shape]`` with the shapes and dtypes of `shapes`.
        """
        raise NotImplementedError

    def unpack(
        self, key_codes: Array, value_codes: Array, spec: "QuantSpec"
    ) -> tuple[UInt8[Array, "*lead b G R"], UInt8[Array, "*lead b G R"]]:
        """Take codeword indices out again: the inverse of `pack`.

        Args:
            key_codes: codes of the keys.
            value_codes: codes of the values.
            spec: of the codes.
        """
        raise NotImplementedError

    def together(self, spec: "QuantSpec") -> int:
        """Count the blocks of a sequence that a cache has all or none of, for a spec."""
        return 1

    # Stages by layer: a stack stores the units of all layers, one layer after the other.

    def units(self, code: "ResidualSpec") -> int:
        """Count the units of a layer's codes; a stack has those of all its layers."""
        raise NotImplementedError

    def to_units(self, codes: Array) -> Array:
        """Cut codes ``[*lead, *shape]`` into units ``[units, *lead, *unit]``."""
        raise NotImplementedError

    def from_units(self, units: Array) -> Array:
        """Join units again: the inverse of `to_units`."""
        raise NotImplementedError

    def restaged(
        self,
        key_codes: Array,
        value_codes: Array,
        old: tuple["ResidualSpec", "ResidualSpec"],
        new: tuple["ResidualSpec", "ResidualSpec"],
    ) -> tuple[Array, Array]:
        """Lay out codes for another number of stages, where `nested` does not make it needless.

        Args:
            key_codes: codes of the keys, ``[*lead, *shape]``.
            value_codes: codes of the values.
            old: the codes of a key and of a value as they are.
            new: those to come; stages beyond the old ones are 0, those beyond the new ones go.
        """
        raise NotImplementedError

    # Attention, where there is a kernel.

    def attend(
        self,
        query: Float[Array, "B T H q d"],
        codebooks: "Codebooks",
        key_codes: Array,
        value_codes: Array,
        blocks: Int[Array, " B"],
        **options: Any,
    ) -> decode.Part:
        """Attend with new tokens to one layer's codes, by a kernel or by its reference.

        Args:
            query: scaled queries, rotated at their own positions, float32.
            codebooks: of the layer.
            key_codes: of the cache, ``[B, H, N, *shape]``.
            value_codes: of the cache.
            blocks: valid blocks of each sequence; the others are not read.
            options: ``first``, ``stride``, ``recent``, ``dtype`` and ``implementation``, see
                `gsrq_jax.kernels.decode.attend_tiles`.

        Returns:
            Weighted values, and the log-sum-exp of the scores.

        Raises:
            InputError: if the implementation asked for does not support this.
        """
        raise NotImplementedError


class Packed(Layout):
    """A row of bytes for each token; the units of a stack are bytes of every token."""

    name = "packed"

    def shapes(self, key: "ResidualSpec", value: "ResidualSpec", block: int) -> Shapes:
        """Give two of uint8 ``[block, bytes]``."""
        of_keys, of_values = (
            jax.ShapeDtypeStruct((block, code.nbytes), jnp.uint8) for code in (key, value)
        )
        return of_keys, of_values

    def pack(self, keys: Array, values: Array, spec: "QuantSpec") -> tuple[Array, Array]:
        """See `Layout.pack`."""
        return _packed(keys, spec.key), _packed(values, spec.value)

    def unpack(
        self, key_codes: Array, value_codes: Array, spec: "QuantSpec"
    ) -> tuple[Array, Array]:
        """See `Layout.unpack`."""
        return unpacked(key_codes, spec.key), unpacked(value_codes, spec.value)

    def units(self, code: "ResidualSpec") -> int:
        """Count the bytes of a vector."""
        return code.nbytes

    def to_units(self, codes: Array) -> Array:
        """Cut ``[*lead, b, bytes]`` into ``[bytes, *lead, b]``."""
        return jnp.moveaxis(codes, -1, 0)

    def from_units(self, units: Array) -> Array:
        """Join units again: the inverse of `to_units`."""
        return jnp.moveaxis(units, 0, -1)


def _packed(codes: Array, code: "ResidualSpec") -> UInt8[Array, "*lead bytes"]:
    return packing.pack(codes.reshape(*codes.shape[:-2], code.codes), code.code_bits)


def unpacked(
    rows: UInt8[Array, "*lead bytes"], code: "ResidualSpec"
) -> UInt8[Array, "*lead groups stages"]:
    """Take codeword indices out of rows of bytes."""
    codes = packing.unpack(rows, code.codes, code.code_bits)
    return codes.reshape(*codes.shape[:-1], code.groups, code.stages)


def _of_kernels(spec: "QuantSpec") -> Facts:
    """What every kernel asks."""
    return (
        ("frame", spec.frame, ("block",)),
        ("outliers", spec.outliers, (0,)),
    )


def _of_heads_apart(spec: "QuantSpec") -> Facts:
    return (
        ("heads of a code of keys", spec.key.heads, (1,)),
        ("heads of a code of values", spec.value.heads, (1,)),
        ("stages by layer", spec.key_stages, (None,)),
    )


class Tiles(Layout):
    """As the fused GPU kernel reads them, see `gsrq_jax.kernels.tiles`."""

    name = "tiles"
    kernel = "gpu"

    def _asked(self, spec: "QuantSpec") -> Facts:
        return (
            *_of_kernels(spec),
            *_of_heads_apart(spec),
            ("groups of channels", spec.key.groups, (1,)),
            ("groups of channels", spec.value.groups, (1,)),
            ("codewords of a stage of keys", spec.key.codewords, (16, 256)),
            ("codewords of a stage of values", spec.value.codewords, (16,)),
            (f"block modulo {tiles.TILE} tokens", spec.block % tiles.TILE, (0,)),
            (
                f"block modulo {2 * tiles.TILE} tokens where several have one frame",
                spec.block % (2 * tiles.TILE) * (spec.frame_blocks > 1),
                (0,),
            ),
        )

    def shapes(self, key: "ResidualSpec", value: "ResidualSpec", block: int) -> Shapes:
        """Give two of uint32 ``[tiles, words]``."""
        of_keys, of_values = (
            jax.ShapeDtypeStruct((block // tiles.TILE, count), jnp.uint32)
            for count in (
                tiles.key_words(key.stages, key.codewords),
                tiles.value_words(value.stages),
            )
        )
        return of_keys, of_values

    def pack(self, keys: Array, values: Array, spec: "QuantSpec") -> tuple[Array, Array]:
        """See `Layout.pack`."""
        return (
            tiles.keys_to_tiles(keys[..., 0, :], spec.key.codewords),
            tiles.values_to_tiles(values[..., 0, :]),
        )

    def unpack(
        self, key_codes: Array, value_codes: Array, spec: "QuantSpec"
    ) -> tuple[Array, Array]:
        """See `Layout.unpack`."""
        keys = tiles.keys_from_tiles(key_codes, spec.key.stages, spec.key.codewords)
        values = tiles.values_from_tiles(value_codes, spec.value.stages)
        return keys[..., None, :], values[..., None, :]

    def together(self, spec: "QuantSpec") -> int:
        """Count those of a frame."""
        return spec.frame_blocks

    def attend(
        self,
        query: Array,
        codebooks: "Codebooks",
        key_codes: Array,
        value_codes: Array,
        blocks: Array,
        **options: Any,
    ) -> decode.Part:
        """See `Layout.attend`."""
        return _by_frames(
            decode.attend_tiles, query, codebooks, key_codes, value_codes, blocks, **options
        )


class Words(Layout):
    """As the fused TPU kernel reads them, see `gsrq_jax.kernels.words`."""

    name = "words"
    kernel = "tpu"

    def _asked(self, spec: "QuantSpec") -> Facts:
        some = (2, 4, 8, words.CODEWORDS)
        return (
            *_of_kernels(spec),
            *_of_heads_apart(spec),
            ("codewords of a stage of keys", spec.key.codewords, some),
            ("codewords of a stage of values", spec.value.codewords, some),
            (f"block modulo {words.LANES} tokens", spec.block % words.LANES, (0,)),
            ("blocks to a frame", spec.frame_blocks, (1,)),
        )

    def shapes(self, key: "ResidualSpec", value: "ResidualSpec", block: int) -> Shapes:
        """Give two of int32 ``[rows, 128]``."""
        runs = block // words.LANES
        of_keys, of_values = (
            jax.ShapeDtypeStruct((runs * words.words_of(code.codes), words.LANES), jnp.int32)
            for code in (key, value)
        )
        return of_keys, of_values

    def pack(self, keys: Array, values: Array, spec: "QuantSpec") -> tuple[Array, Array]:
        """See `Layout.pack`."""
        return words.to_words(keys), words.to_words(values)

    def unpack(
        self, key_codes: Array, value_codes: Array, spec: "QuantSpec"
    ) -> tuple[Array, Array]:
        """See `Layout.unpack`."""
        keys, values = (
            words.from_words(codes, code.groups, code.stages)
            for codes, code in ((key_codes, spec.key), (value_codes, spec.value))
        )
        return keys, values

    def attend(
        self,
        query: Array,
        codebooks: "Codebooks",
        key_codes: Array,
        value_codes: Array,
        blocks: Array,
        **options: Any,
    ) -> decode.Part:
        """See `Layout.attend`."""
        codes = key_codes, value_codes
        return _attended(decode.attend_words, query, codebooks, *codes, blocks, **options)


def _whole_units(stages: int) -> tuple[int, ...]:
    """The stages nearest to ``stages`` that planes take, from below and from above."""
    below = stages // planes.UNIT * planes.UNIT
    return tuple(n for n in (below, below + planes.UNIT) if n)


class Planes(Layout):
    """Codes of two codewords a stage as attention reads them, see `gsrq_jax.kernels.planes`.

    A stack by layer is ``[P, B, H, N, tiles, 32]``: a unit is 32 words of every tile. A layer of R
    stages has R / 32 units, one after the other, which are its tiles of R words as they would lie
    in a cache of that layer alone.
    """

    name = "planes"
    kernel = "gpu"
    nested = False

    def _asked(self, spec: "QuantSpec") -> Facts:
        return (
            *_of_kernels(spec),
            ("groups of channels", spec.key.groups, (1,)),
            ("groups of channels", spec.value.groups, (1,)),
            ("codewords of a stage of keys", spec.key.codewords, (2,)),
            ("codewords of a stage of values", spec.value.codewords, (2,)),
            (f"block modulo {planes.TILE} tokens", spec.block % planes.TILE, (0,)),
            *(
                (f"stages of {name}", code.stages, _whole_units(code.stages))
                for name, codes in zip(("keys", "values"), spec.layer_codes, strict=True)
                for code in codes
            ),
        )

    def shapes(self, key: "ResidualSpec", value: "ResidualSpec", block: int) -> Shapes:
        """Give two of uint32 ``[tiles, stages]``."""
        of_keys, of_values = (
            jax.ShapeDtypeStruct((block // planes.TILE, code.stages), jnp.uint32)
            for code in (key, value)
        )
        return of_keys, of_values

    def pack(self, keys: Array, values: Array, spec: "QuantSpec") -> tuple[Array, Array]:
        """See `Layout.pack`."""
        return planes.keys_to_planes(keys[..., 0, :]), planes.values_to_planes(values[..., 0, :])

    def unpack(
        self, key_codes: Array, value_codes: Array, spec: "QuantSpec"
    ) -> tuple[Array, Array]:
        """See `Layout.unpack`."""
        keys, values = planes.keys_from_planes(key_codes), planes.values_from_planes(value_codes)
        return keys[..., None, :], values[..., None, :]

    def together(self, spec: "QuantSpec") -> int:
        """Count those of a frame."""
        return spec.frame_blocks

    def units(self, code: "ResidualSpec") -> int:
        """Count the words of a tile, by 32."""
        return code.stages // planes.UNIT

    def to_units(self, codes: Array) -> Array:
        """Cut ``[*lead, tiles, stages]`` into ``[units, *lead, tiles, 32]``."""
        split = codes.reshape(*codes.shape[:-1], -1, planes.UNIT)
        return jnp.moveaxis(split, -2, 0)

    def from_units(self, units: Array) -> Array:
        """Join units again: the inverse of `to_units`."""
        codes = jnp.moveaxis(units, 0, -2)
        return codes.reshape(*codes.shape[:-2], -1)

    def restaged(
        self,
        key_codes: Array,
        value_codes: Array,
        old: tuple["ResidualSpec", "ResidualSpec"],
        new: tuple["ResidualSpec", "ResidualSpec"],
    ) -> tuple[Array, Array]:
        """See `Layout.restaged`."""
        (of_keys, of_values), (to_keys, to_values) = ([c.stages for c in x] for x in (old, new))
        if of_keys != to_keys:
            bits = planes.keys_from_planes(key_codes[..., :of_keys])
            key_codes = planes.keys_to_planes(_of_stages(bits, to_keys))
        if of_values != to_values:
            bits = planes.values_from_planes(value_codes[..., :of_values])
            value_codes = planes.values_to_planes(_of_stages(bits, to_values))
        return key_codes, value_codes

    def attend(
        self,
        query: Array,
        codebooks: "Codebooks",
        key_codes: Array,
        value_codes: Array,
        blocks: Array,
        **options: Any,
    ) -> decode.Part:
        """See `Layout.attend`."""
        return _by_frames(
            decode.attend_planes, query, codebooks, key_codes, value_codes, blocks, **options
        )


def _of_stages(bits: Array, stages: int) -> Array:
    """Cut bits to this number of stages, or add stages of zeros."""
    more = max(0, stages - bits.shape[-1])
    return jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, more)])[..., :stages]


def _attended(
    attend: Any,
    query: Array,
    codebooks: "Codebooks",
    key_codes: Array,
    value_codes: Array,
    blocks: Array,
    **options: Any,
) -> decode.Part:
    return attend(
        query,
        codebooks.key_mean,
        codebooks.inv_freq,
        key_codes,
        value_codes,
        codebooks.key,
        codebooks.value,
        blocks,
        every=codebooks.spec.mean_every,
        **options,
    )


def _by_frames(
    attend: Any,
    query: Array,
    codebooks: "Codebooks",
    key_codes: Array,
    value_codes: Array,
    blocks: Array,
    **options: Any,
) -> decode.Part:
    """`_attended` to frames of several blocks, whose tiles are one after the other."""
    fills = codebooks.spec.frame_blocks
    keys, values = (
        x.reshape(*x.shape[:2], -1, fills * x.shape[3], x.shape[4])
        for x in (key_codes, value_codes)
    )
    return _attended(attend, query, codebooks, keys, values, blocks, fills=fills, **options)


LAYOUTS: dict[LayoutName, Layout] = {x.name: x for x in (Packed(), Tiles(), Words(), Planes())}
"""Every layout, by its name."""
