"""Decode attention over codes, fused, on TPUs: Pallas Mosaic TPU (ours).

One program takes one KV head of one sequence and goes through a chunk of its blocks a grid step:

1. *tables*: ⟨query, codeword⟩ of every block of the chunk, and what the mean key adds, from
   products of bfloat16 pieces on the MXU; then integers of three signed bytes with one scale a row;
2. *scores*: each code becomes a one-hot column of bytes, which a single shift makes, and the MXU
   multiplies table and one-hots in int8, exactly;
3. *softmax*: one running maximum a sublane;
4. *masses*: each probability becomes four signed bytes, and the MXU multiplies them with the
   one-hots of the values' codes in int8, tokens contracted, exactly.

What comes out is the probability that falls on each value codeword; multiplied by the codebook once
it is the output. docs/kernels-tpu.md has the data path and what it costs.

Shapes: those of `gsrq_jax.kernels.reference`, with S = G·R codes a vector in W = ceil(S / 8) words
of `gsrq_jax.kernels.words`.
A *tile* is P parts of 128 tokens; its scores are one register of 8 sublanes, row q of part p in
sublane p·(8 / P) + q. So the parts of a tile are softmaxes of their own, merged like splits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from gsrq_jax.kernels import devices, rotary
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.words import CODEWORDS, LANES, PER_WORD, words_of

SUBLANES = 8
CHUNK_TOKENS = 4096
"""Tokens of a grid step, about."""
GROUP_TILES = 8
"""Tiles whose instructions are scheduled together, at most."""
BYTES = 0x00808080
"""Added and taken away by exclusive or, it makes the bytes of a word signed digits of base 256."""
UNIT = 2.0**30
"""What a probability of 1 is as an integer, of four digits."""
TABLE_UNIT = 2.0**22
"""What a table's largest entry is as an integer, of three digits."""
MANTISSA, MANTISSA_BITS = 1.5 * 2**23, 0x4B400000
"""A float32 number in whose neighbourhood the integers are the bits, and its bits."""
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one KV head's tokens fall into tiles, words and grid steps.

    Attributes:
        parts: runs of 128 tokens in a tile; 8 / parts query rows each.
        tiles: tiles of a block.
        chunk: blocks of a grid step.
        group: blocks whose instructions are scheduled together.
        steps: grid steps of a split.
        splits: parts of the sequence with programs of their own.
    """

    parts: int
    tiles: int
    chunk: int
    group: int
    steps: int
    splits: int

    @property
    def rows(self) -> int:
        """Query rows of a part."""
        return SUBLANES // self.parts


def parts_of(rows: int, block: int) -> int:
    """Runs of 128 tokens that share a tile for ``rows`` query rows.

    Raises:
        InputError: if the kernel has no tile for them.
    """
    if not 1 <= rows <= SUBLANES:
        raise _refused("query rows of a KV head", rows, f"1 to {SUBLANES}")
    if block % LANES:
        raise _refused("tokens of a block", block, f"a multiple of {LANES}")
    parts = SUBLANES
    while parts * rows > SUBLANES or block % (parts * LANES):
        parts //= 2
    return parts


def tiling_of(rows: int, blocks: int, block: int, splits: int = 1) -> Tiling:
    """The tiling for ``rows`` query rows over ``blocks`` blocks of ``block`` tokens.

    Raises:
        InputError: if the kernel has none.
    """
    parts = parts_of(rows, block)
    tiles = block // (parts * LANES)
    if tiles > GROUP_TILES:
        most = f"at most {GROUP_TILES * parts * LANES}"
        raise _refused(f"tokens of a block for {rows} query rows", block, most)
    # What a grid step reads, queries and words, fills whole registers.
    least = max(parts, SUBLANES // math.gcd(SUBLANES, tiles * parts))
    chunk = min(max(CHUNK_TOKENS // block, 1), blocks) // least * least
    chunk = chunk or min(least, blocks)
    group = max(n for n in range(1, GROUP_TILES // tiles + 1) if chunk % n == 0)
    chunks = -(-blocks // chunk)
    steps = -(-chunks // splits)
    return Tiling(parts, tiles, chunk, group, steps, -(-chunks // steps))


def _refused(what: str, given: object, supported: str) -> InputError:
    return InputError(
        f"the fused TPU kernel takes {supported} as {what}, got {given}; use another implementation"
    )


def check_device() -> None:
    """Refuse what the kernel cannot be compiled for.

    Raises:
        InputError: naming what there is.
    """
    if not devices.on_tpu():
        raise InputError(
            f"the fused TPU kernel is for TPUs, this is {devices.device().device_kind}; use "
            "another implementation"
        )


def varying(*arrays: Array) -> jax.sharding.ManualAxisType:
    """The axes of a `jax.shard_map` over which what is made of these arrays varies."""
    axes: frozenset[str] = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
    return jax.sharding.ManualAxisType(varying=axes)


def _table_rows(codewords: Float[Array, "H G R K g"]) -> Float[Array, "H W·128 d"]:
    """Codewords in the order of the lanes of tables: 16 a stage, 0 outside their group."""
    H, G, R, K, g = codewords.shape
    if K > CODEWORDS:
        raise _refused("codewords of a stage", K, f"at most {CODEWORDS}")
    spread = jnp.einsum("HGRKg,GF->HGRKFg", codewords.astype(jnp.float32), jnp.eye(G))
    spread = jnp.pad(spread, (*((0, 0),) * 3, (0, CODEWORDS - K), (0, 0), (0, 0)))
    rows = spread.reshape(H, G * R * CODEWORDS, G * g)
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % LANES), (0, 0)))


# --- the kernel -----------------------------------------------------------------------------------


def _pieces(x: Float[Array, "..."], count: int) -> list[Array]:
    """``count`` bfloat16 arrays whose sum is a float32 array to 8 bits each."""
    out = []
    for _ in range(count):
        # Rounded by bits: casts there and back are what XLA may leave out.
        upper = (jax.lax.bitcast_convert_type(x, jnp.int32) + 0x8000) & -0x10000
        upper = jax.lax.bitcast_convert_type(upper, jnp.float32)
        out.append(upper.astype(jnp.bfloat16))
        x = x - upper
    return out


def _product(a: Float[Array, "m d"], b_ref) -> Float[Array, "m n"]:
    """``a bᵀ`` for b in `_pieces`, each of which goes through the MXU once."""
    count, m = b_ref.shape[0], len(a)
    pieces, terms = _pieces(a, count), []
    for i in range(count):
        part = jax.lax.dot_general(
            jnp.concatenate(pieces[: count - i]),
            b_ref[i],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        terms += [part[j * m : (j + 1) * m] for j in range(count - i)]
    return sum(terms[1:], terms[0])


def _by_part(parts: list[Array]) -> Array:
    """One register from one a part: part p's sublanes of the p-th."""
    rows = SUBLANES // len(parts)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    out = parts[0]
    for p, x in enumerate(parts[1:], 1):
        out = jnp.where(sublane >= p * rows, x, out)
    return out


