"""The decode loop against recomputing everything, its compilation, stopping and sampling."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, SPEC, codebooks, model, read_through_cache

from gsrq_jax import calibration, codebook, codec
from gsrq_jax.attention import causal
from gsrq_jax.cache import append, init_cache, layer_views, materialize
from gsrq_jax.errors import InputError
from gsrq_jax.models import evaluation, generation, llama, sharding
from gsrq_jax.models.generation import Generator, Sampler
from gsrq_jax.spec import QuantSpec, ResidualSpec

LENGTH, NEW = 64, 30
LONG = {"max_new_tokens": 12, "max_length": 320}
PROMPTS = [
    np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist() for n in (5, 34, 1, 19)
]
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(1.0)}
TOGETHER = QuantSpec.from_bits(
    1, CONFIG.head_dim, codewords=16, heads=2, block=8, window=8, sinks=2
)
CACHES = {"exact": None, "coded": codebooks(), "together": codebooks(TOGETHER)}
caches = pytest.mark.parametrize("cache", ["exact", "coded"])
materialize_layers = jax.jit(jax.vmap(materialize))
append = jax.jit(append)


@functools.cache
def generator(cache="exact", sampler="greedy", eos=()):
    """One compiled generator for all tests that can share it."""
    return Generator(*model(), CACHES[cache], sampler=SAMPLERS[sampler], eos=eos, dtype=jnp.float32)


def generate(generator, prompts=PROMPTS, **options):
    """The last state."""
    options = {"max_new_tokens": NEW, "max_length": LENGTH} | options
    *_, state = generator(prompts, **options)
    return state


@functools.cache
def whole(cache):
    """Tokens ``[B, NEW]`` that the greedy loop wrote after PROMPTS, and the cache it left."""
    state = generate(generator(cache))
    assert state.count.tolist() == [NEW] * len(PROMPTS)
    return np.asarray(state.tokens), state.cache


def padded(rows, fill=0):
    tokens = np.full((len(rows), LENGTH), fill, np.int32)
    for to, row in zip(tokens, rows, strict=True):
        to[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def same_cache(got, want, books, atol=1e-5):
    """Equal tokens in equal places, and equal codes, wherever a cache may be read."""
    np.testing.assert_array_equal(got.length, want.length)
    for a, b in zip(materialize_layers(got, books), materialize_layers(want, books), strict=True):
        there = np.asarray(materialize_layers(want, books)[2])
        if a.dtype == bool:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(np.asarray(a)[there], np.asarray(b)[there], atol=atol)


# --- the loop against recomputation ---------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, kv = llama.apply(
        graphdef, params, tokens, position, lambda q, k, v, _: (causal(q, k, v), (k, v))
    )
    return llama.logits(graphdef, params, hidden), kv


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_exact_loop_is_greedy_continuation_of_the_recomputed_prefix(row):
    tokens = list(PROMPTS[row])
    for _ in range(NEW):
        logits, _ = forward(*model(), padded([tokens])[0])
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    want = tokens[len(PROMPTS[row]) :]
    assert len(set(want)) > 5  # no loop of one token, that would show little
    assert whole("exact")[0][row].tolist() == want


@pytest.mark.parametrize("cache", ["coded", "together"])
def test_coded_loop_is_what_the_cache_says_at_every_step(cache):
    """Prompts read exactly, then every token through sinks, codes and window as they then were."""
    books, (new, _) = CACHES[cache], whole(cache)
    tokens, _ = padded([[*p, *row] for p, row in zip(PROMPTS, new.tolist(), strict=True)])
    prompt = np.array([len(p) for p in PROMPTS])
    at = np.arange(LENGTH)
    held = np.where(at < prompt[:, None], 0, at)
    logits, _ = read_through_cache(model()[1], tokens, held, books)
    for row, n in enumerate(prompt):
        np.testing.assert_array_equal(
            np.argmax(logits[row, n - 1 : n + NEW - 1], axis=-1), new[row]
        )
    coded = (prompt + NEW - 1 - SPEC.sinks - SPEC.window) // SPEC.block
    assert coded.min() >= 2
    assert coded.max() >= 5
    assert (new != whole("exact")[0]).mean() > 0.3  # the codes do matter here


@pytest.mark.parametrize("cache", ["coded", "together", "exact"])
def test_unrolled_layers_write_the_same_tokens(cache):
    stacked = generator(cache)
    apart = dataclasses.replace(stacked, params=llama.unrolled(stacked.graphdef, stacked.params))
    assert len(apart.params.others) == CONFIG.layers - 1
    np.testing.assert_array_equal(generate(apart).tokens, whole(cache)[0])


@pytest.mark.filterwarnings("ignore:the fused GPU kernel")
@pytest.mark.parametrize(("layout", "block"), [("tiles", 256), ("planes", 64)])
def test_layouts_of_kernels_write_the_same_text(layout, block):
    """By the kernel's reference: the same tokens, and as likely."""
    code = SPEC.key
    if layout == "planes":
        code = ResidualSpec(CONFIG.head_dim, CONFIG.head_dim, 32, 2, heads=2)
    packed = codebooks(
        dataclasses.replace(SPEC, key=code, value=code, block=block, frame_blocks=2, mean_every=16)
    )
    prompts = [
        np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist() for n in (140, 275)
    ]
    states = []
    layouts = ("packed", layout)
    for name in layouts:
        books = codec.respec(packed, layout=name)
        states.append(generate(dataclasses.replace(generator(), codec=books), prompts, **LONG))
    np.testing.assert_array_equal(states[0].tokens, states[1].tokens)
    logits = []
    for name, state in zip(layouts, states, strict=True):
        books = codec.respec(packed, layout=name)
        step = jax.jit(functools.partial(generation.extend, model()[0]))
        one = jnp.ones(2, jnp.int32)
        logits.append(step(model()[1], state.token[:, None], one, state.cache, books)[0])
    np.testing.assert_allclose(*logits, atol=1e-4, rtol=1e-4)


