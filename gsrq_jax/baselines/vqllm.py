"""VQLLM: residual vector quantization with one scale a vector and one codebook for all heads.

After "Residual vector quantization for KV cache compression in large language model" (arXiv
2410.15704; PMLR 262) and its repository iankur/vqllm, read and written anew.

As in the repository:
    - A key (before RoPE) or value of one token and head is divided by the standard deviation of its
      channels (unbiased; the mean stays; 1 where it is 0), which is stored with the codes.
    - Values are split into groups of 32 neighbouring channels, keys into strided groups: group j
      has channels ``j, j + G, j + 2G, …`` in the repository's order, in which the two channels of a
      rotary pair are neighbours. Here they are ``d/2`` apart, so keys are reordered first; on heads
      of 64 channels the two groups are then the first and the second half.
    - All heads and groups of a layer share one codebook of 2,048 codewords a stage, keys and values
      one each; 8 stages. Codes are greedy, the nearest codeword in Euclidean distance.
    - Codewords start from k-means of up to 100,000 groups, stage after stage, with counts of 1, and
      follow exponential moving averages of the sums and counts of their cells: decay 0.99, an
      update after 8 sequences, all stages at once, 200 updates. Counts are smoothed with 1e-5 as in
      VQ-VAE, codewords clipped to ±100, dead ones left alone. No gradient is involved (the
      repository's default), so samples of keys and values are all it takes.

Where this differs:
    - The repository's averages see 13 million tokens of SlimPajama, 8,192 a sequence, each layer
      reading what the coded layers before it produce. Here they go round and round the samples that
      all methods get, from the model at full precision, 1,024 tokens at a time, in a random order.
    - k-means starts from tokens of all sequences rather than of one, and re-seeds cells that empty
      instead of leaving their centroid.
    - Codewords are float32 instead of bfloat16; the scale is bfloat16 in both.
    - The repository codes every token; here sinks and window stay exact, as for all methods.
    - 256 codewords (`VQLLMSpec.from_bits`) are ours: with bytes as codes the nominal rates 0.25,
      0.5, 0.75, 1 and 2 exist. The scale comes on top, 16/d bits a number.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, Key

from gsrq_jax import packing, residual
from gsrq_jax.calibration import LayerSamples
from gsrq_jax.errors import InputError
from gsrq_jax.kmeans import cell_sums, nearest
from gsrq_jax.rope import rotate
from gsrq_jax.spec import CacheSpec, ResidualSpec

CHUNK = 8192  # groups encoded at a time


@dataclasses.dataclass(frozen=True)
class VQLLMSpec(CacheSpec):
    """A cache of VQLLM's codes; keys and values alike.

    Attributes:
        dim: channels of a head.
        group: channels quantised together.
        stages: residual stages.
        codewords: codewords of a stage, a power of two.
        key_groups: which channels of a key form a group: ``strided`` (the method) or
            ``contiguous`` (the paper's ablation).

    ``block``, ``window`` and ``sinks`` are those of `CacheSpec`.

    Raises:
        InputError: if the numbers do not fit each other.
    """

    dim: int
    group: int = 32
    stages: int = 8
    codewords: int = 2048
    key_groups: Literal["strided", "contiguous"] = "strided"

    def __post_init__(self):
        super().__post_init__()
        _ = self.code
        if self.dim % 2:
            raise InputError(f"rotary keys need an even head size, got {self.dim}")
        if self.key_groups not in ("strided", "contiguous"):
            raise InputError(
                f"unknown key_groups {self.key_groups!r}; choose strided or contiguous"
            )

    @classmethod
    def from_bits(
        cls,
        bits: float,
        head_dim: int,
        *,
        group: int | None = None,
        codewords: int = 256,
        **fields: Any,
    ) -> Self:
        """``bits`` bits a number without the scale; ``fields`` are the others.

        Groups are of 32 channels, or of whole heads where those are smaller.

        Raises:
            InputError: if that rate does not exist, naming the nearest that do.
        """
        group = min(32, head_dim) if group is None else group
        code = ResidualSpec.from_bits(bits, head_dim, codewords=codewords, group=group)
        return cls(head_dim, group, code.stages, codewords, **fields)

    @property
    def code(self) -> ResidualSpec:
        """The code of one vector."""
        return ResidualSpec(self.dim, self.group, self.stages, self.codewords)

    @property
    def head_dim(self) -> int:
        """Channels of a key or value vector."""
        return self.dim

    @property
    def bits(self) -> float:
        """Nominal bits a number, without the scale."""
        return self.code.bits

    @property
    def key_order(self) -> Int[np.ndarray, " d"]:
        """The key channel at each place, groups being neighbours."""
        paired = np.arange(self.dim).reshape(2, -1).T.reshape(-1)
        if self.key_groups == "contiguous":
            return paired
        return paired.reshape(self.group, -1).T.reshape(-1)

    def code_shapes(self) -> tuple["Coded", "Coded"]:
        """Packed codes and a scale for each token, keys and values."""
        one = Coded(
            codes=jax.ShapeDtypeStruct((self.block, self.code.nbytes), jnp.uint8),
            scale=jax.ShapeDtypeStruct((self.block,), jnp.bfloat16),
        )
        return one, one

    def __str__(self) -> str:
        return (
            f"VQLLM {self.bits:g} bit and a scale, {self.stages} stages × {self.codewords} "
            f"codewords × {self.code.groups} groups, keys {self.key_groups}, head {self.dim}, "
            f"blocks of {self.block}, window {self.window}, sinks {self.sinks}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, for metadata."""
        return dataclasses.asdict(self)


class Coded(NamedTuple):
    """What is kept of vectors: arrays, or the shapes of them.

    Attributes:
        codes: packed, uint8 ``[*shape, bytes]``.
        scale: standard deviations, bfloat16 ``[*shape]``.
    """

    codes: Any
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQLLM:
    """One layer's codec, or a stack of them with a leading L; see `gsrq_jax.codec.Codec`.

    Attributes:
        key: codewords of keys over their standard deviation, ``[L, R, K, g]``.
        value: the same of values.
        inv_freq: rotary frequencies, ``[L, d / 2]``.
        spec: of the cache.
    """

    key: Float[Array, "*L R K g"]
    value: Float[Array, "*L R K g"]
    inv_freq: Float[Array, "*L half_d"]
    spec: VQLLMSpec = dataclasses.field(metadata={"static": True})

    def encode(
        self,
        k: Float[Array, "*lead b H d"],
        v: Float[Array, "*lead b H d"],
        positions: Int[Array, "*lead b"],
    ) -> tuple[Coded, Coded]:
        """See `gsrq_jax.codec.Codec.encode`; any number of tokens at any positions will do."""
        k = rotate(k.astype(jnp.float32), -positions[..., None], self.inv_freq)
        code = self.spec.code
        return (
            _encode(k[..., self.spec.key_order], self.key, code),
            _encode(v.astype(jnp.float32), self.value, code),
        )

    def decode(
        self, key_codes: Coded, value_codes: Coded, positions: Int[Array, "*lead b"]
    ) -> tuple[Float[Array, "*lead b H d"], Float[Array, "*lead b H d"]]:
        """See `gsrq_jax.codec.Codec.decode`."""
        code, place = self.spec.code, np.argsort(self.spec.key_order)
        k = _decode(key_codes, self.key, code)[..., place]
        return rotate(k, positions[..., None], self.inv_freq), _decode(
            value_codes, self.value, code
        )


def _scale(x: Float[Array, "*shape d"]) -> BFloat16[Array, "*shape"]:
    """What a vector is divided by."""
    scale = jnp.std(x, axis=-1, ddof=1).astype(jnp.bfloat16)
    return jnp.where(scale == 0, 1, scale)


def _encode(x: Array, codewords: Array, code: ResidualSpec) -> Coded:
    """``[*lead, b, H, d]`` to codes ``[*lead, H, b, bytes]`` and scales ``[*lead, H, b]``."""
    x = jnp.swapaxes(x, -2, -3)
    scale = _scale(x)
    count = math.prod(x.shape[:-1])
    points = (x / scale[..., None]).reshape(count * code.groups, code.group)
    codes = residual.encode(points, codewords[None], chunk=CHUNK)
    packed = packing.pack(codes.reshape(*x.shape[:-1], code.codes), code.code_bits)
    return Coded(packed, scale)


def _decode(coded: Coded, codewords: Array, code: ResidualSpec) -> Array:
    """The way back, ``[*lead, b, H, d]`` float32."""
    codes = packing.unpack(coded.codes, code.codes, code.code_bits)
    count = math.prod(coded.scale.shape)
    points = residual.decode(
        codes.reshape(count * code.groups, 1, code.stages), codewords[None]
    ).reshape(*coded.scale.shape, code.dim)
    return jnp.swapaxes(points * coded.scale[..., None], -2, -3)


# --- learning -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How codewords are learned; the defaults are the repository's but for ``length``.

    Attributes:
        steps: updates of the codewords.
        sequences: sequences between two updates.
        length: tokens of a sequence, at most as many as there are samples.
        decay: of the moving averages, each step.
        epsilon: what smooths the counts.
        start: groups of channels, at most, that k-means starts from.
        start_iterations: of that k-means.
    """

    steps: int = 200
    sequences: int = 8
    length: int = 1024
    decay: float = 0.99
    epsilon: float = 1e-5
    start: int = 100_000
    start_iterations: int = 10


def fit(
    rng: Key[Array, ""],
    samples: LayerSamples,
    inv_freq: Float[Array, " d/2"],
    spec: VQLLMSpec,
    *,
    options: FitOptions = FitOptions(),
) -> VQLLM:
    """One layer's codewords.

    Args:
        rng: of the order of the tokens and of the first codewords.
        samples: of the layer; its gradient norms are not used.
        inv_freq: the layer's rotary frequencies.
        spec: of the cache.
        options: how to learn.

    Raises:
        InputError: if the samples have fewer groups of channels than codewords, or another head
            size than the spec.
    """
    return _fit(rng, samples.k, samples.v, samples.positions, inv_freq, spec, options)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _fit(
    rng: Array,
    k: Array,
    v: Array,
    positions: Array,
    inv_freq: Array,
    spec: VQLLMSpec,
    options: FitOptions,
) -> VQLLM:
    if k.shape[-1] != spec.dim:
        raise InputError(f"the spec is for {spec.dim} channels, but the samples have {k.shape[-1]}")
    key_rng, value_rng = jax.random.split(rng)
    k = rotate(k.astype(jnp.float32), -positions[:, None], inv_freq)
    return VQLLM(
        key=_codewords(key_rng, k[..., spec.key_order], spec.code, options),
        value=_codewords(value_rng, v.astype(jnp.float32), spec.code, options),
        inv_freq=jnp.asarray(inv_freq, jnp.float32),
        spec=spec,
    )


def _codewords(rng: Array, x: Array, code: ResidualSpec, options: FitOptions) -> Array:
    """``[N, H, d]`` to ``[R, K, g]``."""
    order_rng, start_rng = jax.random.split(rng)
    tokens, heads, _ = x.shape
    points = (x / _scale(x)[..., None]).reshape(tokens, heads * code.groups, code.group)
    order = jax.random.permutation(order_rng, tokens)
    length = min(options.length, tokens)

    first = order[: -(-options.start // points.shape[1])]
    shared = ResidualSpec(code.group, code.group, code.stages, code.codewords)
    words, _ = residual.fit(
        start_rng,
        points[first].reshape(-1, code.group)[: options.start],
        shared,
        rule="kmeans",
        iterations=options.start_iterations,
        warmup=0,
    )

    def step(state: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        words, average = state

        def sequence(total: Array, index: Array) -> tuple[Array, None]:
            place = index * length + jnp.arange(length)
            return total + _cells(points[order[place % tokens]], words), None

        indices = index * options.sequences + jnp.arange(options.sequences)
        total, _ = lax.scan(sequence, jnp.zeros_like(average), indices)
        average = options.decay * average + (1 - options.decay) * total
        count = average[..., -1:]
        whole = count.sum(-2, keepdims=True)
        share = (count + options.epsilon) / (whole + code.codewords * options.epsilon)
        words = jnp.clip(average[..., :-1] / (share * whole), -100, 100)
        return (words, average), None

    words = words[0]
    average = jnp.concatenate([words, jnp.ones_like(words[..., :1])], axis=-1)
    (words, _), _ = lax.scan(step, (words, average), jnp.arange(options.steps))
    return words


def _cells(points: Array, words: Array) -> Array:
    """Sum and count of each stage's cells ``[R, K, g + 1]`` over points ``[…, g]``."""

    def stage(left: Array, words: Array) -> tuple[Array, Array]:
        code, _ = nearest(left, words)
        counted = jnp.concatenate([left, jnp.ones_like(left[:, :1])], axis=-1)
        return left - words[code], cell_sums(counted, code, len(words))

    _, sums = lax.scan(stage, points.reshape(-1, points.shape[-1]), words)
    return sums
