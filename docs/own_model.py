"""A model of one's own, in plain JAX, over a quantised cache: own-model.md explains it."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax

from gsrq_jax import (
    QuantSpec,
    append,
    attend,
    attend_as_cached,
    causal,
    codebook,
    distill,
    fit_layer,
    init_cache,
)
from gsrq_jax.rope import rotate

LAYERS, VOCAB, WIDTH, QUERIES, KV_HEADS, DIM = 2, 64, 32, 4, 2, 8
INV_FREQ = 10_000.0 ** (-jnp.arange(DIM // 2) * 2 / DIM)


def init_params(rng):
    def normal(*shape):
        nonlocal rng
        rng, key = jax.random.split(rng)
        return jax.random.normal(key, shape) / shape[-2] ** 0.5

    layers = {
        "q": normal(LAYERS, WIDTH, QUERIES * DIM),
        "k": normal(LAYERS, WIDTH, KV_HEADS * DIM),
        "v": normal(LAYERS, WIDTH, KV_HEADS * DIM),
        "o": normal(LAYERS, QUERIES * DIM, WIDTH),
    }
    return {"embed": normal(VOCAB, WIDTH), "layers": layers}


def model(params, tokens, positions, attention, per_layer=None):
    """Logits ``[B, T, VOCAB]``, and what attention gives beside its output, stacked over layers."""

    def layer(x, inputs):
        weights, own = inputs
        q, k, v = ((x @ weights[n]).reshape(*x.shape[:2], -1, DIM) for n in "qkv")
        q, k = (rotate(y, positions[..., None], INV_FREQ) for y in (q, k))
        out, found = attention(q, k, v, own)
        x = x + out.reshape(*x.shape[:2], -1) @ weights["o"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * WIDTH**0.5, found

    x, found = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], per_layer))
    return x @ params["embed"].T, found


@jax.jit
def capture(params, tokens):
    """Keys and values ``[L, B, T, H, d]``, and the norms ``[L, B, T, H]`` of the loss's gradient
    with respect to each, from zeros that are added to them."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(zeros):
        def attention(q, k, v, zero):
            k, v = k + zero[0], v + zero[1]
            return causal(q, k, v), (k, v)

        logits, found = model(params, tokens, positions, attention, zeros)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return each.sum(), found

    zeros = (jnp.zeros((LAYERS, *tokens.shape, KV_HEADS, DIM)),) * 2
    gradients, (k, v) = jax.grad(loss, has_aux=True)(zeros)
    return k, v, *(jnp.linalg.norm(g, axis=-1) for g in gradients)


@functools.partial(jax.jit, static_argnames="spec")
def learn(rng, samples, spec):
    """Codebooks of all layers; the sinks are never coded, and so not learned from."""
    k, v, k_norms, v_norms = (x[:, :, spec.sinks :] for x in samples)
    positions = jnp.broadcast_to(spec.sinks + jnp.arange(k.shape[2]), k.shape[1:3]).reshape(-1)

    def one(rng, *layer):  # [B, T, H, …] each, to [N, H, …]
        k, v, k_norms, v_norms = (x.reshape(-1, *x.shape[2:]) for x in layer)
        norms = {"k_norms": k_norms, "v_norms": v_norms}
        return fit_layer(rng, k, v, positions, INV_FREQ, spec, **norms)[0]

    return jax.vmap(one)(jax.random.split(rng, LAYERS), k, v, k_norms, v_norms)


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(params, tokens, cache, books):
    """The logits after a prompt that is read exactly, and the cache with it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, (k, v) = model(params, tokens, positions, lambda q, k, v, _: (causal(q, k, v), (k, v)))
    return logits[:, -1], append(cache, k, v, books)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def decode(params, logits, cache, books, steps):
    """The most likely tokens ``[steps, B]``, and the cache with all but the last of them."""

    def step(state, _):
        logits, cache = state
        token = jnp.argmax(logits, axis=-1)

        def attention(q, k, v, own):
            return attend(q, k, v, *own), (k, v)

        positions = cache.length[0][:, None]  # of every layer the same
        logits, (k, v) = model(params, token[:, None], positions, attention, (cache, books))
        return (logits[:, -1], append(cache, k, v, books)), token

    (_, cache), tokens = jax.lax.scan(step, (logits, cache), length=steps)
    return tokens, cache


def divergence(params, books, tokens):
    """KL of the model over a quantised cache from that at full precision, nats a token."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    full, _ = model(params, tokens, positions, lambda q, k, v, _: (causal(q, k, v), None))
    coded, _ = model(
        params,
        tokens,
        positions,
        lambda q, k, v, own: (attend_as_cached(q, k, v, own), None),
        books,
    )
    full, coded = jax.nn.log_softmax(full), jax.nn.log_softmax(coded)
    return jnp.mean(jnp.sum(jnp.exp(full) * (full - coded), axis=-1))


def refine(params, books, tokens, steps):
    """The codebooks after so many steps of distillation, and the divergence before each."""
    optimizer = optax.adam(0.02)
    loss = functools.partial(divergence, params)
    step = jax.jit(functools.partial(distill.step, loss, optimizer))
    state, losses = distill.init(optimizer, books), []
    for _ in range(steps):
        state, value = step(books, state, tokens[None])  # one part a step
        losses.append(float(value))
    return distill.moved(books, state.moves), losses


def main(folder: pathlib.Path, batch: int = 4, prompt: int = 48, new: int = 12):
    rng = jax.random.key(0)
    params = init_params(rng)
    tokens = jax.random.randint(rng, (batch, 64), 0, VOCAB)

    spec = QuantSpec.from_bits(1, DIM, codewords=16, block=8, window=8, sinks=2)
    books = learn(rng, capture(params, tokens), spec)
    books, losses = refine(params, books, tokens, steps=6)
    print(f"{spec}: KL {losses[0]:.4f} nats a token, {losses[-1]:.4f} refined")

    facts = {"family": "mine", "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": DIM}
    codebook.save(folder / "codebooks", codebook.stored(books), model=facts)
    books = codebook.load(folder / "codebooks", model=facts)

    sizes = {"batch": batch, "kv_heads": KV_HEADS, "head_dim": DIM, "layers": LAYERS}
    cache = init_cache(spec, **sizes, max_length=prompt + new)
    logits, cache = prefill(params, tokens[:, :prompt], cache, books)
    written, cache = decode(params, logits, cache, books, new)
    print(f"wrote {written.shape[0]} tokens over a cache of {cache.nbytes:,} bytes")
    return params, books, losses, written, cache


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(pathlib.Path(folder))
