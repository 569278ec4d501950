"""Decode attention over bit planes, fused, on Hopper GPUs: Pallas Mosaic GPU (ours).

Codes have one bit a stage, so a score is a sum over stages of bit times a table's entry, and the
values' part of the output needs the mean of each stage's bit. Both are products of the codes'
words as they lie in the cache (`gsrq_jax.kernels.planes`).

One warp does everything for its tokens, 128 at a time:

- Scores: binary products of the keys' words with the bit planes of the table, whose entries are
  integers of `PLANES` bits. Counts, read as subnormal float32, get the weight of their plane.
- Probabilities: of 16 bits below the largest score of the 128 tokens, as two bytes each.
- Values: products of bytes. Each of eight masks leaves one bit in each byte of the values' words.
  The bit's place is a weight that is taken out at the end.

A thread block takes four query rows of one KV head and one part of its tokens. Its warps' sums are
put together in shared memory; XLA adds the parts and multiplies by the codewords. XLA also makes
the tables. What goes in is `gsrq_jax.kernels.reference.attend_planes`'s: B sequences, T query
tokens, H KV heads, q query heads each, N blocks (of the kernel's frames) of b tokens.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from gsrq_jax.kernels import devices, mosaic_gpu_recent, reference, rotary
from gsrq_jax.kernels.devices import PROCESSORS
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.planes import SPAN, STEP, TILE, UNIT
from gsrq_jax.kernels.precision import in_pieces
from gsrq_jax.kernels.reference import Recent, with_beside

CHUNK = 128
"""Tokens that share a scale of probabilities."""
TILES = CHUNK // TILE
ROWS = 4
"""Query rows of a thread block."""
PLANES = 12
"""Bits of a table's entry, in two's complement."""
COLUMNS = PLANES // 2
"""Binary products of a tile of 16 tokens: two planes of each row in one."""
MOST_STAGES = 256
SHARED_BYTES = 227 * 1024 - 2048
"""Shared memory of a thread block on sm_90, less what Mosaic takes."""
DEPTH = 3
"""Chunks that a warp has in shared memory: one in use, the others on their way."""
LOWEST = -1e30  # a running maximum before the first score
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call."""

    batch: int
    tokens: int
    heads: int  # KV heads
    group: int  # query heads of each
    shared: int  # KV heads that share their codes
    blocks: int  # that a sequence can hold
    block: int  # tokens of one
    dim: int
    key_stages: int
    value_stages: int
    every: int  # tokens between knots of the mean key's share, 0 if there is no mean key
    stride: int = 1  # blocks of the sequence from one of these to the next
    fills: int = 1  # equal parts of a block that are valid one by one

    @property
    def row_groups(self) -> int:
        """Groups of four query rows of a KV head."""
        return -(-self.tokens * self.group // ROWS)

    @property
    def pairs(self) -> int:
        """(KV head, sequence, group of rows), in this order."""
        return self.heads * self.batch * self.row_groups

    @property
    def steps(self) -> int:
        """Products along the keys' stages."""
        return -(-self.key_stages // STEP)

    @property
    def chunks(self) -> int:
        """Of a block."""
        return self.block // CHUNK

    @property
    def knots(self) -> int:
        """Of a block and row, the first of the next block among them."""
        return self.block // self.every + 1 if self.every else 0

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 stages of the values."""
        return self.value_stages // 16

    @property
    def chunk_bytes(self) -> tuple[int, int]:
        """Bytes of a chunk of keys, and of values."""
        return CHUNK // 8 * self.key_stages, CHUNK // 8 * self.value_stages

    @property
    def sum_bytes(self) -> int:
        """Bytes of a warp's sums."""
        return self.value_stages * ROWS * 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How work is laid out: ``warps`` of a thread block, ``splits`` of a sequence's tokens."""

    warps: int
    splits: int

    def nbytes(self, problem: Problem) -> int:
        """Bytes of shared memory."""
        ring = self.warps * DEPTH * sum(problem.chunk_bytes)
        merged = self.warps * (problem.sum_bytes + 2 * ROWS * 4)
        return max(ring, merged) + 16


def choose_config(problem: Problem) -> Config:
    """As many warps as registers and shared memory allow; splits that fill the processors."""
    most = max(problem.key_stages, problem.value_stages)
    warps = 16 if most <= 128 else 8
    chunks = problem.blocks * problem.chunks
    splits = max(1, round(PROCESSORS / problem.pairs))
    return Config(warps, max(1, min(splits, -(-chunks // warps))))


def problem_of(
    query: Any,
    mean: Any,
    inv_freq: Any,
    key_planes: Any,
    value_planes: Any,
    key_codewords: Any,
    value_codewords: Any,
    blocks: Any,
    *,
    every: int = 1,
    stride: int = 1,
    fills: int = 1,
) -> Problem:
    """The shapes of a call, on any device.

    Raises:
        InputError: naming what was given and what is supported.
    """

    def refuse(what: str, given: Any, wanted: str) -> None:
        raise InputError(f"the kernel of bit planes takes {wanted} as {what}, got {given}")

    if query.ndim != 5 or key_planes.ndim != 5 or key_codewords.ndim != 5:
        refuse("query, planes and codewords", "other axes", "five axes each")
    batch, tokens, heads, group, dim = query.shape
    of_codes, n, tiles, key_stages = key_planes.shape[1:]
    block, value_stages = tiles * TILE, value_planes.shape[-1]
    if not 1 <= group <= 8:
        refuse("query heads a KV head", group, "1 to 8")
    if not 1 <= tokens <= 8:
        refuse("query tokens", tokens, "1 to 8")
    if of_codes < 1 or heads % of_codes:
        refuse("heads of codes", of_codes, f"a divisor of {heads}")
    if fills < 1 or block % fills or block // fills % CHUNK:
        refuse("tokens of a block", block // max(fills, 1), f"a multiple of {CHUNK}")
    if mean is not None and (every % 16 or block % every):
        refuse("tokens between knots of the mean key", every, "a multiple of 16 that divides b")
    if inv_freq.shape != (dim // 2,):
        refuse("rotary frequencies", inv_freq.shape, f"({dim // 2},)")
    for name, stages, codes, words in (
        ("keys", key_stages, key_planes, key_codewords),
        ("values", value_stages, value_planes, value_codewords),
    ):
        if not UNIT <= stages <= MOST_STAGES or stages % UNIT:
            refuse(f"stages of {name}", stages, f"multiples of {UNIT} up to {MOST_STAGES}")
        expected = (batch, of_codes, n, tiles, stages)
        if codes.shape != expected or codes.dtype != jnp.uint32:
            refuse(f"planes of {name}", f"{codes.dtype} {codes.shape}", f"uint32 {expected}")
        if words.shape != (heads, 1, stages, 2, dim):
            refuse(f"codewords of {name}", words.shape, f"({heads}, 1, {stages}, 2, {dim})")
        if words.dtype not in (jnp.bfloat16, jnp.float32):
            refuse(f"dtype of the codewords of {name}", words.dtype, "bfloat16 or float32")
    if query.dtype != jnp.float32:
        refuse("dtype of the query", query.dtype, "float32")
    if blocks.shape != (batch,) or not jnp.issubdtype(blocks.dtype, jnp.integer):
        refuse("blocks", f"{blocks.dtype} {blocks.shape}", f"integers ({batch},)")
    return Problem(
        *(batch, tokens, heads, group, heads // of_codes, n, block, dim, key_stages, value_stages),
        *(0 if mean is None else every, stride, fills),
    )


def check_supported(*arrays: Any, every: int = 1, stride: int = 1, fills: int = 1) -> Problem:
    """The shapes of a call that can be made here.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(*arrays, every=every, stride=stride, fills=fills)
    devices.check_hopper()
    return problem


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
    """`gsrq_jax.kernels.reference.attend_planes` on a Hopper GPU; call it under jit.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None for nothing.
        inv_freq: rotary frequencies.
        key_planes: see `gsrq_jax.kernels.planes.keys_to_planes`.
        value_planes: see `gsrq_jax.kernels.planes.values_to_planes`.
        key_codewords: of this layer, float32 or bfloat16.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`, a multiple of 16.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
        recent: exact tokens in the same softmax.
        dtype: of the values that are returned.
        config: instead of the one chosen.

    Returns:
        The softmax-weighted values (0 where there are none) and the log-sum-exp of the scores
        (-inf there), NaN where a query is not finite.

    Raises:
        InputError: if the shapes, dtypes, the device or the version of jax are not supported.
    """
    problem = check_supported(
        *(query, mean, inv_freq, key_planes, value_planes, key_codewords, value_codewords, blocks),
        every=every,
        stride=stride,
        fills=fills,
    )
    beside = None
    if recent is not None:
        exact = mosaic_gpu_recent.supported(query, recent)
        beside = (mosaic_gpu_recent if exact else reference).attend_recent(query, recent)
    if not problem.blocks:
        nothing = jnp.zeros_like(query), jnp.full(query.shape[:4], -jnp.inf)
        return with_beside(nothing, beside, dtype)
    config = config or choose_config(problem)
    inputs = score_inputs(problem, query, mean, inv_freq, key_codewords, first)
    made = planes_kernel(problem, config)(
        key_planes, value_planes, blocks.astype(jnp.int32), *inputs
    )
    return with_beside(finish(problem, query, value_codewords, *made), beside, dtype)


# --- before the kernel ----------------------------------------------------------------------------


def score_inputs(
    problem: Problem,
    query: Array,
    mean: Array | None,
    inv_freq: Array,
    key_codewords: Array,
    first: int | Array,
) -> tuple[Array, ...]:
    """What scores are made from, of each pair and block.

    Scores are in units of log 2. Of a pair and a block there are bit planes of the table,
    ``[steps, COLUMNS, 32]`` uint32, a word for each lane; ``[ROWS, 2]`` step and offset; and, with
    a mean key, its share at the knots, ``[ROWS, knots]``.
    """
    p = problem
    # A row turned back to the start of each block: [H, B, groups, N, ROWS, d].
    rows = (_rows(p, query) * LOG2E)[:, :, :, None]
    starts = first + p.stride * p.block * jnp.arange(p.blocks)
    framed = rotary.rotate(rows, -starts[:, None], inv_freq)
    low, high = jnp.moveaxis(key_codewords[:, 0].astype(jnp.float32), -2, 0)
    columns = [high - low, low.sum(axis=1, keepdims=True)]
    if mean is not None:
        slow = rotary.slow(mean.astype(jnp.float32), inv_freq, p.every)
        columns.append(rotary.rotate(slow[:, None], p.every * jnp.arange(p.knots), inv_freq))
    products = _times(framed, jnp.concatenate(columns, axis=1))
    products = products.reshape(p.pairs, p.blocks, ROWS, -1)
    table, offset, share = jnp.split(products, (p.key_stages, p.key_stages + 1), axis=-1)
    most = 2 ** (PLANES - 1) - 1
    step = jnp.max(jnp.abs(table), axis=-1, keepdims=True) / most
    step = jnp.where(step == 0, 1, step)
    entries = jnp.round(table / step).astype(jnp.int32)
    facts = jnp.concatenate([step * 2.0**33, offset], axis=-1)
    return (_lanes(p, entries), facts, *([] if mean is None else [share[..., : p.knots]]))


def _times(
    rows: Float[Array, "H B G N r d"], columns: Float[Array, "H k d"]
) -> Float[Array, "H B G N r k"]:
    """Products of 16 bits of both, by one product of three pieces one after the other.

    Columns are filled up to a multiple of 8 with zeros.
    """
    columns = jnp.pad(columns, ((0, 0), (0, -columns.shape[1] % 8), (0, 0)))
    (high, low), (first, second) = (in_pieces(x, 2, jnp.bfloat16) for x in (rows, columns))
    return jnp.einsum(
        "HBGNrd,Hkd->HBGNrk",
        jnp.concatenate([high, low, high], axis=-1),
        jnp.concatenate([first, first, second], axis=-1),
        preferred_element_type=jnp.float32,
    )


def _rows(problem: Problem, query: Array) -> Float[Array, "H B G 4 d"]:
    """Query rows of each KV head, padded to whole groups of four with rows of zeros."""
    p = problem
    rows = jnp.transpose(query, (2, 0, 1, 3, 4)).reshape(p.heads, p.batch, -1, p.dim)
    spare = p.row_groups * ROWS - rows.shape[2]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, spare), (0, 0)))
    return rows.reshape(p.heads, p.batch, p.row_groups, ROWS, p.dim)


def _lanes(problem: Problem, entries: Int[Array, "pairs N 4 R"]) -> UInt32[Array, "..."]:
    """Bit planes as operands of `Warp.narrow_binary_product`: lane ``8 q + 4 e + t`` of product i
    has plane ``2 i + e`` of row q, 32 stages from ``32 t`` on."""
    p = problem
    spare = p.steps * STEP - p.key_stages
    entries = jnp.pad(entries, [(0, 0)] * 3 + [(0, spare)])
    planes = jnp.arange(PLANES).reshape(COLUMNS, 1, 2, 1, 1)
    split = entries.reshape(p.pairs, p.blocks, ROWS, p.steps, 4, 32)
    split = jnp.transpose(split, (0, 1, 3, 2, 4, 5))  # [pairs, N, step, q, t, 32]
    bits = (split[..., None, :, None, :, :] >> planes & 1).astype(jnp.uint32)
    words = (bits << jnp.arange(32, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)
    return words.reshape(p.pairs, p.blocks, p.steps, COLUMNS, 32)


# --- after the kernel -----------------------------------------------------------------------------


def finish(
    problem: Problem,
    query: Array,
    value_codewords: Array,
    sums: Float[Array, "pairs splits S 4"],
    total: Float[Array, "pairs splits 4"],
    top: Float[Array, "pairs splits 4"],
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """The parts together, times the codewords of the values."""
    p = problem
    most = top.max(axis=1)
    share = jnp.where(total > 0, jnp.exp2(top - most[:, None]), 0)
    weight = jnp.sum(share * total, axis=1)  # [pairs, 4]
    some = weight > 0
    mean = jnp.einsum("Psr,PsSr->PrS", share, sums) / jnp.where(some, weight, 1)[..., None]
    mean = mean.reshape(p.heads, -1, p.value_stages)
    low, high = jnp.moveaxis(value_codewords[:, 0].astype(jnp.float32), -2, 0)
    exact = lax.Precision.HIGHEST
    out = jnp.einsum("HrS,HSd->Hrd", mean, high - low, precision=exact)
    out += low.sum(axis=1)[:, None]
    # Probabilities are counted in 65535ths.
    lse = (jnp.log2(jnp.where(some, weight, 1)) - math.log2(65535) + most) / LOG2E
    out = jnp.where(some.reshape(*out.shape[:2], 1), out, 0)
    lse = jnp.where(some, lse, -jnp.inf)

    def of_queries(x: Array, *last: int) -> Array:  # to [B, T, H, q, *last]
        x = x.reshape(p.heads, p.batch, p.row_groups * ROWS, *last)[:, :, : p.tokens * p.group]
        x = x.reshape(p.heads, p.batch, p.tokens, p.group, *last)
        return jnp.moveaxis(x, 0, 2)

    out, lse = of_queries(out, p.dim), of_queries(lse)
    finite = jnp.isfinite(query).all(axis=-1)
    return jnp.where(finite[..., None], out, jnp.nan), jnp.where(finite, lse, jnp.nan)


# --- the kernel -----------------------------------------------------------------------------------


def planes_kernel(problem: Problem, config: Config) -> Any:
    """The kernel as a function of key planes, value planes, blocks and `score_inputs`."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        PlanesKernel(problem, config, warp, Addresses.of(problem, *places)).run()

    return warp_kernel(
        run,
        outputs=[jax.ShapeDtypeStruct(*x) for x in outputs(problem, config).values()],
        nbytes=config.nbytes(problem),
        parts=problem.pairs * config.splits,
        warps=config.warps,
        name="attend_planes",
    )


def outputs(problem: Problem, config: Config) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """Shapes and dtypes of what the kernel writes."""
    parts = problem.pairs, config.splits
    return {
        "sums": ((*parts, problem.value_stages, ROWS), jnp.float32),
        "total": ((*parts, ROWS), jnp.float32),
        "top": ((*parts, ROWS), jnp.float32),
    }


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie, and shared memory; what a problem does not have is None."""

    keys: Any
    values: Any
    blocks: Any
    tables: Any
    facts: Any
    sums: Any
    total: Any
    top: Any
    shared: Any
    knots: Any = None

    @classmethod
    def of(cls, problem: Problem, *places: Any) -> "Addresses":
        """In the order of the kernel's arguments and results."""
        names = ["keys", "values", "blocks", "tables", "facts"]
        names += ["knots"] * bool(problem.every) + ["sums", "total", "top", "shared"]
        return cls(**dict(zip(names, places, strict=True)))


class PlanesKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(self, problem: Problem, config: Config, warp: Any, at: Addresses):
        self.problem, self.config, self.warp, self.at = problem, config, warp, at
        self.base = (at.shared + 15) & 0xFFFFFFF0
        self.g, self.t = warp.lane >> 2, warp.lane & 3
        p = problem
        self.pair, split = warp.block // config.splits, warp.block % config.splits
        head = self.pair // (p.row_groups * p.batch)
        sequence = self.pair // p.row_groups % p.batch
        of_codes = warp.wide(sequence * (p.heads // p.shared) + head // p.shared)
        self.code_chunk = of_codes * (p.blocks * p.chunks)
        self.table_block = warp.wide(self.pair) * p.blocks
        (valid,) = warp.load_global(at.blocks + warp.wide(sequence) * 4)
        valid = warp.unsigned_min(warp.signed_max(valid, warp.integer(0)), p.blocks * p.fills)
        chunks = valid * (p.chunks // p.fills)
        # Chunks of this part, then of this warp: neighbours, so that tables change seldom.
        first, end = self._share(warp.integer(0), chunks, split, config.splits)
        self.first, self.end = self._share(first, end, warp.index, config.warps)

    def _share(self, first: Any, end: Any, index: Any, count: int) -> tuple[Any, Any]:
        """The index-th of ``count`` equal shares of a range, rounded up."""
        warp = self.warp
        each = (end - first + (count - 1)) // count
        begin = warp.unsigned_min(first + index * each, end)
        return begin, warp.unsigned_min(begin + each, end)

    def run(self) -> None:
        """All chunks of this warp, then the thread block's sums."""
        warp, p = self.warp, self.problem
        self.ring = self.base + warp.index * (DEPTH * sum(p.chunk_bytes))
        for ahead in range(DEPTH - 1):
            self._fetch(self.first + ahead, warp.integer(ahead))
        begin = self.first // p.chunks
        some = warp.less(self.first, self.end)
        after = (self.end + (p.chunks - 1)) // p.chunks
        blocks = warp.select(some, after - begin, 0)
        zero = warp.floating(0.0)
        carry = [warp.floating(LOWEST), zero, *[zero] * (4 * p.row_tiles)]
        carry = warp.loop(blocks, carry, lambda i, carry: self._block(begin + i, carry))
        warp.copies_wait(0)
        self._merge(*carry)

    def _fetch(self, chunk: Any, slot: Any) -> None:
        """Begin to copy a chunk's codes, if it is one of this warp's."""
        warp, p = self.warp, self.problem
        there = warp.less(chunk, self.end)
        lane = warp.wide(warp.lane) * 16
        to = self.ring + slot * sum(p.chunk_bytes) + warp.lane * 16
        for place, nbytes in zip((self.at.keys, self.at.values), p.chunk_bytes, strict=True):
            source = place + (self.code_chunk + warp.wide(chunk)) * nbytes + lane
            for offset in range(0, nbytes, 512):
                warp.copy_16_to_shared(to + offset, source + offset, there)
            to = to + nbytes
        warp.copies_end_group()

    def _block(self, block: Any, carry: list[Any]) -> list[Any]:
        """The chunks of one block, which have one table."""
        warp, p = self.warp, self.problem
        place = self.table_block + warp.wide(block)
        words = p.steps * COLUMNS
        source = self.at.tables + place * (words * 128) + warp.wide(warp.lane) * 4
        table = [warp.load_global(source, 128 * i)[0] for i in range(words)]
        row = place * ROWS + warp.wide(self.t)
        step, offset = warp.load_global(self.at.facts + row * 8, n=2, kind="f")
        knots = self.at.knots + row * (p.knots * 4) if p.every else None
        start = warp.unsigned_min(self.end, (block + 1) * p.chunks)
        begin = warp.select(warp.less(self.first, block * p.chunks), block * p.chunks, self.first)

        def chunk(i: Any, carry: list[Any]) -> list[Any]:
            return self._chunk(begin + i, table, step, offset, knots, block, carry)

        return warp.loop(start - begin, carry, chunk)

    def _chunk(
        self,
        chunk: Any,
        table: list[Any],
        step: Any,
        offset: Any,
        knots: Any,
        block: Any,
        carry: list[Any],
    ) -> list[Any]:
        """Scores, probabilities and the sums of 128 tokens."""
        warp, p = self.warp, self.problem
        top, total, *sums = carry
        number = chunk - self.first
        warp.copies_wait(DEPTH - 2)
        warp.sync()
        self._fetch(chunk + (DEPTH - 1), (number + (DEPTH - 1)) % DEPTH)
        keys = self.ring + number % DEPTH * sum(p.chunk_bytes)
        values = keys + p.chunk_bytes[0]
        in_block = chunk - block * p.chunks
        scores = [
            self._scores(keys, tile, table, step, offset, knots, in_block) for tile in range(TILES)
        ]
        largest = scores[0][0]
        for score in [x for tile in scores for x in tile][1:]:
            largest = warp.fmax(largest, score)
        for mask in (4, 8, 16):
            largest = warp.fmax(largest, warp.from_lane_xor(largest, mask))
        new_top = warp.fmax(top, largest)
        old_scale, scale = warp.exp2(top - new_top), warp.exp2(largest - new_top)

        low_sum, high_sum = warp.integer(0), warp.integer(0)
        operands = []
        source = self.t * 4 + (self.g & 3)
        is_high = warp.less(self.g, 4)
        for tile in scores:
            whole = [
                warp.bits_of(
                    warp.fma(warp.exp2(x - largest), warp.floating(65535.0), warp.floating(2.0**23))
                )
                for x in tile
            ]
            first, second = (warp.choose_bytes(whole[i], whole[i + 1], 0x5140) for i in (0, 2))
            low = warp.choose_bytes(first, second, 0x5410)
            high = warp.choose_bytes(first, second, 0x7632)
            low_sum, high_sum = warp.add_bytes(low, low_sum), warp.add_bytes(high, high_sum)
            operands.append(
                [
                    warp.select(
                        is_high,
                        warp.from_lane(high, source + half),
                        warp.from_lane(low, source + half),
                    )
                    for half in (0, 16)
                ]
            )
        both = warp.to_float(low_sum + (high_sum << 8))
        total = warp.fma(total, old_scale, scale * both)

        scales = []
        for column in (0, 1):
            row = (self.t * 2 + column) & 3
            scales.append([warp.from_lane(x, row) for x in (old_scale, scale)])
        sums = self._sums(values, operands, scales, sums)
        return [new_top, total, *sums]

    def _scores(
        self,
        keys: Any,
        tile: int,
        table: list[Any],
        step: Any,
        offset: Any,
        knots: Any,
        in_block: Any,
    ) -> list[Any]:
        """Of tokens ``g``, ``g + 8``, ``g + 16`` and ``g + 24`` of a tile with row ``t``."""
        warp, p = self.warp, self.problem
        words = []
        for number in range(p.steps):
            width = min(4, p.key_stages // 32 - 4 * number)
            # Lanes without words of their own read others' and meet entries of 0.
            t = self.t if width == 4 else warp.unsigned_min(self.t, width - 1)
            address = keys + (self.g * width + t) * 16
            shift = tile * p.key_stages * 4 + number * STEP * 4
            words.append(warp.load_shared(address, shift, n=4))
        found = []
        for half in range(2):
            counts: list[Any] = [None] * COLUMNS
            for number, word in enumerate(words):
                for i in range(COLUMNS):
                    counts[i] = warp.narrow_binary_product(
                        word[2 * half : 2 * half + 2], table[number * COLUMNS + i], counts[i]
                    )
            start = tile * TILE + half * 16
            share = self._share_of_mean(knots, in_block, start, offset)
            for pair in range(2):
                dot = warp.floating(0.0)
                for i in range(COLUMNS):
                    for e in range(2):
                        plane = 2 * i + e
                        weight = 2.0 ** (plane + 116)
                        weight = -weight if plane == PLANES - 1 else weight
                        count = warp.from_bits(counts[i][2 * pair + e])
                        dot = warp.fma(count, warp.floating(weight), dot)
                found.append(warp.fma(dot, step, share[pair]))
        return found

    def _share_of_mean(self, knots: Any, in_block: Any, start: int, offset: Any) -> list[Any]:
        """Offset and mean key's share of tokens ``start + g`` and ``start + g + 8`` of a chunk."""
        warp, p = self.warp, self.problem
        if not p.every:
            return [offset, offset]
        token = in_block * CHUNK + start
        address = knots + warp.wide(token // p.every) * 4
        before, after = (warp.load_global(address, 4 * i, kind="f")[0] for i in (0, 1))
        slope = (after - before) * (1 / p.every)
        base = before + offset
        into = token % p.every + self.g
        return [warp.fma(slope, warp.to_float(into + more), base) for more in (0, 8)]

    def _sums(
        self, values: Any, operands: list[Any], scales: list[Any], sums: list[Any]
    ) -> list[Any]:
        """Sums over the chunk's tokens of probability × bit, joined to those so far."""
        warp, p = self.warp, self.problem
        new = []
        # Sums begin at 2 ** 23, so that their bits are those of a float32.
        origin = [
            warp.fma(scale, warp.floating(-(2.0**23)), warp.floating(0.0)) for _, scale in scales
        ]
        for first in range(0, p.value_stages, SPAN):
            width = min(SPAN, p.value_stages - first)
            counts = [[warp.integer(0x4B000000)] * 4 for _ in range(width // 16)]
            for tile, operand in enumerate(operands):
                shift = (tile * p.value_stages + first) * 4
                if width == SPAN:
                    halves = warp.load_shared(values + warp.lane * 8, shift, n=2)
                else:
                    (word,) = warp.load_shared(values + warp.lane * 4, shift)
                    halves = [word, word >> 4]
                for i in range(width // 16):
                    bits = [
                        half & (0x01010101 << (2 * i + row)) for half in halves for row in (0, 1)
                    ]
                    counts[i] = warp.byte_product(bits, operand, counts[i])
            for i, count in enumerate(counts):
                for j in range(4):
                    old_scale, scale = scales[j & 1]
                    old = sums[(first // 16 + i) * 4 + j]
                    rest = warp.fma(old, old_scale, origin[j & 1])
                    new.append(warp.fma(warp.from_bits(count[j]), scale, rest))
        return new

    def _merge(self, top: Any, total: Any, *sums: Any) -> None:
        """The sums of all warps of the thread block together, to global memory."""
        warp, p, warps = self.warp, self.problem, self.config.warps
        for mask in (4, 8, 16):
            total = total + warp.from_lane_xor(total, mask)
        warp.sync_block()  # nobody reads codes any more
        tops = self.base + warps * p.sum_bytes
        totals = tops + warps * ROWS * 4
        mine = (warp.index * ROWS + self.t) * 4
        leads = warp.less(warp.lane, ROWS)
        warp.store_shared(tops + mine, [top], where=leads)
        warp.store_shared(totals + mine, [total], where=leads)
        own = self.base + warp.index * p.sum_bytes + self.g * (ROWS * 4) + self.t * 8
        is_high = warp.less(self.t, 2)
        for i in range(p.row_tiles):
            for row in range(2):
                # A bit's place in its byte has been a weight.
                weight = 2.0 ** -(2 * (i % (SPAN // 16)) + row)
                pair = []
                for column in range(2):
                    part = sums[4 * i + 2 * row + column]
                    low = warp.from_lane_xor(part, 2)
                    both = warp.fma(part, warp.floating(256.0), low)
                    pair.append(both * weight)
                stage = 16 * i + 8 * row
                warp.store_shared(own, pair, stage * ROWS * 4, where=is_high)
        warp.sync_block()

        row = warp.lane & 3
        found = [warp.load_shared(tops + row * 4, w * ROWS * 4, kind="f")[0] for w in range(warps)]
        most = found[0]
        for x in found[1:]:
            most = warp.fmax(most, x)
        shares = [warp.exp2(x - most) for x in found]
        part = warp.wide(warp.block)
        thread = warp.index * 32 + warp.lane
        for begin in range(0, p.value_stages * ROWS, warps * 32):
            element = thread + begin
            inside = warp.less(element, p.value_stages * ROWS)
            where = self.base + warp.unsigned_min(element, p.value_stages * ROWS - 1) * 4
            value = warp.floating(0.0)
            for w, share in enumerate(shares):
                (x,) = warp.load_shared(where, w * p.sum_bytes, kind="f")
                value = warp.fma(x, share, value)
            to = self.at.sums + part * p.sum_bytes + warp.wide(element) * 4
            warp.store_global(to, [value], where=inside)
        all_total = warp.floating(0.0)
        for w, share in enumerate(shares):
            (x,) = warp.load_shared(totals + row * 4, w * ROWS * 4, kind="f")
            all_total = warp.fma(x, share, all_total)
        leads = leads & warp.equal(warp.index, 0)
        to = part * (ROWS * 4) + warp.wide(row) * 4
        warp.store_global(self.at.total + to, [all_total], where=leads)
        warp.store_global(self.at.top + to, [most], where=leads)
