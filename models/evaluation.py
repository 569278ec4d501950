"""What a quantised cache costs: perplexity, KL and agreement against full precision.

Protocol: each sequence is one teacher-forced pass from its first token, every key and value
quantised as `gsrq_jax.attention.attend_as_cached` says (``every=1``: sinks and exactly ``window``
past tokens exact, the worst case of a deployed cache). All next-token predictions count.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from gsrq_jax.attention import FEW, Implementation, attend_as_cached, causal
from gsrq_jax.cache import KVCache, init_cache
from gsrq_jax.codec import Codec
from gsrq_jax.errors import InputError
from gsrq_jax.models import generation, llama

Sums = dict[str, Float32[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Means over ``n`` predicted tokens, as floats.

    Attributes:
        n: predicted tokens.
        full_precision: perplexity with the exact cache.
        perplexity: with the quantised one.
        kl: Kullback-Leibler divergence of the quantised prediction from the exact one, nats.
        top1: share of tokens whose most likely prediction is the same.
    """

    n: int
    full_precision: float
    perplexity: float
    kl: float
    top1: float

    @property
    def rise(self) -> float:
        """Perplexity over full precision, minus 1."""
        return self.perplexity / self.full_precision - 1


@functools.partial(jax.jit, static_argnums=0)
def exact_hidden(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "B T"]
) -> Float[Array, "B T hidden"]:
    """Hidden states at full precision."""
    return llama.apply(graphdef, params, tokens, _positions(tokens), _causal)[0]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("every", "remat"))
def cached_hidden(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    codec: Codec,
    *,
    every: int = 1,
    window: Int[Array, ""] | None = None,
    remat: bool = False,
) -> Float[Array, "B T hidden"]:
    """Hidden states over the cache that ``codec``, stacked, stands for.

    ``window`` replaces the spec's without compiling anew; ``remat`` recomputes activations in the
    backward pass instead of keeping them.
    """

    def coded(q: Array, k: Array, v: Array, codec: Codec):
        return attend_as_cached(q, k, v, codec, every=every, window=window), None

    hidden, _ = llama.apply(graphdef, params, tokens, _positions(tokens), coded, codec, remat=remat)
    return hidden


@functools.partial(jax.jit, static_argnums=0, static_argnames=("implementation", "step"))
def streamed_hidden(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    codec: Codec,
    *,
    implementation: Implementation | None = None,
    step: int = FEW,
) -> Float[Array, "B T hidden"]:
    """Hidden states of tokens that are read ``step`` at a time over a real cache.

    What a decode loop computes, with more than one token a step: blocks are encoded when they are
    full, and `gsrq_jax.attention.attend` is done by ``implementation``.
    """
    batch, length = tokens.shape
    config = nnx.merge(graphdef, params).config
    steps = -(-length // step)
    cache = init_cache(
        codec.spec,
        batch=batch,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_length=steps * step,
        layers=config.layers,
        dtype=jax.tree.leaves(params)[0].dtype,
    )
    parts = jnp.pad(tokens, ((0, 0), (0, steps * step - length))).reshape(batch, steps, step)
    all_of_them = jnp.full((batch,), step)

    def read(cache: KVCache, part: Array):
        hidden, cache = generation.hidden_after(
            graphdef, params, part, all_of_them, cache, codec, implementation=implementation
        )
        return cache, hidden

    _, hidden = jax.lax.scan(read, cache, jnp.swapaxes(parts, 0, 1))
    return jnp.swapaxes(hidden, 0, 1).reshape(batch, steps * step, -1)[:, :length]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("chunk", "remat"))
