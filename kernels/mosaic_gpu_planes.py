"""Decode attention over bit planes, fused, on Hopper GPUs: Pallas Mosaic GPU (ours).

A code has one bit a stage, so that a key is ``b + Σ_r bit_r v_r``. A score is then ``q·b`` plus the
sum of ``q·v_r`` over the bits that are set: a binary product of the code's words, as they are
stored, with the bits of a table of R integers. An output is ``b`` plus the sum of ``v_r`` times the
mean of bit r: a product of bits with probabilities of 16 bits, as bytes.

One thread block takes four query rows of one KV head and one part of the tokens of a sequence.
First all its warps make products of these rows with codewords and mean key
(`mosaic_gpu_products`), and attend to what is exact (`mosaic_gpu_recent`). Then each warp goes
through chunks of its own and does everything for them: it copies codes to a ring of its own,
scores, weighs and adds up. At the end the thread block adds up what its warps have. Another kernel
(`mosaic_gpu_finish`) puts thread blocks and exact tokens together.

Below, lane ``4 g + t`` (g < 8, t < 4) is the lane of a warp whose registers are described. In
scores it has query row t and tokens g, g + 8 … of a tile.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from gsrq_jax.kernels import devices, mosaic_gpu_products, mosaic_gpu_recent, reference, rotary
from gsrq_jax.kernels.devices import PROCESSORS
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu import EMPTY, SHARED_BYTES
from gsrq_jax.kernels.mosaic_gpu_recent import NOTHING
from gsrq_jax.kernels.pieces import HEADROOM, LAST_BIT, PROBABILITY_BITS, ROWS
from gsrq_jax.kernels.planes import SPAN, STEP, TILE, UNIT
from gsrq_jax.kernels.reference import Recent, with_beside

MOST_STAGES = 512
CHUNK = 128
"""A block has a multiple of this many tokens, and so has a part of one that is valid by itself."""
KNOTS = (1, 4, 8, 16, 32, 64)
"""Tokens between knots of the mean key's share."""
BITS = 14
"""Bits of an entry of a table: an even number. The highest bit is the sign."""
ENTRY_MOST = 2.0 ** (BITS - 1) - 1
"""The largest entry."""
COLUMNS = BITS // 2
"""Right operands of the binary products of a tile: one has eight columns, two bits of four rows."""
COUNT = 2.0 ** (128 - BITS)
"""Weight of an entry's lowest bit. The bits of a count, read as a float32, are multiplied by it.
The weight of the highest bit is still finite."""
UNIT_OF_SUM = COUNT * 2.0**-149
"""What an entry of 1 adds to a sum."""
LARGE = 2.0**23
"""Its bits, plus a smaller integer, are the bits of the sum of both as a float32."""
MASS = LAST_BIT * 2.0 ** (PROBABILITY_BITS - HEADROOM) / (2.0**PROBABILITY_BITS - 1)
"""What the last bit of a probability adds to the histogram: the unit in which `mosaic_gpu_finish`
takes histograms of codes with tables, too."""
LEAST = 0.4
"""Time of a chunk that few warps take. The unit is the time of chunks that all take at once."""
START = 3.0
"""Time of starting and ending a thread block, in the same unit; estimated, not measured."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Codewords of keys as `mosaic_gpu_products` takes them: it sees 8 stages of two as one of 16.

    Attributes:
        stages: stages of 16 codewords.
    """

    stages: int
    shared = True


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call, as `mosaic_gpu.Problem` names them where both have them.

    Attributes:
        batch: sequences.
        tokens: query tokens.
        heads: KV heads.
        group: query heads of each.
        together: adjacent KV heads that share their codes.
        blocks: that a sequence can hold.
        block: tokens of one.
        dim: channels of a head.
        key_stages: stages of the keys' codes.
        value_stages: stages of the values' codes.
        every: tokens between knots of the mean key's share, 0 if there is no mean key.
        stride: blocks of the sequence from one of these to the next.
        fills: equal parts of a block that are valid one by one.
        short_words: whether codewords of keys are bfloat16; else they become float16.
        recent: sizes of the exact tokens, if the kernel attends to them.
    """

    batch: int
    tokens: int
    heads: int
    group: int
    together: int
    blocks: int
    block: int
    dim: int
    key_stages: int
    value_stages: int
    every: int
    stride: int = 1
    fills: int = 1
    short_words: bool = True
    recent: mosaic_gpu_recent.Problem | None = None

    value_codewords = 2
    blocks_of_chunk = 1

    @property
    def key(self) -> Words:
        """Codewords of the keys."""
        return Words(2 * self.key_stages // 16)

    @property
    def row_groups(self) -> int:
        """Groups of four query rows of a KV head."""
        return -(-self.tokens * self.group // ROWS)

    @property
    def pairs(self) -> int:
        """(KV head, sequence, group of rows)."""
        return self.heads * self.batch * self.row_groups

    @property
    def frame_knots(self) -> int:
        """Knots of a block, without its last one, which is the next block's first."""
        return self.block // self.every if self.every else 0

    @property
    def unit_knots(self) -> int:
        """Numbers that the mean key's shares have for a row and block."""
        return self.frame_knots + (mosaic_gpu_products.LEAD + 1) * (self.every > 1)

    @property
    def share_units(self) -> int:
        """Blocks that the mean key's shares have."""
        return self.blocks

    @property
    def steps(self) -> int:
        """Binary products of keys, of up to 128 stages."""
        return -(-self.key_stages // STEP)

    @property
    def spans(self) -> int:
        """Pairs of value words a lane; the last may be one word."""
        return -(-self.value_stages // SPAN)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a thread block is laid out.

    Attributes:
        warps: 8 or 16.
        depth: slots of each warp's ring.
        tiles: tiles of a chunk, 2 or 4.
        splits: thread blocks that share the tokens of a sequence.
    """

    warps: int
    depth: int
    tiles: int
    splits: int

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.tiles * TILE


@dataclasses.dataclass(frozen=True)
class Memory:
    """Shared memory of a thread block: offsets in bytes from a multiple of 128.

    Attributes:
        slot: bytes of a chunk's codes, those of keys first.
        ring: bytes from a slot of the warps to their next one.
        rest: start of the last slots. Exact tokens and products use them before codes do.
        sums: bytes of a warp's sums of one row, at the end.
        nbytes: bytes of all of it, with what alignment may take.
    """

    slot: int
    ring: int
    rest: int
    sums: int
    nbytes: int

    @classmethod
    def of(cls, problem: Problem, config: Config) -> "Memory":
        """Lay out the slots: the first one of every warp, then the second ones, and so on."""
        p, warps = problem, config.warps
        slot = config.tokens * (p.key_stages + p.value_stages) // 8
        ring = warps * slot
        rest = (config.depth - 1) * ring
        sums = (p.value_stages + 8) * 4
        end = warps * (ROWS * sums + 2 * ROWS * 4)
        recent = p.recent.nbytes(warps) if p.recent else 0
        made = mosaic_gpu_products.Layout(p, 0).tile_bytes  # type: ignore[arg-type]
        nbytes = max(config.depth * ring, rest + made, rest + recent, end)
        return cls(slot, ring, rest, sums, nbytes + 128)


def choose_config(problem: Problem) -> Config:
    """Choose the quickest split by estimate, in the first layout that fits shared memory.

    Args:
        problem: the shapes.

    Raises:
        InputError: if no layout fits.
    """
    many = problem.value_stages <= 128 and problem.key_stages <= 256
    for warps, tiles, depth in (
        *(((16, 4, 3), (16, 4, 2)) if many else ()),
        *((8, tiles, depth) for tiles in (4, 2) for depth in (3, 2)),
    ):
        config = min(
            (Config(warps, depth, tiles, splits) for splits in range(1, PROCESSORS + 1)),
            key=functools.partial(time, problem),
        )
        if Memory.of(problem, config).nbytes <= SHARED_BYTES:
            return config
    raise InputError(
        f"{problem.key_stages} stages of keys and {problem.value_stages} of values take more "
        "shared memory than there is; use fewer stages"
    )


def time(problem: Problem, config: Config) -> float:
    """Estimate how long the busiest multiprocessor works, in chunks that all warps take at once.

    Args:
        problem: the shapes.
        config: of a thread block.
    """
    chunks = problem.blocks * problem.block // config.tokens
    rounds, rest = divmod(math.ceil(chunks / config.splits), config.warps)
    each = rounds + max(LEAST, rest / config.warps) * (rest > 0)
    return math.ceil(problem.pairs * config.splits / PROCESSORS) * (each + START)


def check_config(problem: Problem, config: Config) -> None:
    """Refuse a layout that the kernel cannot have.

    Args:
        problem: the shapes.
        config: of a thread block.

    Raises:
        InputError: naming what does not fit.
    """
    if config.warps not in (8, 16) or config.tiles not in (2, 4):
        raise InputError(f"{config} must have 8 or 16 warps, and chunks of 2 or 4 tiles")
    if config.depth < 2 or config.splits < 1:
        raise InputError(f"{config} must have a depth of at least 2 and splits of at least 1")
    nbytes = Memory.of(problem, config).nbytes
    if nbytes > SHARED_BYTES:
        raise InputError(
            f"{config} takes {nbytes} bytes of shared memory, and there are {SHARED_BYTES}; "
            "use fewer warps, tiles or slots"
        )


# --- what is supported ----------------------------------------------------------------------------


def problem_of(
    query: Array,
    mean: Array | None,
    inv_freq: Array,
    key_planes: Array,
    value_planes: Array,
    key_codewords: Array,
    value_codewords: Array,
    blocks: Array,
    *,
    every: int = 1,
    stride: int = 1,
    fills: int = 1,
) -> Problem:
    """Check a call, and give its shapes.

    Args:
        query: queries. All arguments are as `attend_planes` takes them.
        mean: mean key, or None.
        inv_freq: rotary frequencies.
        key_planes: codes of the keys.
        value_planes: codes of the values.
        key_codewords: codewords of the keys.
        value_codewords: codewords of the values.
        blocks: numbers of valid blocks.
        every: tokens between knots of the mean key's share.
        stride: blocks of the sequence from one of these to the next.
        fills: equal parts of a block that are valid one by one.

    Raises:
        InputError: naming what was given and what is supported.
    """
    batch, tokens, heads, group, dim = query.shape
    shared, n, block = *key_planes.shape[1:3], TILE * key_planes.shape[3]

    def refuse(what: str, given: Any, supported: str) -> None:
        raise InputError(
            f"the fused GPU kernel takes {supported} as {what}, got {given}; use another "
            "implementation"
        )

    if dim not in (64, 128, 256):
        refuse("head_dim", dim, "64, 128 or 256")
    if not 1 <= group <= 8:
        refuse("query heads per KV head", group, "1 to 8")
    if not 1 <= tokens <= 8:
        refuse("query tokens", tokens, "1 to 8")
    if not shared or heads % shared or heads // shared not in (1, 2, 4):
        given = f"{heads} KV heads and codes of {shared}"
        refuse("KV heads that share a code", given, "1, 2 or 4")
    if fills < 1 or block % fills or block // fills % CHUNK:
        refuse(
            "tokens of a block, or of the parts of it",
            f"{block} in {fills}",
            f"a multiple of {CHUNK}",
        )
    if mean is not None and mean.shape != (heads, dim):
        refuse("mean key", mean.shape, f"({heads}, {dim})")
    if every not in KNOTS:
        refuse("tokens between knots of the mean key", every, " or ".join(map(str, KNOTS)))
    if inv_freq.shape != (dim // 2,):
        refuse("rotary frequencies", inv_freq.shape, f"({dim // 2},)")
    for name, codewords, codes in (
        ("keys", key_codewords, key_planes),
        ("values", value_codewords, value_planes),
    ):
        stages = codewords.shape[2]
        if codewords.shape != (heads, 1, stages, 2, dim):
            refuse(
                f"codewords of {name}", codewords.shape, f"whole heads, ({heads}, 1, R, 2, {dim})"
            )
        if stages % UNIT or not UNIT <= stages <= MOST_STAGES:
            refuse(f"stages of {name}", stages, f"a multiple of {UNIT} up to {MOST_STAGES}")
        if codewords.dtype != jnp.bfloat16:
            refuse(f"dtype of the codewords of {name}", codewords.dtype, "bfloat16")
        expected = (batch, shared, n, block // TILE, stages)
        if codes.shape != expected or codes.dtype != jnp.uint32:
            refuse(f"codes of {name}", f"{codes.dtype} {codes.shape}", f"uint32 {expected}")
    if query.dtype != jnp.float32:
        refuse("dtype of the query", query.dtype, "float32")
    if blocks.shape != (batch,) or not jnp.issubdtype(blocks.dtype, jnp.integer):
        refuse("blocks", f"{blocks.dtype} {blocks.shape}", f"integers ({batch},)")
    sizes = batch, tokens, heads, group, heads // shared, n, block, dim
    of_sides = key_codewords.shape[2], value_codewords.shape[2]
    problem = Problem(*sizes, *of_sides, 0 if mean is None else every, stride, fills)
    if n:
        choose_config(problem)
    return problem


def check_supported(*arrays: Any, every: int = 1, stride: int = 1, fills: int = 1) -> Problem:
    """Check a call as `problem_of` does, and that the device and the version of jax can run it.

    Args:
        arrays: arguments of `problem_of`, in its order.
        every: tokens between knots of the mean key's share.
        stride: blocks of the sequence from one of these to the next.
        fills: equal parts of a block that are valid one by one.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(*arrays, every=every, stride=stride, fills=fills)
    devices.check_hopper()
    return problem


# --- the operation --------------------------------------------------------------------------------


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
    config: Config | None = None,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """Attend as `gsrq_jax.kernels.reference.attend_planes` does, on a Hopper GPU.

    Two kernels: codes and exact tokens, and the product with the codewords of values with all that
    follows. Call it under jit. Ours.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None for nothing.
        inv_freq: rotary frequencies.
        key_planes: see `gsrq_jax.kernels.planes.keys_to_planes`; s is 1, 2 or 4.
        value_planes: see `gsrq_jax.kernels.planes.values_to_planes`.
        key_codewords: codewords of this layer's keys, bfloat16.
        value_codewords: codewords of this layer's values, bfloat16.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next: block n starts at ``first + n
            stride b``.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`, one of `KNOTS`.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
        recent: exact tokens in the same softmax. The kernel attends to them where
            `gsrq_jax.kernels.mosaic_gpu_recent` supports them and they fit; else plain jnp does.
        dtype: of the values that are returned.
        config: layout of a thread block, instead of the one that `choose_config` gives.

    Returns:
        The softmax-weighted values (0 where there are none) and the log-sum-exp of the scores
        (-inf there), NaN where a query is not finite or too large for float16.

    Raises:
        InputError: if the shapes, dtypes, the device, the version of jax or the layout are not
            supported.
    """
    from gsrq_jax.kernels import mosaic_gpu_finish

    arrays = query, mean, inv_freq, key_planes, value_planes, key_codewords, value_codewords, blocks
    problem = check_supported(*arrays, every=every, stride=stride, fills=fills)
    if not problem.blocks:
        nothing = jnp.zeros_like(query), jnp.full(query.shape[:4], -jnp.inf)
        return with_beside(nothing, recent and reference.attend_recent(query, recent), dtype)
    config = config or choose_config(problem)
    check_config(problem, config)
    exact = mosaic_gpu_recent.supported(query, recent) if recent else None
    with_exact = dataclasses.replace(problem, recent=exact)
    if exact and Memory.of(with_exact, config).nbytes <= SHARED_BYTES:
        problem = with_exact
    blocks = blocks.astype(jnp.int32)
    inputs = score_inputs(problem, query, mean, inv_freq, key_codewords, first)
    if recent and problem.recent:
        inputs += mosaic_gpu_recent.arrays_of(recent)
    made = fused_kernel(problem, config)(key_planes, value_planes, blocks, *inputs)
    histogram, scale, *others = made
    beside = None
    if problem.recent:
        beside = mosaic_gpu_recent.in_parts(*others[:2])
    elif recent:
        beside = reference.attend_recent(query, recent)
    return mosaic_gpu_finish.finish(
        problem, query, blocks, histogram, scale, value_codewords, beside, dtype
    )


def score_inputs(
    problem: Problem,
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_codewords: Float[Array, "H 1 R 2 d"],
    first: int | Int[Array, ""],
) -> list[Array]:
    """Make what the scores are made of, in the order of `score_arrays`.

    Args:
        problem: the shapes.
        query: scaled queries, rotated at their own positions.
        mean: mean key before RoPE, if there is one.
        inv_freq: rotary frequencies.
        key_codewords: codewords of this layer's keys.
        first: position of the first token of block 0.
    """
    p = problem
    cos, sin = rotary.turns(first + p.stride * p.block * jnp.arange(p.blocks), inv_freq)
    arrays: dict[str, Array] = {"query": query, "cos": cos, "sin": sin, "words": key_codewords}
    if mean is not None:
        arrays["mean"] = mean.astype(jnp.float32)
        arrays["inv_freq"] = inv_freq.astype(jnp.float32)
        arrays["waves"] = mosaic_gpu_products.waves(p, inv_freq)  # type: ignore[arg-type]
    return [arrays[name] for name in score_arrays(p)]


def score_arrays(problem: Problem) -> tuple[str, ...]:
    """Name what scores are made of beside codes, as `Addresses` does.

    Args:
        problem: the shapes.
    """
    of_mean = ("mean", "inv_freq", "waves") if problem.every else ()
    return ("query", "cos", "sin", "words", *of_mean)


# --- the kernel -----------------------------------------------------------------------------------


def fused_kernel(problem: Problem, config: Config) -> Any:
    """Make the kernel: a function of codes, blocks, `score_inputs` and, if it has exact tokens,
    `mosaic_gpu_recent.arrays_of` them. Its results are `outputs`.

    Args:
        problem: the shapes.
        config: of a thread block.
    """
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        PlanesKernel(problem, config, warp, Addresses.of(problem, *places)).run()

    return warp_kernel(
        run,
        outputs=[jax.ShapeDtypeStruct(*x) for x in outputs(problem, config).values()],
        nbytes=Memory.of(problem, config).nbytes,
        parts=problem.pairs * config.splits,
        warps=config.warps,
        name="attend_planes",
    )


def outputs(problem: Problem, config: Config) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """Give shapes and dtypes of what the kernel writes.

    ``histogram``: how much probability has bit 0, and bit 1, of each stage, in units of ``scale``
    as a power of 2. ``products`` and ``share`` are the kernel's own.

    Args:
        problem: the shapes.
        config: of a thread block.
    """
    p = problem
    parts = p.pairs, config.splits
    made: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
        "histogram": ((*parts, ROWS, p.value_stages, 2), jnp.float32),
        "scale": ((*parts, ROWS), jnp.int32),
    }
    if p.recent:
        made |= p.recent.outputs(p.recent.parts(config.splits))
    made["products"] = (p.pairs, p.blocks, ROWS, 2 * p.key_stages), jnp.float16
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
    words: Any
    histogram: Any
    scale: Any
    products: Any
    shared: Any
    mean: Any = None
    inv_freq: Any = None
    waves: Any = None
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
        made = outputs(problem, Config(8, 2, 2, 1))
        arrays = *score_arrays(problem), *(mosaic_gpu_recent.ARRAYS if problem.recent else ())
        names = "keys", "values", "blocks", *arrays, *made, "shared"
        return cls(**dict(zip(names, places, strict=True)))


@dataclasses.dataclass(frozen=True)
class Table:
    """What a warp needs to score the tokens of a block.

    Attributes:
        columns: ``[steps][COLUMNS]`` right operands: column ``2 q + i`` of the j-th is bit
            ``2 j + i`` of the entries of row q.
        step: what one is, of the lane's row.
        offset: what is added, of the lane's row.
        shares: address of the mean key's shares of the lane's row.
    """

    columns: list[list]
    step: Any
    offset: Any
    shares: Any


class PlanesKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(self, problem: Problem, config: Config, warp: Any, at: Addresses):
        self.problem, self.config, self.warp, self.at = problem, config, warp, at
        self.memory = Memory.of(problem, config)
        self.base = (at.shared + 127) & 0xFFFFFF80
        self.g, self.t = warp.lane >> 2, warp.lane & 3
        p = problem
        self.pair = warp.block // config.splits
        self.rows = mosaic_gpu_products.Rows(p, warp, self.pair)  # type: ignore[arg-type]
        head, sequence = self.rows.head, self.rows.sequence
        (valid,) = warp.load_global(at.blocks + warp.wide(sequence) * 4)
        valid = warp.unsigned_min(warp.signed_max(valid, warp.integer(0)), p.blocks * p.fills)
        self.chunks_of_block = p.block // config.tokens
        # Chunks of this thread block, then those of this warp, of all of the sequence.
        chunks = valid * (self.chunks_of_block // p.fills)
        self.first, self.count = self._part(
            warp.integer(0), chunks, warp.block % config.splits, config.splits
        )
        self.own, self.rounds = self._part(self.first, self.count, warp.index, config.warps)
        shared_head = sequence * (p.heads // p.together) + head // p.together
        chunk = warp.wide(shared_head) * (p.blocks * self.chunks_of_block) + warp.wide(self.own)
        self.key_bytes, self.value_bytes = (
            config.tokens * stages // 8 for stages in (p.key_stages, p.value_stages)
        )
        self.keys, self.values = (
            at.keys + chunk * self.key_bytes,
            at.values + chunk * self.value_bytes,
        )
        self.slot = self.base + warp.index * self.memory.slot

    def _part(self, first: Any, count: Any, index: Any, parts: int) -> tuple[Any, Any]:
        """The first of some things, and how many, that one of equal parts has."""
        warp = self.warp
        each = (count + (parts - 1)) // parts
        begin = warp.unsigned_min(each * index, count)
        return first + begin, warp.unsigned_min(each, count - begin)

    def run(self) -> None:
        """Exact tokens and products while the first codes are copied, all chunks, their sum."""
        warp = self.warp
        for i in range(self.config.depth - 1):
            self._fetch(warp.integer(i), self.slot + i * self.memory.ring)
        self._recent()
        self._products()
        top, total, sums = self._chunks()
        warp.copies_wait(0)
        warp.sync_block()
        self._together(top, total, sums)

    # Copies.

    def _fetch(self, round_: Any, slot: Any) -> None:
        """Begin to copy the codes of one of the warp's chunks, if there is such a chunk."""
        warp = self.warp
        there = warp.less(round_, self.rounds)
        own = warp.lane * 16
        for place, nbytes, at in (
            (self.keys, self.key_bytes, 0),
            (self.values, self.value_bytes, self.key_bytes),
        ):
            source = place + warp.wide(round_ * nbytes + own)
            for start in range(0, nbytes, 512):
                to, begin = slot + (own + (at + start)), source + warp.wide(warp.integer(start))
                copy = functools.partial(warp.copy_16_to_shared, to, begin, there)
                if nbytes - start >= 512:
                    copy()
                else:
                    warp.when(warp.less(warp.lane, (nbytes - start) // 16), copy)
        warp.copies_end_group()

    # What is made before.

    def _recent(self) -> None:
        """Exact tokens, by all warps of the first thread blocks of a sequence."""
        warp, exact, config = self.warp, self.problem.recent, self.config
        if not exact:
            return
        parts, part = exact.parts(config.splits), warp.block % config.splits

        def recent() -> None:
            mosaic_gpu_recent.RecentTokens(
                *(exact, warp, self.at, self.rows, self.base + self.memory.rest),
                warps=config.warps,
                part=part,
                parts=parts,
                sync=warp.sync_block,
            ).run()
            warp.sync_block()  # before its memory is that of others

        warp.when(warp.less(part, parts), recent)

    def _products(self) -> None:
        """Products of all blocks in which the thread block has chunks."""
        warp, per = self.warp, self.chunks_of_block
        first = self.first // per
        end = (self.first + self.count + (per - 1)) // per
        count = warp.select(warp.less(warp.integer(0), self.count), end - first, 0)
        nbytes = self.memory.nbytes - 128 - self.memory.rest
        mosaic_gpu_products.Products(
            self.problem,  # type: ignore[arg-type]
            mosaic_gpu_products.Layout(self.problem, nbytes),  # type: ignore[arg-type]
            warp,
            self.at,  # type: ignore[arg-type]
            base=self.base + self.memory.rest,
            warps=self.config.warps,
            rows=self.rows,
            first=first,
            count=count,
        ).run()

    # Tables.

    def _table(self, block: Any) -> Table:
        """Make the table of a block from its products, in registers.

        Lane (g, t) has 16 stages of row ``g // 2``, as many as its neighbour ``g ^ 1`` has of the
        same word: it turns their bits, keeps the planes that are its column's, and gives the
        neighbour the others. Cost, 128 stages: some 240 instructions, 12 SHFL and 4 loads of 16
        bytes among them.
        """
        warp, p = self.warp, self.problem
        row, odd = self.g >> 1, self.g & 1
        of_row = 2 * p.key_stages * 2
        unit = warp.wide(self.pair) * p.blocks + warp.wide(block)
        source = self.at.products + (unit * ROWS + warp.wide(row)) * of_row
        entries: list[list] = []
        offset, most = warp.floating(0.0), warp.floating(1e-30)
        zero = warp.floating(0.0)
        for step in range(p.steps):
            words = min(4, p.key_stages // 32 - 4 * step)
            place = source + warp.wide(warp.unsigned_min(self.t, words - 1) * 128 + odd * 64)
            read = [x for i in range(4) for x in warp.load_written(place, step * 512 + i * 16, 4)]
            of_step = []
            for word in read:
                low, high = warp.halves(word)
                gain = high - low
                if words < 4:
                    there = warp.less(self.t, words)
                    low, gain = warp.select(there, low, zero), warp.select(there, gain, zero)
                offset = offset + low
                most = warp.fmax(most, warp.fmax(gain, zero - gain))
                of_step.append(gain)
            entries.append(of_step)
        for mask in (1, 2, 4):
            offset = offset + warp.from_lane_xor(offset, mask)
            most = warp.fmax(most, warp.from_lane_xor(most, mask))
        scale = warp.reciprocal(most) * ENTRY_MOST
        large = warp.floating(LARGE * 1.5)
        is_odd = warp.equal(odd, 1)
        columns = []
        for of_step in entries:
            numbers = [warp.bits_of(warp.fma(x, scale, large)) for x in of_step]
            turned = [
                warp.choose_bytes(a, b, 0x5410)
                for a, b in zip(numbers[:8], numbers[8:], strict=True)
            ]
            for distance, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
                others = mask ^ 0xFFFFFFFF
                for i in range(8):
                    if not i & distance:
                        a, b = turned[i], turned[i + distance]
                        turned[i] = (a & mask) | ((b << distance) & others)
                        turned[i + distance] = ((a >> distance) & mask) | (b & others)
            of_step = []
            for first in range(0, COLUMNS, 2):
                even_two, odd_two = (
                    self._planes(turned, 2 * first + i, 2 * first + 2 + i) for i in range(2)
                )
                keep = warp.select(is_odd, odd_two, even_two)
                got = warp.from_lane_xor(warp.select(is_odd, even_two, odd_two), 4)
                low, high = warp.select(is_odd, got, keep), warp.select(is_odd, keep, got)
                of_step += [warp.choose_bytes(low, high, x) for x in (0x5410, 0x7632)]
            columns.append(of_step[:COLUMNS])
        own = self.t << 3
        step, offset = (warp.from_lane(x, own) for x in (most, offset))
        shares = None
        if p.every:
            shares = self.at.share + (unit * ROWS + warp.wide(self.t)) * (p.unit_knots * 4)
        return Table(columns, step * (1 / ENTRY_MOST / UNIT_OF_SUM), offset, shares)

    def _planes(self, turned: list, first: int, second: int) -> Any:
        """Two bits of 16 entries each: byte ``h`` of bit i has entries ``8 h …``."""
        a, b = first // 8, second // 8
        selector = a | (2 + a) << 4 | (4 + b) << 8 | (6 + b) << 12
        return self.warp.choose_bytes(turned[first % 8], turned[second % 8], selector)

    # Chunks.

    def _chunks(self) -> tuple[Any, Any, list]:
        """All chunks of this warp: largest score and sum of its row, by lane, and sums of bits."""
        warp, p, per = self.warp, self.problem, self.chunks_of_block
        end = self.own + self.rounds
        block = self.own // per
        count = warp.select(
            warp.less(warp.integer(0), self.rounds), (end + (per - 1)) // per - block, 0
        )
        sums = [warp.floating(0.0)] * (p.value_stages // 32 * 8)
        start = [warp.floating(NOTHING), warp.floating(0.0), self.slot, *sums]

        def of_block(i: Any, carry: list) -> list:
            here = block + i
            table = self._table(here)
            begin = warp.signed_max(here * per, self.own)
            last = warp.unsigned_min((here + 1) * per, end)

            def of_chunk(k: Any, carry: list) -> list:
                return self._chunk(table, begin + k, here, carry)

            return warp.loop(last - begin, carry, of_chunk)

        top, total, _, *sums = warp.loop(count, start, of_block)
        return top, total, sums

    def _chunk(self, table: Table, chunk: Any, block: Any, carry: list) -> list:
        """One chunk, whose codes lie in the slot that is carried."""
        warp, config, memory = self.warp, self.config, self.memory
        top, total, slot, *sums = carry
        warp.copies_wait(config.depth - 2)
        warp.sync()
        last = self.slot + (config.depth - 1) * memory.ring
        at_first = warp.equal(slot, self.slot)
        before = warp.select(at_first, last, slot - memory.ring)
        self._fetch(chunk - self.own + (config.depth - 1), before)
        following = warp.select(warp.equal(slot, last), self.slot, slot + memory.ring)

        scores = self._scores(table, chunk - block * self.chunks_of_block, slot)
        most = functools.reduce(warp.fmax, [x for tile in scores for x in tile])
        for mask in (4, 8, 16):
            most = warp.fmax(most, warp.from_lane_xor(most, mask))
        larger = warp.fmax(top, most)
        old, new = warp.exp2(top - larger), warp.exp2(most - larger)
        columns, mass = self._probabilities(scores, most)
        total = warp.fma(mass, new, total * old)
        of_columns = [(self.t << 1) & 3, ((self.t << 1) + 1) & 3]
        olds, news = ([warp.from_lane(x, lane) for lane in of_columns] for x in (old, new))
        less = [x * -LARGE for x in news]
        for span in range(self.problem.spans):
            added = self._bits(slot + self.key_bytes, span, columns)
            for i, x in enumerate(added):
                at, j = span * 16 + i, i % 2
                kept = warp.fma(sums[at], olds[j], less[j])
                sums[at] = warp.fma(warp.from_bits(x), news[j], kept)
        return [larger, total, following, *sums]

    def _scores(self, table: Table, chunk: Any, slot: Any) -> list[list]:
        """``[tiles][4]`` scores of the lane's row, in powers of 2: tokens g, g + 8, g + 16, g + 24.

        Cost, a tile and 128 stages: 14 binary products, 56 FFMA.
        """
        warp, p = self.warp, self.problem
        shares = self._shares(table, chunk)
        scores = []
        for tile in range(self.config.tiles):
            codes = []
            for step in range(p.steps):
                words = min(4, p.key_stages // 32 - 4 * step)
                lane = warp.lane
                if words < 4:  # lanes that have no word get zeros from the table
                    lane = self.g * words + warp.unsigned_min(self.t, words - 1)
                at = tile * p.key_stages * 4 + step * 512
                codes.append(warp.load_shared(slot + lane * 16, at, 4))
            others = shares(tile)
            of_tile = []
            for half in range(2):
                sums = self._products_of(table, [x[2 * half : 2 * half + 2] for x in codes])
                of_tile += [
                    warp.fma(x, table.step, other)
                    for x, other in zip(sums, others[2 * half :], strict=False)
                ]
            scores.append(of_tile)
        return scores

    def _products_of(self, table: Table, codes: list[list]) -> list:
        """Sums of entries, of tokens g and g + 8: counts of common bits by their weights."""
        warp = self.warp
        sums: list = [None, None]
        for column in range(COLUMNS):
            counts: Any = None
            for step in range(0, len(codes) - 1, 2):
                both = [table.columns[step + i][column] for i in range(2)]
                counts = warp.binary_product([*codes[step], *codes[step + 1]], both, counts)
            if len(codes) % 2:
                last = table.columns[-1][column]
                if counts is None:
                    counts = warp.short_binary_product(codes[-1], last)
                else:
                    none = warp.integer(0)
                    counts = warp.binary_product([*codes[-1], none, none], [last, none], counts)
            for token in range(2):
                for i in range(2):
                    bit = 2 * column + i
                    sign = -1.0 if bit == BITS - 1 else 1.0
                    weight = warp.floating(sign * COUNT * 2.0**bit)
                    count = warp.from_bits(counts[2 * token + i])
                    so_far = sums[token]
                    sums[token] = (
                        count * weight if so_far is None else warp.fma(count, weight, so_far)
                    )
        return sums

    def _shares(self, table: Table, chunk: Any) -> Callable[[int], list]:
        """Offset and mean key's share of the lane's row, of the lane's four tokens of a tile."""
        warp, every = self.warp, self.problem.every
        if not every:
            return lambda _: [table.offset] * 4
        if every == 1:
            place = table.shares + warp.wide(chunk * (self.config.tokens * 4) + self.g * 4)

            def each(tile: int) -> list:
                at = [(tile * TILE + 8 * w) * 4 for w in range(4)]
                return [warp.load_written(place, x, kind="f")[0] + table.offset for x in at]

            return each
        lead = mosaic_gpu_products.LEAD * 4
        own = self.g // every if every < 8 else warp.integer(0)
        place = table.shares + warp.wide(chunk * (self.config.tokens // every * 4) + own * 4)
        since = warp.to_float(self.g % every if every < 8 else self.g)
        read: dict[int, Any] = {}

        def knot(i: int) -> Any:
            if i not in read:
                (read[i],) = warp.load_written(place, lead + i * 4, kind="f")
            return read[i]

        def between(tile: int) -> list:
            found = []
            for w in range(4):
                i, rest = divmod(tile * TILE + 8 * w, every)
                gain = (knot(i + 1) - knot(i)) * (1 / every)
                here = since + float(rest) if rest else since
                found.append(warp.fma(gain, here, knot(i) + table.offset))
            return found

        return between

    def _probabilities(self, scores: list[list], most: Any) -> tuple[list, Any]:
        """Right operands of byte products, two words a tile, and the sum of the lane's tokens.

        Columns are the upper bytes of the four rows, then the lower ones. A lane's four tokens of a
        tile are the four bytes of a word. Cost, a tile: 4 × (FADD, EX2, FFMA), 4 PRMT, 4 SHFL.
        """
        warp = self.warp
        source = (self.t << 2) + (self.g & 3)
        upper_columns = warp.less(self.g, 4)
        sums = [warp.integer(0)] * 2
        operands = []
        most_bits, large = warp.floating(2.0**PROBABILITY_BITS - 1), warp.floating(LARGE)
        for tile in scores:
            p = [warp.bits_of(warp.fma(warp.exp2(x - most), most_bits, large)) for x in tile]
            a, b = (warp.choose_bytes(*p[i : i + 2], 0x5140) for i in (0, 2))
            both = [warp.choose_bytes(a, b, x) for x in (0x5410, 0x7632)]
            sums = [warp.sum_bytes(x, so_far) for x, so_far in zip(both, sums, strict=True)]
            operand = []
            for lane in (source, source + 16):
                low, high = (warp.from_lane(x, lane) for x in both)
                operand.append(warp.select(upper_columns, high, low))
            operands.append(operand)
        return operands, warp.to_float(sums[0] + (sums[1] << 8))

    def _bits(self, values: Any, span: int, columns: list) -> list:
        """Sums of probabilities where bits are set, of 64 stages: float32 from `LARGE` on, as bits.

        Each four of the result are a product's: classes 2 i and 2 i + 1 of stages, whose bits stand
        at another place of a byte, and which are 2 to this place times what they should be. Cost,
        four tiles: 16 products, 64 LOP3, 4 LDS of 8 bytes.
        """
        warp, p = self.warp, self.problem
        whole = p.value_stages - span * SPAN >= SPAN
        products = 4 if whole else 2
        sums = [[warp.bits_of(warp.floating(LARGE))] * 4 for _ in range(products)]
        for tile, operand in enumerate(columns):
            at = tile * p.value_stages * 4 + span * SPAN * 4
            if whole:
                first, second = warp.load_shared(values + warp.lane * 8, at, 2)
            else:
                (first,) = warp.load_shared(values + warp.lane * 4, at)
                second = first >> 4
            for i in range(products):
                masks = [0x01010101 << (2 * i + j) for j in range(2)]
                left = [word & mask for word in (first, second) for mask in masks]
                sums[i] = warp.byte_product(left, operand, sums[i])
        return [x for product in sums for x in product]

    # The end.

    def _together(self, top: Any, total: Any, sums: list) -> None:
        """The sum of all warps, out to global memory."""
        warp, config, memory = self.warp, self.config, self.memory
        for mask in (4, 8, 16):
            total = total + warp.from_lane_xor(total, mask)
        facts = self.base + config.warps * (ROWS * memory.sums)
        own = facts + warp.index * (2 * ROWS * 4) + self.t * 4
        first = warp.equal(self.g, 0)
        warp.store_shared(own, [top], where=first)
        warp.store_shared(own, [total], ROWS * 4, where=first)
        # Columns of upper bytes, in lanes t < 2, and those of lower ones.
        place = self.base + warp.index * (ROWS * memory.sums) + self.g * 4
        place = place + self.t * (2 * memory.sums)
        upper = warp.less(self.t, 2)
        for i, x in enumerate(sums):
            product, (row, column) = i // 4, divmod(i % 4, 2)
            bit = product % 4 * 2 + row
            both = warp.fma(x, warp.floating(256.0), warp.from_lane_xor(x, 2)) * 2.0**-bit
            stage = product // 4 * SPAN + 8 * bit
            warp.store_shared(place, [both], column * memory.sums + stage * 4, where=upper)
        warp.sync_block()
        # Lane 4 w + q: warps w, w + 8, row q.
        tops, totals = [], []
        for start in range(0, config.warps, 8):
            at = facts + (self.g + start) * (2 * ROWS * 4) + self.t * 4
            tops += warp.load_shared(at, kind="f")
            totals += warp.load_shared(at, ROWS * 4, kind="f")
        most = functools.reduce(warp.fmax, tops)
        for mask in (4, 8, 16):
            most = warp.fmax(most, warp.from_lane_xor(most, mask))
        scale = warp.signed_max(warp.floor(most) + 1, warp.integer(EMPTY))
        less = warp.to_float(scale)
        weights = [warp.exp2(x - less) for x in tops]
        total = warp.floating(0.0)
        for x, weight in zip(totals, weights, strict=True):
            total = warp.fma(x, weight, total)
        for mask in (4, 8, 16):
            total = total + warp.from_lane_xor(total, mask)
        out = warp.less(warp.index * 32 + warp.lane, ROWS)
        place = self.at.scale + warp.wide(warp.block * (ROWS * 4) + self.t * 4)
        warp.store_global(place, [scale], where=out)
        self._write(weights, total)

    def _write(self, weights: list, total: Any) -> None:
        """Probability that has either bit, of 32 stages of a row at a time.

        Args:
            weights: of warps ``lane // 4 + 8 i`` and row ``lane % 4``.
            total: of row ``lane % 4``.
        """
        warp, p, config, memory = self.warp, self.problem, self.config, self.memory
        units = p.value_stages // 32
        index = warp.integer(config.warps - 1) - warp.index
        rounds = (warp.integer(ROWS * units + config.warps - 1) - index) // config.warps

        def unit(i: Any, _: list) -> list:
            number = i * config.warps + index
            row, stage = number // units, number % units * 32 + warp.lane
            place = self.base + row * memory.sums + stage * 4
            mass = warp.floating(0.0)
            for w in range(config.warps):
                (x,) = warp.load_shared(place, w * ROWS * memory.sums, kind="f")
                weight = warp.from_lane(weights[w // 8], row + 4 * (w % 8))
                mass = warp.fma(x, weight, mass)
            of_row = warp.from_lane(total, row)
            out = self.at.histogram + warp.wide(warp.block * ROWS + row) * (p.value_stages * 8)
            both = [(of_row - mass) * MASS, mass * MASS]
            warp.store_global(out + warp.wide(stage * 8), both)
            return []

        warp.loop(rounds, [], unit)
