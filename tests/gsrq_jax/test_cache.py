"""The cache against plain attention over everything it stands for."""

import dataclasses
import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.experimental.pallas import tpu as pltpu

from gsrq_jax import attention
from gsrq_jax import cache as cache_module
from gsrq_jax.cache import KVCache, append, blocks_after, init_cache, materialize
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import respec
from gsrq_jax.errors import InputError
from gsrq_jax.frame import from_frame, to_frame
from gsrq_jax.kernels import decode, devices
from gsrq_jax.spec import QuantSpec, ResidualSpec

HEADS, GROUP, DIM = 2, 3, 16

LAYOUTS = {
    "whole head": QuantSpec.from_bits(1, DIM, codewords=16, block=8, window=8, sinks=4),
    "byte codes": QuantSpec.from_bits(1, DIM, codewords=256, block=8, window=5, sinks=2),
    "three blocks to a frame, knots": QuantSpec.from_bits(
        1, DIM, codewords=16, block=8, frame_blocks=3, window=5, sinks=2, mean_every=4
    ),
    "groups": QuantSpec.from_bits(2, DIM, codewords=16, group=4, block=8, window=8, sinks=1),
    "odd bits": QuantSpec(
        key=ResidualSpec(DIM, DIM, 3, 32),
        value=ResidualSpec(DIM, 8, 2, 4),
        block=4,
        window=3,
        sinks=3,
    ),
    "no window": QuantSpec.from_bits(1, DIM, codewords=16, block=4, window=0, sinks=0),
    "block 1": QuantSpec.from_bits(1, DIM, codewords=16, block=1, window=3, sinks=2),
    "before rope": QuantSpec.from_bits(1, DIM, codewords=16, frame="pre", block=8, window=8),
    "after rope": QuantSpec.from_bits(1, DIM, codewords=16, frame="post", block=8, window=8),
    "outliers": QuantSpec.from_bits(1, DIM, codewords=16, block=8, window=8, sinks=4, outliers=3),
    "heads together": QuantSpec.from_bits(1, DIM, codewords=16, heads=2, block=8, window=8),
    "heads of keys together": QuantSpec(
        key=ResidualSpec(DIM, DIM, 6, 16, heads=2),
        value=ResidualSpec(DIM, DIM, 4, 16),
        block=8,
        window=5,
        sinks=2,
        outliers=3,
    ),
    "many outliers": QuantSpec.from_bits(
        1, DIM, codewords=16, frame="pre", block=8, window=8, sinks=1, outliers=11
    ),
}
append = jax.jit(append)
attend = jax.jit(attention.attend, static_argnames="implementation")
materialize = jax.jit(materialize)
to_frame, from_frame = (jax.jit(f, static_argnums=2) for f in (to_frame, from_frame))
OTHER_FRAMES = [name for name, spec in LAYOUTS.items() if spec.frame != "block"]
layouts = pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS.keys())