def _digits(x: Int32[Array, "8 n"]) -> Int[Array, "32 n"]:
    """Signed int8 digits of base 256: digit i of sublane s in row 4·s + i."""
    return pltpu.bitcast((x + BYTES) ^ BYTES, jnp.int8)


def _one_hot(word: Int32[Array, "1 128"]) -> Int[Array, "128 128"]:
    """int8, 1 in row 16·i + code i of a token's word, tokens in lanes.

    A register of 8 sublanes × 4 bytes holds two codes: sublane 4·i + j has the codewords 4·j to
    4·j + 3 of code i. With j taken away by exclusive or, eight times a code is less than 32 in its
    own sublane only, and 1 shifted left by that is its byte; a shift by 32 or more leaves nothing.
    """
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    word = jnp.broadcast_to(word, (SUBLANES, LANES)) ^ (sublane & 3) * 0x44444444
    columns = []
    for pair in range(PER_WORD // 2):
        up, down = (word << 3, 0) if pair == 0 else (word, 8 * pair - 3)
        eight = jax.lax.shift_right_logical(up, down + (sublane & 4))
        one = jax.lax.shift_left(jnp.ones_like(word), eight & 0x78)
        columns.append(pltpu.bitcast(one, jnp.int8))
    return jnp.concatenate(columns)


def _kernel(
    blocks_ref,  # [B] in scalar memory
    query_ref,  # [chunk·rows, d]
    shift_ref,  # [pieces, b, d]
    book_ref,  # [pieces, W·128, d]
    key_ref,  # [chunk·tiles·W·parts, 128]
    value_ref,  # [chunk·tiles·V·parts, 128]
    mass_ref,  # [8, V·128]
    total_ref,  # [8, 128], a sum a lane
    top_ref,  # [8, 128], the same in all lanes
    table_ref,  # [chunk·32, W·128] int8
    scale_ref,  # [chunk·8, 128]
    shared_ref,  # [chunk·8, b]
    score_ref,  # [chunk·tiles, 8, 128]
    digit_ref,  # [group, tiles·parts, 32, 128] int32
    count_ref,  # [parts, V, 32, 128] int32
    *,
    tiling: Tiling,
):
    t = tiling
    step = pl.program_id(3)
    first = (pl.program_id(2) * t.steps + step) * t.chunk
    valid = jnp.minimum(blocks_ref[pl.program_id(0)], first + (t.steps - step) * t.chunk)
    words, values = table_ref.shape[1] // LANES, mass_ref.shape[1] // LANES

    @pl.when(step == 0)
    def _start():
        mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        score_ref[...] = jnp.full(score_ref.shape, -jnp.inf, jnp.float32)

    # Scores of this step's chunk beside masses of the one before, which do not wait for each other.
    @pl.when(first - jnp.minimum(step, 1) * t.chunk < valid)
    def _chunk():
        rows = query_ref[...]
        tables = _product(rows, book_ref)
        shared = _product(rows, shift_ref)
        scale = jnp.max(jnp.abs(tables), axis=1, keepdims=True) / TABLE_UNIT
        # Rounded by an addition that leaves an integer in the mantissa.
        tables = tables * jnp.where(scale > 0, 1 / scale, 0) + MANTISSA
        tables = jax.lax.bitcast_convert_type(tables, jnp.int32) - MANTISSA_BITS
        for c in range(t.chunk):
            ours = slice(c * t.rows, (c + 1) * t.rows)
            of_block = pl.ds(c * SUBLANES, SUBLANES)
            table_ref[pl.ds(c * 4 * SUBLANES, 4 * SUBLANES), :] = _digits(
                jnp.concatenate([tables[ours]] * t.parts)
            )
            shared_ref[of_block, :] = jnp.concatenate([shared[ours]] * t.parts)
            scale_ref[of_block, :] = jnp.broadcast_to(
                jnp.concatenate([scale[ours]] * t.parts), (SUBLANES, LANES)
            )
        count_ref[...] = jnp.zeros(count_ref.shape, jnp.int32)
        before = top_ref[...]
        base = jnp.where(before > -jnp.inf, before, 0)

        def blocks(group, carry):
            best, total = carry
            at = [group * t.group + c for c in range(t.group)]
            tiles = [c * t.tiles + tile for c in at for tile in range(t.tiles)]
            before = [score_ref[tile] for tile in tiles]
            after = [x for i, c in enumerate(at) for x in score(i, c)]
            weights = [jnp.exp(x - base) for x in before]
            count(tiles, weights)
            for tile, x in zip(tiles, after, strict=True):
                score_ref[tile] = x
                best = jnp.maximum(best, x)
            return best, sum(weights, total)

        def one_hots(ref, count, tiles, parts):  # [count·128, tiles·parts·128] int8
            return jnp.concatenate(
                [
                    jnp.concatenate(
                        [
                            _one_hot(ref[pl.ds((tile * t.parts + p) * count + w, 1), :])
                            for w in range(count)
                        ]
                    )
                    for tile in tiles
                    for p in parts
                ],
                axis=1,
            )

        def score(i, c):
            of_block = pl.ds(pl.multiple_of(c * SUBLANES, SUBLANES), SUBLANES)
            digits = pl.ds(pl.multiple_of(c * 4 * SUBLANES, 4 * SUBLANES), 4 * SUBLANES)
            tiles = [c * t.tiles + tile for tile in range(t.tiles)]
            products = jax.lax.dot_general(
                table_ref[digits, :],
                one_hots(key_ref, words, tiles, range(t.parts)),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
            scores = []
            for run in range(t.tiles * t.parts):
                lanes = pl.ds(run * LANES, LANES)
                digit_ref[i, run] = products[:, run * LANES : (run + 1) * LANES]
                looked_up = sum(
                    digit_ref[i, run, pl.ds(k, SUBLANES, 4), :].astype(jnp.float32) * 256.0**k
                    for k in range(3)
                )
                scores.append(shared_ref[of_block, lanes] + looked_up * scale_ref[of_block, :])
            return [
                jnp.where(first + c < valid, _by_part(scores[k : k + t.parts]), -jnp.inf)
                for k in range(0, len(scores), t.parts)
            ]

        def count(tiles, weights):
            integers = [(weight * UNIT + 0.5).astype(jnp.int32) for weight in weights]
            digits = jnp.concatenate([_digits(x) for x in integers], axis=1)
            for p in range(t.parts):
                products = jax.lax.dot_general(
                    digits,
                    one_hots(value_ref, values, tiles, [p]),
                    (((1,), (1,)), ((), ())),
                    preferred_element_type=jnp.int32,
                )
                for w in range(values):
                    count_ref[p, w] += products[:, w * LANES : (w + 1) * LANES]

        best, total = jax.lax.fori_loop(0, t.chunk // t.group, blocks, (before, total_ref[...]))
        top = jnp.broadcast_to(jnp.max(best, axis=1, keepdims=True), best.shape)
        shrink = jnp.exp(base - jnp.where(top > -jnp.inf, top, 0))
        top_ref[...] = top
        total_ref[...] = total * shrink
        for w in range(values):
            at = pl.ds(w * LANES, LANES)
            counted = _by_part(
                [
                    sum(  # digit i of sublane s is row 4·s + i
                        count_ref[p, w, pl.ds(i, SUBLANES, 4), :].astype(jnp.float32)
                        * (256.0**i / UNIT)
                        for i in range(4)
                    )
                    for p in range(t.parts)
                ]
            )
            mass_ref[:, at] = (mass_ref[:, at] + counted) * shrink


def fused_kernel(
    query: Float[Array, "B H N·rows d"],
    shift: Float[Array, "H b d"],
    key_words: Int32[Array, "B H n 128"],
    value_words: Int32[Array, "B H m 128"],
    key_rows: Float[Array, "H W·128 d"],
    blocks: Int[Array, " B"],
    *,
    tiling: Tiling,
    pieces: int = 2,
    interpret: bool = False,
) -> tuple[
    Float[Array, "B H splits 8 V·128"],
    Float[Array, "B H splits 8"],
    Float[Array, "B H splits 8"],
]:
    """The kernel itself: probability on each value codeword, its sum, and the maximal score.

    Args:
        query: scaled queries in each block's frame, ``tiling.rows`` rows a block.
        shift: what the mean key adds to the keys of any block.
        key_words: of `gsrq_jax.kernels.words`, all blocks after each other.
        value_words: the same.
        key_rows: codewords, 16 a stage.
        blocks: valid blocks of each sequence.
        tiling: of `tiling_of`.
        pieces: bfloat16 pieces that stand for a float32 number where tables are made, 2 or 3.
        interpret: whether to run in TPU interpret mode, without a TPU.

    Returns:
        Unnormalised masses, their sum over any one stage, and the maximum (-inf without tokens) for
        every split and sublane.
    """
    t = tiling
    B, H, _, d = query.shape
    b = shift.shape[1]
    per_block = t.tiles * t.parts
    N = query.shape[2] // t.rows
    W, V = key_words.shape[2] // (N * per_block), value_words.shape[2] // (N * per_block)

    def chunked(rows, lanes, late=0):
        def at(i, h, s, c, blocks):  # beyond the valid chunks the last again
            last = jax.lax.div(jnp.maximum(blocks[i] - 1, 0), t.chunk)
            return i, h, jnp.minimum(s * t.steps + jnp.maximum(c - late, 0), last), 0

        return pl.BlockSpec((None, None, t.chunk * rows, lanes), at)

    def of_head(*shape):
        return pl.BlockSpec((None, *shape), lambda i, h, s, c, blocks: (h, 0, 0, 0))

    def out(*shape):
        return pl.BlockSpec((None, None, None, *shape), lambda i, h, s, c, blocks: (i, h, s, 0, 0))

    varies = varying(query, shift, key_words, value_words, key_rows, blocks)
    mass, total, top = pl.pallas_call(
        functools.partial(_kernel, tiling=t),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, t.splits, t.steps + 1),
            in_specs=[
                chunked(t.rows, d),
                of_head(pieces, b, d),
                of_head(pieces, W * LANES, d),
                chunked(per_block * W, LANES),
                chunked(per_block * V, LANES, late=1),
            ],
            out_specs=[out(SUBLANES, V * LANES), out(SUBLANES, LANES), out(SUBLANES, LANES)],
            scratch_shapes=[
                pltpu.VMEM((t.chunk * 4 * SUBLANES, W * LANES), jnp.int8),
                pltpu.VMEM((t.chunk * SUBLANES, LANES), jnp.float32),
                pltpu.VMEM((t.chunk * SUBLANES, b), jnp.float32),
                pltpu.VMEM((t.chunk * t.tiles, SUBLANES, LANES), jnp.float32),
                pltpu.VMEM((t.group, t.tiles * t.parts, 4 * SUBLANES, LANES), jnp.int32),
                pltpu.VMEM((t.parts, V, 4 * SUBLANES, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(
                (B, H, t.splits, SUBLANES, n * LANES), jnp.float32, manual_axis_type=varies
            )
            for n in (V, 1, 1)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="attend_codes",
    )(
        blocks.astype(jnp.int32),
        query,
        jnp.stack(_pieces(shift, pieces), axis=1),
        jnp.stack(_pieces(key_rows, pieces), axis=1),
        key_words,
        value_words,
    )
    return mass, total.sum(axis=-1), top[..., 0]


def attend_codes(
    query: Float[Array, "B T H q N d"],
    shift: Float[Array, "H M b d"],
    key_words: Int32[Array, "B H N n 128"],
    value_words: Int32[Array, "B H N m 128"],
    key_codewords: Float[Array, "H G R K g"],
    value_codewords: Float[Array, "H G R K g"],
    blocks: Int[Array, " B"],
    *,
    tiling: Tiling | None = None,
    pieces: int = 2,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`gsrq_jax.kernels.reference.attend_codes` as a TPU kernel, of codes as it reads them.

    Args:
        query: scaled queries in each block's frame, float32, at most 8 a KV head (T·q).
        shift: what the mean key adds to the keys of any block (M = 1).
        key_words: codes of the keys, of `gsrq_jax.kernels.words.to_words`.
        value_words: codes of the values.
        key_codewords: of this layer, at most 16 a stage.
        value_codewords: of this layer, at most 16 a stage.
        blocks: valid blocks of each sequence; the others are not read.
        tiling: of `tiling_of`, or None for that of one split.
        pieces: bfloat16 pieces of queries, codewords and shift, whose products make the tables: 3
            for the precision of float32, 2 for scores to about 1e-5 of their terms.
        interpret: whether to run in TPU interpret mode, without a TPU.

    Returns:
        What the reference returns.

    Raises:
        InputError: for shapes that the kernel does not have, saying which.
    """
    B, T, H, q, N, d = query.shape
    b = shift.shape[2]
    if shift.shape[1] != 1:
        raise _refused("shifts of the mean key", shift.shape[1], "one for all blocks")
    tiling = tiling or tiling_of(T * q, N, b)
    rows = jnp.transpose(query, (0, 2, 4, 1, 3, 5)).reshape(B, H, N, T * q, d)
    rows = jnp.pad(rows, (*((0, 0),) * 3, (0, tiling.rows - T * q), (0, 0)))
    key_rows, value_rows = _table_rows(key_codewords), _table_rows(value_codewords)
    mass, total, top = fused_kernel(
        rows.reshape(B, H, -1, d),
        shift[:, 0],
        key_words.reshape(B, H, -1, LANES),
        value_words.reshape(B, H, -1, LANES),
        key_rows,
        blocks,
        tiling=tiling,
        pieces=pieces,
        interpret=interpret,
    )
    # One softmax of all splits and parts, then one product with the codebook.
    whole = jnp.max(top.reshape(B, H, -1, tiling.rows), axis=2)  # [B, H, rows]
    whole = jnp.where(jnp.isfinite(whole), whole, 0)
    share = jnp.exp(top - jnp.tile(whole, tiling.parts)[:, :, None])  # [B, H, splits, 8]
    mass = (mass * share[..., None]).reshape(B, H, -1, tiling.rows, mass.shape[-1]).sum(axis=2)
    total = (total * share).reshape(B, H, -1, tiling.rows).sum(axis=2)
    out = jnp.einsum("BHrk,Hkd->BHrd", mass, value_rows, precision=EXACT)
    some = total > 0
    safe = jnp.where(some, total, 1)
    out = jnp.where(some[..., None], out, 0) / safe[..., None]
    lse = jnp.where(some, whole + jnp.log(safe), -jnp.inf)

    def by_query(x: Array) -> Array:  # [B, H, rows, ...] -> [B, T, H, q, ...]
        x = x[:, :, : T * q]
        return jnp.moveaxis(x.reshape(B, H, T, q, *x.shape[3:]), 2, 1)

    return by_query(out), by_query(lse)


def check_supported(
    query: Float[Array, "B T H q d"],
    key_words: Int32[Array, "B H N n 128"],
    value_words: Int32[Array, "B H N m 128"],
    key_codewords: Float[Array, "H G R K g"],
    value_codewords: Float[Array, "H G R K g"],
) -> None:
    """Refuses a call of `attend_words` that cannot be made here.

    Raises:
        InputError: naming what was given and what is supported.
    """
    check_device()
    _, T, _, q, _ = query.shape
    blocks, rows = key_words.shape[2:4]
    tiling_of(min(T, max(1, SUBLANES // q)) * q, blocks, _tokens(rows, key_codewords))
    for words, codewords in ((key_words, key_codewords), (value_words, value_codewords)):
        if codewords.shape[3] > CODEWORDS:
            raise _refused("codewords of a stage", codewords.shape[3], f"at most {CODEWORDS}")
        if words.dtype != jnp.int32 or words.shape[-1] != LANES:
            raise _refused("codes", f"{words.dtype} {words.shape}", f"int32, {LANES} a row,")


def _tokens(rows: int, codewords: Float[Array, "H G R K g"]) -> int:
    """Of a block of so many rows."""
    return rows // words_of(codewords.shape[1] * codewords.shape[2]) * LANES


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
    interpret: bool = False,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`gsrq_jax.kernels.reference.attend_words` on a TPU, by the fused kernel.

    The kernel takes 8 query rows of a KV head at a time; for more, codes are read again.

    Raises:
        InputError: if the shapes or the device are not supported.
    """
    if not interpret:
        check_supported(query, key_words, value_words, key_codewords, value_codewords)
    tokens, heads, group, d = query.shape[1:]
    n = key_words.shape[2]
    if not n:
        return jnp.zeros_like(query), jnp.full(query.shape[:4], -jnp.inf)
    b = _tokens(key_words.shape[3], key_codewords)
    starts = first + stride * b * jnp.arange(n)
    framed = rotary.rotate(query[..., None, :], -starts, inv_freq)
    mean = jnp.zeros((heads, d)) if mean is None else mean
    shift = rotary.shift(mean[:, None, None], jnp.arange(b), inv_freq, every)
    together = max(1, SUBLANES // group)
    found = [
        attend_codes(
            framed[:, some : some + together],
            shift,
            key_words,
            value_words,
            key_codewords,
            value_codewords,
            blocks,
            interpret=interpret,
        )
        for some in range(0, tokens, together)
    ]
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
    return out, lse
