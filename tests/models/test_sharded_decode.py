"""Text over a cache on a mesh is the text of one device; and what devices exchange for it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from gsrq_jax import calibration
from gsrq_jax.errors import InputError
from gsrq_jax.models import generation, sharding
from gsrq_jax.models.generation import Generator
from gsrq_jax.spec import ResidualSpec

CONFIG = dataclasses.replace(small_model.CONFIG, heads=16, kv_heads=8)
LENGTH, NEW, CHUNK = 72, 30, 16
BLOCK = small_model.SPEC.block
PROMPTS = [
    np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist()
    for n in (1, BLOCK - 1, BLOCK, BLOCK + 1, 34)
]
SPECS = {
    "as trained": small_model.SPEC,
    "nothing exact": dataclasses.replace(small_model.SPEC, window=0, sinks=0),
}
MESHES = ((8, 1), (4, 2), (1, 8))
meshes = pytest.mark.parametrize("shape", MESHES, ids=str)


def generator(books, shape=None):
    mesh = shape and sharding.make_mesh(CONFIG.kv_heads, shape)
    return Generator(*small_model.model(CONFIG), books, dtype=jnp.float32, mesh=mesh)


def text(generator):
    *_, state = generator(PROMPTS, max_new_tokens=NEW, max_length=LENGTH)
    return np.asarray(state.tokens)


@functools.cache
def one(name):
    return text(generator(small_model.codebooks(SPECS[name], config=CONFIG)))


@meshes
@pytest.mark.parametrize("name", SPECS)
def test_the_same_text(name, shape):
    books = small_model.codebooks(SPECS[name], config=CONFIG)
    np.testing.assert_array_equal(text(generator(books, shape)), one(name))
    assert len(np.unique(one(name))) > 20


@pytest.mark.parametrize("cache", ["packed", "planes", "exact"])
def test_the_same_text_with_stages_by_layer_and_at_full_precision(cache):
    books = None
    if cache != "exact":
        each, codewords, block = (1, 64, 8) if cache == "packed" else (32, 2, 32)
        key = ResidualSpec(CONFIG.head_dim, CONFIG.head_dim, 3 * each, codewords)
        spec = dataclasses.replace(
            small_model.SPEC,
            key=key,
            value=key,
            key_stages=(3 * each, each),
            value_stages=(each, 3 * each),
            block=block,
            window=0,
            layout=cache,
        )
        uneven = small_model.codebooks(spec, config=CONFIG)
        books = calibration.first_stages(uneven, spec.key_stages, spec.value_stages)
    want = text(generator(books))
    np.testing.assert_array_equal(text(generator(books, (4, 2))), want)


def read(books, mesh, params, tokens, count):
    """Prompts in chunks, then one more token: logits and lengths."""
    graphdef, _ = small_model.model(CONFIG)
    first, cache = generation.read(
        *(graphdef, params, tokens, count, books),
        chunk=CHUNK,
        max_length=LENGTH,
        dtype=jnp.float32,
        mesh=mesh,
    )
    token = jnp.full((len(tokens), 1), 7, jnp.int32)
    ones = jnp.ones(len(tokens), jnp.int32)
    then, cache = generation.extend(graphdef, params, token, ones, cache, books, mesh)
    return first, then, cache.length


@jax.jit
def step(params, tokens, count, books, cache):
    """One call of `prefill` or `extend`."""
    graphdef, _ = small_model.model(CONFIG)
    if cache is None:
        return generation.prefill(
            graphdef, params, tokens, count, books, max_length=LENGTH, dtype=jnp.float32
        )
    return generation.extend(graphdef, params, tokens, count, cache, books)


@functools.cache
def chunks():
    """Padded prompts, their lengths, and what one device says of them."""
    lengths = jnp.array([48, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40])
    shape = len(lengths), 48
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, shape).astype(np.int32)
    books = small_model.codebooks(config=CONFIG)
    run = jax.jit(functools.partial(read, books, None))
    return tokens, lengths, run(small_model.model(CONFIG)[1], tokens, lengths)


def test_a_prompt_in_chunks_is_read_as_the_cache_then_was():
    tokens, lengths, (first, then, length) = chunks()
    np.testing.assert_array_equal(length, np.broadcast_to(lengths + 1, length.shape))
    books, params = small_model.codebooks(config=CONFIG), small_model.model(CONFIG)[1]
    for row, n in enumerate(lengths.tolist()):
        cache = None
        for start in range(0, n, CHUNK):
            part, count = tokens[row : row + 1, start : start + CHUNK], min(CHUNK, n - start)
            logits, cache = step(params, part, jnp.array([count]), books, cache)
        np.testing.assert_allclose(first[row], logits[0], atol=1e-4)
        part = np.full((1, CHUNK), 7, np.int32)
        logits, _ = step(params, part, jnp.array([1]), books, cache)
        np.testing.assert_allclose(then[row], logits[0], atol=1e-4)


def test_a_generator_reads_in_chunks():
    tokens, lengths, (first, _, _) = chunks()
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]
    running = generator(small_model.codebooks(config=CONFIG))
    running = dataclasses.replace(running, chunk=CHUNK)
    state = next(running(prompts, max_new_tokens=1, max_length=LENGTH))
    np.testing.assert_array_equal(state.token, np.argmax(first, axis=-1))
    with pytest.raises(InputError, match="chunk must be at least 1, got 0"):
        next(dataclasses.replace(running, chunk=0)([[1]], max_new_tokens=1, max_length=LENGTH))
    with pytest.raises(InputError, match="17 tokens are not a number of chunks of 16; pad them"):
        generation.read(
            *(*small_model.model(CONFIG), tokens[:, :17], lengths, running.codec),
            chunk=CHUNK,
            max_length=LENGTH,
        )


@meshes
def test_the_same_logits(shape):
    tokens, lengths, want = chunks()
    mesh = sharding.make_mesh(CONFIG.kv_heads, shape)
    params, books = generator(small_model.codebooks(config=CONFIG), shape)._placed
    got = jax.jit(functools.partial(read, books, mesh))(params, tokens, lengths)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@meshes
def test_only_sums_and_maxima_are_exchanged(shape):
    """No weights, codes, codebooks, keys or values are gathered: an all-reduce is all there is."""
    running = generator(small_model.codebooks(config=CONFIG), shape)
    state = next(running(PROMPTS, max_new_tokens=NEW, max_length=LENGTH))
    compiled = running._decode.lower(*running._placed, state, jnp.int32(4)).compile()
    text = compiled.as_text()
    assert re.search(r" all-reduce(-start)?\(", text)
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.cache)
    )
