"""What a quantised cache looks like: rates, stages, frame, window, sinks.

Frozen and hashable, so a spec can be a static argument of ``jit`` and the metadata of a pytree.
Bits are derived from the shape of the code, never stored beside it.
"""

import dataclasses
import math
import operator
import statistics
from typing import Any, Literal, Self

import jax

from gsrq_jax.errors import InputError, at_least
from gsrq_jax.layouts import LAYOUTS, Layout, LayoutName

Frame = Literal["block", "pre", "post"]
FRAMES: tuple[Frame, ...] = ("block", "pre", "post")
MOST_BEAM = 32


def check_beam(beam: int) -> None:
    """Refuse a width that the encoder does not have.

    Raises:
        InputError: if it is not from 1 to `MOST_BEAM`.
    """
    if not 1 <= beam <= MOST_BEAM:
        raise InputError(f"beam must be from 1 (greedy) to {MOST_BEAM}, got {beam}")


def _make_whole(spec: Any, *names: str) -> None:
    """Fields as plain integers, which JSON and hashes take, whatever kind of integer was given.

    Raises:
        InputError: for what is not a whole number.
    """
    for name in names:
        given = getattr(spec, name)
        try:
            object.__setattr__(spec, name, operator.index(given))
        except TypeError:
            raise InputError(f"{name} must be a whole number, got {given!r}") from None


