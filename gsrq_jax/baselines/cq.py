"""Coupled Quantization (CQ): neighbouring channels share one code.

After "KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled
Quantization" (NeurIPS 2024, arXiv 2405.03917). Its authors published no code, and the full text was
not at hand; what follows is from its abstract and from summaries of it.

As in the paper: the channels of a head are split into groups of ``c`` neighbours; each group has
``2^b`` centroids of its own (CQ-<c>c<b>b, ``b/c`` bits a number) and nothing else, neither scale
nor residual; keys are coded before RoPE; a vector takes the nearest centroid. Centroids come from
k-means in which the vector of a group weighs the sum over its channels of the squared gradients of
the loss, the diagonal of the Fisher information. ``weighted=False`` is the paper's "uniform"
ablation, in which CQ-8c8b loses most of what it has (LLaMA-7b on WikiText-2, according to a
summary: perplexity 32.12 instead of 8.09).

That makes a CQ cache a `QuantSpec` with one stage, and its codec the `Codebooks` of every other
residual code, with a mean key of zero.

Where this differs:
    - The authors' k-means starts from k-means++, ours from a random draw of points by weight; it
      re-seeds cells that empty and keeps the best iterate.
    - The paper learns from 16 sequences of 2,048 tokens; here all methods get the same samples.
    - In the paper a window of exact tokens is an option; here window and sinks are those of the
      cache, for all methods.
    - The paper has 2c8b, 4c8b, 8c8b and 8c10b, and 16c12b below one bit. 16c8b and 32c8b, 0.5 and
      0.25 bits, are our continuation of its codes of 8 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gsrq_jax import residual
from gsrq_jax.calibration import LayerSamples
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec, ResidualSpec


def spec(bits: float, head_dim: int, *, code_bits: int = 8, **fields: Any) -> QuantSpec:
    """The cache of CQ with ``code_bits / bits`` coupled channels: 2 bits are 4c8b, 1 bit is 8c8b.

    Args:
        bits: bits a number.
        head_dim: channels of a head.
        code_bits: bits of a group's code.
        fields: ``block``, ``window``, ``sinks`` of the `QuantSpec`.

    Raises:
        InputError: if ``code_bits / bits`` is not a number of channels that divides ``head_dim``.
    """
    possible = [c for c in range(1, head_dim + 1) if head_dim % c == 0]
    channels = next((c for c in possible if c * bits == code_bits), None)
    if channels is None:
        rates = ", ".join(f"{code_bits / c:g}" for c in possible)
        raise InputError(
            f"no group of channels has {bits:g} bits a number with codes of {code_bits} bits on "
            f"heads of {head_dim} channels; the rates are {rates}"
        )
    code = ResidualSpec(dim=head_dim, group=channels, stages=1, codewords=2**code_bits)
    return QuantSpec(key=code, value=code, frame="pre", **fields)


def fit(
    rng: Key[Array, ""],
    samples: LayerSamples,
    inv_freq: Float[Array, " d/2"],
    spec: QuantSpec,
    *,
    k_fisher: Float[Array, "N H S"] | None = None,
    v_fisher: Float[Array, "N H S"] | None = None,
    weighted: bool = True,
    iterations: int = 50,
) -> Codebooks:
    """One layer's centroids.

    Args:
        rng: of the first centroids.
        samples: of the layer; its gradient norms are not used.
        inv_freq: the layer's rotary frequencies.
        spec: made by `spec`.
        k_fisher: squared gradients of the loss with respect to keys before RoPE, summed over each
            of ``S`` equal parts of the channels, as many as the spec has groups or a multiple of
            them. (A rotation mixes the two channels of a pair, which are in different groups, so
            gradients with respect to rotated keys must be turned back first.)
        v_fisher: the same for values.
        weighted: whether vectors weigh their Fisher information, or all the same.
        iterations: of k-means.

    Raises:
        InputError: if ``weighted`` without both Fisher weights, if shapes do not fit, if ``spec``
            is no CQ cache, or if there are fewer tokens than centroids.
    """
    if spec.frame != "pre" or {spec.key.stages, spec.value.stages} != {1}:
        raise InputError(f"not a cache of coupled channels: {spec}; make its spec by cq.spec")
    if weighted and (k_fisher is None or v_fisher is None):
        raise InputError(
            "coupled channels are weighted by squared gradients; give k_fisher and v_fisher, or "
            "weighted=False"
        )
    if not weighted:
        k_fisher = v_fisher = None
    at = jnp.asarray(samples.positions)[:, None]
    k = rotate(jnp.asarray(samples.k, jnp.float32), -at, inv_freq)
    v = jnp.asarray(samples.v, jnp.float32)
    key_rng, value_rng = jax.random.split(rng)

    def centroids(rng: Array, x: Array, code: ResidualSpec, fisher: Array | None) -> Array:
        words, _ = residual.fit(
            rng,
            jnp.moveaxis(x, 1, 0),
            code,
            None if fisher is None else jnp.moveaxis(_by_group(fisher, x, code), 1, 0),
            rule="kmeans",
            iterations=iterations,
            warmup=0,
        )
        return words

    return Codebooks(
        key=centroids(key_rng, k, spec.key, k_fisher),
        value=centroids(value_rng, v, spec.value, v_fisher),
        key_mean=jnp.zeros(k.shape[1:], jnp.float32),
        inv_freq=jnp.asarray(inv_freq, jnp.float32),
        spec=spec,
    )


def _by_group(fisher: Array, x: Array, code: ResidualSpec) -> Array:
    """Fisher weights of the parts to those of the groups, ``[N, H, G]``."""
    fisher = jnp.asarray(fisher, jnp.float32)
    if fisher.shape[:-1] != x.shape[:-1] or fisher.shape[-1] % code.groups:
        raise InputError(
            f"Fisher weights of shape {fisher.shape} do not fit samples of shape {x.shape} in "
            f"{code.groups} groups; give one for each group, or for each of equal parts of it"
        )
    return fisher.reshape(*fisher.shape[:-1], code.groups, -1).sum(-1)
