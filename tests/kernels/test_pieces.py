"""Each piece of the GPU kernel on numpy lanes, against what it is defined to compute."""

import numpy as np
import pytest
from lanes import Lanes

from gsrq_jax.kernels import pieces, tiles

STAGES = [2, 4, 8, 12, 16, 24, 32, 48, 64]
TABLE, FACTS = 0x3000, 0x1000
SCORE = np.float32(pieces.SCORE)


def u32(x):
    return np.full(32, x, np.uint32)


def made_table(warp, stages, raw):
    form = pieces.KeyTable(stages, 16)
    pieces.table(warp, form, warp.put(raw.astype(np.float16)), u32(TABLE), u32(FACTS))
    facts = warp.shared[FACTS : FACTS + 32].view(np.float32)
    return form, facts[:4] * (pieces.COUNT / pieces.SCORE), facts[4:] / pieces.SCORE


def entries_of(warp, form):
    """``[stage, code, row]`` of the first copy, and all copies the same."""
    out = np.zeros((form.stages, form.codewords, 4), np.int64)
    for strip, (first, w) in enumerate(tiles.strips(form.stages)):
        for code in range(form.codewords):
            at = TABLE + form.strip_offset(strip) + code * form.code_bytes
            row = warp.shared[at : at + 128].view(np.uint16).reshape(16, 4)
            out[first : first + w, code] = row[:w]
            np.testing.assert_array_equal(row, np.tile(row[:w], (16 // w, 1)))
    return out


@pytest.mark.parametrize("stages", STAGES)
def test_table_keeps_every_product_to_a_step(stages):
    rng = np.random.default_rng(stages)
    raw = rng.normal(size=(4, stages, 16)) * np.array([3, 0.01, 40, 1])[:, None, None]
    raw = raw.astype(np.float16)
    warp = Lanes()
    form, step, offset = made_table(warp, stages, raw)
    low = raw.min(axis=-1).astype(np.float64)
    np.testing.assert_allclose(offset, low.sum(axis=-1), rtol=1e-5)
    entries = np.moveaxis(entries_of(warp, form), -1, 0)
    error = low[..., None] + step[:, None, None] * entries - raw
    assert (np.abs(error).max(axis=(1, 2)) <= 0.5001 * step + 1e-6 * np.abs(raw).max((1, 2))).all()
    most = entries.max(axis=-1)  # the largest sums an octet can come to
    sums = [most[:, f + i : f + min(i + 8, w)].sum(axis=1)
            for f, w in tiles.strips(stages) for i in range(0, w, 8)]  # fmt: skip
    assert np.max(sums) < 2**16
    if stages % 8 == 0:  # and the range is used
        assert (np.max(sums, axis=0) > 65000).all()


def test_table_of_equal_products():
    warp = Lanes()
    form, step, offset = made_table(warp, 8, np.full((4, 8, 16), 2.0))
    assert not entries_of(warp, form).any()
    assert (step > 0).all()
    np.testing.assert_allclose(offset, 16)


def stored_units(codes, codewords):
    """The units that the 32 lanes read of the first 32 tokens of a tile."""
    units, width = tiles.key_unit(codes.shape[1], codewords)
    words = np.asarray(tiles.keys_to_tiles(codes, codewords))[0]
    return [
        np.ascontiguousarray(x[:32]).astype(np.uint32)
        for x in words.view(np.uint32 if width == 32 else np.uint16).reshape(units, tiles.TILE)
    ]


def integers(sums):
    return np.stack([x.astype(np.int64) for x in sums])


@pytest.mark.parametrize("base", [0x3000, 0xF000, 0x2A000])
@pytest.mark.parametrize("stages", STAGES)
def test_look_up_adds_up_the_entries_of_the_codes(stages, base):
    rng = np.random.default_rng(stages)
    form = pieces.KeyTable(stages, 16)
    entry = rng.integers(0, 65535 // 8, (stages, 16, 4))
    warp = Lanes()
    for strip, (first, w) in enumerate(tiles.strips(stages)):
        for code in range(16):
            at = base + form.strip_offset(strip) + code * form.code_bytes
            row = np.tile(entry[first : first + w, code], (16 // w, 1)).astype(np.uint16)
            warp.shared[at : at + 128] = row.ravel().view(np.uint8)
    codes = rng.integers(0, 16, (tiles.TILE, stages)).astype(np.uint8)
    where = pieces.places(warp, form, u32(base))
    got = integers(pieces.look_up(warp, form, where, stored_units(codes, 16)))
    want = entry[np.arange(stages), codes[:32]].sum(axis=1).T
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("stages", [2, 4, 8, 12, 16, 32])
def test_look_up_in_global_memory(stages):
    rng = np.random.default_rng(stages)
    form = pieces.KeyTable(stages, 256)
    entry = rng.integers(0, 65535 // 8, (stages, 256, 4))
    copies = [first + np.arange(16) % w for first, w in tiles.strips(stages)]
    stored = np.moveaxis(entry[np.concatenate(copies)], 0, 1).astype(np.uint16)
    assert stored.nbytes == form.nbytes
    warp = Lanes()
    warp.put(np.zeros(17))
    base = warp.put(stored)
    codes = rng.integers(0, 256, (tiles.TILE, stages)).astype(np.uint8)
    got = integers(pieces.look_up_global(warp, form, base, stored_units(codes, 256)))
    np.testing.assert_array_equal(got, entry[np.arange(stages), codes[:32]].sum(axis=1).T)


def test_no_look_up_meets_another_in_a_bank():
    class Watched(Lanes):
        def load_shared(self, address, offset=0, n=1, kind="r"):
            for half in (address[:16], address[16:]):
                assert len(set((half + offset) // 8 % 16)) == 16
            return super().load_shared(address, offset, n, kind)

    for stages in STAGES:
        codes = np.random.default_rng(0).integers(0, 16, (tiles.TILE, stages)).astype(np.uint8)
        form = pieces.KeyTable(stages, 16)
        warp = Watched()
        pieces.look_up(warp, form, pieces.places(warp, form, u32(TABLE)), stored_units(codes, 16))


@pytest.mark.parametrize("every", [4, 8, 16, 32, 64])
def test_shares_are_lines_between_knots(every):
    rng = np.random.default_rng(every)
    count = pieces.CHUNK // every
    raw = rng.normal(size=(4, count + 4)).astype(np.float32)
    raw[:, count + 1 :] = np.nan
    offsets = rng.normal(size=4).astype(np.float32)
    in_unit = [np.full(32, x * np.float32(pieces.SCORE)) for x in offsets]
    warp = Lanes()
    warp.shared[0x1000 : 0x1000 + raw.nbytes] = raw.view(np.uint8).ravel()
    pieces.gather_knots(warp, every, 4 * (count + 4), u32(0x1000), in_unit, u32(0x2000))
    for start in range(0, pieces.CHUNK, 64):
        for token in pieces.tokens_of_lane(warp):
            got = pieces.between_knots(warp, every, u32(0x2000), token, start)
            at = (start + token.astype(int)) / every
            want = [np.interp(at, np.arange(count + 1), x[: count + 1]) for x in raw]
            want += offsets[:, None]
            np.testing.assert_allclose(np.array(got) / pieces.SCORE, want, atol=2e-6)


def test_two_groups_are_64_tokens():
    first, second = pieces.tokens_of_lane(Lanes())
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(64))
    for group in (first, second):
        assert len(set(group % 32)) == 32  # no bank twice
        np.testing.assert_array_equal(group % 16, np.arange(32) % 16)  # as codes are in order


@pytest.mark.parametrize("step", [1e-6, 1e-3, 16])
def test_scores(step):
    rng = np.random.default_rng(0)
    warp = Lanes()
    sums = rng.integers(0, 2**19, (4, 32)).astype(np.uint32)
    others = rng.normal(size=(4, 32)).astype(np.float32)
    steps = np.float32(rng.uniform(size=(4, 32)) * step)
    unit = np.float32(pieces.SCORE / pieces.COUNT)
    got = pieces.scores(warp, sums, others * np.float32(pieces.SCORE), steps * unit)
    want = sums * np.float64(steps) + others
    np.testing.assert_allclose(np.array(got) / pieces.SCORE, want, rtol=1e-6, atol=1e-6)


def chunk_scores(seed, spread):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(8, 4, 32)) * spread - 70).astype(np.float32) * SCORE


def by_token(groups):
    """``[GROUPS, …, lane]`` to ``[…, CHUNK]``."""
    groups = np.asarray(groups)
    tokens = np.array([np.asarray(t) for t in pieces.tokens_of_lane(Lanes())] * 4).astype(int)
    tokens += np.arange(8)[:, None] // 2 * 64
    out = np.empty((*groups.shape[1:-1], pieces.CHUNK), groups.dtype)
    out[..., tokens] = np.moveaxis(groups, 0, -2)
    return out


def fixed_point(words):
    """``[ROWS, CHUNK]`` from two tokens a word, lanes 16 to 31 the later one first."""
    groups = np.empty((8, 4, 32), np.uint32)
    for j in range(4):
        for r in range(4):
            both = [words[r][j] & np.uint32(0xFFFF), words[r][j] >> np.uint32(16)]
            for odd in range(2):
                groups[2 * j + odd, r, :16] = both[odd][:16]
                groups[2 * j + odd, r, 16:] = both[1 - odd][16:]
    return by_token(groups)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0, 100.0])
def test_probabilities_are_right_to_their_last_bit(spread):
    warp = Lanes()
    s = chunk_scores(1, spread)
    scale = pieces.chunk_scale(warp, s)
    m = np.array([x.view(np.int32)[0] for x in scale])
    top = s.max(axis=(0, 2)) / SCORE
    assert (m > top).all()
    assert (m - 1 <= top).all()
    got = fixed_point(pieces.probabilities(warp, s, scale))
    shift = pieces.PROBABILITY_BITS - pieces.HEADROOM - m[:, None]
    want = 2.0 ** (by_token(s).astype(np.float64) / SCORE + shift)
    assert np.abs(got - want).max() <= 0.51
    assert got.max() < 2**pieces.PROBABILITY_BITS


def test_the_largest_probability_has_no_bit_too_many():
    s = np.full((8, 4, 32), np.nextafter(np.float32(3), np.float32(2)) * SCORE)
    warp = Lanes()
    got = fixed_point(pieces.probabilities(warp, s, pieces.chunk_scale(warp, s)))
    assert got.min() > (1 - pieces.HEADROOM) * 2**pieces.PROBABILITY_BITS
    assert got.max() < 2**pieces.PROBABILITY_BITS


def words_of(p):
    """What `probabilities` would give for ``[ROWS, CHUNK]`` integers."""
    first, second = (t.astype(int) for t in pieces.tokens_of_lane(Lanes()))
    words = []
    for row in p.astype(np.uint32):
        words.append([])
        for start in range(0, pieces.CHUNK, 64):
            a, b = row[start + first], row[start + second]
            low, high = np.where(np.arange(32) < 16, [a, b], [b, a])
            words[-1].append((low | high << np.uint32(16)).astype(np.uint32))
    return words


def test_planes_are_a_transpose():
    p = np.random.default_rng(2).integers(0, 2**16, (4, 256))
    warp = Lanes()
    got = np.array(pieces.planes(warp, pieces.ways(warp), words_of(p), u32(0x1000)))  # [bit, lane]
    token = np.arange(32)
    for lane in range(32):
        upper, row, j = lane >> 4, lane >> 2 & 3, lane & 3
        of_32 = p[row, 64 * j + 32 * upper + token]
        want = [((of_32 >> bit & 1) << token).sum() for bit in range(16)]
        np.testing.assert_array_equal(got[:, lane], want)


@pytest.mark.parametrize("stages", [1, 4, 8, 12, 16, 24, 32, 40, 64])
def test_histogram_is_probability_on_codes(stages):
    rng = np.random.default_rng(stages)
    codes = rng.integers(0, 16, (pieces.CHUNK, stages)).astype(np.uint8)
    p = rng.integers(0, 2**pieces.PROBABILITY_BITS, (pieces.CHUNK, 4))
    p[::7] = 0
    warp = Lanes()
    place, codes_at, way = 0x1000, 0x4000, pieces.ways(warp)
    turned = pieces.planes(warp, way, words_of(p.T), u32(place))
    pieces.store_planes(warp, way, turned, u32(place))
    stored = np.asarray(tiles.values_to_tiles(codes)).view(np.uint8).ravel()
    warp.shared[codes_at : codes_at + len(stored)] = stored
    got = np.full((-(-stages // 8) * 8, 16, 4), np.nan)
    for octet in range(pieces.octets_of(stages)):
        loaded = pieces.load_codes(warp, stages, u32(octet), u32(codes_at))
        columns = pieces.load_planes(warp, u32(place))
        for low, halves in enumerate(pieces.histogram(warp, loaded, columns)):
            for top, x in enumerate(halves):
                got[8 * octet : 8 * octet + 8, low + 8 * top] = x.reshape(8, 4)
    want = np.zeros((stages, 16, 4))
    for r in range(stages):
        np.add.at(want[r], codes[:, r], p)
    np.testing.assert_array_equal(got[:stages], want * pieces.LAST_BIT)


def test_planes_meet_in_no_bank():
    class Watched(Lanes):
        def store_shared(self, address, values, offset=0, where=None):
            n = len(values)
            for lanes in (address + offset).reshape(n, -1):  # those that store at a time
                assert len(set(lanes // (4 * n) % (32 // n))) == len(lanes)
            super().store_shared(address, values, offset, where)

        def load_shared(self, address, offset=0, n=1, kind="r"):
            for lanes in (address + offset).reshape(n, -1):  # those that load at a time
                assert len(set(lanes // (4 * n) % (32 // n))) == len(lanes)
            return super().load_shared(address, offset, n, kind)

    warp = Watched()
    words = pieces.planes(warp, pieces.ways(warp), words_of(np.zeros((4, 256))), u32(0))
    pieces.store_planes(warp, pieces.ways(warp), words, u32(0))
    pieces.load_planes(warp, u32(0))


@pytest.mark.parametrize(("scale", "new"), [(3, 5), (5, 3), (-(2**30), -7), (4, 4)])
def test_add_chunk(scale, new):
    rng = np.random.default_rng(0)
    running, chunk = rng.uniform(size=(2, 2, 2, 32)).astype(np.float32)
    warp = Lanes()
    got, larger = pieces.add_chunk(warp, running, chunk, warp.integer(scale), warp.integer(new))
    assert (larger.view(np.int32) == max(scale, new)).all()
    want = running * 2.0 ** (scale - max(scale, new)) + chunk * 2.0 ** (new - max(scale, new))
    np.testing.assert_allclose(got, want, rtol=1e-6)
