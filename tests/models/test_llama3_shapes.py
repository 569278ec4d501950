"""LLaMA-3-8B at its true shapes, traced and never made: prefill, a step, bytes of the cache."""

import functools

import jax
import jax.numpy as jnp
import pytest

from gsrq_jax import Codebooks, QuantSpec, init_cache
from gsrq_jax.models import generation, llama
from gsrq_jax.models.config import LLAMA_3_8B

CONFIG = LLAMA_3_8B
LENGTH = 8192


def abstract_codebooks(spec: QuantSpec) -> Codebooks:
    lead = (CONFIG.layers, CONFIG.kv_heads)

    def shape(*size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype)

    return Codebooks(
        key=shape(*lead, *spec.key.codebook_shape, dtype=jnp.bfloat16),
        value=shape(*lead, *spec.value.codebook_shape, dtype=jnp.bfloat16),
        key_mean=shape(*lead, CONFIG.head_dim),
        inv_freq=shape(CONFIG.layers, CONFIG.head_dim // 2),
        spec=spec,
    )


@pytest.mark.parametrize("bits", [None, 1, 0.25])
def test_prefill_and_decode_have_the_shapes_they_should(bits):
    spec = None if bits is None else QuantSpec.from_bits(bits, CONFIG.head_dim)
    books = None if spec is None else abstract_codebooks(spec)
    graphdef, params = llama.abstract(CONFIG, jnp.bfloat16)
    count = jax.ShapeDtypeStruct((2,), jnp.int32)
    logits, cache = jax.eval_shape(
        functools.partial(generation.prefill, graphdef, max_length=LENGTH),
        params,
        jax.ShapeDtypeStruct((2, 1024), jnp.int32),
        count,
        books,
    )
    assert logits.shape == (2, CONFIG.vocab_size)
    logits, after = jax.eval_shape(
        functools.partial(generation.extend, graphdef),
        params,
        jax.ShapeDtypeStruct((2, 1), jnp.int32),
        count,
        cache,
        books,
    )
    assert logits.shape == (2, CONFIG.vocab_size)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )


def bytes_of(spec: QuantSpec | None, context: int) -> int:
    shape = {"batch": 1, "kv_heads": CONFIG.kv_heads, "head_dim": CONFIG.head_dim}
    make = functools.partial(init_cache, spec, max_length=context, layers=CONFIG.layers, **shape)
    return jax.eval_shape(make).nbytes


def test_bytes_a_token():
    """128 KiB at bf16, a sixteenth of it coded at 1 bit, sinks and window beside."""
    kib = 2 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_dim * 2
    assert kib == 128 * 1024
    lengths = 4  # int32 a layer
    assert bytes_of(None, LENGTH) == LENGTH * kib + CONFIG.layers * lengths
    spec = QuantSpec.from_bits(1, CONFIG.head_dim)
    coded = (LENGTH - spec.sinks - spec.window) // spec.block * spec.block
    exact = spec.sinks + spec.window + spec.block
    assert bytes_of(spec, LENGTH) == coded * kib // 16 + exact * kib + CONFIG.layers * lengths
    assert bytes_of(None, LENGTH) > 9 * bytes_of(spec, LENGTH)
    assert bytes_of(None, 131_072) > 15 * bytes_of(spec, 131_072)
