"""Refinement moves codewords and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsrq_jax import distill
from gsrq_jax.codebook import Codebooks
from gsrq_jax.spec import QuantSpec

SPEC = QuantSpec.from_bits(1, 8, codewords=4, window=2, sinks=1, block=4)


def make(scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(scale * rng.normal(size=(2, 3, *shape)), dtype)

    return Codebooks(
        key=normal(*SPEC.key.codebook_shape),
        value=normal(*SPEC.value.codebook_shape),
        key_mean=normal(8).astype(jnp.float32),
        inv_freq=jnp.ones((2, 4)),
        spec=SPEC,
    )


def distance(books, target):
    """Squared distance of the codewords, relative to the target's."""
    parts = ((books.key, target.key), (books.value, target.value))
    return sum(jnp.mean(jnp.square(a - b)) / jnp.mean(jnp.square(b)) for a, b in parts)


def one(batch):
    """A batch in one part."""
    return jax.tree.map(lambda x: x[None], batch)


def test_no_moves_are_the_codebooks_in_float32():
    books = make(dtype=jnp.bfloat16)
    state = distill.init(optax.adam(0.1), books)
    same = distill.moved(books, state.moves)
    np.testing.assert_array_equal(same.key, books.key.astype(jnp.float32))
    assert same.value.dtype == jnp.float32
    np.testing.assert_array_equal(same.key_mean, books.key_mean)


def test_steps_reach_the_optimum_of_the_loss():
    books, target = make(), make()
    target = jax.tree.map(lambda x: x + 0.3, target)
    optimizer = optax.adam(0.05)
    step = jax.jit(functools.partial(distill.step, distance, optimizer))
    state = distill.init(optimizer, books)
    losses = []
    for _ in range(150):
        state, loss = step(books, state, one(target))
        losses.append(float(loss))
    assert losses[0] == float(distance(books, target))
    assert losses[-1] < 1e-3 * losses[0]


def test_moves_are_relative_to_the_codewords():
    """Codebooks a thousand times as large move the same way, a thousand times as far."""
    optimizer = optax.adam(0.05)
    found = []
    for scale in (1.0, 1000.0):
        books = make(scale)
        target = jax.tree.map(lambda x: 1.5 * x, books)
        state = distill.init(optimizer, books)
        for _ in range(3):
            state, _ = distill.step(distance, optimizer, books, state, one(target))
        found.append(distill.moved(books, state.moves).key / scale)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_parts_are_one_batch():
    """The gradient of the mean of their losses, not of their sum or of the last."""
    books, optimizer = make(), optax.sgd(0.1)
    targets = [jax.tree.map(lambda x, s=s: x + s, books) for s in (0.1, 0.2, 0.6)]
    parts = jax.tree.map(lambda *x: jnp.stack(x), *targets)

    state = distill.init(optimizer, books)
    together, loss = distill.step(distance, optimizer, books, state, parts)

    def whole(books, _):
        return sum(distance(books, target) for target in targets) / 3

    expected, value = distill.step(whole, optimizer, books, state, jnp.zeros(1))
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    for name in ("key", "value"):
        assert np.abs(expected.moves[name]).max() > 1e-5
        np.testing.assert_allclose(together.moves[name], expected.moves[name], rtol=1e-4)


def test_average_of_the_moves():
    books, optimizer = make(), optax.adam(0.1)
    target = one(jax.tree.map(lambda x: x + 0.3, books))
    state, average = distill.init(optimizer, books), 0.0
    for _ in range(3):
        state, _ = distill.step(distance, optimizer, books, state, target, ema=0.75)
        average = 0.75 * average + 0.25 * np.asarray(state.moves["key"])
    np.testing.assert_allclose(state.average["key"], average, rtol=1e-5)
    plain, _ = distill.step(distance, optimizer, books, state, target)
    np.testing.assert_array_equal(plain.average["value"], plain.moves["value"])
