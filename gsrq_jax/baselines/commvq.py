"""CommVQ: additive codes of keys that commute with RoPE, and binary additive codes of values.

After "CommVQ: Commutative Vector Quantization for KV Cache Compression" (ICML 2025, arXiv
2506.18879) and its repository UMass-Embodied-AGI/CommVQ, read and written anew. The full text of
the paper was not at hand; what follows is from its abstract and the repository.

As in the repository, for keys:
    - They are coded before RoPE, divided by the norm of all heads of a token together, which is
      kept in 16 bits. The two channels of a rotary pair are one complex number (HF's layout, as in
      `gsrq_jax.rope`), so a head is d/2 of them.
    - A stage has C = 64 complex vectors ``z`` a head, used twice: code (A, B) stands for
      ``z_A + i·z_B``, 4,096 codewords and 12 bits. In real numbers that is a matrix of 2 × 2 blocks
      ``[[x, y], [-y, x]]`` and hence commutes with the rotation: ``R(p)·decode(z) =
      decode(R(p)·z)``.
    - 21 stages on heads of 128 channels at "2 bit", the nearest number; at "1 bit", for which the
      repository has no script, the nearest is 11. Heads of 64 get 5 and 11, 0.94 and 2.06 bits.
    - Stages are learned one after the other on what is left over, from a soft assignment at
      temperature 1 to C² random points, by EM: softmax of minus the distance (not its square) over
      a temperature that falls geometrically from 1e-3 to 1e-5, ten times lower from stages 1, 5, 9,
      … on; weighted least squares for all z at once; 100 steps, of which the iterate with the least
      hard error of the keys themselves is kept. That error is not monotone while the temperature
      falls (their assertion of it is commented out); at a temperature near 0 it is.
    - Encoding is greedy, stage by stage.
and for values:
    - All heads of a token are one vector, coded jointly in as many bits as it has channels (twice
      as many at "2 bit"), and a scale in 16 bits: the norm over all heads, after division by each
      channel's mean magnitude. Decoding is ``bits @ words``. Bits come in pairs.
With LLaMA-3.1-8B's 8 heads of 128 channels that is 1.03 and 2.00 bits a number, scales included:
"2 bit" is one eighth of FP16, the 87.5 % of the abstract. What belongs to a token and not to a head
is spread evenly over the heads' arrays, so that the cache's bytes are those of the method.

Where this differs:
    - The repository finds a value's bits by an MLP of one hidden layer with a Gumbel softmax over
      each pair (random in inference too), trained together with the words by AdamW for 100,000
      ("1 bit") or up to 1,000,000 steps ("2 bit") of 8,192 tokens a device, on the mean squared
      errors of the values and of the attention's outputs. The samples that all methods get are far
      too few for that: of 8k tokens of SmolLM2-135M such an MLP at 1 bit left over 0.32 to 0.33 of
      the values' energy after 2,000 steps, and what is here less than half of it. Here words are
      learned by alternating least squares and search, from the signs of a random rotation, for the
      squared error of the values; the first guess of the bits is a linear map, and
      `CommVQSpec.sweeps` passes of exact search over one pair of bits after the other improve it.
      The format is theirs. The search sees the very error that an MLP has to guess, so this is
      meant to be no weaker than theirs on values; the attention's outputs it does not see.
    - Their decoder brings ``bits @ words`` back to unit length before it applies the scale; words
      fitted by least squares are of the right length already, and the error is lower without.
    - EM always takes all its steps; theirs stops where the error grows by less than 1e-5. Words
      that no point uses stay where they are (theirs: a count of 1e-8).
    - Theirs learns from up to a million keys of FineWeb-Edu; here all methods get the same samples.
    - In theirs nothing stays exact but up to 128 recent tokens; here sinks and window are those of
      the cache, for all methods.
    - Rates other than 1 and 2 bits are ours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, Key, UInt8

from gsrq_jax import packing, residual
from gsrq_jax.calibration import LayerSamples
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.rope import rotate
from gsrq_jax.spec import CacheSpec

CHUNK = 1024  # keys coded at a time, of each head and layer; each takes C² floats
_TINY = float(jnp.finfo(jnp.float32).tiny)
_dot = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@dataclasses.dataclass(frozen=True)
class CommVQSpec(CacheSpec):
    """A cache of CommVQ's codes.

    Attributes:
        dim: channels of a head.
        heads: KV heads, whose values are coded together.
        stages: residual stages of a key.
        value_bits: bits of a value, for each head's share of it.
        words: complex vectors of a stage of keys, a power of two up to 256.
        sweeps: passes of search in the encoding of values; 0 leaves the linear guess.

    ``block``, ``window`` and ``sinks`` are those of `CacheSpec`.

    Raises:
        InputError: if the numbers do not fit each other.
    """

    dim: int
    heads: int
    stages: int
    value_bits: int
    words: int = 64
    sweeps: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.dim < 2 or self.dim % 2:
            raise InputError(f"rotary keys need an even head size, got {self.dim}")
        at_least(1, heads=self.heads, stages=self.stages, value_bits=self.value_bits)
        at_least(0, sweeps=self.sweeps)
        if self.heads * self.value_bits % 2:
            raise InputError(
                f"bits of values come in pairs; {self.heads} heads of {self.value_bits} bits have "
                "an odd number"
            )
        if not 2 <= self.words <= 256 or self.words & (self.words - 1):
            raise InputError(f"words must be a power of two from 2 to 256, got {self.words}")

    @classmethod
    def from_bits(
        cls, bits: float, head_dim: int, heads: int, *, words: int = 64, **fields: Any
    ) -> Self:
        """About ``bits`` bits a number without scales: the nearest number of stages, as theirs.

        Raises:
            InputError: if that is no stage at all, or no whole number of bits of a value.
        """
        probe = cls(head_dim, heads, stages=1, value_bits=2, words=words, **fields)
        stages, value_bits = bits * head_dim / probe.stage_bits, bits * head_dim
        if not (math.isfinite(bits) and stages >= 0.5 and value_bits % 1 == 0):
            raise InputError(
                f"{bits:g} bits cannot be had on heads of {head_dim} channels: a stage of keys "
                f"costs {probe.stage_bits / head_dim:g} bits and a bit of values "
                f"{1 / head_dim:g}; the authors have 1 and 2"
            )
        # Halves go up; round would send 0.5 to 0.
        return dataclasses.replace(
            probe, stages=math.floor(stages + 0.5), value_bits=int(value_bits)
        )

    @property
    def head_dim(self) -> int:
        """Channels of a key or value vector."""
        return self.dim

    @property
    def code_bits(self) -> int:
        """Bits of the index of a complex vector."""
        return self.words.bit_length() - 1

    @property
    def stage_bits(self) -> int:
        """Bits of a stage of keys: two indices."""
        return 2 * self.code_bits

    @property
    def bits(self) -> float:
        """Nominal bits a number, keys and values together, without scales."""
        return (self.stages * self.stage_bits + self.value_bits) / (2 * self.dim)

    def code_shapes(self) -> tuple["Coded", "Coded"]:
        """Packed codes of a block and this head's share of its tokens' scales, keys and values."""

        def coded(bits: int) -> Coded:
            return Coded(
                codes=jax.ShapeDtypeStruct((-(-self.block * bits // 8),), jnp.uint8),
                scale=jax.ShapeDtypeStruct((-(-self.block // self.heads),), jnp.bfloat16),
            )

        return coded(self.stages * self.stage_bits), coded(self.value_bits)

    def __str__(self) -> str:
        return (
            f"CommVQ {self.bits:g} bit and scales, {self.stages} stages × {self.words} complex "
            f"words for keys, {self.value_bits} bits for values, {self.heads} heads of {self.dim}, "
            f"blocks of {self.block}, window {self.window}, sinks {self.sinks}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, for metadata."""
        return dataclasses.asdict(self)


