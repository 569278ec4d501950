"""Decode attention over bit planes, fused, on TPUs: Pallas Mosaic TPU (ours).

One program takes up to 8 query rows of KV heads that share their codes, and goes through a chunk of
a sequence's blocks a grid step:

1. *tables*: ⟨query, difference of a stage's two codewords⟩ of every block of the chunk, and what is
   the same for all codes, from products of bfloat16 pieces on the MXU; then integers of three
   signed bytes with one scale a row;
2. *scores*: the MXU multiplies tables and bits in int8, exactly;
3. *softmax*: one running maximum a row;
4. *masses*: each probability becomes four signed bytes, and the MXU multiplies them with the bits
   of the values in int8, tokens contracted, exactly.

What comes out is the probability that falls on each bit of the values; multiplied by the
differences of the codewords once it is the output.

**Bits from one instruction.** A bit is not brought to the lowest place of its byte: ``word & mask``
leaves the bits of one place of all bytes, as int8 numbers of 0 or ``2^place``. The table's rows are
divided by ``2^place`` beforehand, or the masses afterwards. So one AND gives 4096 numbers.

**Words where the MXU needs them.** The words of `gsrq_jax.kernels.planes` lie along lanes, those
of several stages of a token beside those of other tokens. For a product, the contracted axis must
lie along sublanes: stages of keys, tokens of values. So a tile's words are read into all sublanes
by one broadcasting load, and each sublane gathers its own along lanes: a token's words 0 to 3 for
keys, the tokens 4 k + t of a stage for values. This is done with words, a thirty-second of the
bits.

Shapes: those of `gsrq_jax.kernels.reference`; G groups of heads with a program each, V = ceil(S /
128). A *run* is 4 tiles, 128 tokens; a *unit* is two runs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32, UInt32

from gsrq_jax.kernels import planes, reference, rotary
from gsrq_jax.kernels.mosaic_tpu import (
    EXACT,
    MANTISSA,
    MANTISSA_BITS,
    SUBLANES,
    TABLE_UNIT,
    UNIT,
    _by_part,
    _digits,
    _pieces,
    _product,
    _refused,
    check_device,
    varying,
)
from gsrq_jax.kernels.words import LANES

TILES = LANES // planes.TILE
"""Tiles of a run."""
RUNS = 2
"""Runs of a unit."""
TOKENS = RUNS * LANES
"""Tokens of a unit."""
WORDS = SUBLANES // RUNS
"""Words of a token that a step of keys takes."""
CONTRACTED = SUBLANES * planes.TILE
"""Rows of bits of a step and unit."""
SHIFTED = 4
"""Places of a byte that masks leave before all are shifted down by that."""
STAGES = 512
"""At most."""
CHUNK_TOKENS = 8192
"""Tokens of a grid step, about; their instructions are scheduled together."""
BLOCK_TOKENS = 4096
"""Of a block, at most."""


# --- where words and stages go --------------------------------------------------------------------


def token_of_lane() -> Int[np.ndarray, " 128"]:
    """Token of a run whose score is in each lane.

    Lane ``32 τ + 8 t + 4 k + j`` has token ``8 j + 4 k + t`` of tile τ: the order in which values
    are contracted, of sublanes ``2 t + k`` and bytes j.
    """
    tile, t, k, j = np.unravel_index(np.arange(LANES), (TILES, 4, 2, 4))
    return planes.TILE * tile + 8 * j + 4 * k + t


def key_lanes(stages: int) -> Int[np.ndarray, "steps 8 128"]:
    """Word of a tile that each sublane and lane takes, from the first of its step."""
    token = token_of_lane() % planes.TILE
    w, g = np.divmod(token, 8)
    steps = []
    for first in range(0, stages // planes.UNIT, WORDS):
        words = min(WORDS, stages // planes.UNIT - first)
        of_token = np.minimum(np.arange(SUBLANES) % WORDS, words - 1)[:, None]
        steps.append(4 * (words * g + of_token) + w)
    return np.stack(steps)


def paired(stages: int, parts: int) -> bool:
    """Tell whether sublanes have the words of two steps of a run, not those of a step of two runs.

    Then no row of a table is 0; it needs an even number of whole steps and a register for each run.

    Args:
        stages: of keys.
        parts: of a `Tiling`.
    """
    return stages % (2 * planes.STEP) == 0 and parts == 1


def key_rows(
    stages: int, pairs: bool = False
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Stage of each contracted row of a unit's bits, and what the bit there is as a number.

    Rows go by step, place in a byte, sublane (run and word of a token) and byte.

    Args:
        stages: of keys.
        pairs: whether sublanes have the words of two steps, see `paired`.
    """
    steps = -(-stages // planes.STEP) // (2 if pairs else 1)
    step, place, half, word, byte = np.unravel_index(
        np.arange(steps * CONTRACTED), (steps, 8, RUNS, WORDS, 4)
    )
    step = 2 * step + half if pairs else step
    stage = planes.STEP * step + planes.UNIT * word + 8 * byte + place
    there = stage < stages
    return np.where(there, stage, 0), np.where(there, 2.0 ** (place % SHIFTED), np.inf)


def value_lanes(stages: int) -> tuple[Int[np.ndarray, "V 8 128"], ...]:
    """For each sublane ``2 t + k`` and lane: the word it takes, the shift, the mask.

    Words count from the first of the 128 stages, and lanes go by place i, span and g. Lanes
    without a stage have an empty mask.
    """
    found = []
    t, k = np.divmod(np.arange(SUBLANES), 2)
    t, k = t[:, None], k[:, None]
    for first in range(0, stages, LANES):
        stage = value_stages(stages)[first : first + LANES] - first
        here = stage >= 0
        stage = np.where(here, stage, 0)
        m, i, g = stage // planes.SPAN, stage // 8 % 8, stage % 8
        whole = stages - first - planes.SPAN * m >= planes.SPAN
        word = planes.SPAN * m + np.where(whole, 2 * (4 * g + t) + k, 4 * g + t)
        shift = np.where(whole, 0, 4 * k)
        mask = np.where(here, (1 << i) * 0x01010101, 0)
        found.append((word, shift, np.broadcast_to(mask, word.shape)))
    return tuple(np.stack(x) for x in zip(*found, strict=True))


def value_stages(stages: int) -> Int[np.ndarray, " V·128"]:
    """Stage of each lane of masses, -1 where there is none."""
    lane = np.arange(-(-stages // LANES) * LANES)
    i, m, g = np.unravel_index(lane % LANES, (8, 2, 8))
    stage = lane // LANES * LANES + planes.SPAN * m + 8 * i + g
    return np.where(stage < stages, stage, -1)


def value_unit(stages: int) -> Float[np.ndarray, " V·128"]:
    """What a bit of each lane of masses is as an int8 number."""
    place = value_stages(stages) // 8 % 8
    return np.where(place == 7, -128.0, 2.0**place)


# --- what a call is cut into ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How heads, query rows and blocks fall into programs and grid steps.

    Attributes:
        heads: KV heads of a program.
        rows: query rows of each of them, with those that fill up.
        parts: runs that share a register of scores: 2 for 4 query rows in all, 1 for 8.
        units: of a block.
        chunk: blocks of a grid step.
        steps: grid steps.
    """

    heads: int
    rows: int
    parts: int
    units: int
    chunk: int
    steps: int

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.units * TOKENS

    @property
    def registers(self) -> int:
        """Registers of scores of a unit."""
        return RUNS // self.parts


def tiling_of(rows: int, share: int, blocks: int, block: int) -> Tiling:
    """Choose the tiling for ``rows`` query rows of each of ``share`` heads.

    Args:
        rows: query tokens times query heads of a KV head.
        share: KV heads that share their codes.
        blocks: of the cache.
        block: tokens of one.

    Raises:
        InputError: if the kernel has none.
    """
    if not 1 <= rows <= SUBLANES:
        raise _refused("query rows of a KV head", rows, f"1 to {SUBLANES}")
    if block < TOKENS or block % TOKENS:
        raise _refused("tokens of a block", block, f"a multiple of {TOKENS}")
    units = block // TOKENS
    if block > BLOCK_TOKENS:
        raise _refused("tokens of a block", block, f"at most {BLOCK_TOKENS}")
    heads = max(n for n in (1, 2, 4, 8) if share % n == 0 and n * rows <= SUBLANES)
    all_rows = 4 if heads * rows <= 4 else SUBLANES
    chunk = max(1, min(CHUNK_TOKENS // block, blocks))
    # What a grid step reads of queries fills whole registers.
    least = SUBLANES // math.gcd(SUBLANES, all_rows)
    chunk = chunk if chunk == blocks else max(chunk // least * least, least)
    return Tiling(heads, all_rows // heads, SUBLANES // all_rows, units, chunk, -(-blocks // chunk))


# --- the kernel -----------------------------------------------------------------------------------


def _row(ref, tile) -> Int32[Array, "8 128"]:
    """Words of a tile, in all sublanes."""
    count = ref.shape[1]
    row = jnp.broadcast_to(ref[pl.ds(tile, 1), :], (SUBLANES, count))
    if count == LANES:
        return row
    return jnp.concatenate([row, jnp.zeros((SUBLANES, LANES - count), row.dtype)], axis=1)


def _gathered(x: Int32[Array, "8 128"], lanes: Int32[Array, "8 128"]) -> Int32[Array, "8 128"]:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def _key_bits(rows: list[list[tuple[Array, Array]]], lanes_ref) -> Int[Array, "K 128"]:
    """Bits of keys as int8 numbers, in the rows of `key_rows`; tokens in lanes.

    Args:
        rows: for each step and tile, the words of the upper sublanes and of the lower ones.
        lanes_ref: `key_lanes`.
    """
    sublane, lane = (jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), i) for i in (0, 1))
    columns = []
    for step, tiles in enumerate(rows):
        words = jnp.zeros((SUBLANES, LANES), jnp.int32)
        for tile, (upper, lower) in enumerate(tiles):
            found = _gathered(jnp.where(sublane < WORDS, upper, lower), lanes_ref[step])
            words = jnp.where(lane >= planes.TILE * tile, found, words) if tile else found
        for x in (words, jax.lax.shift_right_logical(words, SHIFTED)):
            for place in range(SHIFTED):
                columns.append(pltpu.bitcast(x & jnp.int32(0x01010101 << place), jnp.int8))
    return jnp.concatenate(columns)


def _value_bits(refs, place_ref, run, shifted: bool) -> Int[Array, "128 V·128"]:
    """Bits of a run's values as int8 numbers; stages in the lanes of `value_stages`."""
    rows = []
    for tile in range(TILES):
        columns = []
        for group, ref in enumerate(refs):
            lanes, shift, mask = (place_ref[what, group] for what in range(3))
            words = _gathered(_row(ref, run * TILES + tile), lanes)
            if shifted and group == len(refs) - 1:
                words = jax.lax.shift_right_logical(words, shift)
            columns.append(pltpu.bitcast(words & mask, jnp.int8))
        rows.append(jnp.concatenate(columns, axis=1))
    return jnp.concatenate(rows)


def _kernel(
    held_ref,  # [B] in scalar memory
    query_ref,  # [chunk·heads·rows, d]
    shift_ref,  # [pieces, b, heads·d]
    book_ref,  # [pieces, K, heads·d]
    lanes_ref,  # [steps, 8, 128]
    place_ref,  # [3, V, 8, 128]
    key_refs,  # [chunk·tiles, 128] for every 128 stages
    value_refs,  # [chunk·tiles, 128] for every 128 stages
    mass_ref,  # [8, V·128]
    total_ref,  # [8, 128], a sum a lane
    top_ref,  # [8, 128], the same in all lanes
    table_ref,  # [chunk·registers·32, K] int8
    scale_ref,  # [chunk·8, 128]
    shared_ref,  # [chunk·units·registers·8, 128]
    score_ref,  # [chunk·units·registers, 8, 128]
    digit_ref,  # [chunk·units, registers·32, 128] int32
    count_ref,  # [parts, V, 32, 128] int32
    *,
    tiling: Tiling,
    shifted: bool,
    pairs: bool,
):
    t = tiling
    step = pl.program_id(2)
    first = step * t.chunk
    held = held_ref[pl.program_id(0)]
    registers, rows = t.registers, t.heads * t.rows
    size = (1 if pairs else registers) * 4 * SUBLANES
    groups = place_ref.shape[1]

    @pl.when(step == 0)
    def _start():
        mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        score_ref[...] = jnp.full(score_ref.shape, -jnp.inf, jnp.float32)

    def _tables():
        query = query_ref[...]
        if t.heads > 1:  # a head's rows meet its codewords alone
            row = jax.lax.broadcasted_iota(jnp.int32, query.shape, 0)
            head = jax.lax.div(jax.lax.rem(row, rows), t.rows)
            query = jnp.concatenate([jnp.where(head == h, query, 0) for h in range(t.heads)], 1)
        tables = _product(query, book_ref)
        shared = _product(query, shift_ref)
        scale = jnp.max(jnp.abs(tables), axis=1, keepdims=True) / TABLE_UNIT
        # Rounded by an addition that leaves an integer in the mantissa.
        tables = tables * jnp.where(scale > 0, 1 / scale, 0) + MANTISSA
        tables = jax.lax.bitcast_convert_type(tables, jnp.int32) - MANTISSA_BITS
        # A run's rows meet its bits alone, where a product has those of both.
        shape = (RUNS * rows, tables.shape[1])
        run_of_row = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 0), rows)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        ours = run_of_row == jax.lax.rem(jax.lax.div(row, planes.TILE // RUNS), RUNS)
        for c in range(t.chunk):
            at = slice(c * rows, (c + 1) * rows)
            table = tables[at]
            if not pairs:
                table = jnp.where(ours, jnp.concatenate([table] * RUNS), 0)
            table_ref[pl.ds(c * size, size), :] = _digits(table)
            scale_ref[pl.ds(c * SUBLANES, SUBLANES), :] = jnp.broadcast_to(
                jnp.concatenate([scale[at]] * t.parts), (SUBLANES, LANES)
            )
            for i in range(t.units * registers):
                runs = range(i * t.parts, (i + 1) * t.parts)
                register = (c * t.units * registers + i) * SUBLANES
                shared_ref[pl.ds(register, SUBLANES), :] = jnp.concatenate(
                    [shared[at, run * LANES : (run + 1) * LANES] for run in runs]
                )

    def key_words(unit, run):
        first = unit * RUNS * TILES
        if pairs:
            tiles = [first + run * TILES + i for i in range(TILES)]
            steps = zip(key_refs[::2], key_refs[1::2], strict=True)
            return [[(_row(a, tile), _row(b, tile)) for tile in tiles] for a, b in steps]
        tiles = [first + i for i in range(TILES)]
        return [[(_row(a, tile), _row(a, tile + TILES)) for tile in tiles] for a in key_refs]

    def score(unit):
        block, register = unit // t.units, unit * registers
        for r in range(RUNS if pairs else 1):
            digit_ref[unit, pl.ds(r * size, size), :] = jax.lax.dot_general(
                table_ref[pl.ds(block * size, size), :],
                _key_bits(key_words(unit, r), lanes_ref),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
        scale = scale_ref[pl.ds(block * SUBLANES, SUBLANES), :]
        sublane, lane = (jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), a) for a in (0, 1))
        # Tokens of a tile by lanes, see `token_of_lane`.
        token = (lane & -32) | (lane & 3) << 3 | (lane & 4) | (lane >> 3 & 3)
        token += jax.lax.div(sublane, rows) * LANES
        scores = []
        for r in range(registers):
            found = sum(
                digit_ref[unit, pl.ds(r * 4 * SUBLANES + k, SUBLANES, 4), :].astype(jnp.float32)
                * 256.0**k
                for k in range(3)
            )
            at = pl.ds((register + r) * SUBLANES, SUBLANES)
            x = shared_ref[at, :] + found * scale
            left = held - first * t.block - unit * TOKENS - r * t.parts * LANES
            scores.append(jnp.where(token < left, x, -jnp.inf))
        return scores

    def count(units, weights):
        digits = jnp.concatenate(
            [_digits((weight * UNIT + 0.5).astype(jnp.int32)) for weight in weights], axis=1
        )
        for p in range(t.parts):
            runs = [unit * RUNS + i for unit in units for i in range(RUNS)][p :: t.parts]
            bits = [_value_bits(value_refs, place_ref, run, shifted) for run in runs]
            products = jax.lax.dot_general(
                digits,
                jnp.concatenate(bits),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
            for group in range(groups):
                lanes = slice(group * LANES, (group + 1) * LANES)
                count_ref[p, group] = products[:, lanes]

    # Scores of this step's chunk beside masses of the one before, which do not wait for each other.
    @pl.when((first - jnp.minimum(step, 1) * t.chunk) * t.block < held)
    def _chunk():
        _tables()
        before = top_ref[...]
        base = jnp.where(before > -jnp.inf, before, 0)
        units = range(t.chunk * t.units)
        earlier = [score_ref[i] for i in range(len(units) * registers)]
        scores = [x for unit in units for x in score(unit)]
        weights = [jnp.exp(x - base) for x in earlier]
        count(units, weights)
        for i, x in enumerate(scores):
            score_ref[i] = x
        best = functools.reduce(jnp.maximum, scores, before)
        total = sum(weights, total_ref[...])
        top = jnp.broadcast_to(jnp.max(best, axis=1, keepdims=True), best.shape)
        shrink = jnp.exp(base - jnp.where(top > -jnp.inf, top, 0))
        top_ref[...] = top
        total_ref[...] = total * shrink
        for group in range(groups):
            lanes = pl.ds(group * LANES, LANES)
            counted = _by_part(
                [
                    sum(  # digit i of sublane s is row 4·s + i
                        count_ref[p, group, pl.ds(i, SUBLANES, 4), :].astype(jnp.float32)
                        * (256.0**i / UNIT)
                        for i in range(4)
                    )
                    for p in range(t.parts)
                ]
            )
            mass_ref[:, lanes] = (mass_ref[:, lanes] + counted) * shrink


def fused_kernel(
    query: Float[Array, "B G N·rows d"],
    shift: Float[Array, "G b heads·d"],
    key_planes: Int32[Array, "B of N·tiles R"],
    value_planes: Int32[Array, "B of N·tiles S"],
    key_steps: Float[Array, "G K heads·d"],
    held: Int[Array, " B"],
    *,
    tiling: Tiling,
    pieces: int = 2,
    interpret: bool = False,
) -> tuple[Float[Array, "B G 8 V·128"], Float[Array, "B G 8"], Float[Array, "B G 8"]]:
    """Run the kernel itself: probability on each bit of values, its sum, and the maximal score.

    Args:
        query: scaled queries in each block's frame, ``tiling.rows`` rows of each head, by blocks.
        shift: what all keys of a block have in common, tokens in the order of lanes.
        key_planes: of `gsrq_jax.kernels.planes`, all blocks after each other.
        value_planes: the same.
        key_steps: differences of codewords in the rows of `key_rows`, `paired` or not.
        held: tokens of each sequence.
        tiling: of `tiling_of`.
        pieces: bfloat16 pieces that stand for a float32 number where tables are made, 2 or 3.
        interpret: whether to run in TPU interpret mode, without a TPU.

    Returns:
        Unnormalised masses, their sum over all tokens, and the maximum (-inf without tokens) for
        every group of heads and sublane.
    """
    t = tiling
    B, G, _, d = query.shape
    rows, registers = t.heads * t.rows, t.registers
    pairs = paired(key_planes.shape[-1], t.parts)
    stages = value_planes.shape[-1]
    lanes = jnp.asarray(key_lanes(key_planes.shape[-1]), jnp.int32)
    place = jnp.asarray(np.stack(value_lanes(stages)), jnp.uint32).astype(jnp.int32)
    contracted, groups = key_steps.shape[1], place.shape[1]

    def chunked(of, rows, lanes, late=0, group=0):
        def at(i, g, c, held):  # beyond the valid chunks the last again
            last = jax.lax.div(jnp.maximum(held[i] - 1, 0), t.chunk * t.block)
            chunk = jnp.minimum(jnp.maximum(c - late, 0), last)
            return i, jax.lax.div(g, G // of), chunk, group

        return pl.BlockSpec((None, None, t.chunk * rows, lanes), at)

    def by_lanes(x, late=0):  # so that a tile's words of a group are one row of a register
        return tuple(
            chunked(x.shape[1], t.block // planes.TILE, min(LANES, x.shape[-1]), late, group)
            for group in range(-(-x.shape[-1] // LANES))
        )

    def of_group(*shape):
        return pl.BlockSpec((None, *shape), lambda i, g, c, held: (g, *(0,) * len(shape)))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda i, g, c, held: (0,) * x.ndim)

    def out(*shape):
        return pl.BlockSpec((None, None, *shape), lambda i, g, c, held: (i, g, 0, 0))

    varies = varying(query, shift, key_planes, value_planes, key_steps, held)
    mass, total, top = pl.pallas_call(
        functools.partial(_kernel, tiling=t, shifted=stages % planes.SPAN != 0, pairs=pairs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, t.steps + 1),
            in_specs=[
                chunked(G, rows, d),
                of_group(pieces, t.block, t.heads * d),
                of_group(pieces, contracted, t.heads * d),
                whole(lanes),
                whole(place),
                by_lanes(key_planes),
                by_lanes(value_planes, late=1),
            ],
            out_specs=[out(SUBLANES, groups * LANES), out(SUBLANES, LANES), out(SUBLANES, LANES)],
            scratch_shapes=[
                pltpu.VMEM(
                    (t.chunk * (1 if pairs else registers) * 4 * SUBLANES, contracted), jnp.int8
                ),
                pltpu.VMEM((t.chunk * SUBLANES, LANES), jnp.float32),
                pltpu.VMEM((t.chunk * t.units * registers * SUBLANES, LANES), jnp.float32),
                pltpu.VMEM((t.chunk * t.units * registers, SUBLANES, LANES), jnp.float32),
                pltpu.VMEM((t.chunk * t.units, registers * 4 * SUBLANES, LANES), jnp.int32),
                pltpu.VMEM((t.parts, groups, 4 * SUBLANES, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, G, SUBLANES, n * LANES), jnp.float32, manual_axis_type=varies)
            for n in (groups, 1, 1)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="attend_planes",
    )(
        held.astype(jnp.int32),
        query,
        jnp.stack(_pieces(shift, pieces), axis=1),
        jnp.stack(_pieces(key_steps, pieces), axis=1),
        lanes,
        place,
        (key_planes,) * len(lanes),
        (value_planes,) * groups,
    )
    return mass, total.sum(axis=-1), top[..., 0]


def check_supported(
    query: Float[Array, "B T H q d"],
    key_planes: UInt32[Array, "B H/s N tiles R"],
    value_planes: UInt32[Array, "B H/s N tiles S"],
) -> None:
    """Refuse a call of `attend_planes` that cannot be made here.

    Args:
        query: of the call.
        key_planes: of the call.
        value_planes: of the call.

    Raises:
        InputError: naming what was given and what is supported.
    """
    check_device()
    _check_shapes(query, key_planes, value_planes)


def _check_shapes(query: Array, key_planes: Array, value_planes: Array) -> None:
    _, T, H, q, d = query.shape
    blocks, tiles = key_planes.shape[2:4]
    for words, what in ((key_planes, "keys"), (value_planes, "values")):
        planes.check_stages(words.shape[-1], what)
        if words.shape[-1] > STAGES:
            raise _refused(f"stages of {what}", words.shape[-1], f"at most {STAGES}")
        if H % words.shape[1]:
            raise _refused(f"heads of codes of {what}", words.shape[1], f"a divisor of {H}")
    if d not in (64, 128):
        raise _refused("head_dim", d, "64 or 128")
    tiling_of(min(T, max(1, SUBLANES // q)) * q, 1, blocks, tiles * planes.TILE)


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
    pieces: int = 2,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """Compute `gsrq_jax.kernels.reference.attend_planes` on a TPU, by the fused kernel.

    The kernel takes 8 query rows of heads that share codes at a time; for more, codes are read
    again.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None is one of zeros.
        inv_freq: rotary frequencies.
        key_planes: codes of the keys, for every s heads that share them.
        value_planes: codes of the values, for heads that share them.
        key_codewords: of this layer, for each head.
        value_codewords: of this layer, for each head.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
        pieces: bfloat16 pieces of queries, codewords and shift, whose products make the tables: 3
            for scores to about 1e-5 of their terms, 2 to about 1e-4.
        interpret: whether to run in TPU interpret mode, without a TPU.

    Returns:
        What the reference returns.

    Raises:
        InputError: if the shapes or the device are not supported.
    """
    if not interpret:
        check_device()
    _check_shapes(query, key_planes, value_planes)
    T, H, q, d = query.shape[1:]
    n, b = key_planes.shape[2], key_planes.shape[3] * planes.TILE
    if not n:
        return jnp.zeros_like(query), jnp.full(query.shape[:4], -jnp.inf)
    starts = first + stride * b * jnp.arange(n)
    framed = rotary.rotate(query[..., None, :], -starts, inv_freq)
    mean = jnp.zeros((H, d)) if mean is None else mean
    base, steps = reference._base_and_steps(key_codewords)
    always = rotary.shift(mean[:, None], jnp.arange(b), inv_freq, every) + base[:, None]
    some = functools.partial(
        _some_rows,
        always=always,
        key_steps=steps,
        codes=(key_planes, value_planes),
        value_codewords=value_codewords,
        held=blocks * (b // fills),
        pieces=pieces,
        interpret=interpret,
    )
    together = max(1, SUBLANES // q)
    found = [some(framed[:, i : i + together]) for i in range(0, T, together)]
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
    return out, lse


def _some_rows(
    framed: Float[Array, "B T H q N d"],
    always: Float[Array, "H b d"],
    key_steps: Float[Array, "H R d"],
    codes: tuple[UInt32[Array, "B H/s N tiles R"], UInt32[Array, "B H/s N tiles S"]],
    value_codewords: Float[Array, "H 1 S 2 d"],
    held: Int[Array, " B"],
    pieces: int,
    interpret: bool,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """Attend with at most 8 query rows of a KV head."""
    B, T, H, q, n, d = framed.shape
    b = always.shape[1]
    share = math.gcd(*(H // x.shape[1] for x in codes))
    t = tiling_of(T * q, share, n, b)
    G = H // t.heads
    rows = jnp.transpose(framed, (0, 2, 4, 1, 3, 5)).reshape(B, G, t.heads, n, T * q, d)
    rows = jnp.pad(rows, (*((0, 0),) * 4, (0, t.rows - T * q), (0, 0)))
    rows = jnp.swapaxes(rows, 2, 3).reshape(B, G, n * t.heads * t.rows, d)

    def side_by_side(x: Array) -> Array:  # [H, m, d] -> [G, m, heads·d]
        return jnp.swapaxes(x.reshape(G, t.heads, -1, d), 1, 2).reshape(G, -1, t.heads * d)

    order = (np.arange(0, b, LANES)[:, None] + token_of_lane()).reshape(-1)
    stages = key_steps.shape[1]
    stage, unit = key_rows(stages, paired(stages, t.parts))
    keys, values = (
        jax.lax.bitcast_convert_type(x, jnp.int32).reshape(B, x.shape[1], -1, x.shape[-1])
        for x in codes
    )
    mass, total, top = fused_kernel(
        rows,
        side_by_side(always[:, order]),
        keys,
        values,
        side_by_side(key_steps[:, stage] / unit[:, None].astype(np.float32)),
        held,
        tiling=t,
        pieces=pieces,
        interpret=interpret,
    )
    # One softmax of both parts, then one product with the differences of codewords.
    split = (B, G, t.parts, t.heads, t.rows)
    top, total, mass = (x.reshape(*split, *x.shape[3:]) for x in (top, total, mass))
    whole = jnp.max(top, axis=2)  # [B, G, heads, rows]
    whole = jnp.where(jnp.isfinite(whole), whole, 0)
    share_of = jnp.exp(top - whole[:, :, None])
    total = (total * share_of).sum(axis=2)
    mass = (mass * share_of[..., None]).sum(axis=2).reshape(B, H, t.rows, -1)
    base, steps = reference._base_and_steps(value_codewords)
    stage = value_stages(steps.shape[1])
    bit = np.where(stage >= 0, 1 / value_unit(steps.shape[1]), 0).astype(np.float32)
    out = jnp.einsum("BHrk,Hkd->BHrd", mass * bit, steps[:, np.maximum(stage, 0)], precision=EXACT)
    total, whole = (x.reshape(B, H, t.rows) for x in (total, whole))
    out += total[..., None] * base[:, None]

    def by_query(x: Array) -> Array:  # [B, H, rows, ...] -> [B, T, H, q, ...]
        x = x[:, :, : T * q]
        return jnp.moveaxis(x.reshape(B, H, T, q, *x.shape[3:]), 2, 1)

    return reference._finish(by_query(out), by_query(total), by_query(whole))
