"""What a warp can do, as small named functions: the vocabulary in which the kernel is written.

Mosaic GPU has arithmetic on whole arrays; what the kernel needs is bits, shuffles, look-ups and
binary products in registers. Each method emits one operation or one line of PTX, and is the only
place where that line stands. The pieces of the kernel (`gsrq_jax.kernels.pieces`) take the warp as
an argument, so that the tests can run them on 32 lanes of numpy instead.

Values are one number a lane: 32-bit integers (unsigned where it matters), float32, or 64-bit
addresses of global memory. Shared memory has 32-bit addresses in bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import scf as _scf

# Their generated types do not know the classes and functions that replace the generated ones.
arith: Any = _arith
llvm: Any = _llvm
scf: Any = _scf
FULL = 0xFFFFFFFF


def _i1() -> Any:
    return ir.IntegerType.get_signless(1)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _i64() -> Any:
    return ir.IntegerType.get_signless(64)


def _f32() -> Any:
    return ir.F32Type.get()


_TYPES = {"r": _i32, "f": _f32, "l": _i64, "b": _i1}


class Value:
    """An SSA value with operators; Python numbers on the right become constants of its type."""

    __slots__ = ("ssa",)

    def __init__(self, ssa: Any):
        self.ssa = ssa

    @property
    def kind(self) -> str:
        """PTX constraint: r (32 bits), f (float32), l (64 bits), b (a condition)."""
        return next(k for k, make in _TYPES.items() if self.ssa.type == make())

    def like(self, number: Any) -> Any:
        """``number`` as an operand of this value's type."""
        if isinstance(number, Value):
            return number.ssa
        return _constant(self.kind, number).ssa

    def _binary(self, other: Any, integer: Any, floating: Any = None) -> "Value":
        make = floating if self.kind == "f" else integer
        return Value(make(self.ssa, self.like(other)))

    def __add__(self, other: Any) -> "Value":
        return self._binary(other, arith.addi, arith.addf)

    def __sub__(self, other: Any) -> "Value":
        return self._binary(other, arith.subi, arith.subf)

    def __mul__(self, other: Any) -> "Value":
        return self._binary(other, arith.muli, arith.mulf)

    def __and__(self, other: Any) -> "Value":
        return self._binary(other, arith.andi)

    def __or__(self, other: Any) -> "Value":
        return self._binary(other, arith.ori)

    def __xor__(self, other: Any) -> "Value":
        return self._binary(other, arith.xori)

    def __invert__(self) -> "Value":
        return self ^ FULL

    def __lshift__(self, other: Any) -> "Value":
        return self._binary(other, arith.shli)

    def __rshift__(self, other: Any) -> "Value":
        return self._binary(other, arith.shrui)

    def __floordiv__(self, other: Any) -> "Value":
        return self._binary(other, arith.divui)

    def __mod__(self, other: Any) -> "Value":
        return self._binary(other, arith.remui)


def _constant(kind: str, number: Any) -> Value:
    type_ = _TYPES[kind]()
    if kind == "f":
        return Value(arith.constant(type_, ir.FloatAttr.get(type_, float(number))))
    if kind == "r":
        number = int(np.uint32(number & FULL).view(np.int32))
    return Value(arith.constant(type_, ir.IntegerAttr.get(type_, int(number))))