class Coded(NamedTuple):
    """What the heads keep of a block: packed codes, and each its share of the tokens' scales.

    Arrays ``[*lead, H, bytes]`` uint8 and ``[*lead, H, share]`` bfloat16, or one head's shapes.
    """

    codes: Any
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CommVQ:
    """One layer's codec, or a stack of them with a leading L; see `gsrq_jax.codec.Codec`.

    D is ``heads · dim``, V is ``heads · value_bits``.

    Attributes:
        key: complex vectors of keys, real parts before imaginary ones, ``[L, H, R, C, d]``.
        value: what each bit of a value adds, ``[L, V, D]``.
        value_guess: linear map from a value and 1 to scores of its bits, ``[L, D + 1, V]``.
        value_scale: mean magnitude of each channel of the values, 1 if it is 0, ``[L, D]``.
        inv_freq: rotary frequencies, ``[L, d / 2]``.
        spec: of the cache.
    """

    key: Float[Array, "*L H R C d"]
    value: Float[Array, "*L V D"]
    value_guess: Float[Array, "*L D_and_1 V"]
    value_scale: Float[Array, "*L D"]
    inv_freq: Float[Array, "*L half_d"]
    spec: CommVQSpec = dataclasses.field(metadata={"static": True})

    def encode(
        self,
        k: Float[Array, "*lead b H d"],
        v: Float[Array, "*lead b H d"],
        positions: Int[Array, "*lead b"],
    ) -> tuple[Coded, Coded]:
        """See `gsrq_jax.codec.Codec.encode`.

        Raises:
            InputError: if the heads are not those of the spec, or the tokens not one block.
        """
        spec = self.spec
        if k.shape[-3:] != (spec.block, spec.heads, spec.dim) or v.shape != k.shape:
            raise InputError(
                f"keys {k.shape} and values {v.shape} are no block of {spec.block} tokens and "
                f"{spec.heads} heads of {spec.dim} channels"
            )
        lead = k.shape[:-3]

        bare = rotate(k.astype(jnp.float32), -positions[..., None], self.inv_freq)
        key_scale = _key_scale(bare)
        points = _over(bare, key_scale[..., None]).reshape(-1, spec.heads, spec.dim)
        codes = jax.vmap(_encode_key, (1, 0))(points, self.key)  # [H, n, R, 2]
        codes = jnp.moveaxis(codes.reshape(spec.heads, *lead, -1), 0, -2)
        keys = Coded(packing.pack(codes, spec.code_bits), self._spread(key_scale))

        joint = v.astype(jnp.float32).reshape(*lead, spec.block, -1)
        value_scale = _value_scale(joint, self.value_scale)
        target = _over(joint, value_scale).reshape(-1, joint.shape[-1])
        bits = search(target, _guess(target, self.value_guess), self.value, spec.sweeps)
        bits = bits.astype(jnp.uint8).reshape(*lead, spec.block, spec.heads, spec.value_bits)
        bits = jnp.swapaxes(bits, -2, -3).reshape(*lead, spec.heads, -1)
        return keys, Coded(packing.pack(bits, 1), self._spread(value_scale))

    def decode(
        self, key_codes: Coded, value_codes: Coded, positions: Int[Array, "*lead b"]
    ) -> tuple[Float[Array, "*lead b H d"], Float[Array, "*lead b H d"]]:
        """See `gsrq_jax.codec.Codec.decode`."""
        spec = self.spec
        lead = key_codes.codes.shape[:-2]
        tokens = (*lead, spec.block, spec.heads)

        codes = packing.unpack(key_codes.codes, spec.block * spec.stages * 2, spec.code_bits)
        codes = jnp.moveaxis(codes, -2, 0).reshape(spec.heads, -1, spec.stages, 2)
        points = decode_key(codes, self.key).reshape(spec.heads, *lead, spec.block, spec.dim)
        bare = jnp.moveaxis(points, 0, -2) * self._gather(key_codes.scale)[..., None, None]

        bits = packing.unpack(value_codes.codes, spec.block * spec.value_bits, 1)
        bits = bits.reshape(*lead, spec.heads, spec.block, spec.value_bits)
        bits = jnp.swapaxes(bits, -2, -3).reshape(*lead, spec.block, -1)
        joint = _dot("...v,vd->...d", bits.astype(jnp.float32), self.value)
        joint *= self._gather(value_codes.scale)[..., None]
        keys = rotate(bare, positions[..., None], self.inv_freq)
        return keys, joint.reshape(*tokens, spec.dim)

    def _spread(self, scale: BFloat16[Array, "*lead b"]) -> BFloat16[Array, "*lead H share"]:
        """Scales of a block's tokens, as even shares of the heads."""
        share = -(-self.spec.block // self.spec.heads)
        spare = share * self.spec.heads - self.spec.block
        padded = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, spare)])
        return padded.reshape(*scale.shape[:-1], self.spec.heads, share)

    def _gather(self, scale: BFloat16[Array, "*lead H share"]) -> Float[Array, "*lead b"]:
        """The way back, float32."""
        flat = scale.reshape(*scale.shape[:-2], -1)[..., : self.spec.block]
        return flat.astype(jnp.float32)


