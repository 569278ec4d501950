"""Greedy encoding by residual codewords, fused, on Hopper GPUs: Pallas Mosaic GPU (ours).

A warp takes 16 vectors through all stages. Their residuals stay in its registers, as an accumulator
of `mma.m16n8k16` lies there, which is also how its left operand lies: so tensor cores make both the
scores ⟨residual, c⟩ and, by a product of minus the one-hots of codes with the codewords, the next
residual. The codewords stay in shared memory, from which `ldmatrix` has them for the one product,
and transposed for the other, without a bank conflict: the 16 bytes of channels ``8 i`` on of
codeword k lie where those of ``8 (i ^ k % 8)`` would. What is written are codes.

A residual stands as 3 bfloat16 pieces, each the upper half of what the ones before it leave, so
that they hold all 24 bits; codewords are bfloat16. A tensor core cuts the terms of a sum off, at 24
bits towards zero: products of the first pieces and of the others, which are 2⁻⁷ of them, have sums
of their own, and these are added, and half the squared length is subtracted last, in float32. The
residual is cut off once a stage. What that makes of a score is in tests/gpu/check_encode.py.

What limits it: instructions. For 16 vectors of 128 channels a stage of 16 codewords is 578 of them
as assembled by jax 0.11, among them some 350 to cut pieces, 64 products and 16 `ldmatrix`: 0.33 µs
of one of a processor's four schedulers. 32 stages of 2¹⁶ vectors take 0.08 ms on an H100 (132
processors of 1.76 GHz) by that count, and to read the vectors 0.01. XLA's program writes and reads
the residuals in every stage.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt8

from gsrq_jax.kernels import devices
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu import SHARED_BYTES
from gsrq_jax.kernels.mosaic_gpu_cluster import over_problems, splits_of, varying_as

ROWS = 16
"""Vectors that a warp takes at a time: what the matrix instruction has."""
COLUMNS = 16
"""Codewords whose scores a warp has at a time."""
PIECES = 3
MOST_CODEWORDS = 256
CHANNELS = (64, 128)
"""Of a group."""
ALIGNMENT = 256
"""Of codewords in shared memory: bits of addresses below are those of a row."""
SCHEDULERS = 4
START = 0.5
"""Estimate of what a thread block takes to begin, in turns of one warp on each scheduler."""
MINUS_ONE = 0xBF80
"""In bfloat16."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call: P, n, groups, R, K, g."""

    problems: int
    points: int
    groups: int
    stages: int
    codewords: int
    channels: int

    @property
    def tiles(self) -> int:
        """Of a group of a problem: how often a warp takes vectors."""
        return -(-self.points // ROWS)

    @property
    def columns(self) -> int:
        """Codewords of a stage, with those that fill up the last columns."""
        return -(-self.codewords // COLUMNS) * COLUMNS

    @property
    def row_bytes(self) -> int:
        """Of a codeword."""
        return 2 * self.channels

    @property
    def stage_bytes(self) -> int:
        """Codewords of a stage and half their squared lengths, float32."""
        return self.columns * (self.row_bytes + 4)

    @property
    def code_bytes(self) -> int:
        """Codes of a vector as they are written: whole words."""
        return -(-self.stages // 4) * 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How a thread block encodes.

    Attributes:
        warps: of a thread block, a multiple of 4. With 16 each thread has 128 registers; with 8 it
            has 255, and pieces of 128 channels stay in them for all codewords of a stage.
        stages: whose codewords are in shared memory together. If these are not all, those that
            follow replace them, whenever each warp has a vector's tile for them.
        parts: thread blocks that share the vectors of a group of a problem.
    """

    warps: int
    stages: int
    parts: int

    def nbytes(self, problem: Problem) -> int:
        """Shared memory of a thread block."""
        return self.stages * problem.stage_bytes + ALIGNMENT


def choose_config(problem: Problem) -> Config:
    """All stages together if they fit, else as few loads of them as can be; the parts that take the
    least time."""
    p = problem
    loads = math.ceil(p.stages / ((SHARED_BYTES - ALIGNMENT) // p.stage_bytes))
    parts = splits_of(p.problems * p.groups, -(-p.tiles // SCHEDULERS), START)
    return Config(16 if p.columns == COLUMNS else 8, math.ceil(p.stages / loads), parts)


def problem_of(x: Any, codewords: Any) -> Problem:
    """The shapes of a call, from the arguments of `encode`.

    Raises:
        InputError: naming what was given and what is supported.
    """
    *lead, n, d = x.shape
    *code_lead, groups, stages, k, channels = codewords.shape

    def refuse(what: str, given: Any, supported: str) -> None:
        raise InputError(
            f"the encoder for GPUs takes {supported} as {what}, got {given}; leave the choice to "
            "gsrq_jax.residual.encode"
        )

    if codewords.dtype != jnp.bfloat16:
        refuse("dtype of the codewords", codewords.dtype, "bfloat16")
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        refuse("dtype of the vectors", x.dtype, "float32 or shorter")
    if channels not in CHANNELS:
        refuse("channels of a group", channels, "64 or 128")
    if not 1 <= k <= MOST_CODEWORDS:
        refuse("codewords of a stage", k, f"1 to {MOST_CODEWORDS}")
    if lead != code_lead or d != groups * channels:
        refuse("vectors", x.shape, f"{(*code_lead, 'n', groups * channels)}")
    if not math.prod((*x.shape, stages)):
        refuse("vectors and stages", (x.shape, stages), "at least one of each")
    return Problem(math.prod(lead), n, groups, stages, k, channels)


def check_supported(x: Any, codewords: Any) -> Problem:
    """The shapes of a call that can be made here, from the arguments of `encode`.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(x, codewords)
    devices.check_hopper()
    return problem


def encode(
    x: Float[Array, "*lead n d"], codewords: BFloat16[Array, "*lead groups stages k g"]
) -> UInt8[Array, "*lead n groups stages"]:
    """`gsrq_jax.residual.encode`, greedy, on a Hopper GPU.

    Under ``vmap`` the problems of all calls go to one kernel.

    Args:
        x: vectors, any float type up to 32 bits.
        codewords: bfloat16, at most 256 a stage, of 64 or 128 channels.

    Returns:
        The code of the largest score in each stage, the lowest of equal ones. A vector that is not
        finite has some codes.

    Raises:
        InputError: if the shapes, dtypes, the device or the version of jax are not supported.
    """
    p = check_supported(x, codewords)
    codes = over_problems(encode_problems)(
        x.reshape(p.problems, *x.shape[-2:]), codewords.reshape(p.problems, *codewords.shape[-4:])
    )
    return varying_as(codes.reshape(*x.shape[:-1], p.groups, p.stages), x, codewords)


def encode_problems(
    x: Float[Array, "P n d"], codewords: BFloat16[Array, "P groups stages k g"]
) -> UInt8[Array, "P n groups stages"]:
    """`encode` of problems in a row."""
    p = problem_of(x, codewords)
    arrays = x.astype(jnp.float32), *_prepared(p, codewords)
    return encode_kernel(p, choose_config(p))(*arrays)[0][..., : p.stages]


def _prepared(
    problem: Problem, codewords: BFloat16[Array, "P groups stages k g"]
) -> tuple[BFloat16[Array, "P groups stages K g"], Float[Array, "P groups stages K"]]:
    """Codewords filled up to whole columns, and half their squared lengths."""
    halves = jnp.sum(jnp.square(codewords.astype(jnp.float32)) / 2, axis=-1)
    more = (0, problem.columns - problem.codewords)
    none = ((0, 0),) * 3
    halves = jnp.pad(halves, (*none, more), constant_values=jnp.inf)
    return jnp.pad(codewords, (*none, more, (0, 0))), halves


def encode_kernel(problem: Problem, config: Config) -> Any:
    """The kernel as a function of float32 vectors, codewords and half their squared lengths; its
    only result is ``[P, n, groups, R]``, R a multiple of 4, of which codes are the first."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        EncodeKernel(problem, config, warp, Addresses(*places)).run()

    p = problem
    return warp_kernel(
        run,
        outputs=[jax.ShapeDtypeStruct((p.problems, p.points, p.groups, p.code_bytes), jnp.uint8)],
        nbytes=config.nbytes(p),
        parts=p.problems * p.groups * config.parts,
        warps=config.warps,
        name="encode_residual",
    )


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie, in the order of the kernel's arguments, and its shared memory."""

    x: Any
    words: Any
    halves: Any
    codes: Any
    shared: Any


class EncodeKernel:
    """What one warp of one thread block does, said to that warp.

    A lane has rows ``g = lane // 4`` and ``g + 8`` of a tile, and with ``t = lane % 4`` channels
    ``2 t`` and ``2 t + 1`` of every eight: a residual is a list of eights, of an eight channels of
    row g, then of row g + 8.
    """

    def __init__(self, problem: Problem, config: Config, warp: Any, at: Addresses):
        self.problem, self.config, self.warp, self.at = problem, config, warp, at
        p = problem
        self.words = (at.shared + (ALIGNMENT - 1)) & (2**32 - ALIGNMENT)
        self.halves = self.words + config.stages * p.columns * p.row_bytes
        self.own = warp.block // config.parts  # group of a problem
        self.row, self.pair = warp.lane // 4, warp.lane % 4
        matrix, row = warp.lane // 8, warp.lane % 8
        self.matrices = (matrix // 2 * 8 + row) * p.row_bytes + (matrix % 2 ^ row) * 16

    def run(self) -> None:
        """All vectors of this warp."""
        p, c = self.problem, self.config
        if c.stages == p.stages:
            self._load(self.warp.integer(0))

        def of_round(i: Any, _: list) -> list:
            tile = (i * c.warps + self.warp.index) * c.parts + self.warp.block % c.parts
            self._encode(tile)
            return []

        self.warp.loop(self.warp.integer(-(-p.tiles // (c.parts * c.warps))), [], of_round)

    # Codewords in shared memory.

    def _load(self, first: Any) -> None:
        """Codewords from stage ``first`` on, and half their squared lengths; waits for them."""
        warp, p = self.warp, self.problem
        self._copy(self._place_word, self.at.words, p.row_bytes, first)
        self._copy(lambda i: self.halves + i * 16, self.at.halves, 4, first)
        warp.copies_end_group()
        warp.copies_wait(0)
        warp.sync_block()

    def _stages_from(self, first: Any) -> Any:
        """How many stages are in shared memory if ``first`` is the first of them."""
        left = self.warp.integer(self.problem.stages) - first
        return self.warp.unsigned_min(left, self.config.stages)

    def _place_word(self, vector: Any) -> Any:
        """Where the 16 bytes of that number lie in shared memory."""
        of_row = self.problem.row_bytes // 16
        row = vector // of_row
        return self.words + row * (16 * of_row) + (vector % of_row ^ row & 7) * 16

    def _copy(self, place: Any, source: Any, nbytes: int, first: Any) -> None:
        """So many bytes of each codeword to where the place of each 16 of them is."""
        warp, p, c = self.warp, self.problem, self.config
        stage = p.columns * nbytes // 16
        source = source + (warp.wide(self.own) * p.stages + warp.wide(first)) * (stage * 16)
        there = self._stages_from(first) * stage

        def step(i: Any, _: list) -> list:
            vector = (i * c.warps + warp.index) * 32 + warp.lane
            own = warp.less(vector, there)

            def copy() -> None:
                warp.copy_16_to_shared(place(vector), source + warp.wide(vector * 16), own)

            warp.when(own, copy)
            return []

        warp.loop(warp.integer(-(-c.stages * stage // (32 * c.warps))), [], step)

    # Vectors.

    def _encode(self, tile: Any) -> None:
        """A tile through all stages; one that is not there through none."""
        warp, p, c = self.warp, self.problem, self.config
        eights = p.channels // 8
        carry = [*self._vectors(tile), warp.integer(0), warp.integer(0)]

        def of_stages(i: Any, carry: list) -> list:
            first = i * c.stages
            if c.stages < p.stages:
                warp.sync_block()  # nobody needs the last ones
                self._load(first)
            count = warp.select(warp.less(tile, p.tiles), self._stages_from(first), 0)
            return warp.loop(count, carry, lambda j, carry: stage(first, j, carry))

        def stage(first: Any, j: Any, carry: list) -> list:
            residual = [carry[4 * i : 4 * i + 4] for i in range(eights)]
            codes = self._best(j, residual)
            words = self._write(tile, first + j, codes, carry[4 * eights :])
            residual = self._subtract(j, codes, residual)
            return [x for eight in residual for x in eight] + words

        if c.stages == p.stages:
            of_stages(warp.integer(0), carry)
        else:
            warp.loop(warp.integer(-(-p.stages // c.stages)), carry, of_stages)

    def _vectors(self, tile: Any) -> list:
        """The lane's channels; beyond the last vector those of the last."""
        warp, p = self.warp, self.problem
        rows = []
        for more in (0, 8):
            point = warp.unsigned_min(tile * ROWS + self.row + more, p.points - 1)
            place = self.at.x + self._number(point) * (p.channels * 4) + warp.wide(self.pair * 8)
            rows.append([warp.load_global(place, i * 4, 2, "f") for i in range(0, p.channels, 8)])
        return [x for both in zip(*rows, strict=True) for two in both for x in two]

    def _number(self, point: Any) -> Any:
        """Of a point of this group in arrays ``[P, n, groups]``."""
        warp, p = self.warp, self.problem
        of_all = warp.wide(self.own // p.groups) * p.points + warp.wide(point)
        return of_all * p.groups + warp.wide(self.own % p.groups)

    def _write(self, tile: Any, stage: Any, codes: list, words: list) -> list:
        """The words of four stages with these codes, to global memory if they are full."""
        warp, p = self.warp, self.problem
        place = stage & 3
        begun = warp.less(warp.integer(0), place)
        words = [
            warp.select(begun, word, 0) | code << place * 8
            for word, code in zip(words, codes, strict=True)
        ]
        last = warp.select(warp.equal(stage, p.stages - 1), warp.integer(3), place)
        # Of the quad the first lane has row g, the second row g + 8.
        point = tile * ROWS + self.row + self.pair * 8
        there = warp.less(warp.select(warp.less(self.pair, 2), point, p.points), p.points)
        at = self.at.codes + self._number(point) * p.code_bytes + warp.wide(stage - place)
        word = warp.select(warp.equal(self.pair, 0), words[0], words[1])
        warp.when(warp.equal(last, 3), lambda: warp.store_global(at, [word], where=there))
        return words

    # A stage.

    def _columns(self, stage: Any, body: Any, carry: list) -> list:
        """``carry = body(first, place, carry)`` for each 16 codewords of a stage, from codeword
        ``first`` on; the place is that of the lane's row of their matrices."""
        warp, p = self.warp, self.problem
        own = self.words + stage * (p.columns * p.row_bytes) + self.matrices
        if p.columns == COLUMNS:
            return body(warp.integer(0), own, carry)

        def turn(i: Any, carry: list) -> list:
            first = i * COLUMNS
            return body(first, own + first * p.row_bytes, carry)

        return warp.loop(warp.integer(p.columns // COLUMNS), carry, turn)

    def _best(self, stage: Any, residual: list[list]) -> list:
        """Codes of the lane's two rows, in all lanes of the quad."""
        warp, p = self.warp, self.problem
        halves = self.halves + stage * (p.columns * 4) + self.pair * 8

        def better(first: Any, place: Any, carry: list) -> list:
            best, code = carry[:2], carry[2:]
            for i, dots in enumerate(self._products(place, residual)):
                two = warp.load_shared(halves + first * 4, i * 32, 2, "f")
                for j in range(4):
                    row, column = j // 2, first + self.pair * 2 + (i * 8 + j % 2)
                    most = warp.fmax(best[row], dots[j] - two[j % 2])
                    same = warp.equal(warp.bits_of(most), warp.bits_of(best[row]))
                    best[row], code[row] = most, warp.select(same, code[row], column)
            return best + code

        # A score that is no number is none: with these alone the codes stay as they are here.
        carry = [warp.floating(-math.inf)] * 2 + [self.pair] * 2
        found = self._columns(stage, better, carry)
        return [self._of_quad(*found[row::2]) for row in range(2)]

    def _of_quad(self, best: Any, code: Any) -> Any:
        """The code of the largest score of a quad's lanes, the lowest of equal ones."""
        warp = self.warp
        for mask in (1, 2):
            other, other_code = (warp.from_lane_xor(x, mask) for x in (best, code))
            most = warp.fmax(best, other)
            own, others = (
                warp.select(warp.equal(warp.bits_of(most), warp.bits_of(x)), i, MOST_CODEWORDS)
                for x, i in ((best, code), (other, other_code))
            )
            best, code = most, warp.unsigned_min(own, others)
        return code

    def _products(self, place: Any, residual: list[list]) -> list[list]:
        """⟨residual, c⟩ with the 16 codewords there, as two accumulators of eight."""
        warp = self.warp
        upper: list = [None, None]
        lower: list = [None, None]  # the pieces after the first
        for step in range(len(residual) // 2):
            words = warp.load_matrices(place ^ 32 * step)
            eights = residual[2 * step : 2 * step + 2]
            pairs = [self._pieces(*x[i : i + 2]) for x in eights for i in (0, 2)]
            first, *others = zip(*pairs, strict=True)
            for i in range(2):
                two = words[2 * i : 2 * i + 2]
                for piece in reversed(others):
                    lower[i] = warp.bfloat16_product(piece, two, lower[i])
                upper[i] = warp.bfloat16_product(first, two, upper[i])
        return [
            [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(lower, upper, strict=True)
        ]

    def _pieces(self, x: Any, y: Any) -> list:
        """Two numbers as words of two bfloat16, whose sum they are: the largest pieces first."""
        warp, words = self.warp, []
        for i in range(PIECES):
            word = warp.choose_bytes(warp.bits_of(x), warp.bits_of(y), 0x7632)
            words.append(word)
            if i < PIECES - 1:
                piece, other = warp.bfloat16s(word)
                x, y = x - piece, y - other
        return words

    def _subtract(self, stage: Any, codes: list, residual: list[list]) -> list[list]:
        """The residual without the codewords of these codes."""
        warp = self.warp
        ones = [warp.integer(MINUS_ONE) << (code & 1) * 16 for code in codes]

        def add(first: Any, place: Any, carry: list) -> list:
            pairs = [(code - first) >> 1 for code in codes]
            hot = [
                warp.select(warp.equal(pair, self.pair + more), one, 0)
                for more in (0, 4)
                for pair, one in zip(pairs, ones, strict=True)
            ]
            new = []
            for step in range(len(residual) // 2):
                words = warp.load_matrices(place ^ 32 * step, transposed=True)
                for i in range(2):
                    eight = carry[(2 * step + i) * 4 :][:4]
                    new += warp.bfloat16_product(hot, words[i::2], eight)
            return new

        flat = self._columns(stage, add, [x for eight in residual for x in eight])
        return [flat[i : i + 4] for i in range(0, len(flat), 4)]
