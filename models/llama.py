"""The LLaMA family as one Flax NNX model that does not own its attention.

Split once, ``graphdef, params = nnx.split(model)``; from there on everything is a pure function of
``params`` (:func:`apply`, :func:`logits`). Modules and parameters carry the names of a Hugging Face
checkpoint, so that loading is a rule and not a table.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from gsrq_jax import residual
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.models.int8 import Int8Linear, product
from gsrq_jax.rope import turned, turns

Attention = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""``attention(q[B,T,Q,d], k[B,T,H,d], v[B,T,H,d], x_layer) -> (out[B,T,Q,d], y_layer)``.

Queries and keys arrive rotated. The function scales scores by ``1/sqrt(d)``, masks them, and lets
query head ``j`` see KV head ``j // (Q/H)``.
"""


_ATTENDED = "attended"  # name by which a rematerialisation policy can save what attention returns


class SelfAttention(nnx.Module):
    """Projections, head norms and rotation around an attention function."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, int8: bool):
        self.config = config
        linear = functools.partial(_linear, config.attention_bias, rngs, dtype, int8)
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, wide)
        self.k_proj = linear(config.hidden_size, narrow)
        self.v_proj = linear(config.hidden_size, narrow)
        self.o_proj = linear(wide, config.hidden_size)
        if config.qk_norm:
            self.q_norm = _norm(config, config.head_dim, rngs, dtype)
            self.k_norm = _norm(config, config.head_dim, rngs, dtype)

    def join(self) -> None:
        """Make the projections one product, `qkv_proj`, of which decoding has less to wait for."""
        self.qkv_proj = _joined(self.q_proj, self.k_proj, self.v_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def _projected(self, h):
        c = self.config
        if not hasattr(self, "qkv_proj"):
            parts = self.q_proj(h), self.k_proj(h), self.v_proj(h)
            return (x.reshape(*h.shape[:-1], -1, c.head_dim) for x in parts)
        heads = self.qkv_proj(h).reshape(*h.shape[:-1], -1, c.head_dim)
        return jnp.split(heads, (c.heads, c.heads + c.kv_heads), axis=-2)

    def __call__(self, h, turn, attention: Attention, x_layer):
        c = self.config
        q, k, v = self._projected(h)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (turned(x, *turn) for x in (q, k))
        out, y_layer = attention(q, k, v, x_layer)
        out = checkpoint_name(out.reshape(*h.shape[:-1], -1).astype(h.dtype), _ATTENDED)
        return self.o_proj(out), y_layer


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, int8: bool):
        linear = functools.partial(_linear, config.mlp_bias, rngs, dtype, int8)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def join(self) -> None:
        """Make the first two products one, `gate_up_proj`."""
        self.gate_up_proj = _joined(self.gate_proj, self.up_proj)
        del self.gate_proj, self.up_proj

    def __call__(self, h):
        if hasattr(self, "gate_up_proj"):
            gate, up = jnp.split(self.gate_up_proj(h), 2, axis=-1)
        else:
            gate, up = self.gate_proj(h), self.up_proj(h)
        return self.down_proj(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, int8: bool):
        self.input_layernorm = _norm(config, config.hidden_size, rngs, dtype)
        self.self_attn = SelfAttention(config, rngs=rngs, dtype=dtype, int8=int8)
        self.post_attention_layernorm = _norm(config, config.hidden_size, rngs, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype, int8=int8)

    def join(self) -> None:
        """Make products of the same input one each."""
        self.self_attn.join()
        self.mlp.join()

    def __call__(self, h, turn, attention: Attention, x_layer):
        out, y_layer = self.self_attn(self.input_layernorm(h), turn, attention, x_layer)
        h = h + out
        return h + self.mlp(self.post_attention_layernorm(h)), y_layer


class Llama(nnx.Module):
    """A LLaMA-family decoder whose layers are stacked on a leading axis and scanned.

    Args:
        config: its sizes.
        rngs: keys for random parameters.
        dtype: of parameters and activations; norms take their statistics, rotations their angles
            and logits their sums in float32 whatever it is.
        int8: weights of linear layers have 8 bits (`gsrq_jax.models.int8`); embeddings, and with
            tied ones logits, stay in ``dtype``.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        int8: bool = False,
    ):
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs, dtype=dtype, int8=int8)

        self.layers = stack(rngs)
        self.norm = _norm(config, config.hidden_size, rngs, dtype)
        if not config.tied_embeddings:
            sizes = config.hidden_size, config.vocab_size
            self.lm_head = _linear(False, rngs, dtype, int8, *sizes)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: Attention,
        per_layer: Any = None,
        *,
        others: Sequence[nnx.State] | None = None,
        remat: bool = False,
        place: Callable[[Array], Array] = lambda h: h,
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        """Hidden states after the final norm, and what ``attention`` returned for each layer.

        Args:
            tokens: token ids; one outside the vocabulary yields NaN.
            positions: of the tokens in their sequences; rotation alone uses them.
            attention: see :data:`Attention`; the only place where tokens meet.
            per_layer: pytree with a leading axis of layers, whose slices are ``attention``'s
                ``x_layer``.
            others: parameters of all layers but the first, whose own are then this module's
                (`Unrolled`); None where all are stacked.
            remat: recompute each layer in the backward pass instead of keeping its activations;
                codes and what attention returns are kept.
            place: constrains where hidden states between layers live, on many devices.

        Returns:
            Hidden states in the parameters' dtype; the ``y_layer`` stacked on a leading axis.
        """
        graphdef, state = nnx.split(self.layers)
        turn = turns(positions[..., None], self.config.inv_freq)  # once, not in each layer

        def body(h, layer):
            state, x_layer = layer
            h, y_layer = nnx.merge(graphdef, state)(h, turn, attention, x_layer)
            return place(h), y_layer

        if remat:
            policy = jax.checkpoint_policies.save_only_these_names(residual.CODES, _ATTENDED)
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        h = place(self.embed_tokens(tokens))
        if others is None:
            h, y = jax.lax.scan(body, h, (state, per_layer))
            return self.norm(h), y
        body, ys = jax.jit(body), []  # traced and lowered once
        for i, own in enumerate([state, *others]):
            h, y = body(h, (own, jax.tree.map(lambda x, i=i: x[i], per_layer)))
            ys.append(y)
        return self.norm(h), jax.tree.map(lambda *y: jnp.stack(y), *ys)

    def logits(self, hidden: Float[Array, "*n hidden"]) -> Float32[Array, "*n vocab"]:
        """Scores of the next token from hidden states, float32."""
        if self.config.tied_embeddings:
            table = self.embed_tokens.embedding[...].T
        elif isinstance(self.lm_head, Int8Linear):
            return product(hidden, self.lm_head.weight[...], self.lm_head.weight_scale[...])
        else:
            table = self.lm_head.kernel[...]
        scores = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        lead = hidden.shape[:-1]
        if math.prod(lead) == 1 and hidden.dtype != jnp.float32:
            # For a single row in half precision XLA converts the table to float32 on a GPU.
            rows = jnp.pad(hidden.reshape(1, -1), ((0, 1), (0, 0)))
            return scores(rows, table)[0].reshape(*lead, -1)
        return scores(hidden, table)