# --- keys -----------------------------------------------------------------------------------------


def turn(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """``i·x``, of complex vectors with real parts before imaginary ones: a quarter turn."""
    real, imaginary = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-imaginary, real], axis=-1)


def decode_key(
    codes: UInt8[Array, "H n R 2"], words: Float[Array, "H R C d"]
) -> Float[Array, "H n d"]:
    """``Σ_r z_A + i·z_B`` for codes (A, B) of each stage; commutes with any rotation of pairs."""
    first, second = (residual.decode(codes[..., None, :, i], words[:, None]) for i in (0, 1))
    return first + turn(second)


def _encode_key(x: Float[Array, "n d"], words: Float[Array, "R C d"]) -> UInt8[Array, "n R 2"]:
    """The nearest codeword of each stage in turn, for one head."""

    def of_chunk(x: Array) -> Array:
        def stage(left: Array, words: Array) -> tuple[Array, Array]:
            code, left = _take_nearest(left, words)
            return left, code

        return jnp.moveaxis(lax.scan(stage, x, words)[1], 0, 1)

    return lax.map(of_chunk, _chunks(x, CHUNK)).reshape(-1, len(words), 2)[: len(x)]


def _take_nearest(
    x: Float[Array, "n d"], words: Float[Array, "C d"]
) -> tuple[UInt8[Array, "n 2"], Float[Array, "n d"]]:
    """Codes (A, B) of the nearest codewords, and what is left over."""
    place = jnp.argmin(_squared_distances(x, words).reshape(len(x), -1), axis=-1)
    a, b = jnp.divmod(place, len(words))
    codes = jnp.stack([a, b], axis=-1).astype(jnp.uint8)
    return codes, x - words[a] - turn(words[b])


