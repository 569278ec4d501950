"""Text out of a LLaMA over a cache, full or quantised: prefill, the decode loop, sampling.

Pure functions of ``(graphdef, params)``, a cache and a codec. A cache for ``None`` is
exact. Shapes: L layers, B sequences, T prompt tokens, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32, Int, Key

from gsrq_jax import sharded
from gsrq_jax.attention import Implementation, attend, causal
from gsrq_jax.cache import KVCache, append, init_cache, layer_views, stack_layers
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import Codec
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.models import llama, sharding
from gsrq_jax.models.llama import Params


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: sample among the most likely tokens whose probability sums to at least this.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a number from 0 up, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def __call__(self, key: Key[Array, ""], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        """One token a sequence."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
            last = jnp.sum(mass < self.top_p, axis=-1, keepdims=True)  # index of the last one kept
            last = jnp.minimum(last, logits.shape[-1] - 1)  # all of the mass may round below top_p
            least = jnp.take_along_axis(ordered, last, axis=-1)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def check_seed(seed: int, prefix: str = "") -> None:
    """Refuse a seed that the sampler does not have; ``prefix`` is as in `errors.at_least`.

    Raises:
        InputError: if it is not from 0 to 2³² - 1.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"{prefix}seed must be from 0 to {2**32 - 1}, got {seed}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from token to token.

    Attributes:
        cache: stacked over layers, all tokens but the last one.
        token: int32 ``[B]``, the last token of each sequence, not yet in the cache.
        done: bool ``[B]``, sequences that have ended; they grow no more.
        tokens: int32 ``[B, new]``, what was generated so far.
        count: int32 ``[B]``, how many of them there are, end tokens included.
        key: of the sampler.
    """

    cache: KVCache
    token: Array
    done: Array
    tokens: Array
    count: Array
    key: Array

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def prefill(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    codec: Codec | None,
    *,
    max_length: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Read prompts: exact attention, each layer's keys and values coded before the next layer.

    Args:
        graphdef: of the model.
        params: of the model.
        tokens: prompts, padded on the right.
        count: tokens of each prompt, at least 1.
        codec: a stacked codec, such as codebooks; None for an exact cache.
        max_length: tokens that the cache must hold.
        dtype: of the exact parts of the cache.
        mesh: of `gsrq_jax.models.sharding.make_mesh`, over which parameters, codec and cache are
            spread.

    Returns:
        Logits after each prompt's last token, and the cache.
    """
    spec = codec.spec if codec is not None else None
    batch, length = tokens.shape

    def layer(q: Array, k: Array, v: Array, books: Codec | None):
        empty = _on(mesh, init_cache, sharded.init_cache)(
            spec,
            batch=batch,
            kv_heads=k.shape[2],
            head_dim=k.shape[3],
            max_length=max_length,
            dtype=dtype,
        )
        grown = _on(mesh, append, sharded.append)(empty, k, v, books, count)
        return _on(mesh, causal, sharded.causal)(q, k, v), grown

    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    place = _on(mesh, lambda h: h, sharding.by_channels)
    hidden, cache = llama.apply(graphdef, params, tokens, positions, layer, codec, place=place)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    return llama.logits(graphdef, params, last), stack_layers(cache)


def read(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    codec: Codec | None,
    *,
    chunk: int,
    max_length: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Read prompts ``chunk`` tokens at a time, each chunk over the cache that those before it left.

    For prompts too long for `prefill`, whose exact keys and values of a layer and hidden states are
    there for all tokens at once. Here they are for a chunk; what is older than sinks and window is
    seen as its codes, as in decoding, so that logits are not those of `prefill`.

    Args:
        graphdef: of the model.
        params: of the model.
        tokens: prompts, padded on the right; T a multiple of ``chunk``.
        count: tokens of each prompt, at least 1.
        codec: as for `prefill`.
        chunk: tokens at a time.
        max_length: as for `prefill`, and ``dtype`` and ``mesh``.
        dtype: as there.
        mesh: as there.

    Returns:
        Logits after each prompt's last token, and the cache.

    Raises:
        InputError: if the chunks do not fill T.
    """
    batch, length = tokens.shape
    if chunk < 1 or length % chunk:
        raise InputError(f"{length} tokens are not a number of chunks of {chunk}; pad them")
    config = llama.model_of(graphdef, params).config
    empty = _on(mesh, init_cache, sharded.init_cache)(
        codec.spec if codec is not None else None,
        batch=batch,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_length=max_length,
        layers=config.layers,
        dtype=dtype,
    )

    def step(carry: tuple[KVCache, Array], x: tuple[Array, Array]):
        cache, logits = carry
        part, start = x
        now = jnp.clip(count - start, 0, chunk)
        new, cache = extend(graphdef, params, part, now, cache, codec, mesh)
        return (cache, jnp.where((now > 0)[:, None], new, logits)), None

    parts = jnp.swapaxes(tokens.reshape(batch, -1, chunk), 0, 1)
    logits = jnp.zeros((batch, config.vocab_size), jnp.float32)
    starts = jnp.arange(0, length, chunk)
    (cache, logits), _ = jax.lax.scan(step, (empty, logits), (parts, starts))
    return logits, cache


def refilled(
    k: Float[Array, "L B C H d"],
    v: Float[Array, "L B C H d"],
    codec: Codec | None,
    count: Int[Array, " B"] | None = None,
    *,
    max_length: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> KVCache:
    """The stacked cache of prompts whose rotated keys and values are known, from position 0.

    Layer by layer, so that what encoding needs exists for one layer at a time.

    Args:
        k: keys of all layers; those after ``count`` are padding.
        v: values of the same tokens.
        codec: stacked; None for an exact cache.
        count: tokens of each prompt; None means all.
        max_length: tokens that the cache must hold.
        dtype: of the exact parts of the cache.
    """

    def layer(x: tuple[Array, Array, Codec | None]) -> KVCache:
        return _filled(*x, count, max_length, dtype)

    return stack_layers(jax.lax.map(layer, (k, v, codec)))


def recoded(exact: KVCache, codec: Codec | None, *, max_length: int) -> KVCache:
    """`refilled` with what a stacked cache at full precision holds.

    Args:
        exact: the cache.
        codec: stacked; None for an exact cache.
        max_length: tokens that the new cache must hold.
    """

    def layer(x: tuple[KVCache, Codec | None]) -> KVCache:
        exact, codec = x
        window = exact.window_key, exact.window_value  # position p in slot p
        k, v = (jnp.swapaxes(x, 1, 2) for x in window)  # of one layer: all would be a copy
        return _filled(k, v, codec, exact.length, max_length, k.dtype)

    return stack_layers(jax.lax.map(layer, (exact, codec)))


def _filled(
    k: Float[Array, "B C H d"],
    v: Float[Array, "B C H d"],
    codec: Codec | None,
    count: Int[Array, " B"] | None,
    max_length: int,
    dtype: jax.typing.DTypeLike,
) -> KVCache:
    """One layer's cache of these tokens."""
    empty = init_cache(
        codec.spec if codec is not None else None,
        batch=k.shape[0],
        kv_heads=k.shape[2],
        head_dim=k.shape[3],
        max_length=max_length,
        dtype=dtype,
    )
    return append(empty, k, v, codec, count)


def extend(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    cache: KVCache,
    codec: Codec | None,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Read more tokens after those in the cache: one to decode, a chunk of a prompt, a new turn.

    With a mesh all of it is spread, as `prefill` leaves it.

    Returns:
        Logits after each sequence's last new token (of the first where there is none), the cache.
    """
    hidden, cache = hidden_after(graphdef, params, tokens, count, cache, codec, mesh)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return llama.logits(graphdef, params, last), cache


def hidden_after(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    cache: KVCache,
    codec: Codec | None,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T hidden"], KVCache]:
    """`extend` with the hidden states of all new tokens instead of the last one's logits.

    The layer loop only reads the cache; one `append` for all layers follows it.

    Args:
        graphdef: of the model.
        params: of the model.
        tokens: new ones.
        count: how many of them each sequence has.
        cache: stacked.
        codec: as for `prefill`.
        mesh: as for `prefill`.
        implementation: of `gsrq_jax.attention.attend`; None, which it must be with a mesh, chooses.
    """
    positions = cache.length[0][:, None] + jnp.arange(tokens.shape[1])
    views, view = layer_views(cache)
    books, codec_of = _codec_views(codec)
    here = functools.partial(attend, implementation=implementation)

    def layer(q: Array, k: Array, v: Array, held: tuple[Any, Any]):
        out = _on(mesh, here, sharded.attend)(q, k, v, view(held[0]), codec_of(held[1]), count)
        # Without it, the product that makes v is done twice on a GPU: also where the stack has it.
        return out, (k, jax.lax.optimization_barrier(v))

    place = _on(mesh, lambda h: h, sharding.by_channels)
    hidden, (k, v) = llama.apply(
        graphdef, params, tokens, positions, layer, (views, books), place=place
    )
    return hidden, _on(mesh, append, sharded.append)(cache, k, v, codec, count)


def _codec_views(codec: Codec | None) -> tuple[Any, Callable[[Any], Codec | None]]:
    """As `gsrq_jax.cache.layer_views`, of a stacked codec.

    A model turns the keys of all its layers alike, so all read the first one's frequencies: what
    follows from them and from positions alone is the same in all layers, also to a compiler.
    """
    if not isinstance(codec, Codebooks):
        return codec, lambda x: x
    common = codec.inv_freq[0]
    bare = dataclasses.replace(codec, inv_freq=None)  # type: ignore[arg-type]
    return bare, lambda x: dataclasses.replace(x, inv_freq=common)


def _on(mesh: Mesh | None, one: Callable, many: Callable) -> Callable:
    """``one`` for a single device, or ``many`` on this mesh."""
    return one if mesh is None else functools.partial(many, mesh)


def decode(
    graphdef: nnx.GraphDef,
    params: Params,
    codec: Codec | None,
    state: DecodeState,
    steps: Int[Array, ""],
    *,
    sampler: Sampler,
    eos: tuple[int, ...],
    mesh: Mesh | None = None,
) -> DecodeState:
    """Up to ``steps`` more tokens in one loop; stops when every sequence is done.

    Compiled once for any number of steps and any length: donate ``state``.
    """

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        left, state = carry
        alive = ~state.done
        logits, cache = extend(
            *(graphdef, params, state.token[:, None], alive.astype(jnp.int32)),
            *(state.cache, codec, mesh),
        )
        return left - 1, _take(state.replace(cache=cache), logits, sampler, eos)

    def more(carry: tuple[Array, DecodeState]) -> Array:
        left, state = carry
        return (left > 0) & ~state.done.all()

    return jax.lax.while_loop(more, body, (steps, state))[1]


ON_GPU: dict[str, Any] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "dot-merger,dot-strength-reduction",
}
"""XLA's options for the decode loop on a GPU. Its layers read weights out of a stack: cuBLAS does
so where they are; Triton's products, those of q, k and v put together, and the sums that XLA makes
of a single sequence's k and v, from a copy in every step."""


def loop_options() -> dict[str, Any] | None:
    """`ON_GPU` there, None elsewhere: the ``compiler_options`` of `jax.jit` for `decode`."""
    return ON_GPU if jax.default_backend() == "gpu" else None


def start(
    cache: KVCache,
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    eos: tuple[int, ...],
) -> DecodeState:
    """The state after a prompt: its first new token is chosen, not yet read."""
    batch = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        key=key,
    )
    return _take(state, logits, sampler, eos)


def _take(state: DecodeState, logits: Array, sampler: Sampler, eos: tuple[int, ...]) -> DecodeState:
    """Choose a token for each sequence that is not done, and note it."""
    key, now = jax.random.split(state.key)
    token = jnp.where(state.done, state.token, sampler(now, logits))
    room = state.tokens.shape[1]
    slot = jnp.where(state.done, room, state.count)
    row = jnp.arange(token.shape[0])
    count = state.count + ~state.done
    ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) | (count >= room)
    return state.replace(
        token=token,
        tokens=state.tokens.at[row, slot].set(token, mode="drop"),
        count=count,
        done=state.done | ended,
        key=key,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A model with compiled prefill and decode loop, for calls from Python.

    Attributes:
        graphdef, params: of the model; unrolled parameters (`gsrq_jax.models.llama.unrolled`) make
            longer programs that take less time on a GPU, and need a mesh of None.
        codec: a stacked codec, such as codebooks; None for the exact cache.
        sampler: how tokens are chosen.
        eos: tokens that end a sequence.
        dtype: of the exact parts of the cache.
        mesh: of `gsrq_jax.models.sharding.make_mesh`, over which parameters, codec and cache are
            spread; None for one device. Every process of several makes the same calls.
        chunk: tokens of prompts that are read at a time (`read`); None reads them at once.
    """

    graphdef: nnx.GraphDef
    params: Params
    codec: Codec | None = None
    sampler: Sampler = Sampler()
    eos: tuple[int, ...] = ()
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    mesh: Mesh | None = None
    chunk: int | None = None

    @functools.cached_property
    def _placed(self) -> tuple[Params, Codec | None]:
        """Parameters and codec where the mesh has them."""
        if self.mesh is None:
            return self.params, self.codec
        if isinstance(self.params, llama.Unrolled):
            raise InputError("unrolled parameters are for one device; a mesh takes stacked ones")
        axes = sharded.codec_axes(self.codec, stacked=True)
        return (
            jax.device_put(self.params, sharding.shardings(self.mesh, self.params)),
            jax.device_put(
                self.codec, jax.tree.map(functools.partial(NamedSharding, self.mesh), axes)
            ),
        )

    @functools.cached_property
    def _prefill(self) -> Callable[..., tuple[Array, KVCache]]:
        way = prefill if self.chunk is None else functools.partial(read, chunk=self.chunk)
        return jax.jit(
            functools.partial(way, self.graphdef, dtype=self.dtype, mesh=self.mesh),
            static_argnames="max_length",
        )

    @functools.cached_property
    def _start(self) -> Callable[..., DecodeState]:
        def begin(cache: KVCache, logits: Array, seed: Array, max_new_tokens: int) -> DecodeState:
            return start(
                cache,
                logits,
                jax.random.key(seed),
                max_new_tokens=max_new_tokens,
                sampler=self.sampler,
                eos=self.eos,
            )

        return jax.jit(begin, static_argnames="max_new_tokens", donate_argnums=0)

    @functools.cached_property
    def _decode(self) -> Callable[..., DecodeState]:
        step = functools.partial(
            decode, self.graphdef, sampler=self.sampler, eos=self.eos, mesh=self.mesh
        )
        return jax.jit(step, donate_argnums=2, compiler_options=loop_options())

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        max_length: int,
        seed: int = 0,
        stride: int | None = None,
    ) -> Iterator[DecodeState]:
        """Yield the state after the first new token, then after every ``stride`` more.

        A state that was yielded is donated to the next step: read it before going on.

        Args:
            prompts: token ids; of any lengths.
            max_new_tokens: at most so many tokens each.
            max_length: tokens that the cache must hold; prompt and new tokens must fit.
            seed: of the sampler, below 2³².
            stride: tokens between yields; None for all that are left.

        Raises:
            InputError: if a prompt is empty or does not fit with its new tokens, or if
                ``max_new_tokens``, ``stride`` or ``chunk`` is less than 1, the seed is out of
                range, or parameters are unrolled and there is a mesh. It comes with the first
                state.
        """
        check_seed(seed)
        longest = max(map(len, prompts), default=0)
        if not prompts or not min(map(len, prompts)):
            raise InputError("a prompt is empty; give at least one token")
        at_least(1, chunk=self.chunk)
        stride = max_new_tokens if stride is None else stride
        if max_new_tokens < 1 or stride < 1:
            raise InputError(
                f"max_new_tokens and stride must be at least 1, got {max_new_tokens} and {stride}"
            )
        if longest + max_new_tokens > max_length:
            raise InputError(
                f"a prompt of {longest} tokens with {max_new_tokens} new ones does not fit into a "
                f"cache of {max_length}; shorten it or ask for a longer cache"
            )
        if self.chunk is None:
            padded = min(max_length, -(-longest // _BUCKET) * _BUCKET)
        else:
            padded = -(-longest // self.chunk) * self.chunk
        tokens = np.zeros((len(prompts), padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        count = np.asarray([len(p) for p in prompts], np.int32)
        params, codec = self._placed
        logits, cache = self._prefill(params, tokens, count, codec, max_length=max_length)
        state = self._start(cache, logits, np.uint32(seed), max_new_tokens=max_new_tokens)
        while not bool(state.done.all()):
            yield state
            state = self._decode(params, codec, state, np.int32(stride))
        yield state


_BUCKET = 128  # prompts are padded to multiples of it, so that few lengths are compiled