@caches
def test_ragged_batch_is_each_prompt_alone(cache):
    alone = generator(cache)
    for row, prompt in enumerate(PROMPTS):
        state = generate(alone, [prompt])
        np.testing.assert_array_equal(state.tokens[0], whole(cache)[0][row])


@pytest.fixture(scope="module")
def forced():
    """Random tokens, their logits by `extend` one at a time after a prompt of one token."""
    rng = np.random.default_rng(4)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (2, 50)), jnp.int32)
    books = CACHES["coded"]

    @jax.jit
    def loop(params, tokens):
        graphdef, one = model()[0], jnp.ones(2, jnp.int32)
        first, cache = generation.prefill(
            graphdef, params, tokens[:, :1], one, books, max_length=LENGTH, dtype=jnp.float32
        )

        def step(cache, token):
            logits, cache = generation.extend(graphdef, params, token[:, None], one, cache, books)
            return cache, logits

        cache, rest = jax.lax.scan(step, cache, tokens[:, 1:].T)
        return jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, 1), cache

    return tokens, *loop(model()[1], tokens)


def test_teacher_forced_pass_and_loop_agree(forced):
    """`compare` with every=block sees at each position what the loop saw there."""
    tokens, logits, _ = forced
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    want, _ = read_through_cache(model()[1], tokens, at, CACHES["coded"])
    np.testing.assert_allclose(logits, want, atol=1e-4)

    sums = evaluation.compare(*model(), tokens, CACHES["coded"], every=SPEC.block)
    logp = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    nll = -np.take_along_axis(logp, np.asarray(tokens)[:, 1:, None], axis=-1).sum()
    np.testing.assert_allclose(sums["nll"], nll, rtol=1e-5)
    assert sums["kl"] / logp[..., 0].size > 0.05  # far from what full precision predicts


# --- prefill and extend ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="max_length")
def prefill(params, tokens, count, books, max_length=LENGTH):
    return generation.prefill(
        model()[0], params, tokens, count, books, max_length=max_length, dtype=jnp.float32
    )


@jax.jit
def extend(params, tokens, count, cache, books):
    return generation.extend(model()[0], params, tokens, count, cache, books)