def _squared_distances(x: Float[Array, "n d"], words: Float[Array, "C d"]) -> Array:
    """``[n, A, B]``, of ``z_A + i·z_B``; its inner products are sums of C + C of them."""
    turned, size = turn(words), jnp.sum(jnp.square(words), axis=-1)
    first = 2 * _dot("nd,cd->nc", x, words) - size
    second = 2 * _dot("nd,cd->nc", x, turned) - size
    both = 2 * _dot("ad,bd->ab", words, turned)
    score = first[:, :, None] + second[:, None, :] - both
    return jnp.maximum(jnp.sum(jnp.square(x), axis=-1)[:, None, None] - score, 0)


class Assigned(NamedTuple):
    """Sums over points, softly assigned to pairs of words.

    ``pairs[A, B]``; the points' sums by first word and by second, ``[C, d]``; and the weighted
    squared error of the nearest codewords.
    """

    pairs: Float[Array, "C C"]
    first: Float[Array, "C d"]
    second: Float[Array, "C d"]
    error: Float[Array, ""]


def _expect(
    x: Float[Array, "m s d"],
    weights: Float[Array, "m s"],
    squared_distances: Callable[[Array], Array],
    temperature: Array | float,
) -> Assigned:
    """E step over chunks of points; those of weight 0 do not count at all."""

    def add(total: Assigned, chunk: tuple[Array, Array]) -> tuple[Assigned, None]:
        x, w = chunk
        squared = squared_distances(x)
        flat = squared.reshape(len(x), -1)
        soft = jax.nn.softmax(-jnp.sqrt(flat) / temperature, axis=-1) * (w > 0)[:, None]
        soft = soft.reshape(squared.shape)
        new = Assigned(
            pairs=soft.sum(0),
            first=_dot("nc,nd->cd", soft.sum(2), x),
            second=_dot("nc,nd->cd", soft.sum(1), x),
            error=jnp.sum(w * flat.min(-1)),
        )
        return jax.tree.map(jnp.add, total, new), None

    words = jax.eval_shape(squared_distances, x[0]).shape[-1]
    sums = jnp.zeros((words, x.shape[-1]))
    zero = Assigned(jnp.zeros((words, words)), sums, sums, jnp.zeros(()))
    return lax.scan(add, zero, (x, weights))[0]


