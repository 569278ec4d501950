"""The reference kernels against float64 softmax attention in numpy."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gsrq_jax.kernels import planes, reference, rotary


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b; codes of K and V."""

    B: int
    T: int
    H: int
    q: int
    N: int
    b: int
    G: int
    R: int
    K: int
    value: tuple[int, int, int]  # G, R, K
    d: int = 12
    blocks: tuple[int, ...] = ()


SHAPES = {
    "one of all": Shape(1, 1, 1, 1, 1, 1, 1, 1, 2, (1, 1, 2), blocks=(1,)),
    "groups, ragged": Shape(3, 1, 2, 3, 4, 5, 3, 2, 16, (2, 3, 8), blocks=(4, 0, 1)),
    "bytes, ragged": Shape(2, 1, 1, 4, 3, 7, 1, 3, 256, (1, 2, 256), blocks=(2, 3)),
    "several queries": Shape(2, 3, 3, 2, 2, 3, 2, 1, 4, (4, 2, 16), blocks=(1, 2)),
    "nothing coded": Shape(2, 1, 2, 2, 3, 4, 1, 2, 16, (1, 2, 16), blocks=(0, 0)),
    "no room": Shape(2, 1, 2, 2, 0, 4, 1, 2, 16, (1, 2, 16), blocks=(0, 0)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
attend_codes, attend_decoded, attend_exact, merge = (
    jax.jit(f)
    for f in (
        reference.attend_codes,
        reference.attend_decoded,
        reference.attend_exact,
        reference.merge,
    )
)


def make(shape: Shape, seed: int = 0, scale: float = 1.0):
    """Arguments of attend_codes, float32 and uint8."""
    s, rng = shape, np.random.default_rng(seed)
    vG, vR, vK = s.value

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    return {
        "query": scale * normal(s.B, s.T, s.H, s.q, s.N, s.d),
        "shift": normal(s.H, s.N, s.b, s.d),
        "key_codes": rng.integers(0, s.K, (s.B, s.H, s.N, s.b, s.G, s.R)).astype(np.uint8),
        "value_codes": rng.integers(0, vK, (s.B, s.H, s.N, s.b, vG, vR)).astype(np.uint8),
        "key_codewords": normal(s.H, s.G, s.R, s.K, s.d // s.G),
        "value_codewords": normal(s.H, vG, vR, vK, s.d // vG),
        "blocks": np.array(s.blocks, np.int32),
    }


def decode(codes, codewords):
    """float64 ``[B, H, N, b, d]``: vector by vector, group by group, stage by stage."""
    B, H, N, b, G, R = codes.shape
    g = codewords.shape[-1]
    out = np.zeros((B, H, N, b, G * g))
    for at in np.ndindex(B, H, N, b):
        for i in range(G):
            for r in range(R):
                word = np.float64(codewords[at[1], i, r, codes[(*at, i, r)]])
                out[at][i * g : (i + 1) * g] += word
    return out


def softmax_attention(scores, values):
    """One query in float64: scores ``[n]``, values ``[n, d]`` to the output and log-sum-exp."""
    if not len(scores):
        return np.zeros(values.shape[-1]), -np.inf
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum())


def expected(query, keys, values, blocks, skip=None):
    """Attention of each query by itself over the valid blocks; keys ``[B, H, N, b, d]``."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    B, T, H, q = query.shape[:4]
    out, lse = np.zeros((B, T, H, q, values.shape[-1])), np.zeros((B, T, H, q))
    for b, t, h, j in np.ndindex(B, T, H, q):
        n = blocks[b]
        scores = np.einsum("nd,nbd->nb", query[b, t, h, j, :n], keys[b, h, :n]).reshape(-1)
        flat = values[b, h, :n].reshape(-1, values.shape[-1])
        kept = slice(None) if skip is None else ~skip[b, h, :n].reshape(-1)
        out[b, t, h, j], lse[b, t, h, j] = softmax_attention(scores[kept], flat[kept])
    return out, lse


def written_out(x):
    keys = decode(x["key_codes"], x["key_codewords"]) + np.float64(x["shift"])
    return keys, decode(x["value_codes"], x["value_codewords"])


def check(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, **({"atol": 2e-5, "rtol": 2e-5} | tolerance))


@shapes
def test_both_forms_are_softmax_attention(shape):
    x = make(shape)
    keys, values = written_out(x)
    want = expected(x["query"], keys, values, x["blocks"])
    check(attend_codes(**x), want)
    decoded = attend_decoded(
        x["query"], np.float32(keys), np.float32(values), jnp.asarray(x["blocks"])
    )
    check(decoded, want)
    for row, n in enumerate(shape.blocks):
        if not n:
            for out, lse in (attend_codes(**x), decoded):
                assert not np.asarray(out[row]).any()
                assert np.isneginf(lse[row]).all()


@shapes
def test_codes_beyond_the_valid_blocks_are_never_read(shape):
    """All bits set there, which is no codeword at all for most codes; infinite queries and NaN."""
    x = make(shape)
    y = {name: a.copy() for name, a in x.items()}
    for row, n in enumerate(shape.blocks):
        for name in ("key_codes", "value_codes"):
            y[name][row, :, n:] = 255
        y["query"][row, :, :, :, n:] = np.nan
    check(attend_codes(**y), attend_codes(**x), atol=1e-6)


BIG = Shape(2, 2, 2, 3, 3, 6, 2, 2, 16, (3, 2, 16), blocks=(3, 2))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 8.0, 30.0])
def test_from_flat_scores_to_large_ones(scale):
    x = make(BIG, seed=1, scale=scale)
    keys, values = written_out(x)
    out, lse = expected(x["query"], keys, values, x["blocks"])
    if scale == 30:
        assert lse.max() > 150  # exp of which is no float32
    tolerance = {"atol": 1e-5 * max(1, scale), "rtol": 2e-5}
    check(attend_codes(**x), (out, lse), **tolerance)
    blocks = jnp.asarray(x["blocks"])
    check(
        attend_decoded(x["query"], np.float32(keys), np.float32(values), blocks),
        (out, lse),
        **tolerance,
    )
    if scale == 0:
        tokens = x["blocks"] * BIG.b
        np.testing.assert_allclose(lse, np.broadcast_to(np.log(tokens), lse.T.shape).T)


@pytest.mark.parametrize("score", [60.0, -60.0])
def test_one_token_with_all_the_mass(score):
    """Every token scores ``score`` but one, which scores 60 more; then its value is the output."""
    x = make(BIG, seed=2)
    B, N, b = BIG.B, BIG.N, BIG.b
    x["query"][:] = 0
    x["query"][..., 0] = 1
    x["shift"][:] = 0
    x["key_codewords"][:] = 0  # the first channel: codeword 0 of stage 0 is `score`, 1 is +60
    x["key_codewords"][:, 0, 0, 0, 0] = score
    x["key_codewords"][:, 0, 0, 1, 0] = score + 60
    x["key_codes"][..., 0, 0] = 0
    x["key_codes"][:, :, 1, 4, 0, 0] = 1
    keys, values = written_out(x)
    assert values.shape == (B, BIG.H, N, b, BIG.d)
    for out, lse in (
        attend_codes(**x),
        attend_decoded(x["query"], np.float32(keys), np.float32(values), x["blocks"]),
    ):
        want = np.broadcast_to(values[:, None, :, None, 1, 4], out.shape)
        np.testing.assert_allclose(out, want, atol=1e-5)
        np.testing.assert_allclose(lse, score + 60, atol=1e-5)


def test_mass_of_equal_codes_adds_up():
    """All tokens with one value code: the value whatever the scores, over all blocks."""
    x = make(BIG, seed=3, scale=3.0)
    x["value_codes"][:] = 5
    out, _ = attend_codes(**x)
    want = decode(x["value_codes"][:, :, :1, :1], x["value_codewords"])[:, :, 0, 0]
    np.testing.assert_allclose(out, np.broadcast_to(want[:, None, :, None], out.shape), atol=1e-5)


# --- exact keys, and merging ----------------------------------------------------------------------


def exact_inputs(seed, B=2, T=3, H=2, q=3, n=11, d=6, scale=1.0):
    rng = np.random.default_rng(seed)
    query = scale * rng.normal(size=(B, T, H, q, d)).astype(np.float32)
    keys, values = rng.normal(size=(2, B, H, n, d)).astype(np.float32)
    return query, keys, values, rng.random((B, T, n)) < 0.5


def expected_exact(query, keys, values, mask):
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out, lse = np.zeros(query.shape), np.zeros(query.shape[:-1])
    for b, t, h, j in np.ndindex(lse.shape):
        seen = mask[b, t]
        scores = keys[b, h, seen] @ query[b, t, h, j]
        out[b, t, h, j], lse[b, t, h, j] = softmax_attention(scores, values[b, h, seen])
    return out, lse


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attend_exact(scale):
    query, keys, values, mask = exact_inputs(4, scale=scale)
    mask[0, 1] = False  # a query that sees nothing
    mask[1, 2] = np.arange(11) == 7  # and one that sees one token
    want = expected_exact(query, keys, values, mask)
    got = attend_exact(query, keys, values, mask)
    check(got, want, atol=1e-5 * scale)
    assert not np.asarray(got[0][0, 1]).any()
    assert np.isneginf(got[1][0, 1]).all()
    np.testing.assert_allclose(got[0][1, 2, :, 1], values[1, :, 7], atol=1e-6)


def test_keys_and_values_that_nobody_sees_may_be_anything():
    query, keys, values, mask = exact_inputs(5)
    mask[:, :, [2, 6]] = False  # nobody sees them in any sequence
    mask[1, :, 9] = False  # nobody in the second
    mask[:, 0, 3], mask[:, 1, 3] = True, False  # some do
    want = expected_exact(query, keys, values, mask)
    for bad in (np.nan, np.inf):
        k, v = keys.copy(), values.copy()
        for x in (k, v):
            x[:, :, [2, 6]] = bad
            x[1, :, 9] = bad
        check(attend_exact(query, k, v, mask), want)


def test_keys_of_another_dtype_count_as_they_are():
    query, keys, values, mask = exact_inputs(6)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in (keys, values))
    out, lse = attend_exact(query, k, v, mask)
    assert out.dtype == lse.dtype == jnp.float32
    check((out, lse), expected_exact(query, np.float32(k), np.float32(v), mask))


def test_sets_are_attended_to_together():
    query, keys, values, mask = exact_inputs(8, scale=3.0)
    parts = np.s_[:0], np.s_[:4], np.s_[4:]
    sets = [(keys[:, :, at], values[:, :, at], mask[..., at]) for at in parts]
    got = jax.jit(reference.attend_sets)(query, sets)
    check(got, expected_exact(query, keys, values, mask), atol=3e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_merged_parts_are_attention_over_the_union(scale):
    query, keys, values, mask = exact_inputs(7, n=13, scale=scale)
    mask |= np.arange(13) == 12
    which = np.array([0, 2, 2, 0, 0, 2, 3, 0, 3, 2, 0, 2, 3])  # part 1 is empty
    parts = [attend_exact(query, keys, values, mask & (which == i)) for i in range(4)]
    assert np.isneginf(parts[1][1]).all()
    want = expected_exact(query, keys, values, mask)
    check(merge(parts), want, atol=1e-5 * scale)
    check(merge(parts[::-1]), want, atol=1e-5 * scale)
    # Merging is associative, and one part alone is itself.
    check(merge([merge(parts[:3]), parts[3]]), want, atol=1e-5 * scale)
    for a, b in zip(merge([parts[3]]), parts[3], strict=True):
        some = np.isfinite(parts[3][1])
        np.testing.assert_allclose(np.asarray(a)[some], np.asarray(b)[some], rtol=1e-6)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_tokens_to_skip(share):
    x = make(SHAPES["groups, ragged"], seed=11)
    skip = np.random.default_rng(12).random(x["key_codes"].shape[:4]) < share
    want = expected(x["query"], *written_out(x), x["blocks"], skip)
    got = attend_codes(**x, skip=skip)
    check(got, want)
    assert share < 1 or not np.isfinite(got[1]).any()


def test_coded_and_exact_parts_merge():
    x = make(SHAPES["groups, ragged"], seed=9)
    rng = np.random.default_rng(10)
    keys, values = written_out(x)
    B, H, N, b, d = keys.shape
    query = x["query"] = np.repeat(x["query"][..., :1, :], N, axis=-2)  # one frame for all blocks
    new_k, new_v = rng.normal(size=(2, B, H, 2, d)).astype(np.float32)
    mask = np.ones((B, 1, 2), bool)
    got = merge([attend_codes(**x), attend_exact(query[..., 0, :], new_k, new_v, mask)])
    old = (np.arange(N * b) < (x["blocks"] * b)[:, None])[:, None]

    def join(old, new):
        return np.concatenate([old.reshape(B, H, N * b, d), new], axis=2)

    want = expected_exact(
        query[..., 0, :], join(keys, new_k), join(values, new_v), np.concatenate([old, mask], -1)
    )
    check(got, want)


def test_a_shift_of_all_blocks_is_given_once():
    x = {name: jnp.asarray(a) for name, a in make(SHAPES["groups, ragged"]).items()}
    once = x["shift"][:, :1]
    repeated = jnp.broadcast_to(once, x["shift"].shape)
    got, want = (attend_codes(**(x | {"shift": s})) for s in (once, repeated))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# --- bit planes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys_share", "values_share", "fills", "every"), [(2, 4, 3, 16), (4, 1, 2, 8)]
)
def test_planes_are_attended_to_as_what_they_stand_for(
    keys_share, values_share, fills, every, monkeypatch
):
    """All blocks at once, and some at a time; what is not valid may be any bits."""
    B, T, H, q, N, b, d, R, S = 3, 2, 4, 3, 7, 96, 8, 64, 32
    rng = np.random.default_rng(20)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    query, mean = normal(B, T, H, q, d), normal(H, d)
    inv_freq = jnp.asarray(100.0 ** -(np.arange(0, d, 2) / d), jnp.float32)
    words = normal(H, 1, R, 2, d) / 8, normal(H, 1, S, 2, d) / 8
    keys = jnp.asarray(rng.integers(0, 2, (B, H // keys_share, N, b, R)), jnp.uint8)
    values = jnp.asarray(rng.integers(0, 2, (B, H // values_share, N, b, S)), jnp.uint8)
    blocks = jnp.asarray([N * fills, 0, 2 * fills + fills // 2])
    first, stride = 5, 2

    def written(codes, words):
        codes = jnp.repeat(codes, H // codes.shape[1], axis=1)[..., None, :]
        return jnp.asarray(decode(np.asarray(codes), np.asarray(words)), jnp.float32)

    held = np.arange(N * b).reshape(N, b) < np.asarray(blocks * (b // fills))[:, None, None]
    start = first + stride * b * jnp.arange(N)
    framed = rotary.rotate(query[..., None, :], -start, inv_freq)
    shift = rotary.shift(mean[:, None], jnp.arange(b), inv_freq, every)
    shown = written(keys, words[0]) + shift[:, None], written(values, words[1])
    want = expected(framed, *shown, np.full(B, N), np.broadcast_to(~held[:, None], (B, H, N, b)))

    def attended(keys, values):
        planed = planes.keys_to_planes(keys), planes.values_to_planes(values)
        how = {"first": first, "stride": stride, "every": every, "fills": fills}
        arguments = (query, mean, inv_freq, *planed, *words, blocks)
        return jax.jit(lambda *x: reference.attend_planes(*x, **how))(*arguments)

    poisoned = (jnp.where(held[:, None, ..., None], x, 1) for x in (keys, values))
    check(attended(keys, values), want)
    check(attended(*poisoned), want)
    monkeypatch.setattr(reference, "STEP", 4 * b)
    check(attended(keys, values), want)


# --- annotations ----------------------------------------------------------------------------------


def fits(function, arguments, result):
    """Whether arrays fit the jaxtyping annotations of a function, all axes by one meaning."""
    hints = typing.get_type_hints(function, include_extras=True)
    returned = typing.get_args(hints.pop("return"))
    with jaxtyping.jaxtyped("context"):
        return all(isinstance(arguments.get(name), hint) for name, hint in hints.items()) and all(
            isinstance(array, hint) for array, hint in zip(result, returned, strict=True)
        )


def test_annotations_hold_for_what_goes_in_and_comes_out():
    x = {name: jnp.asarray(a) for name, a in make(SHAPES["groups, ragged"]).items()}
    # Keys and values share the names of their axes, so here their codes have one shape.
    x["value_codes"], x["value_codewords"] = x["key_codes"], x["key_codewords"]
    out = attend_codes(**x)
    assert fits(reference.attend_codes, x, out)
    assert not fits(reference.attend_codes, x | {"shift": x["shift"][:, :, :-1]}, out)
    assert not fits(reference.attend_codes, x, out[::-1])
    keys, values = (jnp.asarray(a, jnp.float32) for a in written_out(x))
    y = {"query": x["query"], "keys": keys, "values": values, "blocks": x["blocks"]}
    assert fits(reference.attend_decoded, y, attend_decoded(**y))
    z = dict(zip(("query", "keys", "values", "mask"), exact_inputs(8), strict=True))
    z = {name: jnp.asarray(a) for name, a in z.items()}
    assert fits(reference.attend_exact, z, attend_exact(**z))