@caches
def test_prefill_is_the_exact_forward_and_an_append_in_each_layer(cache):
    books, (tokens, count) = CACHES[cache], padded(PROMPTS)
    logits, got = prefill(model()[1], tokens, count, books)
    all_logits, (k, v) = forward(*model(), tokens)
    want_logits = np.asarray(all_logits)[np.arange(len(PROMPTS)), np.asarray(count) - 1]
    np.testing.assert_allclose(logits, want_logits, atol=1e-5)
    empty = init_cache(
        books and books.spec,
        batch=len(PROMPTS),
        kv_heads=CONFIG.kv_heads,
        head_dim=CONFIG.head_dim,
        max_length=LENGTH,
        layers=CONFIG.layers,
        dtype=jnp.float32,
    )
    want = append(empty, k, v, books, count)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert books is None or np.asarray(got.key_codes).any()


@caches
def test_padding_never_matters(cache):
    books = CACHES[cache]
    rng = np.random.default_rng(3)
    tokens, count = padded(PROMPTS)
    noise = rng.integers(0, CONFIG.vocab_size, tokens.shape)
    other = jnp.where(jnp.arange(LENGTH) < count[:, None], tokens, noise).astype(jnp.int32)
    assert (other != tokens).any()
    for a, b in zip(
        jax.tree.leaves(prefill(model()[1], tokens, count, books)),
        jax.tree.leaves(prefill(model()[1], other, count, books)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@caches
def test_a_prompt_in_chunks(cache):
    """Ragged chunks of 16: at full precision prefill in one go; coded, as the cache then was."""
    books, chunk, params = CACHES[cache], 16, model()[1]
    rng = np.random.default_rng(5)
    lengths = np.array([48, 37, 9, 16])
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
    tokens, _ = padded(prompts)
    held = np.zeros((len(prompts), LENGTH), np.int32)
    _, state = prefill(params, tokens, jnp.minimum(lengths, chunk), books)
    for start in range(chunk, 48, chunk):
        count = np.clip(lengths - start, 0, chunk)
        held[:, start : start + chunk] = start
        logits, state = extend(params, tokens[:, start : start + chunk], count, state, books)
        want, (k, v) = read_through_cache(params, tokens, held, books)
        for row in np.flatnonzero(count):
            at = start + count[row] - 1
            np.testing.assert_allclose(logits[row], want[row, at], atol=1e-4)
    np.testing.assert_array_equal(state.length, np.broadcast_to(lengths, (CONFIG.layers, 4)))

    # The same exact and coded tokens as if the keys and values had come in one go …
    empty = jax.tree.map(jnp.zeros_like, state)
    same_cache(state, append(empty, k, v, books, jnp.asarray(lengths)), books)
    one_logits, one = prefill(params, tokens, jnp.asarray(lengths), books)
    first = functools.partial(jax.tree.map, lambda x: x[:1])
    same_cache(first(state), first(one), first(books))  # … as they do in the first layer …
    if books is None:  # … and at full precision in every layer.
        same_cache(state, one, books)
        np.testing.assert_allclose(logits[0], one_logits[0], atol=1e-5)

    # Then decode on.
    token = jnp.full((len(prompts), 1), 7, jnp.int32)
    logits, _ = extend(params, token, jnp.ones(4, jnp.int32), state, books)
    row = np.arange(len(prompts))
    held[row, lengths] = lengths
    want, _ = read_through_cache(params, tokens.at[row, lengths].set(7), held, books)
    np.testing.assert_allclose(logits, np.asarray(want)[row, lengths], atol=1e-4)


# --- one program, one buffer ----------------------------------------------------------------------


@pytest.fixture
def traces(monkeypatch):
    """A list that grows whenever the decode step is traced."""
    seen, inner = [], generation.extend

    def counted(*args):
        seen.append(1)
        return inner(*args)

    monkeypatch.setattr(generation, "extend", counted)
    return seen


def test_one_compilation_for_all_lengths_and_steps(traces):
    fresh = Generator(*model(), CACHES["coded"], dtype=jnp.float32)
    lengths, before = [], None
    for prompt, stride in (([1], 1), (list(range(30)), None), (list(range(9)), 7)):
        for state in fresh([prompt], max_new_tokens=NEW, max_length=LENGTH, stride=stride):
            lengths.append(int(state.cache.length[0, 0]))
            if len(lengths) == 2:  # the first call of the loop is over
                before = len(traces)
    assert set(range(1, 31)) < set(lengths)
    assert max(lengths) == 59
    assert before > 0
    assert len(traces) == before
    assert fresh._decode._cache_size() == 1
    assert fresh._prefill._cache_size() == 1
    # The counter does count: another batch is another program.
    generate(fresh, [[1], [2]])
    assert len(traces) > before
    assert fresh._decode._cache_size() == 2


@caches
def test_the_cache_is_donated_and_reused(cache):
    running = generator(cache)
    states = running(PROMPTS, max_new_tokens=NEW, max_length=LENGTH, stride=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        first = next(states)
        second = next(states)
    for old in jax.tree.leaves(first.cache):
        assert old.is_deleted() or not old.size
    assert not second.cache.window_key.is_deleted()
    compiled = running._decode.lower(running.params, running.codec, second, jnp.int32(4)).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this version of jax does not analyse memory on this backend")
    assert memory.alias_size_in_bytes >= second.cache.nbytes


# --- stopping -------------------------------------------------------------------------------------


@caches
def test_end_tokens_end_a_sequence_and_it_grows_no_more(cache):
    new, _ = whole(cache)
    eos = (int(new[0, 6]), int(new[1, 11]))
    ends = np.isin(new, eos)
    want = np.where(ends.any(1), ends.argmax(1) + 1, NEW)
    assert len(set(want.tolist())) >= 3
    assert want.min() < NEW // 2
    prompt = np.array([len(p) for p in PROMPTS])
    states = generator(cache, eos=eos)(PROMPTS, max_new_tokens=NEW, max_length=LENGTH, stride=1)
    for step, state in enumerate(states):
        count = np.minimum(want, step + 1)
        np.testing.assert_array_equal(state.count, count)
        np.testing.assert_array_equal(state.done, count == want)
        # The last token of a sequence is chosen and not read.
        grown = np.broadcast_to(prompt + count - 1, (CONFIG.layers, len(PROMPTS)))
        np.testing.assert_array_equal(state.cache.length, grown)
        written = np.where(np.arange(NEW) < count[:, None], new, 0)
        np.testing.assert_array_equal(state.tokens, written)
    assert step == want.max() - 1


def test_max_new_tokens():
    for most in (1, 2, 5):
        state = generate(generator(), PROMPTS[:1], max_new_tokens=most)
        assert state.count.tolist() == [most]
        assert state.done.all()
        np.testing.assert_array_equal(state.tokens, whole("exact")[0][:1, :most])


@pytest.mark.parametrize("stride", [1, 4, NEW])
def test_streamed_tokens_are_the_same(stride):
    streaming, seen = generator("coded"), []
    for state in streaming(PROMPTS, max_new_tokens=NEW, max_length=LENGTH, stride=stride):
        count = int(state.count[0])
        seen.append(count)
        np.testing.assert_array_equal(state.tokens[:, :count], whole("coded")[0][:, :count])
    assert seen == sorted({*range(1, NEW, stride), NEW})


def test_seeds():
    sampled = generator("coded", "sampled")
    same, again, other = (np.asarray(generate(sampled, seed=s).tokens) for s in (3, 3, 4))
    np.testing.assert_array_equal(same, again)
    assert (same != other).mean() > 0.5
    assert (same != whole("coded")[0]).mean() > 0.5
    streamed = generate(sampled, seed=3, stride=4).tokens
    np.testing.assert_array_equal(streamed, same)


def test_every_token_has_its_own_randomness(monkeypatch):
    """From flat logits at every step tokens come evenly, in an order of each sequence's own."""
    new, flat = 610, jnp.zeros((2, CONFIG.vocab_size))
    monkeypatch.setattr(generation, "extend", lambda *arguments: (flat, arguments[4]))
    cache = init_cache(None, batch=2, kv_heads=1, head_dim=2, max_length=1)
    options = {"sampler": Sampler(1.0), "eos": ()}
    state = generation.start(cache, flat, jax.random.key(0), max_new_tokens=new, **options)
    state = generation.decode(None, None, None, state, jnp.int32(new), **options)
    tokens = np.asarray(state.tokens)
    for row in tokens:
        assert np.bincount(row, minlength=CONFIG.vocab_size).max() < 30  # 10 on average
        assert (row[1:] == row[:-1]).mean() < 0.1
    assert (tokens[0] == tokens[1]).mean() < 0.1


# --- sampling -------------------------------------------------------------------------------------


def nucleus(logits, temperature, top_p):
    """The smallest set of most likely tokens of that mass, and their probabilities, in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    return {int(i): p[i] / p[kept].sum() for i in kept}


_rng = np.random.default_rng(8)
LOGITS = {
    "flat": _rng.normal(size=10) * 0.3,
    "ordinary": _rng.normal(size=10),
    "peaked": np.array([0.0, 6, 0.5, 1, -1, 0.2, 2, -3, 1.5, 0.7]),
    "one": np.array([0.0, 0, 60, 1, 2, 3]) + np.arange(6) * 0.1,
    "two": np.array([40.0, -40, 39.5, 0, -20, 7]),
    "huge": np.array([3e4, -3e4, 3e4 - 1, 0]),
    "forbidden": np.array([-np.inf, 1.0, -np.inf, 0.3, 0.1]),
}


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS.keys())
def test_sampling_draws_from_exactly_the_smallest_set(logits, temperature, top_p):
    n = 20_000
    want = nucleus(logits, temperature, top_p)
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    drawn = np.asarray(Sampler(temperature, top_p)(jax.random.key(0), batch))
    assert drawn.dtype == np.int32
    frequency = dict(zip(*np.unique(drawn, return_counts=True), strict=True))
    assert set(frequency) <= set(want)
    for token, p in want.items():
        if p > 1e-3:
            assert frequency[token] > 0
        spread = np.sqrt(n * p * (1 - p))
        assert abs(frequency.get(token, 0) - n * p) < 5 * spread + 1


def test_a_small_top_p_keeps_one():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(500, 30)), jnp.float32)
    got = Sampler(1.0, 1e-6)(jax.random.key(1), logits)
    np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


def test_temperature_zero_takes_the_most_likely_whatever_the_seed():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(50, 30)), jnp.float32)
    for seed in range(3):
        got = Sampler(0.0, 0.5)(jax.random.key(seed), logits)
        np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


def test_a_top_p_that_rounding_never_reaches_keeps_all():
    """The cumulative mass of some rows ends below 0.9999999 in float32."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 61)), jnp.float32)
    mass = jnp.cumsum(jax.nn.softmax(jnp.sort(logits, descending=True)), axis=-1)[:, -1]
    short = mass < 0.9999999
    assert short.any()
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        Sampler(1.0, 0.9999999)(key, logits)[short], Sampler(1.0)(key, logits)[short]
    )


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "a prompt is empty"),
        ([[1], []], {}, "a prompt is empty"),
        ([[1], [2] * 35], {}, "35 tokens with 30 new ones does not fit into a cache of 64"),
        ([[1]], {"max_length": NEW}, "shorten it or ask for a longer cache"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens and stride must be at least 1, got 0"),
        ([[1]], {"stride": 0}, "must be at least 1, got 30 and 0"),
        ([[1]], {"seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
        ([[1]], {"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_unusable_prompts(prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(generator(), prompts, **options)


def test_unrolled_layers_on_a_mesh():
    mesh = sharding.make_mesh(CONFIG.kv_heads, (2, 1))
    params = llama.unrolled(*model())
    with pytest.raises(InputError, match="unrolled parameters are for one device"):
        generate(dataclasses.replace(generator(), params=params, mesh=mesh))


def test_a_prompt_that_just_fits():
    state = generate(generator(), [[2] * (LENGTH - NEW)])
    assert state.count.tolist() == [NEW]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 up, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_unusable_samplers(arguments, message):
    with pytest.raises(InputError, match=message):
        Sampler(**arguments)


def test_codebooks_of_another_head_size():
    code = dataclasses.replace(SPEC.key, dim=16, group=16)
    spec = dataclasses.replace(SPEC, key=code, value=code)
    with pytest.raises(InputError, match="train codebooks for this model"):
        generate(Generator(*model(), codebooks(spec)))


# Layers with stages of their own


def uneven(layout):
    """Codebooks whose layers have 3 and 1 stages of keys, 1 and 2 of values; codes of 6 bits.

    In planes they are 32 stages of one bit each.
    """
    each, codewords, block = (32, 2, 32) if layout == "planes" else (1, 64, SPEC.block)
    key, value = (
        ResidualSpec(CONFIG.head_dim, CONFIG.head_dim, each * n, codewords) for n in (3, 2)
    )
    spec = dataclasses.replace(
        SPEC,
        key=key,
        value=value,
        key_stages=(3 * each, each),
        value_stages=(each, 2 * each),
        block=block,
        layout=layout,
    )
    books = codebooks(spec)
    return calibration.first_stages(books, spec.key_stages, spec.value_stages)


@pytest.mark.parametrize("layout", ["packed", "planes"])
def test_stages_by_layer_are_the_padded_ones_in_fewer_bytes(layout):
    """The same text, codes and logits as with all stages stored, the missing ones being 0."""
    books = uneven(layout)
    codebook.validate(books)
    spec = dataclasses.replace(books.spec, key_stages=None, value_stages=None)
    padded_books = dataclasses.replace(books, spec=spec)
    block, longer = spec.block, spec.block // SPEC.block
    length, prompts = longer * LENGTH, [longer * prompt for prompt in PROMPTS]
    states = [
        generate(Generator(*model(), b, dtype=jnp.float32), prompts, max_length=length)
        for b in (books, padded_books)
    ]
    ours, padded_cache = (s.cache for s in states)
    np.testing.assert_array_equal(*(s.tokens for s in states))
    assert ours.blocks == padded_cache.blocks > 1
    shape = (len(PROMPTS), CONFIG.kv_heads, ours.blocks)
    unit = (block,) if layout == "packed" else (1, 32)  # 8 bits a token or 32
    assert ours.key_codes.shape == (3 + 1, *shape, *unit)  # packed 18 and 6 bits a token
    assert ours.value_codes.shape == (1 + 2, *shape, *unit)

    rng = np.random.default_rng(0)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 2, longer * 40, 2, 8)), jnp.float32)
    count = longer * jnp.array([40, 21])
    made = generation.refilled(k, v, books, count, max_length=length, dtype=jnp.float32)
    fresh = init_cache(
        books.spec,
        batch=2,
        kv_heads=2,
        head_dim=8,
        max_length=length,
        layers=2,
        dtype=jnp.float32,
    )
    grown = append(fresh, k, v, books, count)
    done = (count - 2 - 8) // block
    for x, y in ((made.key_codes, grown.key_codes), (made.value_codes, grown.value_codes)):
        for row in range(2):
            np.testing.assert_array_equal(x[:, row, :, : done[row]], y[:, row, :, : done[row]])

    sizes = {"kv_heads": 2, "head_dim": 8, "layers": 2, "dtype": jnp.float32}
    exact = append(init_cache(None, batch=2, max_length=k.shape[2], **sizes), k, v, None, count)
    again = generation.recoded(exact, books, max_length=length)
    jax.tree.map(np.testing.assert_array_equal, again, made)

    views, view = layer_views(ours)
    held = [
        jax.vmap(lambda x, b: materialize(view(x), b))(views, books),
        materialize_layers(padded_cache, padded_books),
    ]
    there = held[0][2]
    assert (there == held[1][2]).all()
    for got, want in zip(held[0][:2], held[1][:2], strict=True):
        np.testing.assert_allclose(got[there], want[there], atol=1e-6)
    with pytest.raises(InputError, match="the spec is for 2 layers, the model has 3"):
        init_cache(books.spec, batch=1, kv_heads=2, head_dim=8, max_length=64, layers=3)