def maximize(assigned: Assigned, words: Float[Array, "C d"]) -> Float[Array, "C d"]:
    """M step: the words of least squared error for these assignments.

    The normal equations of ``Σ n_AB ‖z_A + i·z_B − m_AB‖²`` are Hermitian, ``diag(rows + columns)
    + i (n − nᵀ)``, here in real numbers. A thousandth of a word's mean count holds each word where
    it was: what no point decides does not move, and the error still never grows.
    """
    count = assigned.pairs
    hold = 2e-3 * count.sum() / len(count) + _TINY
    real = jnp.diag(count.sum(0) + count.sum(1) + hold)
    imaginary = count - count.T
    matrix = jnp.block([[real, -imaginary], [imaginary, real]])
    right = assigned.first - turn(assigned.second) + hold * words
    stacked = jnp.concatenate(jnp.split(right, 2, axis=-1), axis=0)
    solved = jnp.linalg.solve(matrix, stacked)
    return jnp.concatenate(jnp.split(solved, 2, axis=0), axis=-1)


def em(
    rng: Key[Array, ""],
    x: Float[Array, "n d"],
    weights: Float[Array, " n"],
    words: int,
    temperatures: Float[Array, " steps"],
    *,
    chunk: int = 8192,
) -> tuple[Float[Array, "C d"], Float[Array, " steps"]]:
    """The words of one head and stage, by EM.

    Args:
        rng: of the C² points to start from.
        x: points.
        weights: of their squared errors in the choice of the best iterate.
        words: C.
        temperatures: of each step's assignment.
        chunk: points handled at a time.

    Returns:
        The best iterate, and each iterate's weighted squared error, hard assigned.
    """
    chunks = _chunks(x, chunk), _chunks(weights, chunk)
    drawn = x[jax.random.randint(rng, (words, words), 0, len(x))]

    def to_drawn(x: Array) -> Array:
        score = 2 * _dot("nd,abd->nab", x, drawn) - jnp.sum(jnp.square(drawn), axis=-1)
        return jnp.maximum(jnp.sum(jnp.square(x), axis=-1)[:, None, None] - score, 0)

    start = maximize(_expect(*chunks, to_drawn, 1.0), jnp.zeros((words, x.shape[-1])))

    def step(
        state: tuple[Array, Array, Array], temperature: Array
    ) -> tuple[tuple[Array, Array, Array], Array]:
        z, best, least = state
        assigned = _expect(*chunks, functools.partial(_squared_distances, words=z), temperature)
        better = ~(assigned.error >= least)  # so that NaN is taken, and seen
        best = jnp.where(better, z, best)
        least = jnp.where(better, assigned.error, least)
        return (maximize(assigned, z), best, least), assigned.error

    (_, best, _), errors = lax.scan(step, (start, start, jnp.array(jnp.inf)), temperatures)
    return best, errors


# --- values ---------------------------------------------------------------------------------------


