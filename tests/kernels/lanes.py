"""Warps of 32 numpy lanes: run what `gsrq_jax.kernels.warp.Warp` would say to a GPU.

Values are arrays of 32 uint32, float32, uint64 (addresses of global memory) or bool. `Lanes` is one
warp, enough for a piece of the kernel; `run_block` runs all warps of a thread block, each in a
thread, with barriers and copies.
"""

import random
import threading
import time

import ml_dtypes
import numpy as np

LANES = np.arange(32)
PATIENCE = 60  # seconds that a warp waits at a barrier before the kernel counts as stuck


def every(x, dtype):
    return np.full(32, x, dtype) if np.isscalar(x) else x


class Memory:
    """Global memory: arrays at multiples of 256 bytes, all else poison."""

    def __init__(self):
        self.octets = np.zeros(0, np.uint8)

    def put(self, array):
        """A copy of an array; its address."""
        at = -(-(len(self.octets) + 16) // 256) * 256
        fill = np.full(at - len(self.octets), 255, np.uint8)
        self.octets = np.concatenate([self.octets, fill, np.ravel(array).view(np.uint8)])
        return np.full(32, at, np.uint64)

    def get(self, address, shape, dtype):
        """The array there."""
        at, size = int(address[0]), int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.octets[at : at + size].view(dtype).reshape(shape)


class Lanes:
    def __init__(self, memory=None, shared=None, index=0, block=0, gate=None):
        self.memory = memory or Memory()
        if shared is None:
            shared = np.random.default_rng(0).integers(0, 256, 256 * 1024).astype(np.uint8)
        self.shared, self.gate = shared, gate
        self.lane = LANES.astype(np.uint32)
        self.index, self.block = self.integer(index), self.integer(block)
        self.active = np.ones(32, bool)
        self.groups = [[]]  # of copies by 16 bytes

    def put(self, array):
        return self.memory.put(array)

    # --- numbers

    def integer(self, number):
        return np.full(32, number & 0xFFFFFFFF, np.uint32)

    unknown = integer

    def floating(self, number):
        return np.full(32, number, np.float32)

    def bits_of(self, x):
        return x.view(np.uint32)

    def from_bits(self, x):
        return x.view(np.float32)

    def to_float(self, x):
        return x.view(np.int32).astype(np.float32)

    def wide(self, x):
        return x.astype(np.uint64)

    def fma(self, a, b, c):
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def fmax(self, a, b):
        return np.fmax(a, b)

    def fmin(self, a, b):
        return np.fmin(a, b)

    def reciprocal(self, x):
        return np.float32(1) / x

    def exp2(self, x):
        return np.exp2(x)

    def log2(self, x):
        return np.log2(x)

    def floor(self, x):
        return np.clip(np.floor(x), -(2**31), 2**31 - 1).astype(np.int64).astype(np.uint32)

    def halves(self, word):
        both = word.view(np.float16).reshape(32, 2).astype(np.float32)
        return both[:, 0], both[:, 1]

    def to_halves(self, low, high):
        return np.stack([low, high], axis=1).astype(np.float16).view(np.uint32)[:, 0]

    def bfloat16s(self, word):
        return tuple(
            (x.astype(np.uint32)).view(np.float32) for x in (word << 16, word & 0xFFFF0000)
        )

    def to_bfloat16s(self, low, high):
        return np.stack([low, high], axis=1).astype(ml_dtypes.bfloat16).view(np.uint32)[:, 0]

    def half_min(self, a, b):
        return np.fmin(a.view(np.float16), b.view(np.float16)).view(np.uint32)

    def half_max(self, a, b):
        return np.fmax(a.view(np.float16), b.view(np.float16)).view(np.uint32)

    def signed_max(self, a, b):
        return np.maximum(a.view(np.int32), b.view(np.int32)).view(np.uint32)

    def unsigned_min(self, a, b):
        return np.minimum(a, every(b, np.uint32))

    def choose_bytes(self, a, b, selector):
        source = np.stack([(x >> (8 * i)) & 255 for x in (a, b) for i in range(4)])
        out = np.zeros(32, np.uint32)
        for i in range(4):
            pick = every(selector, np.uint32) >> (4 * i) & 15
            byte = source[pick & 7, LANES]
            sign = np.where(byte & 128, 255, 0)
            out |= np.where(pick & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
        return out

    def sum_bytes(self, x, c):
        return c + x.view(np.uint8).reshape(32, 4).sum(axis=1).astype(np.uint32)

    def rotate_left(self, x, n):
        n = n.astype(np.uint64) % 32
        twice = x.astype(np.uint64) << np.uint64(32) | x
        return (twice >> (np.uint64(32) - n)).astype(np.uint32)

    # --- conditions

    def less(self, a, b):
        return a.view(np.int32) < every(b, np.int32).view(np.int32)

    def equal(self, a, b):
        return a == b

    def select(self, condition, a, b):
        return np.where(condition, a, every(b, a.dtype))

    def when(self, condition, body):
        was = self.active
        self.active = was & condition
        if self.active.any():
            body()
        self.active = was

    def either(self, condition, then, other):
        self.when(condition, then)
        self.when(~condition, other)

    def add_where_equal(self, x, y, a, b):
        return np.where(a == b, x + y, x)

    def loop(self, count, carry, body):
        (rounds,) = set(count.tolist())
        for i in range(rounds):
            carry = body(self.integer(i), carry)
        return carry

    # --- lanes

    def _all(self):
        assert self.active.all(), "an operation of all lanes where some are not there"

    def from_lane_xor(self, x, mask):
        self._all()
        return x[LANES ^ mask]

    def from_lane(self, x, lane):
        self._all()
        return x[lane % 32]

    def all_max(self, x):
        self._all()
        return np.full(32, x.view(np.int32).max(), np.int32).view(np.uint32)

    def sync(self):
        self._all()

    def sync_block(self):
        self._all()
        self.gate.everyone.wait(PATIENCE)

    def sync_first(self, warps):
        assert (self.index < warps).all()
        self._all()
        self.gate.some(warps).wait(PATIENCE)

    # --- memory

    def _words(self, memory, address, n):
        assert (address % (4 * n) == 0).all(), "a misaligned access"
        at = address.astype(np.int64)[:, None] + np.arange(4 * n)
        return np.ascontiguousarray(memory[at].view(np.uint32).reshape(32, n).T)

    def load_shared(self, address, offset=0, n=1, kind="r"):
        words = self._words(self.shared, address + np.uint32(offset), n)
        return list(words.view(np.uint32 if kind == "r" else np.float32))

    def load_shared_16(self, address, offset=0):
        at = (address + np.uint32(offset)).astype(np.int64)
        assert (at % 2 == 0).all(), "a misaligned access"
        return self.shared[at].astype(np.uint32) | self.shared[at + 1].astype(np.uint32) << 8

    def _store(self, memory, address, values, offset, where):
        lanes = self.active if where is None else self.active & where
        at = address.astype(np.int64)[lanes] + offset
        assert (at % (4 * len(values)) == 0).all(), "a misaligned access"
        for i, value in enumerate(values):
            octets = np.ascontiguousarray(value).view(np.uint8).reshape(32, 4)
            memory[at[:, None] + 4 * i + np.arange(4)] = octets[lanes]

    def store_shared(self, address, values, offset=0, where=None):
        self._store(self.shared, address, values, offset, where)

    def load_global(self, address, offset=0, n=1, kind="r"):
        words = self._words(self.memory.octets, address + np.uint64(offset), n)
        return list(words.view(np.uint32 if kind == "r" else np.float32))

    def load_written(self, address, offset=0, n=1, kind="r"):
        return self.load_global(address, offset, n, kind)

    def store_global(self, address, values, offset=0, where=None):
        self._store(self.memory.octets, address, values, offset, where)

    # --- tensor cores

    def binary_product(self, a, b, c=None):
        self._all()
        g, t, bit = LANES // 4, LANES % 4, np.arange(32)
        left, right = np.zeros((16, 256), np.int64), np.zeros((256, 8), np.int64)
        for i in range(4):  # (row g or g + 8, first or second half)
            columns = i // 2 * 128 + 32 * t[:, None] + bit
            left[g[:, None] + 8 * (i % 2), columns] = a[i][:, None] >> bit & 1
        for i in range(2):
            right[i * 128 + 32 * t[:, None] + bit, g[:, None]] = b[i][:, None] >> bit & 1
        counts = (left.astype(np.float32) @ right.astype(np.float32)).astype(np.uint32)
        rows, columns = (g, g, g + 8, g + 8), (2 * t, 2 * t + 1, 2 * t, 2 * t + 1)
        new = [counts[r, s] for r, s in zip(rows, columns, strict=True)]
        return new if c is None else [x + y for x, y in zip(new, c, strict=True)]

    def short_binary_product(self, a, b):
        none = self.integer(0)
        return self.binary_product([*a, none, none], [b, none])

    def byte_product(self, a, b, c):
        self._all()
        g, t, byte = LANES // 4, LANES % 4, np.arange(4)
        left, right = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
        for i in range(4):
            columns = i // 2 * 16 + 4 * t[:, None] + byte
            left[g[:, None] + 8 * (i % 2), columns] = a[i].view(np.uint8).reshape(32, 4)
        for i in range(2):
            right[i * 16 + 4 * t[:, None] + byte, g[:, None]] = b[i].view(np.uint8).reshape(32, 4)
        sums = (left @ right).astype(np.uint32)
        rows, columns = (g, g, g + 8, g + 8), (2 * t, 2 * t + 1, 2 * t, 2 * t + 1)
        return [sums[r, s] + x for r, s, x in zip(rows, columns, c, strict=True)]

    def bfloat16_product(self, a, b, c=None):
        return self._product(a, b, c, lambda bits: (bits << np.uint32(16)).view(np.float32))

    def float16_product(self, a, b, c=None):
        return self._product(a, b, c, lambda bits: bits.astype(np.uint16).view(np.float16))

    def _product(self, a, b, c, number_of):
        self._all()
        g, t = LANES // 4, LANES % 4
        left, right, added = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for half in range(2):
            shift = np.uint32(16 * half)
            for i in range(4):  # (row g or g + 8, first or second eight)
                number = number_of(a[i] >> shift & np.uint32(0xFFFF))
                left[g + 8 * (i % 2), i // 2 * 8 + 2 * t + half] = number
            for i in range(2):
                right[i * 8 + 2 * t + half, g] = number_of(b[i] >> shift & np.uint32(0xFFFF))
        places = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
        if c is not None:
            for place, number in zip(places, c, strict=True):
                added[place] = number
        terms = np.concatenate([left[:, :, None] * right, added[:, None]], axis=1)
        return [sum_cut_off(terms)[place] for place in places]

    def load_matrices(self, address, transposed=False):
        self._all()
        assert (address % 16 == 0).all(), "a misaligned access"
        at = address.astype(np.int64).reshape(4, 8, 1) + np.arange(16)
        rows = np.ascontiguousarray(self.shared[at]).view(np.uint16)
        if transposed:
            rows = np.ascontiguousarray(np.swapaxes(rows, 1, 2))
        return list(rows.view(np.uint32).reshape(4, 32))

    # --- copies in the background, and barriers

    def _one(self, *values):
        (lane,) = np.flatnonzero(self.active)
        return [int(x[lane]) for x in values]

    def barrier_init(self, barrier, arrivals):
        self.gate.barriers[self._one(barrier)[0]] = Barrier(arrivals)

    def barrier_fence(self):
        pass

    def copies_fence(self):
        pass

    def _count(self, barrier, arrivals=0, nbytes=0):
        with self.gate.changed:
            self.gate.barriers[barrier].count(arrivals, nbytes)
            self.gate.changed.notify_all()

    def barrier_arrive(self, barrier):
        self._count(self._one(barrier)[0], arrivals=1)

    def barrier_expect(self, barrier, nbytes):
        at, nbytes = self._one(barrier, nbytes)
        self._count(at, arrivals=1, nbytes=nbytes)

    def barrier_wait(self, barrier, parity):
        self._all()
        at, parity = int(barrier[0]), int(parity[0])
        with self.gate.changed:
            ready = self.gate.changed.wait_for(
                lambda: self.gate.failed or self.gate.barriers[at].ended(parity), PATIENCE
            )
        assert ready, "stuck at a barrier"
        assert not self.gate.failed, "another warp failed"

    def copy_to_shared(self, to, source, nbytes, barrier):
        to, source, nbytes, barrier = self._one(to, source, nbytes, barrier)
        assert to % 16 == source % 16 == nbytes % 16 == 0, "a misaligned copy"
        assert source + nbytes <= len(self.memory.octets), "a copy from beyond memory"

        def later():
            self.shared[to : to + nbytes] = self.memory.octets[source : source + nbytes]
            self._count(barrier, nbytes=-nbytes)

        self.shared[to : to + nbytes] = 255  # nothing is there before the barrier says so
        self.gate.copies.put(later)

    def copy_16_to_shared(self, to, source, where):
        for lane in np.flatnonzero(self.active):
            at, start = int(to[lane]), int(source[lane])
            assert at % 16 == start % 16 == 0, "a misaligned copy"
            octets = np.zeros(16, np.uint8)
            if where[lane]:
                assert start + 16 <= len(self.memory.octets), "a copy from beyond memory"
                octets = self.memory.octets[start : start + 16]
            self.shared[at : at + 16] = 255  # nothing is there before it is waited for
            self.groups[-1].append((at, octets))

    def copies_end_group(self):
        self.groups.append([])

    def copies_wait(self, groups):
        while len(self.groups) - 1 > groups:
            for at, octets in self.groups.pop(0):
                self.shared[at : at + 16] = octets

    def prefetch(self, source, nbytes):
        source, nbytes = self._one(source, nbytes)
        assert source % 16 == nbytes % 16 == 0, "a misaligned copy"
        assert source + nbytes <= len(self.memory.octets)


def sum_cut_off(terms):
    """The sum over the second axis, float64 to float32, each term and the sum cut off towards zero
    at 24 bits, those of terms beside the largest."""
    top = np.abs(terms).max(axis=1, keepdims=True)
    unit = np.exp2(np.frexp(np.where(top > 0, top, 1))[1] - 24.0)
    total = (np.trunc(terms / unit) * unit).sum(axis=1)
    near = total.astype(np.float32)
    return np.where(np.abs(near) > np.abs(total), np.nextafter(near, np.float32(0)), near)


class Barrier:
    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.nbytes = self.phase = 0

    def count(self, arrivals, nbytes):
        self.pending -= arrivals
        self.nbytes += nbytes
        assert self.pending >= 0, "an arrival too many"
        if self.pending == 0 and self.nbytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def ended(self, parity):
        """Whether the phase of this parity is over: the one before the current phase is."""
        return self.phase % 2 != parity


class Gate:
    """What the warps of a block share beside memory."""

    def __init__(self, warps):
        self.everyone = threading.Barrier(warps)
        self.first = None
        self.changed = threading.Condition()
        self.barriers = {}
        self.failed = []
        self.copies = Copies()

    def some(self, warps):
        """The barrier of the first of them, always as many."""
        with self.changed:
            self.first = self.first or threading.Barrier(warps)
        assert self.first.parties == warps
        return self.first

    def abort(self):
        """Nobody waits any more."""
        for barrier in (self.everyone, self.first):
            if barrier:
                barrier.abort()


class Copies:
    """Copies that are under way: done later, in any order."""

    def __init__(self):
        self.waiting = []
        self.over = False
        self.random = random.Random(0)
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def put(self, copy):
        self.waiting.append(copy)

    def _work(self):
        while not self.over or self.waiting:
            time.sleep(self.random.choice((1e-4, 3e-3)))
            if self.waiting:
                self.waiting.pop(self.random.randrange(len(self.waiting)))()

    def end(self):
        self.over = True
        self.thread.join()


def run_kernel(program, blocks, warps, nbytes, arrays, outputs):
    """What a kernel makes of ``outputs``, by all its thread blocks, which is all that it writes.

    Args:
        program: of a warp, the places of arrays and outputs and that of shared memory.
        blocks: thread blocks.
        warps: of each.
        nbytes: of its shared memory.
        arrays: that it reads.
        outputs: as they are before.
    """
    memory, start = Memory(), 1024 + 8
    places = [memory.put(np.asarray(x)) for x in (*arrays, *outputs)]
    memory.put(np.full(1024, np.nan, np.float32))
    before, results = memory.octets.copy(), []

    def run(warp):
        program(warp, *places, warp.integer(start))

    for block in range(blocks):
        run_block(memory, warps, block, start, nbytes, run)
    for place, x in zip(places[len(arrays) :], outputs, strict=True):
        results.append(memory.get(place, x.shape, x.dtype).copy())
        first = int(place[0])
        memory.octets[first : first + x.nbytes] = before[first : first + x.nbytes]
    np.testing.assert_array_equal(memory.octets, before)
    return results


def run_block(memory, warps, block, shared_start, shared_bytes, program):
    """``program(warp)`` by each warp of a thread block whose shared memory starts there."""
    gate = Gate(warps)
    shared = np.full(shared_start + shared_bytes, 255, np.uint8)

    def run(index):
        try:
            with np.errstate(all="ignore"):
                program(Lanes(memory, shared, index, block, gate))
        except BaseException as error:
            with gate.changed:
                gate.failed.append(error)
                gate.changed.notify_all()
            gate.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(warps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.copies.end()
    for error in gate.failed:
        raise error