class Warp:
    """The warp that runs the code being emitted."""

    def __init__(self) -> None:
        thread = self._ptx("mov.u32 $0, %tid.x;", "r")
        self.lane: Value = thread & 31
        # The same in all lanes, which the compiler sees only through the shuffle.
        self.index: Value = self._ptx(
            f"shfl.sync.idx.b32 $0, $1, 0, 0x1f, {FULL};", "r", thread >> 5, effects=True
        )
        self.block: Value = self._ptx("mov.u32 $0, %ctaid.x;", "r")

    # --- numbers ------------------------------------------------------------------------------

    def integer(self, number: int) -> Value:
        """A constant."""
        return _constant("r", number)

    def unknown(self, number: int) -> Value:
        """A constant that the compiler does not see as one: a loop so often is not unrolled."""
        return self._ptx(f"mov.u32 $0, {number};", "r", effects=True)

    def floating(self, number: float) -> Value:
        """A constant."""
        return _constant("f", number)

    def bits_of(self, x: Value) -> Value:
        """The bits of a float32 as an integer."""
        return Value(arith.bitcast(_i32(), x.ssa))

    def from_bits(self, x: Value) -> Value:
        """The float32 with these bits."""
        return Value(arith.bitcast(_f32(), x.ssa))

    def to_float(self, x: Value) -> Value:
        """A signed integer as a float32."""
        return Value(arith.sitofp(_f32(), x.ssa))

    def wide(self, x: Value) -> Value:
        """An unsigned integer as 64 bits."""
        return Value(arith.extui(_i64(), x.ssa))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a b + c`` in float32, rounded once."""
        return self._ptx("fma.rn.f32 $0, $1, $2, $3;", "f", a, b, c)

    def fmax(self, a: Value, b: Value) -> Value:
        """The larger float32, or the one that is a number."""
        return self._ptx("max.f32 $0, $1, $2;", "f", a, b)

    def fmin(self, a: Value, b: Value) -> Value:
        """The smaller float32, or the one that is a number."""
        return self._ptx("min.f32 $0, $1, $2;", "f", a, b)

    def reciprocal(self, x: Value) -> Value:
        """``1 / x`` to the last bit but one."""
        return self._ptx("rcp.approx.ftz.f32 $0, $1;", "f", x)

    def exp2(self, x: Value) -> Value:
        """``2 ** x`` to two bits in the last place; 0 for very negative x."""
        return self._ptx("ex2.approx.ftz.f32 $0, $1;", "f", x)

    def log2(self, x: Value) -> Value:
        """The logarithm to two bits or so; -inf for 0."""
        return self._ptx("lg2.approx.ftz.f32 $0, $1;", "f", x)

    def floor(self, x: Value) -> Value:
        """The integer below, saturated."""
        return self._ptx("cvt.rmi.s32.f32 $0, $1;", "r", x)

    def halves(self, word: Value) -> tuple[Value, Value]:
        """Two float16 in a word, lower bits first, as float32."""
        low, high = self._ptx(
            "{.reg .b16 l,h; mov.b32 {l,h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}", "ff", word
        )
        return low, high

    def to_halves(self, low: Value, high: Value) -> Value:
        """Two float32 as float16 in a word, rounded to the nearest; infinite where too large."""
        return self._ptx("cvt.rn.f16x2.f32 $0, $1, $2;", "r", high, low)

    def bfloat16s(self, word: Value) -> tuple[Value, Value]:
        """Two bfloat16 in a word, lower bits first, as float32."""
        return self.from_bits(word << 16), self.from_bits(word & 0xFFFF0000)

    def to_bfloat16s(self, low: Value, high: Value) -> Value:
        """Two float32 as bfloat16 in a word, rounded to the nearest."""
        return self._ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", "r", high, low)

    def half_min(self, a: Value, b: Value) -> Value:
        """The smaller of two float16, pair by pair."""
        return self._ptx("min.f16x2 $0, $1, $2;", "r", a, b)

    def half_max(self, a: Value, b: Value) -> Value:
        """The larger of two float16, pair by pair."""
        return self._ptx("max.f16x2 $0, $1, $2;", "r", a, b)

    def signed_max(self, a: Value, b: Value) -> Value:
        """The larger signed integer."""
        return Value(arith.maxsi(a.ssa, b.ssa))

    def unsigned_min(self, a: Value, b: Any) -> Value:
        """The smaller unsigned integer."""
        return Value(arith.minui(a.ssa, a.like(b)))

    def choose_bytes(self, a: Value, b: Value, selector: Any) -> Value:
        """Four of the eight bytes of ``a`` (0 to 3) and ``b`` (4 to 7), lowest nibble first.

        A nibble above 7 stands for eight times the sign bit of byte ``nibble - 8``.
        """
        if isinstance(selector, Value):
            return self._ptx("prmt.b32 $0, $1, $2, $3;", "r", a, b, selector)
        return self._ptx(f"prmt.b32 $0, $1, $2, {selector};", "r", a, b)

    def sum_bytes(self, x: Value, c: Value) -> Value:
        """The sum of the four bytes of a word, and ``c``."""
        return self._ptx(f"dp4a.u32.u32 $0, $1, {0x01010101}, $2;", "r", x, c)

    def rotate_left(self, x: Value, n: Value) -> Value:
        """The word turned by ``n`` bits."""
        return self._ptx("shf.l.wrap.b32 $0, $1, $1, $2;", "r", x, n)

    # --- conditions ---------------------------------------------------------------------------

    def less(self, a: Value, b: Any) -> Value:
        """Whether ``a < b`` as signed integers."""
        return Value(arith.cmpi(arith.CmpIPredicate.slt, a.ssa, a.like(b)))

    def equal(self, a: Value, b: Any) -> Value:
        """Whether two integers are the same."""
        return Value(arith.cmpi(arith.CmpIPredicate.eq, a.ssa, a.like(b)))

    def select(self, condition: Value, a: Value, b: Any) -> Value:
        """``a`` where the condition holds, else ``b``."""
        return Value(arith.select(condition.ssa, a.ssa, a.like(b)))

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        """Run the body in the lanes where the condition holds."""
        op = scf.IfOp(condition.ssa)
        with ir.InsertionPoint(op.then_block):
            body()
            scf.yield_([])

    def either(self, condition: Value, then: Callable[[], None], other: Callable[[], None]) -> None:
        """Run one of two bodies."""
        op = scf.IfOp(condition.ssa, has_else=True)
        for block, body in ((op.then_block, then), (op.else_block, other)):
            with ir.InsertionPoint(block):
                body()
                scf.yield_([])

    def add_where_equal(self, x: Value, y: Value, a: Value, b: Value) -> Value:
        """``x + y`` in float32 where two integers are the same, else ``x``."""
        code = "{.reg .pred p; setp.eq.u32 p, $3, $4; mov.f32 $0, $1; @p add.f32 $0, $1, $2;}"
        return self._ptx(code, "f", x, y, a, b)

    def loop(
        self, count: Value, carry: list[Value], body: Callable[[Value, list[Value]], list[Value]]
    ) -> list[Value]:
        """``carry = body(i, carry)`` for i from 0 below ``count``."""
        op = scf.ForOp(self.integer(0).ssa, count.ssa, self.integer(1).ssa, [x.ssa for x in carry])
        with ir.InsertionPoint(op.body):
            new = body(Value(op.induction_variable), [Value(x) for x in op.inner_iter_args])
            scf.yield_([x.ssa for x in new])
        return [Value(x) for x in op.results]

    # --- lanes --------------------------------------------------------------------------------

    def from_lane_xor(self, x: Value, mask: int) -> Value:
        """The value of the lane whose number differs in the bits of the mask."""
        code = f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, {FULL};"
        return self._ptx(code, x.kind, x, effects=True)

    def from_lane(self, x: Value, lane: Value) -> Value:
        """The value of the lane of this number."""
        code = f"shfl.sync.idx.b32 $0, $1, $2, 0x1f, {FULL};"
        return self._ptx(code, x.kind, x, lane, effects=True)

    def all_max(self, x: Value) -> Value:
        """The largest signed integer of all lanes, in all lanes."""
        return self._ptx(f"redux.sync.max.s32 $0, $1, {FULL};", "r", x, effects=True)

    def sync(self) -> None:
        """Wait for all lanes; what they wrote is then seen by all."""
        self._ptx(f"bar.warp.sync {FULL};", "", effects=True)

    def sync_block(self) -> None:
        """Wait for all warps of the thread block."""
        self._ptx("bar.sync 0;", "", effects=True)

    def sync_first(self, warps: int) -> None:
        """Wait for so many of them, of which this is one: always the same."""
        self._ptx(f"bar.sync 1, {32 * warps};", "", effects=True)

    # --- memory -------------------------------------------------------------------------------

    def load_shared(self, address: Value, offset: int = 0, n: int = 1, kind: str = "r") -> list:
        """``n`` (1, 2 or 4) words from shared memory, as integers (r) or float32 (f)."""
        code = f"ld.shared{_vector(n)}.{_SUFFIX[kind]} {_list(0, n)}, [${n}+{offset}];"
        return self._many(self._ptx(code, kind * n, address, effects=True))

    def load_shared_16(self, address: Value, offset: int = 0) -> Value:
        """16 bits from shared memory, the upper half of the word 0."""
        code = f"{{.reg .b16 t; ld.shared.b16 t, [$1+{offset}]; cvt.u32.u16 $0, t;}}"
        return self._ptx(code, "r", address, effects=True)

    def store_shared(
        self, address: Value, values: Sequence[Value], offset: int = 0, where: Value | None = None
    ) -> None:
        """1, 2 or 4 words to shared memory, in the lanes where the condition holds."""
        n = len(values)
        store = f"st.shared{_vector(n)}.{_SUFFIX[values[0].kind]} [$0+{offset}], {_list(1, n)};"
        self._guarded(store, (address, *values), where)

    def load_global(self, address: Value, offset: int = 0, n: int = 1, kind: str = "r") -> list:
        """``n`` (1, 2 or 4) words from global memory that nothing writes meanwhile."""
        code = f"ld.global.nc{_vector(n)}.{_SUFFIX[kind]} {_list(0, n)}, [${n}+{offset}];"
        return self._many(self._ptx(code, kind * n, address, effects=True))

    def load_written(self, address: Value, offset: int = 0, n: int = 1, kind: str = "r") -> list:
        """Likewise, of what this thread block has written before it waited for all warps."""
        code = f"ld.global{_vector(n)}.{_SUFFIX[kind]} {_list(0, n)}, [${n}+{offset}];"
        return self._many(self._ptx(code, kind * n, address, effects=True))

    def store_global(
        self, address: Value, values: Sequence[Value], offset: int = 0, where: Value | None = None
    ) -> None:
        """1, 2 or 4 words to global memory, in the lanes where the condition holds."""
        n = len(values)
        store = f"st.global{_vector(n)}.{_SUFFIX[values[0].kind]} [$0+{offset}], {_list(1, n)};"
        self._guarded(store, (address, *values), where)

    # --- tensor cores -------------------------------------------------------------------------

    def binary_product(
        self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value] | None = None
    ) -> list[Value]:
        """Counts of common bits, ``[16, 8]`` = ``[16, 256] × [256, 8]`` bits, added to ``c``.

        Operands and result lie in registers as PTX lays out ``m16n8k256``: with ``g = lane // 4``
        and ``t = lane % 4``, ``a`` holds 32 bits of row g and of row g + 8 at 32 t, then the same
        at 128 + 32 t; ``b`` 32 bits of column g at 32 t and at 128 + 32 t; the result rows g and
        g + 8, columns 2 t and 2 t + 1 each.
        """
        code = (
            "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return self._ptx(code, "rrrr", *a, *b, *(c or [self.integer(0)] * 4))

    def short_binary_product(self, a: Sequence[Value], b: Value) -> list[Value]:
        """`binary_product` of half as many bits: ``[16, 8]`` = ``[16, 128] × [128, 8]``.

        ``a`` holds 32 bits of row g and of row g + 8 at 32 t, ``b`` of column g.
        """
        code = (
            "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
            "{$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$7,$7,$7};"
        )
        return self._ptx(code, "rrrr", *a, b, self.integer(0))

    def byte_product(
        self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]
    ) -> list[Value]:
        """``[16, 8]`` = ``[16, 32] × [32, 8]`` bytes without sign, added to ``c`` in 32 bits.

        Operands and result lie in registers as PTX lays out ``m16n8k32``, four bytes a word, lower
        bits first: with ``g = lane // 4`` and ``t = lane % 4``, ``a`` holds row g and row g + 8 at
        4 t …, then the same at 4 t + 16 …; ``b`` column g at 4 t …, then at 4 t + 16 …; the result
        rows g and g + 8, columns 2 t and 2 t + 1 each.
        """
        code = (
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return self._ptx(code, "rrrr", *a, *b, *c)

    def bfloat16_product(
        self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value] | None = None
    ) -> list[Value]:
        """``[16, 8]`` = ``[16, 16] × [16, 8]`` bfloat16, added to ``c`` in float32.

        Operands and result lie in registers as PTX lays out ``m16n8k16``, two bfloat16 a word,
        lower bits first: with ``g = lane // 4`` and ``t = lane % 4``, ``a`` holds row g and row
        g + 8 at 2 t and 2 t + 1, then the same at 2 t + 8 and 2 t + 9; ``b`` column g at 2 t and
        2 t + 1, then at 2 t + 8 and 2 t + 9; the result rows g and g + 8, columns 2 t and 2 t + 1
        each. What does not fit into 24 bits beside the largest term is cut off, towards zero.
        """
        code = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return self._ptx(code, "ffff", *a, *b, *(c or [self.floating(0.0)] * 4))

    def float16_product(
        self, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value] | None = None
    ) -> list[Value]:
        """`bfloat16_product`, of float16."""
        code = (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return self._ptx(code, "ffff", *a, *b, *(c or [self.floating(0.0)] * 4))

    def load_matrices(self, address: Value, transposed: bool = False) -> list[Value]:
        """Four matrices ``[8, 8]`` of 16 bits from shared memory, in a word each.

        Lane ``8 m + i`` has the address of row i of matrix m, 16 bytes. With ``g = lane // 4`` and
        ``t = lane % 4`` a word holds row g, columns 2 t and 2 t + 1, lower bits first, or if
        transposed column g, rows 2 t and 2 t + 1.
        """
        how = ".trans" if transposed else ""
        code = f"ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
        return self._ptx(code, "rrrr", address, effects=True)

    # --- copies in the background, and barriers -----------------------------------------------

    def barrier_init(self, barrier: Value, arrivals: int) -> None:
        """A barrier in shared memory whose phase ends after so many arrivals."""
        self._ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", "", barrier, effects=True)

    def barrier_fence(self) -> None:
        """Make new barriers known to the copy engine."""
        self._ptx("fence.mbarrier_init.release.cluster;", "", effects=True)

    def barrier_arrive(self, barrier: Value) -> None:
        """One arrival."""
        code = "{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [$0];}"
        self._ptx(code, "", barrier, effects=True)

    def barrier_expect(self, barrier: Value, nbytes: Value) -> None:
        """One arrival, and so many bytes to be copied before the phase ends."""
        code = "{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [$0], $1;}"
        self._ptx(code, "", barrier, nbytes, effects=True)

    def barrier_wait(self, barrier: Value, parity: Value) -> None:
        """Wait until the phase of this parity has ended."""
        code = (
            "{\n.reg .pred p;\nAGAIN_${:uid}:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n"
            "@!p bra AGAIN_${:uid};\n}"
        )
        self._ptx(code, "", barrier, parity, effects=True)

    def copies_fence(self) -> None:
        """What this lane has written or read is ordered before copies that begin later."""
        self._ptx("fence.proxy.async;", "", effects=True)

    def shared_window(self, generic: Value) -> Value:
        """The 32-bit address in shared memory of a 64-bit one that may be anywhere."""
        code = "{.reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t;}"
        return self._ptx(code, "r", generic)

    def copy_to_shared(self, to: Value, source: Value, nbytes: Value, barrier: Value) -> None:
        """Copy in the background, 16 bytes or a multiple; the barrier counts them."""
        code = (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[$0], [$1], $2, [$3];"
        )
        self._ptx(code, "", to, source, nbytes, barrier, effects=True)

    def copy_16_to_shared(self, to: Value, source: Value, where: Value) -> None:
        """Copy 16 bytes a lane in the background, or write zeros where the condition fails."""
        nbytes = self.select(where, self.integer(16), 0)
        self._ptx(
            "cp.async.cg.shared.global [$0], [$1], 16, $2;", "", to, source, nbytes, effects=True
        )

    def copies_end_group(self) -> None:
        """What this lane has begun to copy by 16 bytes since the last group is the next one."""
        self._ptx("cp.async.commit_group;", "", effects=True)

    def copies_wait(self, groups: int) -> None:
        """Wait until no more than so many of the lane's latest groups are under way."""
        self._ptx(f"cp.async.wait_group {groups};", "", effects=True)

    def prefetch(self, source: Value, nbytes: Value) -> None:
        """Copy from memory to the second-level cache in the background, 16 bytes or a multiple."""
        self._ptx("cp.async.bulk.prefetch.L2.global [$0], $1;", "", source, nbytes, effects=True)

    # --- how it is said -----------------------------------------------------------------------

    def _ptx(self, code: str, results: str, *operands: Value, effects: bool = False) -> Any:
        """One inline instruction: ``$0 …`` are the results, then the operands."""
        constraints = ",".join(["=" + kind for kind in results] + [x.kind for x in operands])
        types = [_TYPES[kind]() for kind in results]
        if not types:
            result = ir.Type.parse("!llvm.void")
        else:
            result = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
        done = llvm.inline_asm(
            result, [x.ssa for x in operands], code, constraints, has_side_effects=effects
        )
        if len(types) > 1:
            return [Value(llvm.extractvalue(t, done, [i])) for i, t in enumerate(types)]
        return Value(done) if types else None

    def _guarded(self, code: str, operands: tuple[Value, ...], where: Value | None) -> None:
        if where is None:
            self._ptx(code, "", *operands, effects=True)
            return
        flag = Value(arith.extui(_i32(), where.ssa))
        code = f"{{.reg .pred p; setp.ne.u32 p, ${len(operands)}, 0; @p {code}}}"
        self._ptx(code, "", *operands, flag, effects=True)

    @staticmethod
    def _many(values: Any) -> list:
        return values if isinstance(values, list) else [values]