def search(
    target: Float[Array, "n D"],
    bits: Float[Array, "n V"],
    words: Float[Array, "V D"],
    sweeps: int,
) -> Float[Array, "n V"]:
    """Better bits, 0 or 1, for ``target ≈ bits @ words``: the best of each pair in turn.

    The squared error never grows.
    """
    corners = jnp.array([[0, 0], [1, 0], [0, 1], [1, 1]], jnp.float32)
    pairs = words.reshape(-1, 2, words.shape[-1])
    sums = _dot("kb,pbd->pkd", corners, pairs)
    sizes = jnp.sum(jnp.square(sums), axis=-1)

    def choose(left: Array, pair: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        old, words, sums, sizes = pair
        left = left + _dot("nb,bd->nd", old, words)
        new = corners[jnp.argmin(sizes - 2 * _dot("nd,kd->nk", left, sums), axis=-1)]
        return left - _dot("nb,bd->nd", new, words), new

    def sweep(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        left, bits = state
        return lax.scan(choose, left, (bits, pairs, sums, sizes)), None

    by_pair = jnp.moveaxis(bits.reshape(len(bits), -1, 2), 1, 0)
    left = target - _dot("nv,vd->nd", bits, words)
    (_, by_pair), _ = lax.scan(sweep, (left, by_pair), length=sweeps)
    return jnp.moveaxis(by_pair, 0, 1).reshape(bits.shape)


def _with_one(target: Float[Array, "*n D"]) -> Float[Array, "*n D_and_1"]:
    return jnp.concatenate([target, jnp.ones_like(target[..., :1])], axis=-1)


def _guess(target: Float[Array, "n D"], linear: Float[Array, "D_and_1 V"]) -> Array:
    return (_dot("nd,dv->nv", _with_one(target), linear) > 0).astype(jnp.float32)


def value_words(
    rng: Key[Array, ""],
    target: Float[Array, "n D"],
    weights: Float[Array, " n"],
    bits: int,
    rounds: int,
    *,
    chunk: int = 8192,
) -> tuple[Float[Array, "V D"], Float[Array, "D_and_1 V"], Float[Array, " rounds"]]:
    """What each bit of a value adds, by alternating least squares and search.

    Args:
        rng: of the rotation whose signs are the first bits.
        target: values over their scales.
        weights: of their squared errors.
        bits: V.
        rounds: of least squares and search.
        chunk: values handled at a time.

    Returns:
        The words, the linear first guess of the bits, and the weighted squared error after each
        round's search, with that round's words.
    """
    dim = target.shape[-1]
    mean = _dot("n,nd->d", weights, target) / jnp.maximum(weights.sum(), _TINY)
    turns = jnp.moveaxis(jax.random.orthogonal(rng, dim, (-(-bits // dim),)), 0, 1)
    first = _dot("nd,dv->nv", target - mean, turns.reshape(dim, -1)[:, :bits]) > 0
    targets, weighed = _chunks(target, chunk), _chunks(weights, chunk)

    def searched(words: Array, codes: Array, sweeps: int) -> tuple[Array, tuple[Array, ...]]:
        """Codes after search, and the sums that least squares need of them."""

        def of_chunk(total: Any, chunk: tuple[Array, Array, Array]) -> tuple[Any, Array]:
            x, w, b = chunk
            b = search(x, b, words, sweeps)
            weighed = w[:, None] * b
            left = x - _dot("nv,vd->nd", b, words)
            new = (
                _dot("nv,nu->vu", weighed, b),
                _dot("nv,nd->vd", weighed, x),
                jnp.sum(w * jnp.sum(jnp.square(left), axis=-1)),
            )
            return jax.tree.map(jnp.add, total, new), b

        zero = jnp.zeros((bits, bits)), jnp.zeros((bits, dim)), jnp.zeros(())
        total, codes = lax.scan(of_chunk, zero, (targets, weighed, codes))
        return codes, total

    def one_round(state: Any, _: None) -> tuple[Any, Array]:
        codes, (gram, product, _) = state
        codes, sums = searched(_least_squares(gram, product), codes, 2)
        return (codes, sums), sums[2]

    start = searched(jnp.zeros((bits, dim)), _chunks(first.astype(jnp.float32), chunk), 0)
    (codes, (gram, product, _)), errors = lax.scan(one_round, start, length=rounds)
    codes = codes.reshape(-1, bits)[: len(target)]
    known = _with_one(target)
    guess = _least_squares(
        _dot("nd,n,ne->de", known, weights, known), _dot("nd,n,nv->dv", known, weights, codes - 0.5)
    )
    return _least_squares(gram, product), guess, errors


def _least_squares(gram: Float[Array, "a a"], product: Float[Array, "a b"]) -> Array:
    """With a ridge of a thousandth, for bits that are never or always 1."""
    ridge = 1e-3 * jnp.trace(gram) / len(gram) + _TINY
    return jnp.linalg.solve(gram + ridge * jnp.eye(len(gram)), product)


# --- scales and learning --------------------------------------------------------------------------


def _key_scale(bare: Float[Array, "*n H d"]) -> BFloat16[Array, "*n"]:
    """The norm of all heads of a token."""
    return jnp.sqrt(jnp.sum(jnp.square(bare), axis=(-2, -1))).astype(jnp.bfloat16)


def _value_scale(joint: Float[Array, "*n D"], channels: Float[Array, " D"]) -> Array:
    """The norm of a token's value, each channel over its mean magnitude. BFloat16 ``[*n]``."""
    return jnp.sqrt(jnp.sum(jnp.square(joint / channels), axis=-1)).astype(jnp.bfloat16)


def _over(x: Float[Array, "*n D"], scale: BFloat16[Array, "*n"]) -> Float[Array, "*n D"]:
    """Vectors over their scales; a vector of nothing stays one."""
    return x / jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]


def _chunks(x: Float[Array, "n *d"], size: int) -> Float[Array, "m s *d"]:
    """Chunks of at most ``size``, with zeros at the end."""
    count = -(-len(x) // size)
    each = -(-len(x) // count)
    padding = [(0, count * each - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, each, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How a layer is learned; what concerns keys is the repository's.

    Attributes:
        steps: of EM, each stage of the keys.
        first_temperature, last_temperature: of the first stages' assignments.
        rounds: of least squares and search, for values.
        chunk: keys handled at a time, of each head; of values, which take as many numbers and not
            C² each, sixteen times as many: the search goes from bit to bit, and over chunks.
    """

    steps: int = 100
    first_temperature: float = 1e-3
    last_temperature: float = 1e-5
    rounds: int = 16
    chunk: int = 8192


def fit(
    rng: Key[Array, ""],
    samples: LayerSamples,
    inv_freq: Float[Array, " d/2"],
    spec: CommVQSpec,
    *,
    options: FitOptions = FitOptions(),
) -> CommVQ:
    """One layer's codec.

    Args:
        rng: of the points and the rotation that learning starts from.
        samples: of the layer; its gradient norms are not used.
        inv_freq: the layer's rotary frequencies.
        spec: of the cache.
        options: how to learn.

    Raises:
        InputError: if the samples have other heads than the spec, or too few tokens.
    """
    tokens, heads, dim = samples.k.shape
    if (heads, dim) != (spec.heads, spec.dim) or samples.v.shape != samples.k.shape:
        raise InputError(
            f"the spec is for {spec.heads} heads of {spec.dim} channels, but the samples have "
            f"keys {samples.k.shape} and values {samples.v.shape}"
        )
    if tokens < spec.words:
        raise InputError(f"{spec.words} words need as many tokens, got {tokens}; give more samples")
    key_rng, value_rng = jax.random.split(rng)
    key = _fit_keys(key_rng, samples.k, samples.positions, inv_freq, spec, options)
    key, value_rng = lax.optimization_barrier((key, value_rng))  # one after the other
    value, guess, channels = _fit_values(value_rng, samples.v, spec, options)
    return CommVQ(
        key=key,
        value=value,
        value_guess=guess,
        value_scale=channels,
        inv_freq=jnp.asarray(inv_freq, jnp.float32),
        spec=spec,
    )


# Two programs, the second after the first: in one, on CPU, the linear solvers of both ran side by
# side, and on two cores they came to wait for each other for ever (jax 0.10.2).


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _fit_keys(
    rng: Array, k: Array, positions: Array, inv_freq: Array, spec: CommVQSpec, options: FitOptions
) -> Float[Array, "H R C d"]:
    tokens, heads, dim = k.shape
    bare = rotate(k.astype(jnp.float32), -positions[:, None], inv_freq)
    scale = _key_scale(bare)
    weights = jnp.square(scale.astype(jnp.float32))
    fall = jnp.linspace(0, 1, options.steps)
    ratio = options.last_temperature / options.first_temperature
    temperatures = options.first_temperature * ratio**fall

    def stage(left: Array, of_stage: tuple[Array, Array]) -> tuple[Array, Array]:
        index, rng = of_stage
        one_head = functools.partial(
            em,
            weights=weights,
            words=spec.words,
            temperatures=temperatures / 10.0 ** ((index + 3) // 4),
            chunk=options.chunk,
        )
        words, _ = jax.vmap(one_head)(jax.random.split(rng, heads), left)

        def rest(left: Array, words: Array) -> Array:
            chunks = _chunks(left, options.chunk)
            after = lax.map(lambda x: _take_nearest(x, words)[1], chunks)
            return after.reshape(-1, dim)[:tokens]

        return jax.vmap(rest)(left, words), words

    points = jnp.moveaxis(_over(bare, scale[:, None]), 1, 0)
    stages = jnp.arange(spec.stages), jax.random.split(rng, spec.stages)
    _, words = lax.scan(stage, points, stages)
    return jnp.moveaxis(words, 0, 1)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _fit_values(
    rng: Array, v: Array, spec: CommVQSpec, options: FitOptions
) -> tuple[Float[Array, "V D"], Float[Array, "D_and_1 V"], Float[Array, " D"]]:
    """Words, first guess, and the channels' magnitudes."""
    joint = v.astype(jnp.float32).reshape(len(v), -1)
    channels = jnp.mean(jnp.abs(joint), axis=0)
    channels = jnp.where(channels > 0, channels, 1)
    scale = _value_scale(joint, channels)
    words, guess, _ = value_words(
        rng,
        _over(joint, scale),
        jnp.square(scale.astype(jnp.float32)),
        spec.heads * spec.value_bits,
        options.rounds,
        chunk=16 * options.chunk,
    )
    return words, guess, channels
