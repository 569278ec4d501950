"""Decode attention over codes, fused, on Hopper GPUs: Pallas Mosaic GPU (ours).

One thread block takes four query rows of one KV head and one part of its blocks of tokens. First
all warps make products of these rows with codewords and mean key (`mosaic_gpu_products`). Then
eight warps *score*: each goes through blocks of its own, makes the block's table in shared memory,
looks up 256 tokens at a time, and puts their probabilities, as bit planes, into its slots of a
ring. Eight warps *count*: all of them go through the slots and add up, by binary products, how much
probability falls on each value code; before, they attend to what is exact (`mosaic_gpu_recent`).
Histogram × codebook, once the parts are put together, is the output.
docs/kernels.md explains it with a picture; `gsrq_jax.kernels.pieces` has the steps.

What goes in is `gsrq_jax.kernels.reference.attend_tiles`'s: B sequences, T query tokens, H KV
heads, q query heads each, N blocks of b tokens. A *pair* is (KV head, sequence, four rows).
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from gsrq_jax.kernels import (
    devices,
    mosaic_gpu_products,
    mosaic_gpu_recent,
    pieces,
    reference,
    rotary,
)
from gsrq_jax.kernels.devices import PROCESSORS
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.pieces import CHUNK, COUNTERS, GROUPS, LN2, ROWS, KeyTable
from gsrq_jax.kernels.precision import in_pieces
from gsrq_jax.kernels.reference import Recent, with_beside
from gsrq_jax.kernels.tiles import TILE, key_words, strips, value_words

SHARED_BYTES = 227 * 1024 - 2048
"""Shared memory of a thread block on sm_90, less what Mosaic takes."""
MOST_STAGES = 64
KNOTS = (1, 4, 8, 16, 32, 64)
"""Tokens between knots of the mean key's share."""
EMPTY = -(2**30)
"""Scale of a part without tokens."""
MOST_QUERY = 2.0**14
"""Bound of a query's numbers, so that float16 holds them in any frame."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a thread block is laid out.

    Attributes:
        scorers: warps that score, 4 or 8.
        depth: slots of the ring for each of them.
        splits: thread blocks that share the blocks of a sequence.
        span: chunks of one block that a scorer takes one after the other, with one table.
        buffers: chunks of keys that are on their way to each of them, 1 or 2.
    """

    scorers: int
    depth: int
    splits: int
    span: int
    buffers: int = 1

    def teams(self, value_stages: int) -> int:
        """Teams of counters, each of one warp an octet of stages, that share the scorers' slots."""
        return min(self.scorers, COUNTERS // pieces.octets_of(value_stages))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call."""

    batch: int
    tokens: int
    heads: int  # KV heads
    group: int  # query heads of each
    blocks: int  # that a sequence can hold
    block: int  # tokens of one
    dim: int
    key: KeyTable
    value_stages: int
    every: int  # tokens between knots of the mean key's share, 0 if there is no mean key
    stride: int = 1  # blocks of the sequence from one of these to the next
    fills: int = 1  # equal parts of a block that are valid one by one
    short_words: bool = True  # whether codewords of keys are bfloat16; else they become float16
    recent: mosaic_gpu_recent.Problem | None = None  # exact tokens that the kernel has, too

    @property
    def value_codewords(self) -> int:
        """Of a stage of values."""
        return 16

    @property
    def row_groups(self) -> int:
        """Groups of four query rows of a KV head."""
        return -(-self.tokens * self.group // ROWS)

    @property
    def pairs(self) -> int:
        """(KV head, sequence, group of rows)."""
        return self.heads * self.batch * self.row_groups

    @property
    def chunks_of_block(self) -> int:
        """Chunks of a block, 1 if it is half a chunk."""
        return max(1, self.block // CHUNK)

    @property
    def blocks_of_chunk(self) -> int:
        """2 if a block is half a chunk, else 1."""
        return max(1, CHUNK // self.block)

    @property
    def knots(self) -> int:
        """Of a chunk; the first of the next one is its last."""
        return CHUNK // self.every if self.every else 0

    @property
    def frame_knots(self) -> int:
        """Of a block; the first of the next one is its last."""
        return self.block // self.every if self.every else 0

    @property
    def unit_knots(self) -> int:
        """Of a row, of a block or of the two of a chunk, with what is copied after them."""
        return max(self.block, CHUNK) // self.every + self.copied_knots - self.knots

    @property
    def copied_knots(self) -> int:
        """Of a row and chunk, what is copied: a multiple of 16 bytes."""
        return self.knots + 4 * (self.every > 1)

    @property
    def share_units(self) -> int:
        """Blocks, or chunks of two blocks."""
        return -(-self.blocks // self.blocks_of_chunk)

    @property
    def chunk_key_bytes(self) -> int:
        """Codes of the keys of a chunk."""
        return 2 * 4 * key_words(self.key.stages, self.key.codewords)

    @property
    def chunk_value_bytes(self) -> int:
        """Codes of the values of a chunk."""
        return 2 * 4 * value_words(self.value_stages)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Shared memory of a thread block: offsets in bytes from a multiple of 4096.

    Attributes:
        tables: of the scorers, a multiple of 4096 each.
        staged: of the chunks that a scorer is at and waits for, codes and the mean key's share as
            it is copied.
        knots: of the chunk that a scorer is at, the mean key's share knot by knot.
        slots: of the ring: planes of probabilities, then codes of values.
        facts: step and offset of each row, for each scorer.
        scales: of each slot, four integers.
        recent: of the warps that count, for exact tokens.
        arrived, full, free: barriers of each scorer's staged chunks and of each slot.
        nbytes: all of it, with what alignment may take.
    """

    tables: int
    staged: int
    knots: int
    slots: int
    facts: int
    scales: int
    recent: int
    arrived: int
    full: int
    free: int
    nbytes: int
    table_bytes: int
    staged_bytes: int
    knot_bytes: int
    slot_bytes: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> "Memory":
        """Laid out one after the other."""
        scorers, ring = config.scorers, config.scorers * config.depth
        chunks = scorers * config.buffers
        table = problem.key.nbytes if problem.key.shared else 0
        staged = problem.chunk_key_bytes + ROWS * problem.copied_knots * 4
        knots = pieces.knot_bytes(problem.every, CHUNK) if problem.every > 1 else 0
        slot = pieces.plane_bytes() + problem.chunk_value_bytes
        sizes = {
            "tables": scorers * table,
            "staged": chunks * staged,
            "knots": scorers * knots,
            "slots": ring * slot,
            "facts": scorers * 2 * ROWS * 4,
            "scales": ring * ROWS * 4,
            "recent": problem.recent.nbytes(COUNTERS) if problem.recent else 0,
            "arrived": chunks * 8,
            "full": ring * 8,
            "free": ring * 8,
        }
        starts = {}
        end = 0
        for name, size in sizes.items():
            if name == "arrived":  # what products are made of lies before, where the rest will be
                end = max(end, mosaic_gpu_products.Layout(problem, end).tile_bytes)
            starts[name] = end
            end += size
        return cls(
            **starts,
            nbytes=end + 4096,
            table_bytes=table,
            staged_bytes=staged,
            knot_bytes=knots,
            slot_bytes=slot,
        )


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a layout is chosen by: as estimated here, or as measured on a device (`tuned`).

    Attributes:
        scorers, depth, buffers: of the layout that is tried first.
        table_time: of a table, in chunks that all scorers take at once.
        start_time: of starting and ending a thread block, likewise.
    """

    scorers: int = 8
    depth: int = 2
    buffers: int = 1
    table_time: float = 0.3
    start_time: float = 1.5

    def time(self, work: tuple[float, int, int]) -> float:
        """Of `work`, in chunks."""
        chunks, tables, starts = work
        return chunks + self.table_time * tables + self.start_time * starts


TUNED = "tuned.json"
"""File beside this one, made by ``benchmarks/tune_decode.py --save``: by the device's name, what it
was made with, and for each rate the fields of `Tuning`."""


def rate_of(problem: Problem) -> dict[str, int]:
    """The numbers of a problem that tuning is kept for."""
    p = problem
    return {
        "dim": p.dim,
        "key_stages": p.key.stages,
        "key_codewords": p.key.codewords,
        "value_stages": p.value_stages,
    }


def tuned(problem: Problem) -> Tuning:
    """What was measured for its rate on the device that programs are for, or the estimates."""
    rates = _tuned().get(devices.device().device_kind, {}).get("rates", [])
    rate = rate_of(problem)
    for row in rates:
        if all(row[name] == x for name, x in rate.items()):
            return Tuning(**{f.name: row[f.name] for f in dataclasses.fields(Tuning)})
    return Tuning()


@functools.cache
def _tuned() -> dict[str, Any]:
    return json.loads((pathlib.Path(__file__).parent / TUNED).read_text(encoding="utf-8"))


LEAST = 0.4
"""Time of a chunk that only one scorer takes, in those of chunks that all take at once: on an H200
at (1, 8k) and 1 bit a thread block with two chunks takes 12.5 µs, one with eight 16.2."""


FEW = 8
"""Chunks one after the other up to which a scorer's program has one body for both tiles of a chunk:
a third less to be read by a processor that has run other kernels in between, which takes as long as
two chunks or so; with more of them, 2 % slower."""


def work(problem: Problem, config: Config) -> tuple[float, int, int]:
    """What the busiest multiprocessor does one after the other: chunks that all scorers take at
    once (those that fewer take in proportion, but no less than `LEAST`), tables, which all make at
    once, and thread blocks."""
    p = problem
    spans = p.blocks * p.chunks_of_block // (p.blocks_of_chunk * config.span)
    rounds, rest = divmod(math.ceil(spans / config.splits), config.scorers)
    tables = rounds + (rest > 0)
    chunks = rounds + max(LEAST, rest / config.scorers) * (rest > 0)
    waves = math.ceil(p.pairs * config.splits / PROCESSORS)
    return waves * chunks * config.span, waves * tables, waves


def choose_config(problem: Problem, tuning: Tuning | None = None) -> Config:
    """The quickest split by estimate, in the first layout that fits shared memory.

    Registers need no choice: 16 warps may have 128 each, which is what the compiler takes.

    Args:
        problem: the shapes.
        tuning: what layout is tried first, and how long its work takes; `tuned` by default.

    Raises:
        InputError: if no layout fits.
    """
    by = tuning or tuned(problem)
    for scorers, depth, buffers in (
        (by.scorers, by.depth, by.buffers),
        *itertools.product((8, 4), (2, 1), (1,)),
    ):
        choices = splittings(problem, scorers, depth, buffers)
        config = min(choices, key=lambda config: by.time(work(problem, config)))
        if Memory.of(problem, config).nbytes <= SHARED_BYTES:
            return config
    raise InputError(
        f"{problem.key.stages} stages of {problem.key.codewords} codewords for keys and "
        f"{problem.value_stages} for values take more shared memory than there is; use fewer stages"
    )


def splittings(problem: Problem, scorers: int, depth: int, buffers: int) -> list[Config]:
    """Every way to split the work of a layout, those of fewer thread blocks first."""
    spans = [1 << i for i in range(6) if problem.chunks_of_block % (1 << i) == 0]
    return [
        Config(scorers, depth, splits, span, buffers)
        for splits in range(1, PROCESSORS + 1)
        for span in spans
    ]


def check_config(problem: Problem, config: Config) -> None:
    """Refuse a layout that the kernel cannot have.

    Raises:
        InputError: naming what does not fit.
    """
    nbytes = Memory.of(problem, config).nbytes
    if nbytes > SHARED_BYTES:
        raise InputError(
            f"{config} takes {nbytes} bytes of shared memory, and there are {SHARED_BYTES}; "
            "use fewer scorers, a depth of 1 or one buffer"
        )
    if config.scorers not in (4, 8) or min(config.depth, config.splits) < 1:
        raise InputError(f"{config} must have 4 or 8 scorers, a depth and splits of at least 1")
    if config.buffers not in (1, 2):
        raise InputError(f"{config} must have 1 or 2 buffers")
    if config.span < 1 or problem.chunks_of_block % config.span:
        chunks = problem.chunks_of_block
        raise InputError(f"{config} must have a span that divides the {chunks} chunks of a block")


# --- what is supported ----------------------------------------------------------------------------


def problem_of(
    query: Array,
    mean: Array | None,
    inv_freq: Array,
    key_tiles: Array,
    value_tiles: Array,
    key_codewords: Array,
    value_codewords: Array,
    blocks: Array,
    *,
    every: int = 1,
    stride: int = 1,
    fills: int = 1,
) -> Problem:
    """The shapes of a call, checked.

    Raises:
        InputError: naming what was given and what is supported.
    """
    batch, tokens, heads, group, dim = query.shape
    n, block = key_tiles.shape[2], TILE * key_tiles.shape[3]

    def refuse(what: str, given: Any, supported: str) -> None:
        raise InputError(
            f"the fused GPU kernel takes {supported} as {what}, got {given}; use another "
            "implementation"
        )

    if dim not in (64, 128):
        refuse("head_dim", dim, "64 or 128")
    if not 1 <= group <= 8:
        refuse("query heads per KV head", group, "1 to 8")
    if block != TILE and block % CHUNK:
        refuse("tokens of a block", block, f"{TILE} or a multiple of {CHUNK}")
    if fills < 1 or block % fills or (fills > 1 and block // fills % CHUNK):
        refuse("parts of a block", fills, f"parts of a multiple of {CHUNK} tokens")
    if mean is not None and mean.shape != (heads, dim):
        refuse("mean key", mean.shape, f"({heads}, {dim})")
    if every not in KNOTS:
        refuse("tokens between knots of the mean key", every, " or ".join(map(str, KNOTS)))
    if stride > 1 and every > 1 and block < CHUNK:
        refuse(f"blocks of {block} tokens that do not follow each other", every, "knots at each")
    if inv_freq.shape != (dim // 2,):
        refuse("rotary frequencies", inv_freq.shape, f"({dim // 2},)")
    for name, codewords, sizes in (
        ("keys", key_codewords, (16, 256)),
        ("values", value_codewords, (16,)),
    ):
        if codewords.shape[:2] != (heads, 1) or codewords.shape[4] != dim:
            refuse(
                f"codewords of {name}", codewords.shape, f"whole heads, ({heads}, 1, R, K, {dim})"
            )
        if codewords.shape[3] not in sizes:
            refuse(
                f"codewords of a stage of {name}",
                codewords.shape[3],
                " or ".join(map(str, sizes)),
            )
        if not 1 <= codewords.shape[2] <= MOST_STAGES:
            refuse(f"stages of {name}", codewords.shape[2], f"1 to {MOST_STAGES}")
        if codewords.dtype not in (jnp.bfloat16, jnp.float32):
            refuse(f"dtype of the codewords of {name}", codewords.dtype, "bfloat16 or float32")
    key = KeyTable(key_codewords.shape[2], key_codewords.shape[3])
    value_stages = value_codewords.shape[2]
    for name, array, words in (
        ("key tiles", key_tiles, key_words(key.stages, key.codewords)),
        ("value tiles", value_tiles, value_words(value_stages)),
    ):
        expected = (batch, heads, n, block // TILE, words)
        if array.shape != expected or array.dtype != jnp.uint32:
            refuse(name, f"{array.dtype} {array.shape}", f"uint32 {expected}")
    if query.dtype != jnp.float32:
        refuse("dtype of the query", query.dtype, "float32")
    if blocks.shape != (batch,) or not jnp.issubdtype(blocks.dtype, jnp.integer):
        refuse("blocks", f"{blocks.dtype} {blocks.shape}", f"integers ({batch},)")
    every = 0 if mean is None else every
    short = key_codewords.dtype == jnp.bfloat16
    problem = Problem(
        *(batch, tokens, heads, group, n, block, dim, key, value_stages, every, stride, fills),
        short_words=short,
    )
    if n:
        choose_config(problem)
    return problem


def check_supported(*arrays: Any, every: int = 1, stride: int = 1, fills: int = 1) -> Problem:
    """The shapes of a call that can be made here.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(*arrays, every=every, stride=stride, fills=fills)
    devices.check_hopper()
    return problem


# --- the operation --------------------------------------------------------------------------------


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
    config: Config | None = None,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`gsrq_jax.kernels.reference.attend_tiles` on a Hopper GPU.

    One fused kernel, and one for the product with the value codebooks and all that follows; call
    it under jit.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None for nothing.
        inv_freq: rotary frequencies.
        key_tiles: see `gsrq_jax.kernels.tiles.keys_to_tiles`.
        value_tiles: see `gsrq_jax.kernels.tiles.values_to_tiles`.
        key_codewords: of this layer, float32 or bfloat16, 16 or 256 a stage.
        value_codewords: of this layer, 16 a stage.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next: block n starts at ``first + n
            stride b``.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`, one of `KNOTS`. With a
            knot at every token the mean key's share is as many bytes as one bit of codes.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
        recent: exact tokens in the same softmax. The kernel has them, too, where there is room for
            them and `gsrq_jax.kernels.mosaic_gpu_recent` has them; that, or plain jnp.
        dtype: of the values that are returned.
        config: instead of the one chosen.

    Returns:
        The softmax-weighted values (0 where there are none) and the log-sum-exp of the scores
        (-inf there), NaN where a query is not finite or too large for float16.

    Raises:
        InputError: if the shapes, dtypes, the device or the version of jax are not supported.
    """
    from gsrq_jax.kernels import mosaic_gpu_finish  # with shapes from here

    problem = check_supported(
        query,
        mean,
        inv_freq,
        key_tiles,
        value_tiles,
        key_codewords,
        value_codewords,
        blocks,
        every=every,
        stride=stride,
        fills=fills,
    )
    exact = mosaic_gpu_recent.supported(query, recent) if recent else None
    if not problem.blocks:
        nothing = jnp.zeros_like(query), jnp.full(query.shape[:4], -jnp.inf)
        return with_beside(nothing, recent and reference.attend_recent(query, recent), dtype)
    config = config or choose_config(problem)
    check_config(problem, config)
    both = dataclasses.replace(problem, recent=exact)
    if Memory.of(both, config).nbytes <= SHARED_BYTES:
        problem = both
    blocks = blocks.astype(jnp.int32)
    inputs = score_inputs(problem, query, mean, inv_freq, key_codewords, value_codewords, first)
    if recent and problem.recent:
        inputs += mosaic_gpu_recent.arrays_of(recent)
    made = fused_kernel(problem, config)(key_tiles, value_tiles, blocks, *inputs)
    histogram, scale, *others = made
    beside = None
    if problem.recent:
        beside = mosaic_gpu_recent.in_parts(*others[:2])
    elif recent:
        by = mosaic_gpu_recent if exact else reference
        beside = by.attend_recent(query, recent)
    by_kernel = mosaic_gpu_finish.supports(value_codewords)
    end = mosaic_gpu_finish.finish if by_kernel else finish
    return end(problem, query, blocks, histogram, scale, value_codewords, beside, dtype)


def finish(
    problem: Problem,
    query: Float[Array, "B T H q d"],
    blocks: Int[Array, " B"],
    histogram: Float[Array, "pairs parts 4 S 16"],
    scale: Int[Array, "pairs parts 4"],
    value_codewords: Float[Array, "H 1 S 16 d"],
    beside: tuple[Float[Array, "P B T H q d"], Float[Array, "P B T H q"]] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """What `attend_tiles` returns, from what its kernel does; `mosaic_gpu_finish` is the kernel of
    this.

    Args:
        problem: the shapes.
        query: its numbers are to be smaller than `MOST_QUERY`.
        blocks: of each sequence; where there are none, the query may be anything.
        histogram: as for `put_together`, and
        scale: likewise.
        value_codewords: of this layer.
        beside: other parts of the same softmax, with their log-sum-exps.
        dtype: of the values that are returned.
    """
    out, lse = put_together(problem, histogram, scale, value_codewords)
    usable = (jnp.abs(query) < MOST_QUERY).all(axis=-1) | (blocks <= 0)[:, None, None, None]
    out, lse = jnp.where(usable[..., None], out, jnp.nan), jnp.where(usable, lse, jnp.nan)
    return with_beside((out, lse), beside, dtype)


def score_inputs(
    problem: Problem,
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_codewords: Float[Array, "H 1 R K d"],
    value_codewords: Float[Array, "H 1 S 16 d"],
    first: int | Int[Array, ""],
) -> list[Array]:
    """What the scores are made of, in the order of `score_arrays`.

    Args:
        problem: the shapes.
        query: scaled queries, rotated at their own positions.
        mean: mean key before RoPE, if there is one.
        inv_freq: rotary frequencies.
        key_codewords: of this layer.
        value_codewords: likewise; no score needs them, but to have been prefetched.
        first: position of the first token of block 0.
    """
    p = problem
    cos, sin = rotary.turns(first + p.stride * p.block * jnp.arange(p.blocks), inv_freq)
    words = key_codewords.reshape(p.heads, -1, p.dim)
    arrays: dict[str, Array] = {"query": query, "cos": cos, "sin": sin}
    arrays["value_words"] = value_codewords
    if p.key.shared:
        arrays["words"] = words if p.short_words else words.astype(jnp.float16)
    else:
        arrays["tables"], arrays["facts"] = finished_tables(p, query, words, cos, sin)
    if mean is not None:
        arrays["mean"] = mean.astype(jnp.float32)
        arrays["inv_freq"] = inv_freq.astype(jnp.float32)
        arrays["waves"] = mosaic_gpu_products.waves(p, inv_freq)
    return [arrays[name] for name in score_arrays(p)]


def score_arrays(problem: Problem) -> tuple[str, ...]:
    """What scores are made of beside codes, as `Addresses` has it.

    ``query``; ``cos`` and ``sin`` ``[N, d/2]`` of the angles at the start of each block;
    ``value_words`` ``[H, 1, S, 16, d]``, which are only prefetched; ``words``
    ``[H, R·16, d]``, bfloat16 or float16, or of 256 codewords finished ``tables`` ``[pairs, N, 256,
    places, 4]`` (uint16) and ``facts`` ``[pairs, N, 8]``, their steps and offsets; and if there is
    a mean key ``mean`` ``[H, d]``, ``inv_freq`` ``[d/2]`` and ``waves``, as
    `mosaic_gpu_products.waves`.
    """
    of_keys = ("words",) if problem.key.shared else ("tables", "facts")
    of_mean = ("mean", "inv_freq", "waves") if problem.every else ()
    return ("query", "cos", "sin", "value_words", *of_keys, *of_mean)


def finished_tables(
    problem: Problem,
    query: Float[Array, "B T H q d"],
    words: Float[Array, "H c d"],
    cos: Float[Array, "N d/2"],
    sin: Float[Array, "N d/2"],
) -> tuple[Array, Float[Array, "pairs N 8"]]:
    """Tables of all blocks by XLA, where one is too large for shared memory: of the rows of each KV
    head in the frame of each block, four together, zeros where there are not so many."""
    p = problem
    rows = jnp.transpose(query, (2, 0, 1, 3, 4)).reshape(p.heads, p.batch, -1, p.dim) / LN2
    spare = p.row_groups * ROWS - p.tokens * p.group
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, spare), (0, 0)))
    rows = rows.reshape(p.heads, -1, 1, ROWS, p.dim)
    rows = rotary.turned(rows, cos[:, None], -sin[:, None]).astype(jnp.float16)
    products = jnp.einsum(
        "hpnrd,hcd->hpnrc",
        rows,
        words.astype(jnp.float16),
        preferred_element_type=jnp.float32,
    ).reshape(p.pairs, p.blocks, ROWS, -1)
    table, steps, offsets = finished_table(p.key, products)
    units = pieces.SCORE / pieces.COUNT, pieces.SCORE
    return table, jnp.concatenate([steps * units[0], offsets * units[1]], axis=-1)


def finished_table(
    key: KeyTable, products: Float[Array, "*n 4 c"]
) -> tuple[Array, Float[Array, "*n 4"], Float[Array, "*n 4"]]:
    """`gsrq_jax.kernels.pieces.table` in jnp: entries as `KeyTable` has them, steps and offsets."""
    lead = products.shape[:-1]
    products = products.reshape(*lead, key.stages, key.codewords)
    low = products.min(axis=-1)
    spread = products.max(axis=-1) - low
    octets = [
        spread[..., first + i : first + min(i + pieces.OCTET, w)].sum(axis=-1)
        for first, w in strips(key.stages)
        for i in range(0, w, pieces.OCTET)
    ]
    widest = jnp.maximum(jnp.stack(octets).max(axis=0), 1e-30)
    scale = pieces.ENTRY_MOST / widest
    entries = jnp.round((products - low[..., None]) * scale[..., None, None]).astype(jnp.uint16)
    order = [first + place % w for first, w in strips(key.stages) for place in range(pieces.STRIP)]
    placed = entries[..., jnp.array(order), :]  # [..., 4, places, K]
    return jnp.moveaxis(placed, (-1, -3), (-3, -1)), 1 / scale, low.sum(axis=-1)


def _rows_to_heads(problem: Problem, x: Array) -> Array:
    """``[pairs, 4, …]`` to ``[B, T, H, q, …]``."""
    p = problem
    x = x.reshape(p.heads, p.batch, -1, *x.shape[2:])[:, :, : p.tokens * p.group]
    x = x.reshape(p.heads, p.batch, p.tokens, p.group, *x.shape[3:])
    return jnp.moveaxis(x, 0, 2)


def put_together(
    problem: Problem,
    histogram: Float[Array, "pairs parts 4 S 16"],
    scale: Int[Array, "pairs parts 4"],
    value_codewords: Float[Array, "H 1 S 16 d"],
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """The output and log-sum-exp of all parts: one sum over them, one product with the codebooks.

    The histogram of any stage adds up to all probability, so that rounding it cancels.
    """
    p = problem
    top = scale.max(axis=1, keepdims=True)
    weight = jnp.exp2((scale - top).astype(jnp.float32))  # [pairs, parts, 4]
    mass = jnp.einsum("psrvk,psr->prvk", histogram, weight)
    total = mass[:, :, 0].sum(axis=-1)  # [pairs, 4]
    some = total > 0
    words = value_codewords.reshape(p.heads, -1, p.dim)
    out = _times_words(mass.reshape(p.heads, -1, p.value_stages * p.value_codewords), words)
    out = out.reshape(-1, ROWS, p.dim)
    safe = jnp.where(some, total, 1)
    out = jnp.where(some[..., None], out, 0) / safe[..., None]
    unit = math.log2(pieces.LAST_BIT) + pieces.PROBABILITY_BITS - pieces.HEADROOM
    lse = (top[:, 0] + jnp.log2(safe) - unit) * LN2
    lse = jnp.where(some, lse, -jnp.inf)
    return _rows_to_heads(p, out), _rows_to_heads(p, lse)


def _times_words(
    mass: Float[Array, "H n c"], words: Float[Array, "H c d"]
) -> Float[Array, "H n d"]:
    """A product in float32, or to 16 bits of ``mass`` where codewords are bfloat16."""
    if words.dtype != jnp.bfloat16:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("hnc,hcd->hnd", mass, words, precision=exact)
    both = jnp.stack(in_pieces(mass, 2, jnp.bfloat16), axis=1)
    kind = jnp.float32
    return jnp.einsum("hpnc,hcd->hpnd", both, words, preferred_element_type=kind).sum(axis=1)


# --- the kernel -----------------------------------------------------------------------------------


def fused_kernel(problem: Problem, config: Config) -> Any:
    """The kernel as a function of key tiles, value tiles, blocks, `score_inputs` and, if it has
    exact tokens, `mosaic_gpu_recent.arrays_of` them.

    Its results are `outputs`: the histogram and scale of each part, then the parts of exact tokens
    if there are any; what follows them are products and shares of the mean key that it made for
    itself.
    """
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        FusedKernel(problem, config, warp, Addresses.of(problem, *places)).run()

    return warp_kernel(
        run,
        outputs=[jax.ShapeDtypeStruct(*x) for x in outputs(problem, config).values()],
        nbytes=Memory.of(problem, config).nbytes,
        parts=problem.pairs * config.splits,
        warps=COUNTERS + config.scorers,
        name="attend_codes",
    )


def outputs(problem: Problem, config: Config) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """Shapes and dtypes of what the kernel writes."""
    p = problem
    parts = p.pairs, config.splits * config.teams(p.value_stages)
    made: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
        "histogram": ((*parts, ROWS, p.value_stages, 16), jnp.float32),
        "scale": ((*parts, ROWS), jnp.int32),
    }
    if p.recent:
        made |= p.recent.outputs(p.recent.parts(config.splits))
    if p.key.shared:
        made["products"] = (p.pairs, p.blocks, ROWS, p.key.stages * 16), jnp.float16
    if p.every:
        made["share"] = (p.pairs, p.share_units, ROWS, p.unit_knots), jnp.float32
    return made


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie, and shared memory; what a problem does not have is None."""

    keys: Any
    values: Any
    blocks: Any
    query: Any
    cos: Any
    sin: Any
    value_words: Any
    histogram: Any
    scale: Any
    shared: Any
    words: Any = None
    tables: Any = None
    facts: Any = None
    mean: Any = None
    inv_freq: Any = None
    waves: Any = None
    products: Any = None
    share: Any = None
    sink_key: Any = None
    window_key: Any = None
    key: Any = None
    sink_value: Any = None
    window_value: Any = None
    value: Any = None
    counts: Any = None
    recent: Any = None
    recent_lse: Any = None

    @classmethod
    def of(cls, problem: Problem, *places: Any) -> "Addresses":
        """In the order of the kernel's arguments and results."""
        made = outputs(problem, Config(8, 1, 1, 1))
        arrays = *score_arrays(problem), *(mosaic_gpu_recent.ARRAYS if problem.recent else ())
        names = "keys", "values", "blocks", *arrays, *made, "shared"
        return cls(**dict(zip(names, places, strict=True)))


class FusedKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(self, problem: Problem, config: Config, warp: Any, at: Addresses):
        self.problem, self.config, self.warp, self.at = problem, config, warp, at
        self.memory = Memory.of(problem, config)
        self.base = (at.shared + 4095) & 0xFFFFF000
        self.first_lane = warp.equal(warp.lane, 0)
        self.few = work(problem, config)[0] <= FEW

        p = problem
        self.pair = warp.block // config.splits
        self.rows = mosaic_gpu_products.Rows(p, warp, self.pair)
        head, sequence = self.rows.head, self.rows.sequence
        # Blocks of codes before this head's, and of tables before this pair's.
        self.code_block = warp.wide(sequence * p.heads + head) * p.blocks
        self.table_block = warp.wide(self.pair) * p.blocks
        (valid,) = warp.load_global(at.blocks + warp.wide(sequence) * 4)
        valid = warp.unsigned_min(warp.signed_max(valid, warp.integer(0)), p.blocks * p.fills)
        self.valid = valid  # blocks, or parts of them
        self.product_bytes = ROWS * p.key.stages * p.key.codewords * 2
        # A span is what a scorer takes at a time: chunks of one block, or one chunk of two blocks.
        self.spans_of_block = p.chunks_of_block // config.span
        chunks = valid * (p.chunks_of_block // p.fills)
        if p.blocks_of_chunk > 1:
            chunks = (valid + (p.blocks_of_chunk - 1)) // p.blocks_of_chunk
        spans = (chunks + (config.span - 1)) // config.span
        each = (spans + (config.splits - 1)) // config.splits
        self.first = (warp.block % config.splits) * each
        end = warp.select(warp.less(self.first + each, spans), self.first + each, spans)
        self.spans = warp.select(warp.less(self.first, end), end - self.first, 0)
        # Chunks that the last of all spans lacks, where a block may be valid in part: that of the
        # last scorer in its last round, in the part that has it.
        self.missing: Any = 0
        if p.fills > 1:
            has_last = warp.equal(end, spans) & warp.less(self.first, end)
            self.missing = warp.select(has_last, spans * config.span - chunks, warp.integer(0))

    def run(self) -> None:
        """Barriers and products, then the two kinds of warps."""
        warp, memory = self.warp, self.memory
        self._prefetch()
        ring = self.config.scorers * self.config.depth
        octets = pieces.octets_of(self.problem.value_stages)
        busy = octets * self.config.teams(self.problem.value_stages)

        def barriers() -> None:
            for i in range(self.config.scorers * self.config.buffers):
                warp.barrier_init(self.base + (memory.arrived + 8 * i), 1)
            for i in range(ring):
                warp.barrier_init(self.base + (memory.full + 8 * i), 2)
                warp.barrier_init(self.base + (memory.free + 8 * i), octets)
            warp.barrier_fence()

        warp.when(warp.equal(warp.index, 0) & self.first_lane, barriers)
        self._products()
        warp.either(
            warp.less(warp.index, COUNTERS),
            lambda: self._recent_and_count(busy),
            self.score,
        )

    def _recent_and_count(self, busy: int) -> None:
        """Exact tokens by all warps that may count, then codes by those that do."""
        warp, exact = self.warp, self.problem.recent
        if exact:
            parts, part = exact.parts(self.config.splits), warp.block % self.config.splits

            def recent() -> None:
                mosaic_gpu_recent.RecentTokens(
                    *(exact, warp, self.at, self.rows, self.base + self.memory.recent),
                    warps=COUNTERS,
                    part=part,
                    parts=parts,
                    sync=functools.partial(warp.sync_first, COUNTERS),
                ).run()

            warp.when(warp.less(part, parts), recent)
        warp.when(warp.less(warp.index, busy), self.count)

    def _prefetch(self) -> None:
        """What is wanted first and may not be in the second-level cache: each scorer's first codes,
        and by the thread blocks of a head's first rows, together, its codewords."""
        warp, p = self.warp, self.problem
        scorer = warp.index - COUNTERS
        own = warp.less(scorer, self.spans) & warp.less(warp.integer(-1), scorer)

        def codes() -> None:
            block, chunk = self._place(scorer, warp.integer(0))
            for place, nbytes in (
                (self.at.keys, p.chunk_key_bytes),
                (self.at.values, p.chunk_value_bytes),
            ):
                source = self._source(place, nbytes, block, chunk)
                warp.prefetch(source, self._present(block, nbytes))

        warp.when(own & self.first_lane, codes)
        if p.key.shared:
            self._prefetch_words(self.at.words, p.key.stages, warp.equal(warp.index, 0))

    def _prefetch_words(self, words: Any, stages: int, where: Any) -> None:
        """Codewords of the head, 16 a stage of two bytes a number, by the thread blocks of its
        first rows together."""
        warp, p, splits = self.warp, self.problem, self.config.splits
        of_head = stages * 16 * p.dim * 2
        each = math.ceil(of_head / splits / 16) * 16
        begin = warp.block % splits * each
        rest = warp.integer(of_head) - begin
        first = warp.equal(self.pair % (p.batch * p.row_groups), 0) & self.first_lane

        def some() -> None:
            source = words + warp.wide(self.rows.head) * of_head + warp.wide(begin)
            warp.prefetch(source, warp.unsigned_min(rest, each))

        warp.when(first & where & warp.less(warp.integer(0), rest), some)

    def _products(self) -> None:
        """Of all blocks that the thread block has chunks of; if there are any, all warps wait."""
        warp, p, config = self.warp, self.problem, self.config
        if not p.key.shared and not p.every:
            warp.sync_block()
            return
        first = self.first // self.spans_of_block
        end = (self.first + self.spans + (self.spans_of_block - 1)) // self.spans_of_block
        first, end = first * p.blocks_of_chunk, end * p.blocks_of_chunk
        end = warp.unsigned_min(end, (self.valid + (p.fills - 1)) // p.fills)
        count = warp.select(warp.less(warp.integer(0), self.spans), end - first, 0)
        mosaic_gpu_products.Products(
            p,
            mosaic_gpu_products.Layout(p, self.memory.arrived),
            warp,
            self.at,
            base=self.base,
            warps=COUNTERS + config.scorers,
            rows=self.rows,
            first=first,
            count=count,
        ).run()

    def _slot(self, round_: Any, scorer: Any) -> tuple[Any, Any]:
        """A scorer's slot in its round, and the parity of the slot's use."""
        depth = self.config.depth
        return (round_ % depth) * self.config.scorers + scorer, (round_ // depth) & 1

    # Scoring warps.

    def _place(self, scorer: Any, round_: Any) -> tuple[Any, Any]:
        """The block, or the first of two, and the chunk in it that a scorer takes in a round."""
        span_chunks = self.config.span
        span = self.first + round_ // span_chunks * self.config.scorers + scorer
        chunk = span % self.spans_of_block * span_chunks + round_ % span_chunks
        return span // self.spans_of_block * self.problem.blocks_of_chunk, chunk

    def _source(self, place: Any, nbytes: int, block: Any, chunk: Any) -> Any:
        """Where the codes of a chunk lie, so many bytes of all."""
        warp = self.warp
        of_block = nbytes * self.problem.block // CHUNK
        block = self.code_block + warp.wide(block)
        return place + block * of_block + warp.wide(chunk * nbytes)

    def score(self) -> None:
        """Chunk after chunk of this warp's spans: scores, probabilities, planes."""
        warp, p, memory = self.warp, self.problem, self.memory
        scorers = self.config.scorers
        scorer = warp.index - COUNTERS
        rounds = (self.spans + (scorers - 1) - scorer) // scorers * self.config.span
        if p.fills > 1:
            last = warp.equal((self.spans + (scorers - 1)) % scorers, scorer)
            rounds = rounds - warp.select(last, self.missing, warp.integer(0))
        buffers = self.config.buffers
        knots = self.base + memory.knots + scorer * memory.knot_bytes
        facts = self.base + memory.facts + scorer * (2 * ROWS * 4)
        table = self.base + memory.tables + scorer * memory.table_bytes
        places = pieces.places(warp, p.key, table)
        ways, tokens = pieces.ways(warp), pieces.tokens_of_lane(warp)

        def buffer(k: Any) -> tuple[Any, Any]:
            """Addresses of a round's staged chunk and of the barrier that says it has come."""
            index = scorer * buffers + k % buffers
            staged = self.base + memory.staged + index * memory.staged_bytes
            return staged, self.base + memory.arrived + index * 8

        def fetch(k: Any) -> None:
            block, chunk = self._place(scorer, k)
            self._fetch(block, chunk, *buffer(k))

        for first in range(buffers):
            k = warp.integer(first)
            warp.when(self.first_lane & warp.less(k, rounds), functools.partial(fetch, k))

        def round_(k: Any, _: list) -> list:
            block, chunk = self._place(scorer, k)
            staged, arrived = buffer(k)
            slot, parity = self._slot(k, scorer)
            full = self.base + memory.full + slot * 8
            slot_at = self.base + memory.slots + slot * memory.slot_bytes
            warp.barrier_wait(self.base + memory.free + slot * 8, parity ^ 1)
            warp.when(self.first_lane, lambda: self._fetch_values(block, chunk, slot_at, full))
            if p.blocks_of_chunk == 1:
                first = warp.equal(k % self.config.span, 0)
                warp.when(first, lambda: self._make_table(block, table, facts))
            warp.barrier_wait(arrived, (k // buffers) & 1)
            shares = staged + p.chunk_key_bytes
            if p.blocks_of_chunk == 1 and p.every > 1:
                self._gather_knots(shares, facts, knots)

            def scores_of(tile: Any, before: list) -> list:
                """Those of the last tile, and of this one."""
                here = block
                if p.blocks_of_chunk == 2:
                    here = warp.unsigned_min(block + tile, self.valid - 1)
                    self._make_table(here, table, facts)
                    if p.every > 1:
                        self._gather_knots(shares, facts, knots)
                others = self._others(shares, knots, tokens, facts, tile)
                made = self._scores(here, tile, staged, tokens, facts, places, others)
                return before[len(before) // 2 :] + [x for group in made for x in group]

            flat = [warp.floating(0.0)] * (GROUPS * ROWS)
            if self.few:
                flat = warp.loop(warp.unknown(2), flat, scores_of)
            else:
                for tile in range(2):
                    flat = scores_of(warp.integer(tile), flat)
            groups = [flat[i : i + ROWS] for i in range(0, len(flat), ROWS)]
            if p.blocks_of_chunk == 2:  # the second block may not be there
                there = warp.less(block + 1, self.valid)
                groups[4:] = [[warp.select(there, s, -1e30) for s in g] for g in groups[4:]]
            warp.sync()
            further = k + buffers
            warp.when(self.first_lane & warp.less(further, rounds), lambda: fetch(further))
            scale = pieces.chunk_scale(warp, groups)
            words = pieces.probabilities(warp, groups, scale)
            pieces.store_planes(warp, ways, pieces.planes(warp, ways, words, slot_at), slot_at)
            at = self.base + memory.scales + slot * (ROWS * 4)
            warp.store_shared(at, scale, where=self.first_lane)
            warp.sync()
            warp.when(self.first_lane, lambda: warp.barrier_arrive(full))
            return []

        warp.loop(rounds, [], round_)
        # For the kernel that follows.
        last = warp.equal(scorer, scorers - 1)
        self._prefetch_words(self.at.value_words, p.value_stages, last)

    def _present(self, block: Any, nbytes: int) -> Any:
        """Bytes of a chunk that are there: half of them if its second block is not."""
        warp = self.warp
        if self.problem.blocks_of_chunk == 1:
            return warp.integer(nbytes)
        there = warp.less(block + 1, self.valid)
        return warp.select(there, warp.integer(nbytes), nbytes // 2)

    def _fetch(self, block: Any, chunk: Any, staged: Any, arrived: Any) -> None:
        """Start to copy the codes and the mean key's shares of a chunk."""
        warp, p = self.warp, self.problem
        codes = self._present(block, p.chunk_key_bytes)
        share = p.copied_knots * 4
        warp.barrier_expect(arrived, codes + ROWS * share)
        source = self._source(self.at.keys, p.chunk_key_bytes, block, chunk)
        warp.copy_to_shared(staged, source, codes, arrived)
        if not p.every:
            return
        staged = staged + p.chunk_key_bytes
        unit = warp.wide(self.pair) * p.share_units + warp.wide(block // p.blocks_of_chunk)
        of_row = p.unit_knots * 4
        source = self.at.share + unit * (ROWS * of_row) + warp.wide(chunk * (p.knots * 4))
        for row in range(ROWS):
            to = staged + row * share
            warp.copy_to_shared(
                to, source + warp.wide(warp.integer(row * of_row)), warp.integer(share), arrived
            )

    def _fetch_values(self, block: Any, chunk: Any, slot_at: Any, full: Any) -> None:
        """Start to copy the codes of the values of a chunk."""
        warp, p = self.warp, self.problem
        nbytes = self._present(block, p.chunk_value_bytes)
        source = self._source(self.at.values, p.chunk_value_bytes, block, chunk)
        warp.barrier_expect(full, nbytes)
        warp.copy_to_shared(slot_at + pieces.plane_bytes(), source, nbytes, full)

    def _make_table(self, block: Any, table: Any, facts: Any) -> None:
        """Of one block, by this warp for itself; of 256 codewords it is there already."""
        warp, key = self.warp, self.problem.key
        warp.sync()  # no lane still reads the one before
        index = self.table_block + warp.wide(block)
        if key.shared:
            pieces.table(warp, key, self.at.products + index * self.product_bytes, table, facts)
            return
        lane = warp.lane & (2 * ROWS - 1)
        read = warp.load_global(self.at.facts + index * (2 * ROWS * 4) + warp.wide(lane * 4))
        warp.store_shared(facts + lane * 4, read)
        warp.sync()

    def _gather_knots(self, shares: Any, facts: Any, knots: Any) -> None:
        """What scores have at the chunk's knots beside their table's entries."""
        warp, p = self.warp, self.problem
        offsets = warp.load_shared(facts, ROWS * 4, ROWS, "f")
        raw = shares + mosaic_gpu_products.LEAD * 4
        pieces.gather_knots(warp, p.every, p.copied_knots * 4, raw, offsets, knots)

    def _others(
        self, shares: Any, knots: Any, tokens: list, facts: Any, tile: Any
    ) -> Callable[[int], list]:
        """``[ROWS]`` offsets of the scores of a group of the tile: of the table, and the mean key's
        shares."""
        warp, p = self.warp, self.problem
        if p.every > 1:
            here = knots + tile * pieces.knot_bytes(p.every, TILE)
            return lambda group: pieces.between_knots(
                warp, p.every, here, tokens[group % 2], group // 2 * 64
            )
        offsets = warp.load_shared(facts, ROWS * 4, ROWS, "f")
        if not p.every:
            return lambda _: offsets
        stride, unit = p.copied_knots * 4, warp.floating(pieces.SCORE)
        own = [shares + tile * (TILE * 4) + token * 4 for token in tokens]

        def each(group: int) -> list:
            at = own[group % 2]
            shares = [
                warp.load_shared(at, row * stride + group // 2 * 256, kind="f")[0]
                for row in range(ROWS)
            ]
            return [warp.fma(x, unit, offset) for x, offset in zip(shares, offsets, strict=True)]

        return each

    def _scores(
        self,
        block: Any,
        tile: Any,
        staged: Any,
        tokens: list,
        facts: Any,
        places: Any,
        others: Callable[[int], list],
    ) -> list:
        """``[4 groups][ROWS]`` scores of a tile."""
        warp, p = self.warp, self.problem
        units, width = p.key.units
        steps = warp.load_shared(facts, 0, ROWS, "f")
        of_unit = TILE * width // 8
        staged = staged + tile * (units * of_unit)
        lanes = [staged + token * (width // 8) for token in tokens]
        load = {
            32: lambda a, o: warp.load_shared(a, o)[0],
            16: warp.load_shared_16,
        }[width]
        groups = []
        for group in range(GROUPS // 2):
            at = group // 2 * 64 * width // 8
            codes = [load(lanes[group % 2], at + u * of_unit) for u in range(units)]
            if p.key.shared:
                sums = pieces.look_up(warp, p.key, places, codes)
            else:
                index = self.table_block + warp.wide(block)
                base = self.at.tables + index * p.key.nbytes
                sums = pieces.look_up_global(warp, p.key, base, codes)
            groups.append(pieces.scores(warp, sums, others(group), steps))
        return groups

    # Counting warps.

    def _slots_of_team(self, team: Any, teams: int) -> tuple[Any, Callable[[Any], Any]]:
        """How many slots a team goes through, and how many scorers are there in a round."""
        warp, scorers, span = self.warp, self.config.scorers, self.config.span
        whole = self.spans // scorers * span  # rounds in which all scorers are there
        rest = self.spans % scorers

        def of_team(scorers: Any) -> Any:
            return (scorers + (teams - 1) - team) // teams

        own = whole * (scorers // teams) + of_team(rest) * span
        if self.problem.fills == 1:
            return own, lambda round_: warp.select(
                warp.less(round_, whole), warp.integer(scorers), rest
            )
        # In the last rounds the last of the scorers that began them is not there any more.
        all_there = warp.equal(rest, 0)
        began = warp.select(all_there, warp.integer(scorers), rest)
        end = warp.select(all_there, whole, whole + span) - self.missing
        own = own - self.missing * (of_team(began) - of_team(began - 1))

        def present(round_: Any) -> Any:
            there = warp.select(warp.less(round_, whole), warp.integer(scorers), rest)
            return warp.select(warp.less(round_, end), there, began - 1)

        return own, present

    def count(self) -> None:
        """Slot after slot of a team's scorers: counts, added to a histogram, written at the end."""
        warp, p, memory = self.warp, self.problem, self.memory
        octets = pieces.octets_of(p.value_stages)
        teams = self.config.teams(p.value_stages)
        team, octet = warp.index // octets, warp.index % octets
        own, present = self._slots_of_team(team, teams)
        row = warp.lane & 3

        def slot(_: Any, carry: list) -> list:
            round_, scorer, scale, flat = carry[0], carry[1], carry[2], carry[3:]
            mass = [flat[2 * i : 2 * i + 2] for i in range(8)]
            index, parity = self._slot(round_, scorer)
            at = self.base + memory.slots + index * memory.slot_bytes
            warp.barrier_wait(self.base + memory.full + index * 8, parity)
            scales = self.base + memory.scales + index * (ROWS * 4)
            (of_chunk,) = warp.load_shared(scales + row * 4)
            tiles = pieces.load_codes(warp, p.value_stages, octet, at + pieces.plane_bytes())
            columns = pieces.load_planes(warp, at)
            warp.sync()
            free = self.base + memory.free + index * 8
            warp.when(self.first_lane, lambda: warp.barrier_arrive(free))
            chunk = pieces.histogram(warp, tiles, columns)
            mass, scale = pieces.add_chunk(warp, mass, chunk, scale, of_chunk)
            # The next slot that is filled: of the team's next scorer, or of its first in the next
            # round.
            following = scorer + teams
            there = warp.less(following, present(round_))
            return [
                warp.select(there, round_, round_ + 1),
                warp.select(there, following, team),
                scale,
                *[x for pair in mass for x in pair],
            ]

        start = [warp.integer(0), team, warp.integer(EMPTY)] + [warp.floating(0.0)] * 16
        done = warp.loop(own, start, slot)
        stage = (octet << 3) + (warp.lane >> 2)
        real = warp.less(stage, p.value_stages)
        part = warp.block * teams + team
        of_codes = 16 * 4
        place = self.at.histogram + warp.wide(part) * (ROWS * p.value_stages * of_codes)
        place = place + warp.wide((row * p.value_stages + stage) * of_codes)
        in_order = [*done[3::2], *done[4::2]]
        for code in range(0, 16, 4):
            warp.store_global(place, in_order[code : code + 4], code * 4, where=real)
        first = warp.equal(octet, 0) & warp.less(warp.lane, ROWS)
        place = self.at.scale + warp.wide(part * (ROWS * 4) + row * 4)
        warp.store_global(place, [done[2]], where=first)
