"""The pieces of the fused kernel, each one step of a warp's work on 32 tokens a time.

    table          query · codeword, float16, to 16-bit entries in shared memory     once a block
    scores         codes of 32 tokens to sums of entries, and to scores              8 a chunk
    probabilities  scores of a chunk to 16-bit numbers below the chunk's own maximum
    planes         their bits, 32 tokens a word: the operand of the binary product
    one_hot        bit planes of value codes to rows "this token has code c"
    histogram      the counts of a chunk, added to the running histogram

A chunk is 256 tokens, what one binary product contracts. Rows are query heads (and query tokens)
of one KV head, four at a time. Costs are a chunk's, in warp instructions (an SM issues four a
cycle) for the whole thread block, at 32 stages of 16 codewords for keys and for values (1 bit,
head_dim 128); LDS and SHFL also share one pipe that takes one of them every 2 cycles or so.

Each piece takes the warp that runs it (`gsrq_jax.kernels.warp.Warp`, or numpy in the tests).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from gsrq_jax.kernels.tiles import PLANES, STRIP, key_unit, strips

ROWS = 4
"""Query rows that share one look-up: four entries of 16 bits are one 8-byte load."""
CHUNK = 256
LN2 = math.log(2)
"""Scores are in powers of 2."""
GROUPS = CHUNK // 32
"""Groups of 32 tokens in a chunk, one a lane: see `tokens_of_lane`."""
PROBABILITY_BITS = 16
HEADROOM = 2.0**-12
"""Probabilities are 2**-HEADROOM of what they should be, all alike, so that the largest, rounded,
still has `PROBABILITY_BITS` bits; the log-sum-exp adds it back."""
OCTET = 8
"""Entries that are added in 16 bits before they are widened."""
ENTRY_MOST = 65535 - OCTET
"""Largest sum of the entries of an octet, less what rounding may add."""
COUNTERS = 8
"""Warps that count, each an octet of stages: 64 at most."""
OPERANDS = PROBABILITY_BITS // 2
"""Right operands of binary products: two bits of four rows are the eight columns of one."""
DOUBLED = 2
"""Pairs of operands, of four, whose higher bits are counted twice instead of weighed. All on an
H200 at (8, 128k) and 1 bit: 200 µs; none 198; two 191."""
OPERAND_BYTES = 32 * 8
"""Of one of them: two words a lane."""
COUNT = 2.0**-149
"""The float32 whose bits are the integer 1: an integer, its bits read as a float32, is that many of
these. They are subnormal, which a multiply-add takes as any number."""
SCORE = 2.0**-29
"""What a score of 1 is as long as scores are added up, such that `SCORE` / `COUNT` times a table's
step, which may be up to 16, is a number of float32."""
LAST_BIT = 2.0**-37
"""What the last bit of a probability is in a histogram, likewise."""


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """Where the entry of a code is: ``[code, place, row]``, 16 bits each.

    A strip of up to 16 stages has 16 places, stage ``place mod w``. In shared memory (16 codewords)
    two strips make a row of 256 bytes and each 16 rows follow each other; in global memory (256
    codewords) all strips of a code do.
    """

    stages: int
    codewords: int

    @property
    def shared(self) -> bool:
        """Whether the kernel makes it, in shared memory, rather than reads it."""
        return self.codewords == 16

    @property
    def code_bytes(self) -> int:
        """From one code's entries to the next."""
        return 256 if self.shared else self.places * 2 * ROWS

    @property
    def places(self) -> int:
        """Entries of a code, copies counted."""
        return STRIP * len(strips(self.stages))

    @property
    def nbytes(self) -> int:
        """The whole table."""
        return self.codewords * self.code_bytes * (-(-self.places // 32) if self.shared else 1)

    def strip_offset(self, strip: int) -> int:
        """Bytes to the strip's entries of code 0."""
        if self.shared:
            return strip // 2 * 16 * 256 + strip % 2 * 128
        return strip * 128

    @property
    def units(self) -> tuple[int, int]:
        """See `gsrq_jax.kernels.tiles.key_unit`."""
        return key_unit(self.stages, self.codewords)


# --- table ----------------------------------------------------------------------------------------


def table(warp: Any, form: KeyTable, raw: Any, place: Any, facts: Any) -> None:
    """Products of one block's queries with the codewords to a table of 16-bit integers.

    Entry = (product − smallest of its stage) / step, with one step a row, such that no octet of
    stages can add up to more than 16 bits; the smallest ones, added up, join the row's offset. A
    lane takes one stage (or a copy of one), 16 codes × 4 rows, and writes them 8 bytes a code.

    Cost: about 420 instructions, of which 8 loads of 16 bytes, 16 stores of 8, 38 SHFL.

    Args:
        warp: who does it.
        form: of the table, with 16 codewords.
        raw: address of ``[ROWS, stages, 16]`` float16 in global memory, as the thread block wrote
            them.
        place: address of the table in shared memory.
        facts: address of ``[2, ROWS]`` float32 there; gets each row's step, in `SCORE` by `COUNT`,
            and offset, in `SCORE`.
    """
    parts = strips(form.stages)
    tiny = warp.floating(1e-30)
    low: list[list] = []
    words: list[list] = []
    widest = [warp.floating(0.0)] * ROWS
    bottom = [warp.floating(0.0)] * ROWS
    for pair in range(0, len(parts), 2):
        stage, counts = _stage_of_lane(warp, parts[pair : pair + 2])
        source = raw + warp.wide(stage * 32)
        low.append([])
        words.append([])
        for row in range(ROWS):
            at = row * form.stages * 32
            w = warp.load_written(source, at, 4) + warp.load_written(source, at + 16, 4)
            words[-1].append(w)
            least, most = w[0], w[0]
            for x in w[1:]:
                least, most = warp.half_min(least, x), warp.half_max(most, x)
            a, b = warp.halves(least)
            c, d = warp.halves(most)
            top = warp.fmax(c, d)
            a = warp.fmin(a, b)
            low[-1].append(a)
            octet = top - a
            for mask in (1, 2, 4):
                octet = octet + warp.from_lane_xor(octet, mask)
            widest[row] = warp.fmax(widest[row], octet)
            bottom[row] = bottom[row] + warp.select(counts, a, 0.0)
    scale = []
    steps = []
    offsets = []
    for row in range(ROWS):
        for mask in (1, 2, 4, 8, 16):
            bottom[row] = bottom[row] + warp.from_lane_xor(bottom[row], mask)
        # Positive floats are ordered as their bits are.
        most = warp.fmax(warp.from_bits(warp.all_max(warp.bits_of(widest[row]))), tiny)
        scale.append(warp.reciprocal(most) * float(ENTRY_MOST))
        steps.append(most * (SCORE / COUNT / ENTRY_MOST))
        offsets.append(bottom[row] * SCORE)
    first = warp.equal(warp.lane, 0)
    warp.store_shared(facts, steps, 0, where=first)
    warp.store_shared(facts, offsets, 16, where=first)
    mine = place + warp.lane * 8
    magic = warp.floating(2.0**23)
    for pair, (lows, rows) in enumerate(zip(low, words, strict=True)):
        for word in range(8):
            entries = []  # [row][half of the word]
            for row in range(ROWS):
                both = warp.halves(rows[row][word])
                entries.append(
                    [warp.bits_of(warp.fma(x - lows[row], scale[row], magic)) for x in both]
                )
            for half in range(2):
                q = [entries[row][half] for row in range(ROWS)]
                warp.store_shared(
                    mine,
                    [warp.choose_bytes(q[0], q[1], 0x5410), warp.choose_bytes(q[2], q[3], 0x5410)],
                    (pair * 16 + 2 * word + half) * 256,
                )
    warp.sync()


def _stage_of_lane(warp: Any, parts: tuple[tuple[int, int], ...]) -> tuple[Any, Any]:
    """The stage at lane's place in one strip or two, and whether it has no place before."""
    place = warp.lane & 15
    below = warp.less(warp.lane, 16)
    (first, w) = parts[0]
    stage = (place & (w - 1)) + first
    counts = warp.less(place, w)
    if len(parts) == 1:
        return stage, counts & below
    (first, w) = parts[1]
    other = (place & (w - 1)) + first
    return (
        warp.select(below, stage, other),
        warp.less(place, warp.select(below, warp.integer(parts[0][1]), w)),
    )


# --- scores ---------------------------------------------------------------------------------------


def tokens_of_lane(warp: Any) -> list:
    """A lane's token of 64, in the first of two groups and in the second.

    Lanes 0 to 15 go through tokens 0 to 31, lanes 16 to 31 through the others, 16 at a time and so
    that the groups are 32 different tokens modulo 32: half a warp's tokens of two groups are the 32
    that a word of a bit plane has (`planes`), and its tokens of one lie in all banks.
    """
    return [warp.lane + ((warp.lane & 16) << 1), warp.lane + 16]


@dataclasses.dataclass(frozen=True)
class Places:
    """What a lane needs to turn a code into the address of its entry; made once."""

    words: list
    base: Any


def places(warp: Any, form: KeyTable, base: Any) -> Places:
    """Of a table in shared memory, whose address must be a multiple of 4096.

    Three places, 8 bytes each, and the third byte of the address share a word.
    """
    place = (warp.lane & 15) << 3
    high = (base >> 16) << 24
    words = []
    for first in range(0, STRIP, 3):
        word = high
        for i in range(3):
            if first + i < STRIP:
                word = word | ((place ^ ((first + i) * 8)) << (8 * i))
        words.append(word)
    return Places(words, ((base >> 12) & 15) * 0x10101010)


def look_up(warp: Any, form: KeyTable, where: Places, units: list) -> list:
    """Sums of the entries of a lane's token, one for each row.

    Cost: 8 × (32 × (PRMT, LDS.64, 2 halves of an IADD3) + 28) = 990, of which 256 LDS.64.

    Args:
        warp: who does it.
        form: of the table, in shared memory.
        where: from `places`.
        units: the lane's codes, as tiles have them.
    """
    mask = 0x0F0F0F0F
    nibbles: list[tuple] = []
    for unit in units:
        low = (unit & mask) | where.base
        high = ((unit >> 4) & mask) | where.base
        nibbles += [(half, i) for i in range(form.units[1] // 8) for half in (low, high)]

    def entry(step: int, strip: int, s: int) -> list:
        codes, byte = nibbles[step]
        own = 4 + s % 3
        # Bytes: own place, code, high byte of the address, 0 (the sign of the place).
        address = warp.choose_bytes(
            codes, where.words[s // 3], own | byte << 4 | 7 << 8 | (own | 8) << 12
        )
        return warp.load_shared(address, form.strip_offset(strip), 2)

    return _added_up(warp, form, entry)


def look_up_global(warp: Any, form: KeyTable, base: Any, units: list) -> list:
    """The same from a table in global memory, where one of 256 codewords a stage is too large to
    be copied for every block: each of the loads is 32 transactions, four times the rest together.
    """
    per_unit = form.units[1] // 8
    place = (warp.lane & 15) << 3

    def entry(step: int, strip: int, s: int) -> list:
        code = (units[step // per_unit] >> (step % per_unit * 8)) & 255
        offset = code * form.code_bytes + (place ^ (s * 8))
        return warp.load_global(base + warp.wide(offset), form.strip_offset(strip), 2)

    return _added_up(warp, form, entry)


def _added_up(warp: Any, form: KeyTable, entry: Any) -> list:
    # Of two rows in a word: the words, of which 32 bits matter, and their upper halves.
    words_sum, upper_sum = ([warp.integer(0)] * (ROWS // 2) for _ in range(2))
    step = 0
    for strip, (_, w) in enumerate(strips(form.stages)):
        for start in range(0, w, OCTET):
            total: Any = None
            for s in range(start, min(start + OCTET, w)):
                words = entry(step, strip, s)
                step += 1
                total = (
                    words if total is None else [a + b for a, b in zip(total, words, strict=True)]
                )
            words_sum = [a + x for a, x in zip(words_sum, total, strict=True)]
            upper_sum = [a + (x >> 16) for a, x in zip(upper_sum, total, strict=True)]
    sums = []
    for both, upper in zip(words_sum, upper_sum, strict=True):
        sums += [both - (upper << 16), upper]
    return sums


def knot_bytes(every: int, tokens: int) -> int:
    """Of what `gather_knots` writes, so many tokens."""
    return tokens // every * 2 * ROWS * 4


def gather_knots(warp: Any, every: int, stride: int, raw: Any, offsets: list, place: Any) -> None:
    """What scores have at a chunk's knots beside their table's entries, and what they gain a token.

    That is offset and share of the mean key. Cost, 16 knots: 8 LDS, 2 STS of 16 bytes, 16 others.

    Args:
        warp: who does it.
        every: tokens from knot to knot, a power of two up to 64.
        stride: bytes from row to row.
        raw: address of ``[ROWS, stride]`` float32 in shared memory, the mean key's shares; one
            after the last knot is there.
        offsets: of the rows, in `SCORE`.
        place: address there that gets ``[CHUNK / every, 2, ROWS]`` float32.
    """
    count = CHUNK // every
    for first in range(0, count, 32):
        knot = warp.lane + first
        own = raw + warp.unsigned_min(knot, count - 1) * 4
        there = warp.less(knot, count)
        at, gain = [], []
        for row in range(ROWS):
            here, after = (
                warp.load_shared(own, row * stride + i * 4, kind="f")[0] * SCORE for i in range(2)
            )
            at.append(here + offsets[row])
            gain.append((after - here) * (1.0 / every))
        for i, of_rows in enumerate((at, gain)):
            warp.store_shared(place + knot * (2 * ROWS * 4), of_rows, i * ROWS * 4, where=there)
    warp.sync()


def between_knots(warp: Any, every: int, knots: Any, token: Any, start: int) -> list:
    """``[ROWS]`` of a group's tokens, from the knots before them.

    Cost: 8 × (2 LDS of 16 bytes, 4 FFMA) = 48.

    Args:
        warp: who does it.
        every: tokens from knot to knot.
        knots: address of what `gather_knots` wrote.
        token: from `tokens_of_lane`.
        start: of the 64 tokens, in those that ``knots`` are of.
    """
    own, since = knots + token // every * (2 * ROWS * 4), warp.to_float(token % every)
    at, gain = (
        warp.load_shared(own, start // every * (2 * ROWS * 4) + i * ROWS * 4, ROWS, "f")
        for i in range(2)
    )
    return [warp.fma(b, since, a) for a, b in zip(at, gain, strict=True)]


def scores(warp: Any, sums: list, others: list, steps: list) -> list:
    """Scores in powers of 2, as multiples of `SCORE`: ``others + step · sum`` of each row.

    The sum is an integer, read as a float32. Cost: 8 × 4 = 32.

    Args:
        warp: who does it.
        sums: from `look_up`.
        others: offset and share of the mean key, ``[ROWS]``.
        steps: of the rows, as `table` has them.
    """
    return [warp.fma(warp.from_bits(sums[r]), steps[r], others[r]) for r in range(ROWS)]


# --- probabilities, planes ------------------------------------------------------------------------


def chunk_scale(warp: Any, chunk: list) -> list:
    """The integer above the largest score of each row in a chunk, ``[GROUPS][ROWS]`` scores.

    A scale of the chunk's own keeps the error of a chunk in proportion to what it contributes, and
    makes the result independent of which warp was first. Cost: 8 × 4 + 4 × 3 = 44.
    """
    scale = []
    for row in range(ROWS):
        most = chunk[0][row]
        for group in chunk[1:]:
            most = warp.fmax(most, group[row])
        scale.append(warp.all_max(warp.floor(most * (1 / SCORE))) + 1)
    return scale


def probabilities(warp: Any, chunk: list, scale: list) -> list:
    """``2 ** (score − scale)`` in `PROBABILITY_BITS` bits, two tokens of a row a word.

    The lower 16 bits are the token of two that comes first (see `tokens_of_lane`).
    Cost: 8 × (4 × (FFMA, EX2, FADD) + 2) = 112.

    Returns:
        ``[ROWS][GROUPS / 2]`` words.
    """
    in_order = warp.select(warp.less(warp.lane, 16), warp.integer(0x5410), 0x1054)
    words: list[list] = []
    for r in range(ROWS):
        shift = warp.floating(PROBABILITY_BITS - HEADROOM) - warp.to_float(scale[r])
        in_bits = [warp.exp2(warp.fma(g[r], warp.floating(1 / SCORE), shift)) for g in chunk]
        p = [warp.bits_of(x + 2.0**23) for x in in_bits]
        words.append(
            [warp.choose_bytes(*pair, in_order) for pair in zip(p[::2], p[1::2], strict=True)]
        )
    return words


@dataclasses.dataclass(frozen=True)
class Ways:
    """Where a lane writes and reads in the steps of `planes`, in bytes from a slot's start; made
    once.

    Attributes:
        out: of its four words of each row.
        back: of the words of lanes ``16 h + i``, i in steps of 2, modulo 8.
        planes: of its planes of even digits and of odd ones.
    """

    out: list
    back: list
    planes: list


def ways(warp: Any) -> Ways:
    """Such that eight lanes that write 16 bytes, and 32 that write or read 4, meet in no bank."""
    lane = warp.lane
    upper, row, two_groups = lane >> 4, (lane >> 2) & 3, lane & 3
    turn = (lane >> 1) & 3
    half, quarter = two_groups >> 1, ((two_groups & 1) << 1) + upper
    return Ways(
        [(lane + upper) * 64 + ((turn ^ c) << 4) for c in range(ROWS)],
        [upper * (17 * 64) + ((row ^ c) << 4) + (two_groups << 2) for c in range(4)],
        [_of_column(row, warp.integer(odd), quarter) + (half << 2) for odd in range(2)],
    )


def _of_column(row: Any, odd: Any, quarter: Any) -> Any:
    """Bytes to the two words of a column, even or odd digits of a row, in an operand's layout.

    No two of 16 are in one bank, be they all rows and quarters of 32 tokens of even digits or of
    odd ones (which are stored at a time) or two rows with both (which are loaded).
    """
    return (odd << 7) + (quarter << 5) + ((row & 1) << 3) + (((row >> 1) ^ odd) << 4)


def planes(warp: Any, way: Ways, words: list, place: Any) -> list:
    """Words of one bit of 32 tokens: lane ``16 h + 4 row + j`` gets all bits of a row's
    probabilities of tokens ``64 j + 32 h …``.

    Through shared memory each lane gets the words of the 16 lanes that have its 32 tokens, and
    turns bits and words of them in its registers. Cost: 4 STS of 16 bytes, 16 LDS, 16 PRMT, 48 ×
    (SHF, LOP3), 10 others = 142.

    Args:
        warp: who does it.
        way: from `ways`.
        words: from `probabilities`.
        place: address of `plane_bytes` in shared memory, free again afterwards.
    """
    for out, of_row in zip(way.out, words, strict=True):
        warp.store_shared(place + out, of_row)
    warp.sync()
    back = [place + x for x in way.back]
    x = [warp.load_shared(back[i // 2 % 4], i * 64)[0] for i in range(16)]
    for step, mask in ((8, 0), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        others = mask ^ 0xFFFFFFFF
        for i in range(16):
            if not i & step:
                a, b = x[i], x[i + step]
                if step == 8:
                    x[i] = warp.choose_bytes(a, b, 0x6240)
                    x[i + step] = warp.choose_bytes(a, b, 0x7351)
                else:
                    x[i] = (a & mask) | ((b << step) & others)
                    x[i + step] = ((a >> step) & mask) | (b & others)
    warp.sync()
    return x


def plane_bytes() -> int:
    """Shared memory of a chunk's planes of probabilities, and of what `planes` passes through it:
    64 bytes a lane, and 64 between the lower lanes and the upper ones."""
    return 33 * 64


def store_planes(warp: Any, way: Ways, x: list, place: Any) -> None:
    """To shared memory as right operands of binary products, columns (row, which of two digits).

    Digits have two bits, of which one operand has the lower ones of two digits of all rows, and the
    next one the higher ones. What a lane needs of it, the 32 tokens of one quarter of each half of
    the chunk, stands side by side. Cost: 16 STS; no bank twice.
    """
    own = [place + offset for offset in way.planes]
    for bit in range(PROBABILITY_BITS):
        digit, higher = bit >> 1, bit & 1
        operand = digit // 2 * 2 + higher
        warp.store_shared(own[digit % 2], [x[bit]], operand * OPERAND_BYTES)


def load_planes(warp: Any, place: Any) -> list:
    """The right operands, of the lowest two digits first; 8 LDS of 8 bytes a warp."""
    column, quarter = warp.lane >> 2, warp.lane & 3
    own = place + _of_column(column >> 1, column & 1, quarter)
    return [warp.load_shared(own, i * OPERAND_BYTES, 2) for i in range(OPERANDS)]


# --- histogram ------------------------------------------------------------------------------------


def octets_of(stages: int) -> int:
    """Octets of stages, of which a warp counts one: all 16 codes of 8 stages."""
    return -(-stages // 8)


def load_codes(warp: Any, stages: int, octet: Any, place: Any) -> list:
    """Bit planes of the values of a chunk, two tiles of `PLANES` words, for one octet of stages."""
    stage = warp.unsigned_min((octet << 3) + (warp.lane >> 2), stages - 1)
    own = place + (((stage << 2) + (warp.lane & 3)) << 4)
    return [warp.load_shared(own, half * stages * 64, PLANES) for half in range(2)]


def one_hot(tiles: list, low: int) -> list:
    """Left operand of a binary product: rows (stage, highest bit of the code), columns tokens.

    Args:
        tiles: from `load_codes`.
        low: the other three bits of the code. Cost: 6 LOP3.
    """
    operand = []
    for tile in tiles:
        bits = [tile[k] if low >> k & 1 else ~tile[k] for k in range(3)]
        has = bits[0] & bits[1] & bits[2]
        operand += [has & ~tile[3], has & tile[3]]
    return operand


def histogram(warp: Any, tiles: list, columns: list) -> Iterator[list]:
    """Probability, in units of `LAST_BIT`, on each code of an octet: 8 times two float32.

    The codes are ``low`` and ``low + 8``, one after the other, so that few are on the way at once.
    Lane (g, t) holds stage g of the octet and row t. A count, its bits read as a float32, is
    multiplied by the weight of its bit or digit and added in one instruction, exactly. Of
    `DOUBLED` pairs of operands the higher bits are counted twice on top of the lower ones, so that
    there are half as many numbers to add: what the tensor cores then do more, others do less.
    Cost, 4 octets: 32 × (10 products, 6 LOP3, 24 FFMA) = 1280.
    """
    for low in range(8):
        left = one_hot(tiles, low)
        counted = []  # (counts, weight of the lower of two digits' bits)
        for pair in range(OPERANDS // 2):
            lower, higher = columns[2 * pair : 2 * pair + 2]
            counts, weight = warp.binary_product(left, lower), LAST_BIT / COUNT * 16.0**pair
            if pair < DOUBLED:
                for _ in range(2):
                    counts = warp.binary_product(left, higher, counts)
                counted.append((counts, weight))
            else:
                counted.append((counts, weight))
                counted.append((warp.binary_product(left, higher), 2 * weight))
        yield [_weighted(warp, counted, half) for half in range(2)]


def _weighted(warp: Any, counted: list, half: int) -> Any:
    """The sum of all digits of a row of the left operand, ``half`` of two."""
    total: Any = None
    for counts, weight in counted:
        for digit in range(2):
            count = warp.from_bits(counts[2 * half + digit])
            of_digit = warp.floating(weight * 4.0**digit)
            total = count * of_digit if total is None else warp.fma(count, of_digit, total)
    return total


def add_chunk(
    warp: Any, mass: list, chunk: Iterable[list], scale: Any, chunk_scale: Any
) -> tuple[list, Any]:
    """The running histogram and its scale with a chunk's added, at the larger of the two scales.

    Cost, 4 octets: 4 × (2 EX2, 32 FMUL or FFMA, 5) = 160.
    """
    larger = warp.signed_max(scale, chunk_scale)
    old = warp.exp2(warp.to_float(scale - larger))
    new = warp.exp2(warp.to_float(chunk_scale - larger))
    return [
        [warp.fma(b, new, a * old) for a, b in zip(x, y, strict=True)]
        for x, y in zip(mass, chunk, strict=True)
    ], larger
