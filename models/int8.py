"""Linear layers with weights of 8 bits, one scale an output channel: half of bf16's bytes a step.

Activations stay what they are. For few rows, as in decoding, they are written as two int8 numbers
each, so that the products are of integers: a GPU's cuBLAS takes these weights where they lie in the
stack of layers, while a product with other numbers needs a copy of them in every step.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

FEW = 1024
"""Rows up to which activations are split; from there on the weights are converted, which is then
little beside the product."""


class Int8Linear(nnx.Module):
    """``nnx.Linear`` whose weight is rounded; no gradient passes.

    ``weight[out, in] · weight_scale[out]`` is the transposed kernel, as checkpoints have it.
    """

    def __init__(self, n_in: int, n_out: int, *, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (n_in, n_out), jnp.float32)
        weight, scale = rounded(kernel)
        self.weight = nnx.Param(weight)
        self.weight_scale = nnx.Param(scale)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(n_out, dtype))
        self.use_bias = use_bias
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*n out"]:
        y = product(x, self.weight[...], self.weight_scale[...])
        if self.use_bias:
            y += self.bias[...]
        return y.astype(self.dtype)


@jax.jit
def rounded(
    kernel: Float[Array, "*L in out"],
) -> tuple[Int8[Array, "*L out in"], Float32[Array, "*L out"]]:
    """A kernel's transpose as integers from -127 to 127, and what one of them is in each row."""
    kernel = jnp.swapaxes(kernel.astype(jnp.float32), -2, -1)
    scale = _unit(kernel)
    return jnp.round(kernel / scale).astype(jnp.int8), scale[..., 0]


def product(
    x: Float[Array, "*n in"], weight: Int8[Array, "out in"], scale: Float32[Array, " out"]
) -> Float32[Array, "*n out"]:
    """``x @ (weight · scale)ᵀ``.

    Exact in the weights. Of x, up to `FEW` rows, each number is rounded to 1.5e-5 of its row's
    largest; a row with a number that is not finite becomes NaN.
    """
    if math.prod(x.shape[:-1]) > FEW:
        return _contracted(x, weight.astype(x.dtype), jnp.float32) * scale
    x = x.astype(jnp.float32)
    unit = _unit(x)
    upper = jnp.round(x / unit)
    lower = jnp.round((x / unit - upper) * _PER_UNIT)
    pieces = jnp.stack([upper, lower]).astype(jnp.int8)
    sums = _contracted(pieces, weight, jnp.int32).astype(jnp.float32)
    return (sums[0] + sums[1] / _PER_UNIT) * (unit * scale)


def from_dense(flat: Iterable[tuple[tuple[Any, ...], nnx.Variable]]) -> nnx.State:
    """Parameters of a model with `Int8Linear` from those of one with ``nnx.Linear``.

    Args:
        flat: paths and leaves (``nnx.to_flat_state``), taken one at a time, so that they need not
            all be there at once.
    """
    found = []
    for path, leaf in flat:
        if path[-1] != "kernel":
            found.append((path, leaf))
            continue
        weight, scale = rounded(leaf.get_value())
        found.append(((*path[:-1], "weight"), leaf.replace(weight)))
        found.append(((*path[:-1], "weight_scale"), leaf.replace(scale)))
    return nnx.from_flat_state(found)


_PER_UNIT = 254  # lower pieces in an upper one, so that both are at most 127


def _unit(x: Float32[Array, "*n k"]) -> Float32[Array, "*n 1"]:
    """What an integer stands for in each row: its largest number is 127 of them."""
    unit = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    unit = jnp.where(unit == 0, 1, unit)
    return jnp.where(unit < jnp.inf, unit, jnp.nan)


def _contracted(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, last, preferred_element_type=dtype)