@dataclasses.dataclass(frozen=True)
class ResidualSpec:
    """The code of one vector: ``dim`` channels in groups of ``group``, each in ``stages`` stages.

    Attributes:
        dim: channels of a vector (head_dim).
        group: channels quantised together; divides ``dim``. ``dim`` itself is the default choice.
        stages: residual stages, each one codeword index per group.
        codewords: codewords of a stage, a power of two from 2 to 65536.
        heads: adjacent KV heads that share every code, each with codewords of its own: the vectors
            of a token in all of them are one vector to the encoder (ours). What heads have in
            common is then stored once, and attention has so many times more codes to read a head.

    Raises:
        InputError: if the numbers do not fit each other.
    """

    dim: int
    group: int
    stages: int
    codewords: int = 256
    heads: int = 1

    def __post_init__(self):
        _make_whole(self, "dim", "group", "stages", "codewords", "heads")
        if self.dim < 1 or self.group < 1 or self.dim % self.group:
            raise InputError(
                f"group {self.group} does not divide the head size {self.dim}; "
                "choose a group that does, or leave it out to quantise whole heads"
            )
        at_least(1, stages=self.stages, heads=self.heads)
        if not 2 <= self.codewords <= 65536 or self.codewords & (self.codewords - 1):
            raise InputError(
                f"codewords must be a power of two from 2 to 65536, got {self.codewords}"
            )
        if self.heads > 1 and self.groups > 1:
            raise InputError(
                f"codes of {self.heads} heads are for whole heads; leave out the group or heads"
            )

    @classmethod
    def from_bits(
        cls,
        bits: float,
        dim: int,
        *,
        codewords: int = 256,
        group: int | None = None,
        heads: int = 1,
    ) -> Self:
        """The spec with ``bits`` bits a number, or an error naming the nearest rates that exist."""
        group = dim if group is None else group
        probe = cls(dim=dim, group=group, stages=1, codewords=codewords, heads=heads)
        stages = bits / probe.bits
        if not (stages >= 1 and stages % 1 == 0):  # nan and inf fail one of the two
            low = int(stages) if 1 < stages < math.inf else 0
            nearest = " and ".join(f"{n * probe.bits:g}" for n in (low, low + 1) if n)
            raise InputError(
                f"{bits:g} bits cannot be had with {codewords} codewords on groups of "
                f"{group * heads} channels, where a stage costs {probe.bits:g} bits; "
                + (f"the nearest rates are {nearest}" if low else f"the lowest rate is {nearest}")
            )
        return dataclasses.replace(probe, stages=int(stages))

    @property
    def groups(self) -> int:
        """Channel groups of a vector."""
        return self.dim // self.group

    @property
    def code_bits(self) -> int:
        """Bits of one codeword index."""
        return self.codewords.bit_length() - 1

    @property
    def codes(self) -> int:
        """Codeword indices of one vector, over groups and stages."""
        return self.groups * self.stages

    @property
    def nbytes(self) -> int:
        """Bytes of one packed vector, of `heads` heads."""
        return -(-self.codes * self.code_bits // 8)

    @property
    def bits(self) -> float:
        """Nominal bits a number."""
        return self.stages * self.code_bits / (self.group * self.heads)

    @property
    def codebook_shape(self) -> tuple[int, int, int, int]:
        """``(groups, stages, codewords, group)``: one head's codewords."""
        return self.groups, self.stages, self.codewords, self.group


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What every quantised cache has, whatever fills it; the base of each codec's spec.

    Attributes:
        block: tokens encoded together.
        window: recent tokens that stay exact (at least; up to ``window + block - 1`` do).
        sinks: first tokens of a sequence that stay exact.

    Raises:
        InputError: if a number is too small.
    """

    block: int = 128
    window: int = 128
    sinks: int = 4

    def __post_init__(self):
        _make_whole(self, "block", "window", "sinks")
        at_least(1, block=self.block)
        at_least(0, window=self.window, sinks=self.sinks)

    @property
    def head_dim(self) -> int:
        """Channels of a key or value vector."""
        raise NotImplementedError

    @property
    def bits(self) -> float:
        """Nominal bits a number, keys and values together: codes alone."""
        raise NotImplementedError

    @property
    def ring(self) -> int:
        """Slots of the exact window."""
        return self.window + self.block

    @property
    def stored_bits(self) -> float:
        """Bits a number that coded tokens take: codes, scales and whatever else a block keeps."""
        stored = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(self.code_shapes()))
        return 8 * stored / (2 * self.block * self.head_dim)

    def code_shapes(self) -> tuple[Any, Any]:
        """What one head, or `code_heads` of them, keeps of one block of keys, and of values.

        Pytrees of ``jax.ShapeDtypeStruct``.
        """
        raise NotImplementedError

    @property
    def code_heads(self) -> tuple[int, int]:
        """KV heads that share the codes of keys, and of values."""
        return 1, 1

    @property
    def blocks_together(self) -> int:
        """Blocks of a sequence that a cache has all or none of, because they are read at once."""
        return 1


@dataclasses.dataclass(frozen=True)
class QuantSpec(CacheSpec):
    """A KV cache of residual codes.

    Attributes:
        key: the code of a key vector.
        value: the code of a value vector, of the same ``dim``.
        frame: rotary frame in which keys are quantised. ``block``: rotated by the offset inside
            its block (ours); ``pre``: before RoPE; ``post``: after RoPE, for comparison.
        beam: partial sums that the encoder keeps from stage to stage, 1 to 32; 1 is greedy.
            Codebooks are also trained with it, and serve any other.
        frame_blocks: blocks, one after the other, whose keys are rotated by their offset from the
            start of the first. A kernel has work to do for every frame, and tokens wait for their
            block to fill: several small blocks to a large frame are quick and leave few exact.
        mean_every: tokens between those, counted in a frame, at which the mean key of a head is
            rotated; what keys are centred with is interpolated between them, and rotary pairs that
            make more than half a turn meanwhile are not centred. 1 rotates it at every token. More
            is for the fused GPU kernel, which has so many times fewer products with it to read.
        outliers: coded tokens of a sequence that every layer and KV head also keeps exact: those
            whose codes err most.
        key_stages: stages of the keys of each layer where layers differ, the most of them
            ``key.stages``; None where all have that many.
        value_stages: the same of the values.
        layout: of the codes in a cache, one of `gsrq_jax.layouts.LAYOUTS`. Codebooks serve any
            that takes their codes.

    ``block``, ``window`` and ``sinks`` are those of `CacheSpec`.

    Raises:
        InputError: if the numbers do not fit each other.
    """

    key: ResidualSpec
    value: ResidualSpec
    frame: Frame = "block"
    beam: int = 1
    frame_blocks: int = 1
    mean_every: int = 1
    outliers: int = 0
    key_stages: tuple[int, ...] | None = None
    value_stages: tuple[int, ...] | None = None
    layout: LayoutName = "packed"

    def __post_init__(self):
        super().__post_init__()
        _make_whole(self, "beam", "frame_blocks", "mean_every", "outliers")
        check_beam(self.beam)
        at_least(0, outliers=self.outliers)
        if self.key.dim != self.value.dim:
            raise InputError(
                f"keys have {self.key.dim} channels and values {self.value.dim}; "
                "a head has one size for both"
            )
        if self.frame not in FRAMES:
            raise InputError(f"unknown frame {self.frame!r}; choose one of {', '.join(FRAMES)}")
        at_least(1, frame_blocks=self.frame_blocks)
        if self.mean_every < 1 or self.block % self.mean_every:
            raise InputError(
                f"mean_every must be at least 1 and divide the block of {self.block} tokens, got "
                f"{self.mean_every}"
            )
        for name in ("mean_every", "frame_blocks"):
            if getattr(self, name) > 1 and self.frame != "block":
                raise InputError(
                    f"{name} is for frame 'block'; in frame {self.frame!r} it must be 1, got "
                    f"{getattr(self, name)}"
                )
        if self.layout not in LAYOUTS:
            raise InputError(f"unknown layout {self.layout!r}; choose one of {', '.join(LAYOUTS)}")
        if (self.key_stages is None) != (self.value_stages is None):
            raise InputError("key_stages and value_stages are given together or not at all")
        if self.key_stages is not None:
            self._check_stages()
        self.arrangement.check(self)

    def _check_stages(self) -> None:
        keys, values = (tuple(map(int, x or ())) for x in (self.key_stages, self.value_stages))
        object.__setattr__(self, "key_stages", keys)
        object.__setattr__(self, "value_stages", values)
        if len(keys) != len(values):
            raise InputError(
                f"key_stages are of {len(keys)} layers and value_stages of {len(values)}; a model "
                "has one number"
            )
        for name, stages, code in (("key", keys, self.key), ("value", values, self.value)):
            if code.groups > 1:
                raise InputError("stages can differ between layers only for whole heads")
            if min(stages, default=0) < 1 or max(stages) != code.stages:
                raise InputError(
                    f"{name}_stages must be at least 1 and the most of them {name}.stages, "
                    f"{code.stages}, got {stages}"
                )

    @classmethod
    def from_bits(
        cls,
        bits: float,
        head_dim: int,
        *,
        codewords: int = 256,
        value_codewords: int | None = None,
        group: int | None = None,
        heads: int = 1,
        **fields: Any,
    ) -> Self:
        """Keys and values at ``bits`` nominal bits a number each, alike but for the codewords of a
        stage, where ``value_codewords`` is given; ``fields`` are the others."""

        def code(codewords: int) -> ResidualSpec:
            return ResidualSpec.from_bits(
                bits, head_dim, codewords=codewords, group=group, heads=heads
            )

        of_values = codewords if value_codewords is None else value_codewords
        return cls(key=code(codewords), value=code(of_values), **fields)

    @property
    def head_dim(self) -> int:
        """Channels of a key or value vector."""
        return self.key.dim

    @property
    def bits(self) -> float:
        """Nominal bits a number, keys and values together, mean over layers."""
        return sum(statistics.fmean(code.bits for code in codes) for codes in self.layer_codes) / 2

    @property
    def stored_bits(self) -> float:
        """See `CacheSpec.stored_bits`; mean over layers."""
        shared = zip(*self.layer_codes, strict=True)
        stored = statistics.fmean(
            sum(
                shape.size * shape.dtype.itemsize / (self.block * code.heads)
                for shape, code in zip(
                    self.arrangement.shapes(key, value, self.block), (key, value), strict=True
                )
            )
            for key, value in shared
        )
        return 8 * stored / (2 * self.head_dim)

    @property
    def frame_tokens(self) -> int:
        """Tokens from the start of one rotary frame to that of the next, in frame ``block``."""
        return self.block * self.frame_blocks

    @property
    def code_heads(self) -> tuple[int, int]:
        """See `CacheSpec.code_heads`."""
        return self.key.heads, self.value.heads

    @property
    def layer_codes(self) -> tuple[tuple[ResidualSpec, ...], tuple[ResidualSpec, ...]]:
        """The code of the keys, and of the values, of each layer; of one where all are alike."""

        def codes(code: ResidualSpec, stages: tuple[int, ...] | None) -> tuple[ResidualSpec, ...]:
            if stages is None:
                return (code,)
            return tuple(dataclasses.replace(code, stages=s) for s in stages)

        return codes(self.key, self.key_stages), codes(self.value, self.value_stages)

    @property
    def arrangement(self) -> Layout:
        """The layout itself, of which ``layout`` is the name."""
        return LAYOUTS[self.layout]

    @property
    def blocks_together(self) -> int:
        """See `CacheSpec.blocks_together`."""
        return self.arrangement.together(self)

    def code_shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Codes of a block, keys and values, of most stages: those of the layout."""
        return self.arrangement.shapes(self.key, self.value, self.block)

    def __str__(self) -> str:
        def code(c: ResidualSpec, by_layer: tuple[int, ...] | None) -> str:
            split = "" if c.groups == 1 else f" × {c.groups} groups"
            least = c.stages if by_layer is None else min(by_layer)
            stages = f"{c.stages}" if least == c.stages else f"{least} to {c.stages}"
            together = "" if c.heads == 1 else f" for {c.heads} heads together"
            return f"{stages} stages × {c.codewords} codewords{split}{together}"

        key, value = code(self.key, self.key_stages), code(self.value, self.value_stages)
        both = key if key == value else f"keys {key}, values {value}"
        return (
            f"{self.bits:g} bit, {both}, head {self.head_dim}, frame {self.frame}, "
            f"blocks of {self.block}, window {self.window}, sinks {self.sinks}"
            + (f", {self.frame_blocks} blocks to a frame" if self.frame_blocks > 1 else "")
            + (f", mean key at every {self.mean_every} tokens" if self.mean_every > 1 else "")
            + (f", beam {self.beam}" if self.beam > 1 else "")
            + (f", {self.outliers} outliers exact" if self.outliers else "")
            + (f", codes in {self.layout}" if self.layout != "packed" else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, for metadata; ``from_json`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The spec that ``to_json`` wrote.

        Raises:
            InputError: if a field is missing, unknown or unusable.
        """
        try:
            rest = dict(data)
            key, value = ResidualSpec(**rest.pop("key")), ResidualSpec(**rest.pop("value"))
            return cls(key=key, value=value, **rest)
        except (KeyError, TypeError) as error:
            raise InputError(f"not a quantisation spec ({error}): {data}") from error