_SUFFIX = {"r": "b32", "f": "f32"}


def _vector(n: int) -> str:
    return "" if n == 1 else f".v{n}"


def _list(first: int, n: int) -> str:
    names = [f"${i}" for i in range(first, first + n)]
    return names[0] if n == 1 else "{" + ",".join(names) + "}"


def warp_kernel(
    run: Callable[..., None],
    *,
    outputs: Sequence[Any],
    nbytes: int,
    parts: int,
    warps: int,
    name: str | None = None,
) -> Any:
    """A Pallas kernel, as a function of its arrays, whose body is said to each warp.

    Args:
        run: the body: of a warp, the addresses of arrays and outputs, and that of shared memory.
        outputs: shapes and dtypes.
        nbytes: of shared memory.
        parts: thread blocks.
        warps: of a thread block, a multiple of 4.
        name: of the kernel.
    """
    import jax.numpy as jnp
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(_: Any, *refs: Any) -> None:
            *arrays, shared = refs
            warp = Warp()
            run(warp, *map(global_address, arrays), shared_address(warp, shared))

        emit(*refs)

    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=[plgpu.SMEM((nbytes,), jnp.uint8)],
        grid=(parts,),
        grid_names=("part",),
        num_threads=warps // 4,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )


def global_address(ref: Any) -> Value:
    """The address of an array in global memory."""
    from jax.experimental.mosaic.gpu import utils

    return Value(llvm.ptrtoint(_i64(), utils.memref_ptr(ref)))


def shared_address(warp: Warp, ref: Any) -> Value:
    """The address of an array in shared memory, 32 bits."""
    from jax.experimental.mosaic.gpu import utils

    pointer = llvm.addrspacecast(llvm.PointerType.get(), utils.memref_ptr(ref))
    return warp.shared_window(Value(llvm.ptrtoint(_i64(), pointer)))