def divergence(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    full: Float[Array, "B T hidden"],
    ours: Float[Array, "B T hidden"],
    first: Int[Array, ""] | int = 0,
    *,
    chunk: int = 128,
    remat: bool = False,
) -> Sums:
    """Sums over the predictions: ``nll_full``, ``nll``, ``kl``, ``agree``.

    There are ``T - 1`` a sequence, of which those before ``first`` do not count. Logits exist for
    ``chunk`` positions at a time.
    """
    batch, length = tokens.shape
    parts = -(-(length - 1) // chunk)
    pad = parts * chunk - (length - 1)

    def split(x: Array) -> Array:  # [B, T - 1, …] -> [parts, B, chunk, …]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, parts, chunk, *x.shape[2:]), 1, 0)

    def sums(total: Sums, part: tuple[Array, ...]):
        full, ours, target, counts = part
        a = jax.nn.log_softmax(llama.logits(graphdef, params, full))
        b = jax.nn.log_softmax(llama.logits(graphdef, params, ours))

        def nll(x: Array) -> Array:
            return -jnp.take_along_axis(x, target[..., None], axis=-1)[..., 0]

        new = {
            "nll_full": nll(a),
            "nll": nll(b),
            "kl": jnp.sum(jnp.exp(a) * (a - b), axis=-1),
            "agree": (a.argmax(-1) == b.argmax(-1)).astype(jnp.float32),
        }
        return {name: total[name] + jnp.sum(x * counts) for name, x in new.items()}, None

    real = jnp.broadcast_to((jnp.arange(length - 1) >= first) * 1.0, (batch, length - 1))
    zero = dict.fromkeys(("nll_full", "nll", "kl", "agree"), jnp.zeros(()))
    xs = tuple(split(x) for x in (full[:, :-1], ours[:, :-1], tokens[:, 1:], real))
    return jax.lax.scan(jax.checkpoint(sums) if remat else sums, zero, xs)[0]


def compare(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    codec: Codec,
    *,
    every: int = 1,
    window: Int[Array, ""] | None = None,
    remat: bool = False,
) -> Sums:
    """`divergence` of the cache from full precision; differentiable in the codec's arrays."""
    full = exact_hidden(graphdef, params, tokens)
    ours = cached_hidden(graphdef, params, tokens, codec, every=every, window=window, remat=remat)
    return divergence(graphdef, params, tokens, full, ours, remat=remat)


def fidelity(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    sequences: Iterable[Int[np.ndarray, " T"]],
    codec: Codec,
    *,
    every: int = 1,
    window: int | None = None,
    stride: int | None = None,
    exact: Sequence[Float[Array, "1 T hidden"]] | None = None,
    streamed: Implementation | None = None,
) -> Fidelity:
    """Means over sequences of one length, one at a time.

    Args:
        graphdef: of the model.
        params: of the model.
        sequences: tokens.
        codec: stacked.
        every: tokens encoded at a time, see `gsrq_jax.attention.was_coded`.
        window: instead of the spec's.
        stride: tokens from the beginning of a sequence to that of the next, where they overlap:
            each prediction counts once, where it has the most context.
        exact: `exact_hidden` of each sequence, where it is known.
        streamed: not by one pass, but over a real cache (`streamed_hidden`) by this implementation;
            ``every`` and ``window`` are then the spec's.

    Raises:
        InputError: if no sequence has two tokens, so that there is nothing to predict.
    """
    n, total = 0, dict.fromkeys(("nll_full", "nll", "kl", "agree"), 0.0)
    width = None if window is None else jnp.int32(window)
    for index, sequence in enumerate(sequences):
        tokens = jnp.asarray(sequence)[None]
        full = exact_hidden(graphdef, params, tokens) if exact is None else exact[index]
        if streamed is None:
            ours = cached_hidden(graphdef, params, tokens, codec, every=every, window=width)
        else:
            ours = streamed_hidden(graphdef, params, tokens, codec, implementation=streamed)
        first = len(sequence) - 1 - stride if stride is not None and index else 0
        sums = divergence(graphdef, params, tokens, full, ours, first)
        total = {name: value + float(sums[name]) for name, value in total.items()}
        n += len(sequence) - 1 - first
    if n < 1:
        raise InputError("nothing to predict; give at least one sequence of two tokens or more")
    return Fidelity(
        n=n,
        full_precision=math.exp(total["nll_full"] / n),
        perplexity=math.exp(total["nll"] / n),
        kl=total["kl"] / n,
        top1=total["agree"] / n,
    )


def _causal(q: Array, k: Array, v: Array, _: None):
    return causal(q, k, v), None


def _positions(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
