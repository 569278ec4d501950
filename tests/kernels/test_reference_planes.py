"""Attention over bit planes in plain jnp against its definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax.kernels import planes, reference
from gsrq_jax.kernels.errors import InputError


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences, T queries, H KV heads (each s share codes), q query heads, N blocks of b."""

    B: int = 2
    T: int = 1
    H: int = 2
    s: int = 1
    q: int = 2
    N: int = 3
    b: int = 64
    d: int = 8
    R: int = 32
    S: int = 64
    blocks: tuple[int, ...] = (3, 1)
    first: int = 0
    stride: int = 1
    every: int = 1
    fills: int = 1
    mean: bool = True
    scale: float = 1.0


CASES = {
    "plain": Case(),
    "no mean key": Case(mean=False),
    "knots, strided": Case(every=16, first=9, stride=3),
    "parts of blocks": Case(every=8, fills=2, blocks=(5, 2)),
    "two heads together": Case(H=4, s=2, T=2, R=96, S=32),
    "three of six heads": Case(H=6, s=3, every=4, blocks=(2, 3)),
    "nothing coded": Case(blocks=(0, 0)),
    "no room": Case(N=0, blocks=(0, 0)),
    "many queries": Case(T=3, q=3, B=1, blocks=(2,)),
    "large scores": Case(scale=6.0, every=16),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case, seed=0):
    """Arguments of attend_planes, the bits they are of, and how it is called."""
    c, rng = case, np.random.default_rng(seed)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    bits = [rng.integers(0, 2, (c.B, c.H // c.s, c.N, c.b, n)).astype(np.uint8) for n in (c.R, c.S)]
    arrays = {
        "query": normal(c.B, c.T, c.H, c.q, c.d) * np.float32(c.scale / np.sqrt(c.R)),
        "mean": normal(c.H, c.d) if c.mean else None,
        "inv_freq": 10.0 ** -np.linspace(0, 3, c.d // 2, dtype=np.float32),
        "key_planes": planes.keys_to_planes(bits[0]),
        "value_planes": planes.values_to_planes(bits[1]),
        "key_codewords": jnp.asarray(normal(c.H, 1, c.R, 2, c.d), jnp.bfloat16),
        "value_codewords": jnp.asarray(normal(c.H, 1, c.S, 2, c.d), jnp.bfloat16),
        "blocks": np.array(c.blocks, np.int32),
    }
    how = {name: getattr(c, name) for name in ("first", "stride", "every", "fills")}
    return arrays, bits, how


def turned(x, angles):
    """Pairs of channels of vectors ``[..., d]`` turned by ``angles [..., d/2]``, in float64."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def decoded(bits, codewords):
    """``[b, d]`` of a block's bits: codeword by codeword."""
    words = np.asarray(codewords, np.float64)[0]
    return sum(words[r, bits[:, r]] for r in range(bits.shape[1]))


def shift(mean, inv_freq, b, every):
    """What the mean key adds in a block's frame: between knots, interpolated."""
    if every > 1:
        mean = np.where(np.tile(inv_freq * every <= np.pi, 2), mean, 0)
    out = []
    for token in range(b):
        knot = token // every * every
        before, after = (turned(mean, inv_freq * k) for k in (knot, knot + every))
        out.append(before + (after - before) * ((token - knot) / every))
    return np.stack(out)


def expected(case, arrays, bits):
    """Output and log-sum-exp, query by query, in float64."""
    c = case
    inv_freq = np.float64(arrays["inv_freq"])
    out = np.zeros(arrays["query"].shape)
    lse = np.full(out.shape[:-1], -np.inf)
    for i, h in np.ndindex(c.B, c.H):
        keys, values = [], []
        for n in range(c.N):
            own = bits[0][i, h // c.s, n], bits[1][i, h // c.s, n]
            key = decoded(own[0], arrays["key_codewords"][h])
            if c.mean:
                key = key + shift(np.float64(arrays["mean"][h]), inv_freq, c.b, c.every)
            keys.append(turned(key, inv_freq * (c.first + c.stride * c.b * n)))
            values.append(decoded(own[1], arrays["value_codewords"][h]))
        held = c.blocks[i] * (c.b // c.fills)
        if not held:
            continue
        keys, values = (np.concatenate(x)[:held] for x in (keys, values))
        for t, j in np.ndindex(c.T, c.q):
            scores = keys @ np.float64(arrays["query"][i, t, h, j])
            top = scores.max()
            weights = np.exp(scores - top)
            out[i, t, h, j] = weights @ values / weights.sum()
            lse[i, t, h, j] = top + np.log(weights.sum())
    return out, lse


def attend(arrays, how):
    return jax.jit(functools.partial(reference.attend_planes, **how))(**arrays)


def check(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=2e-5)


@cases
def test_planes_are_softmax_attention(case):
    arrays, bits, how = make(case)
    check(attend(arrays, how), expected(case, arrays, bits))


def test_a_few_blocks_at_a_time(monkeypatch):
    arrays, bits, how = make(CASES["knots, strided"])
    want = expected(CASES["knots, strided"], arrays, bits)
    for tokens in (64, 128):  # one block, two of three
        monkeypatch.setattr(reference, "STEP", tokens)
        check(jax.jit(lambda x: reference.attend_planes(**x, **how))(arrays), want)


@pytest.mark.parametrize("name", ["plain", "parts of blocks", "two heads together"])
def test_what_is_not_valid_is_not_read(name):
    case = CASES[name]
    arrays, bits, how = make(case)
    want = expected(case, arrays, bits)
    for bad in (0, 0xFFFFFFFF):
        for side in ("key_planes", "value_planes"):
            codes = np.array(arrays[side])
            for i, n in enumerate(case.blocks):
                tiles = n * (case.b // case.fills) // planes.TILE
                codes[i].reshape(codes.shape[1], -1, codes.shape[-1])[:, tiles:] = bad
            arrays[side] = codes
        check(attend(arrays, how), want)


def test_bits_are_never_all_in_float32():
    case = Case(B=1, H=1, N=64, b=256, R=64, S=64, blocks=(64,))
    arrays, _, how = make(case)
    compiled = jax.jit(functools.partial(reference.attend_planes, **how)).lower(**arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < case.N * case.b * case.R * 4


def test_what_does_not_fit_is_refused():
    arrays, _, how = make(Case(H=3))
    two = arrays | {"key_planes": arrays["key_planes"][:, :2]}
    with pytest.raises(InputError, match="3 KV heads cannot share the codes of 2 keys"):
        reference.attend_planes(**two, **how)
    other = arrays | {"value_codewords": arrays["value_codewords"][:, :, :32]}
    with pytest.raises(InputError, match="values have codes of 64 stages and codewords of 32"):
        reference.attend_planes(**other, **how)