def make_codebooks(spec: QuantSpec, rng: np.random.Generator, layers: int | None = None):
    lead = () if layers is None else (layers,)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32)

    inv_freq = np.float32(100.0) ** (-np.arange(DIM // 2, dtype=np.float32) * 2 / DIM)
    return Codebooks(
        key=normal(HEADS, *spec.key.codebook_shape),
        value=normal(HEADS, *spec.value.codebook_shape),
        key_mean=normal(HEADS, DIM),
        inv_freq=jnp.broadcast_to(jnp.asarray(inv_freq), (*lead, DIM // 2)),
        spec=spec,
    )


def make_tokens(rng, *shape):
    k, v = rng.normal(size=(2, *shape, HEADS, DIM)).astype(np.float32)
    q = rng.normal(size=(*shape, HEADS * GROUP, DIM)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def empty(spec, batch=2, max_length=64, layers=None):
    return init_cache(
        spec,
        batch=batch,
        kv_heads=HEADS,
        head_dim=DIM,
        max_length=max_length,
        layers=layers,
        dtype=jnp.float32,
    )


def poison(cache: KVCache) -> KVCache:
    """NaN and 255 wherever nothing may be read, by the invariants of KVCache."""
    spec = cache.spec
    length = np.asarray(cache.length)
    sinks = cache.sink_key.shape[2]
    ring = cache.window_key.shape[2]
    block = spec.block if spec else 1
    arrays = {f.name: np.array(getattr(cache, f.name)) for f in dataclasses.fields(cache)[:6]}
    for row, n in enumerate(length):
        coded = max(0, n - sinks - spec.window) // spec.block if spec else 0
        first = sinks + coded * (block if spec else 0)
        held = {(p - sinks) % ring for p in range(first, n)}
        free = [s for s in range(ring) if s not in held]
        for name in ("window_key", "window_value"):
            arrays[name][row, :, free] = np.nan
        for name in ("sink_key", "sink_value"):
            arrays[name][row, :, min(n, sinks) :] = np.nan
        for name in ("key_codes", "value_codes"):
            arrays[name][row, :, coded:] = 255
    cache = cache.replace(**{name: jnp.asarray(a) for name, a in arrays.items()})
    if cache.outliers is None:
        return cache
    free = (cache.outliers.error == -jnp.inf)[..., None]
    key, value = (jnp.where(free, jnp.nan, x) for x in cache.outliers[:2])
    position = jnp.where(free[..., 0], 10**6, cache.outliers.position)
    return cache.replace(outliers=cache.outliers._replace(key=key, value=value, position=position))


def plain_attention(q, k, v, there):
    """Float64 softmax attention of one query token; there[B, n]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q = q.reshape(q.shape[0], HEADS, GROUP, DIM)
    scores = np.einsum("BHqd,BnHd->BHqn", q, np.nan_to_num(k)) / np.sqrt(DIM)
    scores = np.where(np.asarray(there)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("BHqn,BnHd->BHqd", weights, np.nan_to_num(v)).reshape(-1, HEADS * GROUP, DIM)


@jax.jit
def expected_tokens(k, v, length, codebooks):
    """What a cache of ``length[B]`` tokens must show, from the definition: exact or round trip."""
    spec = codebooks.spec
    at = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    old_k, old_v = codebooks.decode(*codebooks.encode(k, v, at), at)
    blocks = jnp.maximum(0, length - spec.sinks - spec.window) // spec.block
    coded_end = spec.sinks + blocks[:, None] * spec.block
    coded = ((at >= spec.sinks) & (at < coded_end))[..., None]

    def relative(x, old, words):
        first = jnp.sum(jnp.square(words[:, :, 0]), axis=(1, 3)).mean(-1)  # [H]
        return jnp.sum(jnp.square(x - old), -1) / first

    if spec.outliers:
        error = relative(k, old_k, codebooks.key) + relative(v, old_v, codebooks.value)
        error = jnp.where(coded, error, -jnp.inf)  # [B, n, H]
        larger = jnp.sum(error[:, None] > error[:, :, None], axis=2)
        coded = coded & (larger >= spec.outliers)
    return tuple(jnp.where(coded[..., None], old, x) for old, x in ((old_k, k), (old_v, v)))


def padded(tokens, start, count, width):
    """``count[B]`` tokens of each sequence from ``start[B]`` on, then NaN up to ``width``."""
    out = np.full((len(tokens), width, *tokens.shape[2:]), np.nan, np.float32)
    for row, (at, n) in enumerate(zip(start, count, strict=True)):
        out[row, :n] = tokens[row, at : at + n]
    return jnp.asarray(out)


@layouts
def test_frame_round_trip(spec):
    rng = np.random.default_rng(0)
    books = make_codebooks(spec, rng)
    _, k, _ = make_tokens(rng, 2, 40)
    at = jnp.broadcast_to(jnp.arange(40), (2, 40))
    framed = to_frame(k, at, spec, books.key_mean, books.inv_freq)
    back = from_frame(framed, at, spec, books.key_mean, books.inv_freq)
    np.testing.assert_allclose(back, k, atol=2e-5)


def test_frame_of_a_block_does_not_depend_on_where_the_block_is():
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(1)
    books = make_codebooks(spec, rng)
    _, k, _ = make_tokens(rng, 1, spec.block)
    from gsrq_jax.rope import rotate

    def framed(start):
        at = start + jnp.arange(spec.block)
        rotated = rotate(k, at[:, None], books.inv_freq)
        return to_frame(rotated, at[None], spec, books.key_mean, books.inv_freq)

    near, far = framed(spec.sinks), framed(spec.sinks + 50 * spec.block)
    np.testing.assert_allclose(near, far, atol=2e-4)


# Eight sequences of up to 60 tokens in the next two tests, so that they share what is compiled.
WAYS = (
    [1] * 37,
    [23] + [1] * 14,
    [5, 1, 19, 1, 11],
    [37],
    [60],
    [5] * 12,
    [3, 2, 5, 0, 4, 33, 1],
    [12, 1, 0, 0, 31, 5, 5],
)


@layouts
def test_any_way_of_appending_gives_the_same_cache(spec):
    """Each sequence of a batch in its own steps; a call is five tokens wide where that will do."""
    rng = np.random.default_rng(2)
    books = make_codebooks(spec, rng)
    _, k, v = make_tokens(rng, 8, 60)
    cache, at = empty(spec, batch=8), np.zeros(8, int)
    for counts in itertools.zip_longest(*WAYS, fillvalue=0):
        new = (padded(np.asarray(x), at, counts, 5 if max(counts) <= 5 else 60) for x in (k, v))
        cache = append(poison(cache), *new, books, jnp.asarray(counts))
        at += counts
    np.testing.assert_array_equal(cache.length, [sum(way) for way in WAYS])
    keys, values, there = (np.asarray(x) for x in materialize(poison(cache), books))
    want_k, want_v = expected_tokens(k, v, cache.length, books)
    # The same set of tokens: sort both by a fingerprint.
    for row, n in enumerate(at):
        got = np.concatenate([keys[row][there[row]], values[row][there[row]]], -1)
        want = np.concatenate([want_k[row, :n], want_v[row, :n]], -1)
        assert got.shape == want.shape
        got, want = (x[np.argsort(x[:, 0].sum(axis=-1))] for x in (got, want))
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=str(WAYS[row]))


@layouts
def test_attend_equals_plain_attention_over_decoded_tokens(spec):
    lengths = np.asarray([0, 1, 3, 4, 12, 13, 31, 60])
    rng = np.random.default_rng(3)
    books = make_codebooks(spec, rng)
    _, k, v = make_tokens(rng, 8, 60)
    new = (padded(np.asarray(x), np.zeros(8, int), lengths, 60) for x in (k, v))
    cache = append(empty(spec, batch=8), *new, books, jnp.asarray(lengths))
    cache = poison(cache)
    q, new_k, new_v = make_tokens(rng, 8, 1)

    past = expected_tokens(k, v, cache.length, books)
    keys, values = (np.concatenate(pair, 1) for pair in zip(past, (new_k, new_v), strict=True))
    there = np.concatenate([np.arange(60) < lengths[:, None], np.ones((8, 1), bool)], 1)
    want = plain_attention(q[:, 0], keys, values, there)
    ways = ["decoded"] if spec.frame == "pre" else ["decoded", "codes"]
    for way in ways:
        got = attend(q, new_k, new_v, cache, books, implementation=way)[:, 0]
        np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4, err_msg=way)


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_new_tokens_attend_causally_to_themselves(tokens):
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(5)
    books = make_codebooks(spec, rng)
    _, k, v = make_tokens(rng, 2, 29)
    q, new_k, new_v = make_tokens(rng, 2, tokens)
    cache = append(empty(spec), k, v, books)
    count = jnp.asarray([tokens, max(1, tokens - 2)])
    ragged = [
        jnp.where((jnp.arange(tokens) < count[:, None])[..., None, None], x, jnp.nan)
        for x in (new_k, new_v)
    ]
    got = attend(q, *ragged, cache, books, count)
    past = expected_tokens(k, v, cache.length, books)
    for t in range(tokens):
        keys, values = (
            np.concatenate([a, b[:, : t + 1]], 1) for a, b in zip(past, (new_k, new_v), strict=True)
        )
        want = plain_attention(q[:, t], keys, values, np.ones((2, keys.shape[1]), bool))
        real = np.asarray(t < count)
        np.testing.assert_allclose(got[real, t], want[real], atol=3e-5, rtol=1e-4)


def test_full_precision_is_the_same_pytree_without_codes():
    rng = np.random.default_rng(6)
    q, k, v = make_tokens(rng, 2, 20)
    cache = append(empty(None, max_length=24), k[:, :19], v[:, :19])
    got = attend(q[:, 19:], k[:, 19:], v[:, 19:], poison(cache))[:, 0]
    want = plain_attention(q[:, 19], k, v, np.ones((2, 20), bool))
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize(
    ("spec", "every"),
    [
        *(pytest.param(spec, spec.block, id=name) for name, spec in LAYOUTS.items()),
        # In the block frame a cache with other blocks has other codes.
        *(pytest.param(LAYOUTS[name], 1, id=f"{name}, every token") for name in OTHER_FRAMES),
        pytest.param(
            QuantSpec.from_bits(2, DIM, codewords=2, block=32, window=0, sinks=0, layout="planes"),
            32,
            id="planes",
        ),
    ],
)
def test_teacher_forced_pass_equals_the_decode_loop(spec, every):
    """The pass with every=block is the loop; with every=1 it is the loop of a spec of block 1."""
    rng = np.random.default_rng(7)
    books = make_codebooks(spec, rng)
    looped = dataclasses.replace(spec, block=every)
    loop_books = dataclasses.replace(books, spec=looped)
    q, k, v = make_tokens(rng, 1, 33 if every < 32 else 70)
    got = jax.jit(attention.attend_as_cached, static_argnames="every")(q, k, v, books, every=every)

    def step(cache, token):
        out = attend(*token, cache, loop_books)
        return append(cache, *token[1:], loop_books), out

    tokens = tuple(jnp.moveaxis(x, 1, 0)[:, :, None] for x in (q, k, v))
    room = empty(looped, batch=1, max_length=72)
    _, want = jax.jit(lambda c, t: jax.lax.scan(step, c, t))(room, tokens)
    np.testing.assert_allclose(got[0], want[:, 0, 0], atol=3e-5, rtol=1e-3)


def test_flash_attention_where_cudnn_has_it(monkeypatch):
    class Device:
        compute_capability = "9.0"

    asked = []

    def attention_of(q, k, v, **options):
        asked.append(options.get("implementation"))
        return q

    def implementation(dtype, dim=64):
        q, k = (jax.ShapeDtypeStruct((1, 2048, h, dim), dtype) for h in (8, 2))
        asked.clear()
        jax.eval_shape(lambda *x: attention.causal(*x), q, k, k)
        return asked[0]

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention_of)
    assert implementation(jnp.bfloat16) is None
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert implementation(jnp.bfloat16) == "cudnn"
    assert implementation(jnp.float32) is None
    assert implementation(jnp.bfloat16, dim=68) is None
    for other in ("7.5", "gfx942"):
        Device.compute_capability = other
        assert implementation(jnp.bfloat16) is None


def test_pass_chunks_long_sequences(monkeypatch):
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(8)
    books = make_codebooks(spec, rng)
    q, k, v = make_tokens(rng, 1, 50)

    def both():  # a new function each time, so that jit compiles again
        return jax.jit(
            lambda q, k, v, books: (
                attention.attend_as_cached(q, k, v, books),
                attention.causal(q, k, v),
            )
        )(q, k, v, books)

    whole, plain = both()
    monkeypatch.setattr(attention, "_QUERY_CHUNK", 12)
    chunked, plain_chunked = both()
    np.testing.assert_allclose(chunked, whole, atol=1e-5)
    np.testing.assert_allclose(plain_chunked, plain, atol=1e-5)


def test_stacked_vmapped_and_scanned_layers_agree():
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(9)
    books = make_codebooks(spec, rng, layers=3)
    _, k, v = make_tokens(rng, 3, 2, 30)
    q1, k1, v1 = make_tokens(rng, 3, 2, 1)
    cache = append(append(empty(spec, layers=3), k, v, books), k1, v1, books)
    out = jax.vmap(attend)(q1, k1, v1, cache, books)

    def layer(_, x):
        q, k, v, cache, books = x
        return None, attend(q, k, v, cache, books)

    _, scanned = jax.lax.scan(layer, None, (q1, k1, v1, cache, books))
    np.testing.assert_allclose(scanned, out, atol=1e-5)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], books)
        alone = append(append(empty(spec), k[i], v[i], one), k1[i], v1[i], one)
        np.testing.assert_allclose(attend(q1[i], k1[i], v1[i], alone, one), out[i], atol=1e-5)
    # An outer vmap over independent caches, as an ensemble would have.
    many = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    grown = jax.vmap(append, (0, None, None, None))(many, k1, v1, books)
    alone = append(cache, k1, v1, books)
    for got, want in zip(jax.tree.leaves(grown), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(got[1], want)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_are_encoded_some_at_a_time(monkeypatch, layers):
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(9)
    books = make_codebooks(spec, rng, layers=4)
    _, k, v = make_tokens(rng, 4, 2, spec.block + 29)
    want = append(empty(spec, layers=4), k, v, books)
    floats = k[0].size // k.shape[2] * 5 * spec.block  # of a layer: five blocks
    monkeypatch.setattr(cache_module, "_FLOATS", layers * floats)
    assert cache_module._layers_at_once(k, spec) == layers
    got = append(empty(spec, layers=4), k, v, books)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.any(want.key_codes)


@pytest.mark.parametrize("layers", [None, 3])
def test_encodes_where_a_block_fills_and_nowhere_else(layers):
    """In a decode loop: nothing of the encoder around its own loop, nor a copy of the cache."""
    spec = LAYOUTS["outliers"]
    books = make_codebooks(spec, np.random.default_rng(15), layers)
    cache = empty(spec, layers=layers)
    k = jnp.zeros((*cache.length.shape, 1, HEADS, DIM))

    def loop(cache, k, books, steps):
        return jax.lax.fori_loop(
            0, steps, lambda i, cache: append.__wrapped__(cache, k + i, k - i, books), cache
        )

    compiled = jax.jit(loop, donate_argnums=0).lower(cache, k, books, 5).compile()
    text = compiled.as_text()
    assert programs.outside(text, "flush") == []
    sizes = {",".join(map(str, x.shape)) for x in (cache.key_codes, cache.window_key)}
    assert not re.findall(rf"\w+\[(?:{'|'.join(sizes)})\]\S* copy\(", text)


def test_a_step_that_fills_no_block_takes_a_fraction_of_one_that_does():
    spec = QuantSpec.from_bits(2, DIM, codewords=256, block=256, window=0, sinks=0)
    rng = np.random.default_rng(16)
    books = make_codebooks(spec, rng)
    _, k, v = make_tokens(rng, 2, spec.block - 1)
    filling = append(empty(spec, max_length=2 * spec.block), k, v, books)
    k, v = k[:, :1], v[:, :1]
    filled = append(filling, k, v, books)
    assert blocks_after(spec, filled.length).tolist() == [1, 1]

    def seconds(cache):
        begin = time.perf_counter()
        jax.block_until_ready(append(cache, k, v, books))
        return time.perf_counter() - begin

    seconds(filled)
    once, seldom = (min(seconds(x) for _ in range(10)) for x in (filling, filled))
    assert once > 5 * seldom


def test_heads_together_keep_their_codes_once():
    spec = LAYOUTS["heads together"]
    cache = empty(spec)
    assert cache.key_codes.shape[:2] == cache.value_codes.shape[:2] == (2, 1)
    separate = empty(LAYOUTS["whole head"])
    assert cache.key_codes.shape[2] == separate.key_codes.shape[2]
    assert cache.key_codes.size == separate.key_codes.size


def test_ragged_batch_equals_each_sequence_alone():
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(10)
    books = make_codebooks(spec, rng)
    lengths = jnp.asarray([41, 7, 0, 29])
    _, k, v = make_tokens(rng, 4, 41)
    cache = append(empty(spec, batch=4), k, v, books, lengths)
    q1, k1, v1 = make_tokens(rng, 4, 1)
    for _ in range(10):
        together = attend(q1, k1, v1, cache, books)
        cache = append(cache, k1, v1, books)
    for row in range(4):
        pick = slice(row, row + 1)
        one = append(empty(spec, batch=1), k[pick], v[pick], books, lengths[pick])
        x = [a[row : row + 1] for a in (q1, k1, v1)]
        for _ in range(10):
            out = attend(*x, one, books)
            one = append(one, *x[1:], books)
        np.testing.assert_allclose(together[row], out[0], atol=1e-5)


def test_nothing_is_encoded_twice():
    """Codes of a block never change once written, whatever happens to the exact tokens later."""
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(11)
    books = make_codebooks(spec, rng)
    _, k, v = make_tokens(rng, 2, 60)
    cache = append(empty(spec), k[:, :30], v[:, :30], books)
    done = int(blocks_after(spec, cache.length)[0])
    assert done > 0
    first = cache.key_codes[:, :, :done]
    cache = append(poison(cache), k[:, 30:], v[:, 30:], books)
    np.testing.assert_array_equal(cache.key_codes[:, :, :done], first)


def test_outliers_are_counted_and_no_others_than_the_worst():
    spec = LAYOUTS["outliers"]
    rng = np.random.default_rng(13)
    books = make_codebooks(spec, rng)
    _, k, v = make_tokens(rng, 2, 60)
    far = k.at[0, 20, 1].multiply(30)  # in one head of one sequence
    plain = dataclasses.replace(books, spec=dataclasses.replace(spec, outliers=0))
    cache = append(empty(spec), far, v, books)
    without = append(empty(plain.spec), far, v, plain)
    np.testing.assert_array_equal(cache.key_codes, without.key_codes)
    assert cache.nbytes - without.nbytes == 2 * 3 * HEADS * (2 * DIM * 4 + 4 + 4)
    assert cache.outliers.position[0, 1].tolist()[0] == 20
    assert 20 not in cache.outliers.position[1].tolist()
    np.testing.assert_array_equal(cache.outliers.key[0, 1, 0], far[0, 20, 1])
    assert (jnp.diff(cache.outliers.error, axis=2) <= 0).all()


@pytest.mark.parametrize(("context", "least"), [(8192, 9), (131072, 15)])
@pytest.mark.parametrize("dim", [64, 128])
def test_one_bit_saves_what_it_should(context, least, dim):
    """Bytes of real arrays, window and sinks counted, against bf16, with the default spec."""
    shape = dict(batch=1, kv_heads=2, head_dim=dim, max_length=context)
    coded = init_cache(QuantSpec.from_bits(1, dim), **shape)
    full = init_cache(None, **shape)
    assert full.nbytes >= context * 2 * 2 * dim * 2
    assert coded.capacity >= context
    assert full.nbytes / coded.nbytes >= least


TILES = ResidualSpec(DIM, DIM, 3, 256), ResidualSpec(DIM, DIM, 4, 16)
IN_KERNELS = {
    "tiles, bytes": QuantSpec(*TILES, block=128, layout="tiles"),
    "tiles, knots, frames": QuantSpec(
        TILES[1], TILES[1], block=256, frame_blocks=2, mean_every=16, layout="tiles"
    ),
    "planes": QuantSpec.from_bits(2, DIM, codewords=2, block=128, layout="planes"),
    "planes, knots, frames": QuantSpec(
        key=ResidualSpec(DIM, DIM, 64, 2, heads=2),
        value=ResidualSpec(DIM, DIM, 32, 2),
        block=64,
        frame_blocks=3,
        mean_every=16,
        layout="planes",
    ),
}


@pytest.mark.parametrize("spec", IN_KERNELS.values(), ids=IN_KERNELS.keys())
def test_layouts_of_kernels_hold_the_same_codes(spec):
    """Filled in one go or token by token, read decoded or as codes."""
    spec = dataclasses.replace(spec, window=5, sinks=3)
    block, frame_blocks = spec.block, spec.frame_blocks
    rng = np.random.default_rng(13)
    packed = respec(make_codebooks(spec, rng), layout="packed")
    laid_out = respec(packed, layout=spec.layout)
    _, k, v = make_tokens(rng, 2, 400)
    count = jnp.asarray([400, 263])
    caches = []
    for books in (packed, laid_out):
        cache = append(empty(books.spec, max_length=420), k[:, :390], v[:, :390], books, count - 10)

        def step(cache, token, books=books):
            return append.__wrapped__(cache, *token, books), None

        rest = [
            jnp.stack([x[row, n - 10 : n, None] for row, n in enumerate(count)], 1) for x in (k, v)
        ]
        caches.append(jax.jit(lambda c, t, step=step: jax.lax.scan(step, c, t)[0])(cache, rest))
    assert caches[1].capacity >= caches[0].capacity  # there are whole frames
    for x, y in zip(materialize(caches[0], packed), materialize(caches[1], laid_out), strict=True):
        np.testing.assert_array_equal(x, y[:, : x.shape[1]])
    assert caches[1].key_codes.dtype == jnp.uint32
    assert blocks_after(spec, caches[1].length).tolist() == [392 // block, 255 // block]
    assert caches[1].blocks == -(-(412 // block) // frame_blocks) * frame_blocks
    for tokens in (1, 3):
        new = make_tokens(rng, 2, tokens)
        want = attend(*new, caches[0], packed, implementation="decoded")
        for way in ("codes", "decoded"):
            got = attend(*new, poison(caches[1]), laid_out, implementation=way)
            np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4, err_msg=way)
    with pytest.raises(InputError, match="'fused' is for a cache whose codes are in its layout"):
        attend(*new, caches[0], packed, implementation="fused")
    with pytest.raises(InputError, match="use one spec"):
        attend(*new, caches[0], laid_out)


def test_where_there_is_no_kernel_its_reference_attends():
    spec = dataclasses.replace(IN_KERNELS["tiles, bytes"], window=5, sinks=3)
    rng = np.random.default_rng(13)
    books = make_codebooks(spec, rng)
    cache = append(empty(spec, max_length=300), *make_tokens(rng, 2, 280)[1:], books)
    new = make_tokens(rng, 2, 1)
    decode._say.cache_clear()
    with pytest.warns(UserWarning, match=r"the fused GPU kernel .*the reference is used"):
        got = attention.attend(*new, cache, books)
    want = attend(*new, cache, books, implementation="decoded")
    np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4)
    with pytest.raises(InputError, match="the fused GPU kernel takes 64 or 128 as head_dim, got"):
        attend(*new, cache, books, implementation="fused")


def test_the_tpu_kernels_over_a_cache(monkeypatch):
    """Encoding and attention by TPU kernels, interpreted: what plain jnp makes of packed codes."""
    code = ResidualSpec(DIM, DIM, 9, 16), ResidualSpec(DIM, DIM, 3, 8)
    spec = QuantSpec(*code, block=128, window=5, sinks=3, mean_every=16)
    rng = np.random.default_rng(14)
    packed = make_codebooks(spec, rng)
    books = respec(packed, layout="words")
    _, k, v = make_tokens(rng, 2, 270)
    count = jnp.asarray([270, 130])
    new = make_tokens(rng, 2, 2)
    plain = append(empty(spec, max_length=290), k, v, packed, count)
    want = attend(*new, plain, packed, implementation="decoded")

    monkeypatch.setattr(devices, "on_tpu", lambda: True)
    with pltpu.force_tpu_interpret_mode():
        cache = append.__wrapped__(empty(books.spec, max_length=290), k, v, books, count)
        got = attention.attend(*new, poison(cache), books)
    assert cache.key_codes.dtype == jnp.int32
    for x, y in zip(materialize(plain, packed), materialize(cache, books), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        attend(*new, poison(cache), books, implementation="codes"), want, atol=3e-5, rtol=1e-4
    )


def test_refusals():
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(12)
    books = make_codebooks(spec, rng)
    q, k, v = make_tokens(rng, 2, 80)
    with pytest.raises(InputError, match=r"holds \d+ tokens and 80 are needed.*max_length"):
        append.__wrapped__(empty(spec), k, v, books)
    with pytest.raises(InputError, match="do not fit this cache"):
        append(empty(spec, batch=3), k, v, books)
    with pytest.raises(InputError, match="use one spec"):
        append(empty(LAYOUTS["byte codes"]), k, v, books)
    with pytest.raises(InputError, match="use one spec"):
        attend(q[:, :1], k[:, :1], v[:, :1], empty(None), books)
    with pytest.raises(InputError, match="one layer's cache"):
        attend(q[:, :1], k[:, :1], v[:, :1], empty(spec, layers=2), books)
    with pytest.raises(InputError, match="train codebooks for this model"):
        init_cache(spec, batch=1, kv_heads=1, head_dim=64, max_length=10)
    with pytest.raises(InputError, match="2 KV heads share, and there are 3; train codebooks"):
        init_cache(LAYOUTS["heads together"], batch=1, kv_heads=3, head_dim=DIM, max_length=10)
    pre = LAYOUTS["before rope"]
    with pytest.raises(InputError, match="table of its own"):
        attend(
            q[:, :1],
            k[:, :1],
            v[:, :1],
            empty(pre),
            make_codebooks(pre, rng),
            implementation="codes",
        )


def test_shapes_that_do_not_fit_are_named():
    spec = LAYOUTS["whole head"]
    rng = np.random.default_rng(13)
    books, cache = make_codebooks(spec, rng), empty(spec)
    q, k, v = make_tokens(rng, 2, 3)
    for wrong in (
        (q[:, :, :3], k, v),  # query heads that KV heads do not divide
        (q[:1], k, v),
        (q[:, :2], k, v),
        (q[..., :8], k, v),
    ):
        for call in (
            lambda *x: attention.attend(*x, cache, books),
            lambda *x: attention.attend_as_cached(*x, books),
            attention.causal,
        ):
            with pytest.raises(InputError, match=r"do not fit; .*\[B, T, Q, d\].*multiple of H"):
                call(*wrong)
    for wrong in ((k[:1], v[:1]), (k[:, :, :1], v[:, :, :1]), (k, v[:, :2]), (k[0], v[0])):
        for call in (
            lambda k, v: attention.attend(q, k, v, cache, books),
            lambda k, v: append.__wrapped__(cache, k, v, books),
        ):
            with pytest.raises(InputError, match=r"do not fit this cache, .* \(2, T, 2, 16\)"):
                call(*wrong)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), books)
    with pytest.raises(InputError, match=r"of a stack of 2 layers, the cache of one layer"):
        attention.attend(q, k, v, cache, two)
    with pytest.raises(InputError, match=r"of one layer, the cache of a stack of 3 layers"):
        append.__wrapped__(empty(spec, layers=3), *(jnp.stack([x] * 3) for x in (k, v)), books)
    half = jax.tree.map(lambda x: x[:1] if x.ndim > 1 else x, books)
    with pytest.raises(InputError, match="of 1 KV heads, the cache of 2"):
        attention.attend(q, k, v, cache, half)
    assert attention.attend(q[:, :0], k[:, :0], v[:, :0], cache, books).shape == (2, 0, 6, DIM)


def test_counts_are_checked():
    cache, rng = empty(None), np.random.default_rng(13)
    q, k, v = make_tokens(rng, 2, 3)
    assert append.__wrapped__(
        cache, np.asarray(k), np.asarray(v), None, [1, 3]
    ).length.tolist() == [1, 3]
    for call in (
        lambda count: append.__wrapped__(cache, k, v, None, count),
        lambda count: attention.attend(q, k, v, cache, None, count),
    ):
        with pytest.raises(
            InputError, match=r"count must be from 0 to the 3 new tokens, got \[1, 4\]"
        ):
            call(jnp.asarray([1, 4]))
        with pytest.raises(InputError, match=r"count must have the shape \(2,\)"):
            call(2)
        with pytest.raises(InputError, match="count must be from 0 to the 3 new tokens"):
            jax.jit(call, static_argnums=0)((1, 4))


@pytest.mark.parametrize("bad", [{"batch": 0}, {"layers": 0}, {"max_length": 0}])
def test_a_cache_has_positive_sizes(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be at least 1, got 0"):
        empty(None, **bad)


def test_a_cache_holds_floats():
    with pytest.raises(InputError, match="dtype must be a floating type, got int8"):
        init_cache(None, batch=1, kv_heads=1, head_dim=4, max_length=8, dtype=jnp.int8)


@pytest.mark.parametrize("x64", [False, True])
def test_a_decode_loop_is_traced_once(x64):
    """A step gives back the types that it was given, weak ones and those of 64 bits too."""
    spec = LAYOUTS["outliers"]
    rng = np.random.default_rng(13)
    books, new = make_codebooks(spec, rng), make_tokens(rng, 2, 1)

    def step(cache):
        attention.attend(*new, cache, books)
        return append.__wrapped__(cache, *new[1:], books)

    def types(cache):
        return jax.tree.map(lambda x: (x.dtype.name, x.weak_type), cache)

    with jax.enable_x64(x64):
        cache = empty(spec)
        after = jax.eval_shape(step, cache)
        assert types(after) == types(cache)
        assert {x.dtype.name for x in jax.tree.leaves(after)} == {"float32", "uint8", "int32"}
