"""What a quantised cache costs: perplexity, KL and agreement against full precision.

Protocol: each sequence is one teacher-forced pass from its first token, every key and value
quantised as `gsrq_jax.attention.attend_as_cached` says (``every=1``: sinks and exactly ``window``
past tokens exact, the worst case of a deployed cache). All next-token predictions count.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from gsrq_jax.attention import attend_as_cached, causal
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.models import llama


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


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("every", "chunk", "remat"))
def compare(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    codebooks: Codebooks,
    *,
    every: int = 1,
    chunk: int = 128,
    remat: bool = False,
) -> dict[str, Float32[Array, ""]]:
    """Sums over the ``B (T - 1)`` predictions: ``nll_full``, ``nll``, ``kl``, ``agree``.

    Logits exist for ``chunk`` positions at a time. ``kl`` is differentiable in the codewords;
    ``remat`` recomputes activations in the backward pass instead of keeping them.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)

    def exact(q: Array, k: Array, v: Array, _: None):
        return causal(q, k, v), None

    def coded(q: Array, k: Array, v: Array, books: Codebooks):
        return attend_as_cached(q, k, v, books, every=every), None

    full, _ = llama.apply(graphdef, params, tokens, positions, exact)
    ours, _ = llama.apply(graphdef, params, tokens, positions, coded, codebooks, remat=remat)

    parts = -(-(length - 1) // chunk)
    pad = parts * chunk - (length - 1)

    def split(x: Array) -> Array:  # [B, T - 1, …] -> [parts, B, chunk, …]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, parts, chunk, *x.shape[2:]), 1, 0)

    def sums(total: dict[str, Array], part: tuple[Array, ...]):
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

    real = jnp.ones((batch, length - 1))
    zero = dict.fromkeys(("nll_full", "nll", "kl", "agree"), jnp.zeros(()))
    xs = tuple(split(x) for x in (full[:, :-1], ours[:, :-1], tokens[:, 1:], real))
    return jax.lax.scan(jax.checkpoint(sums) if remat else sums, zero, xs)[0]


def fidelity(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    sequences: Iterable[Int[np.ndarray, " T"]],
    codebooks: Codebooks,
    *,
    every: int = 1,
) -> Fidelity:
    """`compare` over sequences of one length, one at a time.

    Raises:
        InputError: if no sequence has two tokens, so that there is nothing to predict.
    """
    n, total = 0, dict.fromkeys(("nll_full", "nll", "kl", "agree"), 0.0)
    for sequence in sequences:
        sums = compare(graphdef, params, jnp.asarray(sequence)[None], codebooks, every=every)
        total = {name: value + float(sums[name]) for name, value in total.items()}
        n += len(sequence) - 1
    if n < 1:
        raise InputError("nothing to predict; give at least one sequence of two tokens or more")
    return Fidelity(
        n=n,
        full_precision=math.exp(total["nll_full"] / n),
        perplexity=math.exp(total["nll"] / n),
        kl=total["kl"] / n,
        top1=total["agree"] / n,
    )