def _linear(
    bias: bool, rngs: nnx.Rngs, dtype: DTypeLike, int8: bool, n_in: int, n_out: int
) -> nnx.Linear | Int8Linear:
    if int8:
        return Int8Linear(n_in, n_out, use_bias=bias, dtype=dtype, rngs=rngs)
    return nnx.Linear(n_in, n_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _joined(*layers: nnx.Linear | Int8Linear) -> nnx.Linear | Int8Linear:
    """One layer whose outputs are those of all, one after the other."""
    graphdef, _ = nnx.split(layers[0])

    def joined(path: tuple[Any, ...], *arrays: Array) -> Array:
        axis = -2 if path[0].key == "weight" else -1  # `Int8Linear` has the transpose
        return jnp.concatenate(arrays, axis=axis)

    states = map(nnx.state, layers)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(joined, *states))


def _norm(config: LlamaConfig, size: int, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Parameters of a model, each layer's in arrays of their own: its layers follow one another in
    the program instead of being a loop's, and products of the same input are one.

    A program then takes longer to compile, and less time on GPUs: XLA tunes products with weights
    that are not cut out of a stack, and finds once what is the same in all layers.

    Attributes:
        graphdef: of a module whose only layer is the first.
        first: its parameters.
        others: of each of the other layers.
    """

    graphdef: nnx.GraphDef[Llama] = dataclasses.field(metadata={"static": True})
    first: nnx.State
    others: tuple[nnx.State, ...]


Params = nnx.State | Unrolled


def unrolled(graphdef: nnx.GraphDef[Llama], params: nnx.State) -> Unrolled:
    """A copy of stacked parameters, layer by layer."""
    model = nnx.merge(graphdef, params)
    of_layer, stacked = nnx.split(model.layers)

    def layer(i: int) -> DecoderLayer:
        one = nnx.merge(of_layer, jax.tree.map(lambda x: x[i], stacked))
        one.join()
        return one

    model.layers, *others = map(layer, range(model.config.layers))
    return Unrolled(*nnx.split(model), tuple(map(nnx.state, others)))


def model_of(graphdef: nnx.GraphDef[Llama], params: Params) -> Llama:
    """The module; of unrolled parameters, one whose only layer is the first."""
    if isinstance(params, Unrolled):
        return nnx.merge(params.graphdef, params.first)
    return nnx.merge(graphdef, params)


def apply(
    graphdef: nnx.GraphDef[Llama],
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attention: Attention,
    per_layer: Any = None,
    *,
    remat: bool = False,
    place: Callable[[Array], Array] = lambda h: h,
) -> tuple[Float[Array, "B T hidden"], Any]:
    """:meth:`Llama.__call__` as a pure function of the parameters."""
    model = model_of(graphdef, params)
    others = params.others if isinstance(params, Unrolled) else None
    return model(tokens, positions, attention, per_layer, others=others, remat=remat, place=place)


def logits(
    graphdef: nnx.GraphDef[Llama], params: Params, hidden: Float[Array, "*n hidden"]
) -> Float32[Array, "*n vocab"]:
    """:meth:`Llama.logits` as a pure function of the parameters."""
    return model_of(graphdef, params).logits(hidden)


def output_moments(graphdef: nnx.GraphDef[Llama], params: nnx.State) -> Float32[Array, "L H d d"]:
    """``W_oᵀW_o`` of each KV head's values: the sum over the query heads that read it."""
    model = nnx.merge(graphdef, params)
    c = model.config
    o_proj = model.layers.self_attn.o_proj
    assert isinstance(o_proj, nnx.Linear)  # what is learned from has its weights in full
    weights = o_proj.kernel[...].astype(jnp.float32)
    weights = weights.reshape(c.layers, c.kv_heads, -1, c.head_dim, c.hidden_size)
    return jnp.einsum("LHqdo,LHqeo->LHde", weights, weights)


def abstract(
    config: LlamaConfig, dtype: DTypeLike = jnp.float32, *, int8: bool = False
) -> tuple[nnx.GraphDef[Llama], nnx.State]:
    """``nnx.split`` of a model without making its arrays: parameters are ``ShapeDtypeStruct``."""

    def make() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0), dtype=dtype, int8=int8)

    return nnx.split(nnx.eval_shape(make))


def count(params: Any) -> int:
    """Numbers in a pytree of arrays or of ``ShapeDtypeStruct``."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
