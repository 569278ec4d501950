import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gsrq_jax.errors import InputError
from gsrq_jax.kmeans import (
    _top_one_by_one,
    assign,
    cell_sums,
    check_finite,
    cluster,
    gskm,
    kmeans,
    spherical,
)

RULES = ("kmeans", "spherical", "unit", "raw")
every_rule = pytest.mark.parametrize("rule", RULES)
KEY = jax.random.key(7)
N, D, K = 640, 6, 16


def run(rule, x, w=None, init=None, key=KEY, k=K, **options):
    """Every test the same shapes and numbers where it can, so that little is compiled."""
    w = jnp.ones(len(x)) if w is None else w
    options = {"iterations": 8, "chunk": 256} | options
    if rule in ("unit", "raw"):
        options["shape_update"] = rule
    function = {"kmeans": kmeans, "spherical": spherical}.get(rule, gskm)
    return function(key, x, k, w, init=init, **options)


def normal(n=N, d=D, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (n, d), dtype)


def some_weights(n=N, seed=1):
    return jax.random.uniform(jax.random.key(seed), (n,), minval=0.1, maxval=3)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def lloyd(x, w, c, iterations, rule):
    """The method as the paper's summary puts it, in float64, one cell at a time, no empty cells."""
    x, w, c = (np.asarray(a, np.float64) for a in (x, w, c))
    if rule == "spherical":
        x, c = unit(x), unit(c)
    history = []
    for _ in range(iterations):
        distance = ((x[:, None] - c[None]) ** 2).sum(-1)
        code = distance.argmin(1)
        history.append((w * distance.min(1)).sum() / w.sum())
        last, c = c, c.copy()
        for k in range(len(c)):
            xk, wk = x[code == k], w[code == k, None]
            mean = (wk * xk).sum(0) / wk.sum()
            if rule == "kmeans":
                c[k] = mean
                continue
            u = unit((wk * (xk if rule == "raw" else unit(xk))).sum(0))
            c[k] = (
                u if rule == "spherical" else max((wk[:, 0] * (xk @ u)).sum() / wk.sum(), 1e-4) * u
            )
    return history, last


@every_rule
def test_against_numpy(rule):
    x, w = normal(), some_weights()
    init = x[:K]
    result = run(rule, x, w, init)
    history, centroids = lloyd(x, w, init, 8, rule)
    np.testing.assert_allclose(result.history, history, rtol=1e-5)
    if np.argmin(history) == 7:
        np.testing.assert_allclose(result.centroids, centroids, atol=1e-5)
    else:
        assert rule == "unit"  # the only rule whose objective may rise


@every_rule
def test_report_describes_the_centroids(rule):
    x, w = normal(), some_weights()
    result = run(rule, x, w)
    points = unit(np.asarray(x)) if rule == "spherical" else np.asarray(x)
    code, error = assign(jnp.asarray(points), result.centroids)
    c = np.asarray(result.centroids)[code]
    cosine = (points * c).sum(-1) / np.linalg.norm(points, axis=-1) / np.linalg.norm(c, axis=-1)
    np.testing.assert_allclose(error, ((points - c) ** 2).sum(-1), atol=1e-5)
    np.testing.assert_allclose(result.objective, np.average(error, weights=w), rtol=1e-5)
    np.testing.assert_allclose(result.angle, np.average(1 - cosine, weights=w), rtol=1e-5)
    np.testing.assert_allclose(result.counts, np.bincount(code, w, K), rtol=1e-5)
    assert result.dead == 0
    assert result.objective == result.history.min()


def test_best_iterate_is_kept():
    # Where k-means has settled, any other rule does worse.
    x, start = normal(), normal()[:K]
    for _ in range(8):
        start = run("kmeans", x, init=start).centroids
    result = run("unit", x, init=start, iterations=2)
    assert result.history[1] > result.history[0] == result.objective
    np.testing.assert_allclose(result.centroids, start, rtol=1e-5)


def test_gskm_fixed_point():
    x, w = normal(), some_weights()
    centroids = x[:K]
    for _ in range(30):
        centroids = run("unit", x, w, centroids).centroids
    code = np.asarray(assign(x, centroids)[0])
    for k, c in enumerate(np.asarray(centroids)):
        xk, wk = np.asarray(x)[code == k], np.asarray(w)[code == k, None]
        u = unit((wk * unit(xk)).sum(0))
        np.testing.assert_allclose(unit(c), u, atol=1e-4)
        gain = np.average(xk @ u, weights=wk[:, 0])
        np.testing.assert_allclose(np.linalg.norm(c), gain, rtol=1e-4)


def test_spherical_centroids_are_unit_and_ignore_norms():
    x = normal()
    a, b = run("spherical", x), run("spherical", x * some_weights()[:, None])
    np.testing.assert_allclose(jnp.linalg.norm(a.centroids, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(a.centroids, b.centroids, atol=1e-5)
    np.testing.assert_allclose(a.objective, 2 * a.angle, rtol=1e-5)


def test_raw_is_kmeans_started_spherically():
    x, w = normal(), some_weights()
    raw = run("raw", x, w)
    shapes = run("spherical", x, w, iterations=5).centroids
    code = np.asarray(assign(x / jnp.linalg.norm(x, axis=-1, keepdims=True), shapes)[0])
    norms = np.linalg.norm(x, axis=-1)
    gains = [np.average(norms[code == k], weights=w[code == k]) for k in range(K)]
    plain = run("kmeans", x, w, init=shapes * np.array(gains)[:, None])
    np.testing.assert_allclose(raw.history, plain.history, rtol=1e-5)
    np.testing.assert_allclose(raw.centroids, plain.centroids, atol=1e-5)


@every_rule
def test_a_weight_is_a_number_of_copies(rule):
    x = normal()
    copies = np.where(np.arange(N) < 200, np.arange(N) % 4, 0)
    total = copies.sum()
    weighted = run(rule, x, jnp.asarray(copies, jnp.float32), init=x[1 : K + 1])
    repeated = jnp.pad(jnp.repeat(x, copies, axis=0), [(0, N - total), (0, 0)])
    repeated = run(rule, repeated, (jnp.arange(N) < total) * 1.0, init=x[1 : K + 1])
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, atol=1e-5)
    np.testing.assert_allclose(weighted.history, repeated.history, rtol=1e-5)
    np.testing.assert_allclose(weighted.counts, repeated.counts)


@every_rule
def test_points_of_weight_zero_do_not_exist(rule):
    x, w = normal(), some_weights().at[::3].set(0)
    good = run(rule, x.at[::3].set(0), w)
    for rubbish in (np.nan, np.inf, 1e30):
        bad = run(rule, x.at[::3].set(rubbish), w)
        np.testing.assert_array_equal(bad.centroids, good.centroids)
        np.testing.assert_array_equal(bad.objective, good.objective)
    assert np.isfinite(good.objective)


@every_rule
def test_empty_cells_are_seeded_again(rule):
    # All centroids start at one place, so all cells but one are empty at first.
    x = normal()
    result = run(rule, x, init=jnp.broadcast_to(x[0], (K, D)))
    assert result.dead == 0
    assert result.objective < 0.6 * result.history[0]


def test_dead_counts_empty_cells():
    x = normal()
    assert run("kmeans", x, init=jnp.broadcast_to(x[0], (K, D)), iterations=1).dead == K - 1


@every_rule
def test_duplicates_leave_no_cell_dead(rule):
    # As many distinct points as codewords, and all the others equal: a random start finds few.
    x = normal().at[K:].set(normal()[0])
    result = run(rule, x)
    assert result.history[0] > 1e-3 or rule in ("unit", "raw")  # past their spherical start
    assert result.dead == 0
    assert result.objective < 1e-5


def test_as_many_codewords_as_points():
    result = run("kmeans", normal(K))
    assert result.objective < 1e-5
    np.testing.assert_allclose(result.counts, 1)


@every_rule
def test_fewer_points_than_codewords_have_weight(rule):
    result = run(rule, normal(), (jnp.arange(N) < K - 3) * 1.0)
    assert result.objective < 1e-5
    assert np.isfinite(result.centroids).all()


@every_rule
def test_zero_vectors(rule):
    result = run(rule, normal().at[::2].set(0))
    for field in jax.tree.leaves(result):
        assert np.isfinite(field).all()
    np.testing.assert_allclose(result.counts.sum(), N // 2 if rule == "spherical" else N)
    assert 0 < result.angle < 1  # they have none
    only_zeros = run(rule, jnp.zeros((N, D)))
    for field in jax.tree.leaves(only_zeros):
        assert np.isfinite(field).all()
    assert only_zeros.objective < 1e-6


@pytest.mark.parametrize("chunk", [37, 4096])
def test_chunks_do_not_matter(chunk):
    x, w = normal(), some_weights()
    a, b = run("unit", x, w), run("unit", x, w, chunk=chunk)
    np.testing.assert_allclose(a.centroids, b.centroids, atol=1e-5)
    np.testing.assert_allclose(a.history, b.history, rtol=1e-5)
    code, error = assign(x, a.centroids, chunk)
    np.testing.assert_array_equal(code, assign(x, a.centroids)[0])
    np.testing.assert_allclose(error, assign(x, a.centroids)[1], atol=1e-5)


def test_same_key_same_result():
    x = normal()
    a, b, other = run("unit", x), run("unit", x), run("unit", x, key=jax.random.key(8))
    np.testing.assert_array_equal(a.centroids, b.centroids)
    assert not np.array_equal(a.centroids, other.centroids)


@pytest.mark.parametrize(
    ("how", "rule"), [("shard_map", "kmeans"), ("shard_map", "unit"), ("pmap", "unit")]
)
def test_devices_agree_with_one(rule, how):
    # One device has no weight at all, and one weighs so much that cells are seeded again.
    x, w = normal().at[100:140].mul(20), some_weights().at[:100].set(0)
    init = jnp.broadcast_to(x[200], (K, D))
    one = run(rule, x, w, init)

    def share(x, w):
        return run(rule, x, w, init, axis_name="data")

    if how == "pmap":
        many = jax.pmap(share, axis_name="data")(x.reshape(8, 80, D), w.reshape(8, 80))
        for device in range(1, 8):
            np.testing.assert_array_equal(many.centroids[0], many.centroids[device])
        many = jax.tree.map(lambda a: a[0], many)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        mapped = jax.shard_map(share, mesh=mesh, in_specs=P("data"), out_specs=P())
        many = jax.jit(mapped)(x, w)
    assert one.dead == 0
    np.testing.assert_allclose(many.centroids, one.centroids, atol=1e-4)
    np.testing.assert_allclose(many.history, one.history, rtol=1e-5)


def test_more_codewords_than_one_device_has_points():
    x = normal(64)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda x: run("spherical", x, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=P(("a", "b")),
        out_specs=P(),
    )
    one = run("spherical", x).centroids
    np.testing.assert_allclose(jax.jit(mapped)(x).centroids, one, atol=1e-5)


def test_vmap_with_the_problems_spread_over_devices():
    x, keys = normal(2 * N).reshape(2, N, D), jax.random.split(KEY, 2)
    mesh = jax.make_mesh((2,), ("p",), axis_types=(jax.sharding.AxisType.Auto,))
    solve = jax.vmap(lambda key, x: run("unit", x, key=key).centroids)
    mapped = jax.shard_map(solve, mesh=mesh, in_specs=P("p"), out_specs=P("p"))
    together = jax.jit(mapped)(keys, x)
    for i in range(2):
        alone = run("unit", x[i], key=keys[i]).centroids
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_bfloat16_points_are_summed_in_float32():
    # 4000 points a cell: sums in bfloat16 would stop growing at 256.
    x = (1 + 0.25 * normal(8000, 4)).astype(jnp.bfloat16)
    result = run("unit", x, init=x[:2], k=2)
    history, centroids = lloyd(x, np.ones(8000), x[:2], 8, "unit")
    assert result.centroids.dtype == jnp.float32
    np.testing.assert_allclose(result.counts.sum(), 8000)
    np.testing.assert_allclose(result.history, history, rtol=1e-5)
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-4)


@every_rule
def test_types_do_not_depend_on_jax_enable_x64(rule):
    """Traced only."""
    with jax.enable_x64(True):
        points = np.ones((N, D))
        options = {"shape_update": rule} if rule in ("unit", "raw") else {}
        function = {"kmeans": kmeans, "spherical": spherical}.get(rule, gskm)
        found = jax.eval_shape(lambda x: function(KEY, x, K, **options), points)
        codes, errors = jax.eval_shape(assign, points, np.ones((K, D)))
    assert found.dead.dtype == codes.dtype == jnp.int32
    rest = (found.centroids, found.objective, found.angle, found.counts, found.history, errors)
    assert {x.dtype for x in rest} == {jnp.dtype(jnp.float32)}


def test_cluster_runs_the_rules():
    options = {"iterations": 5, "warmup": 3, "chunk": 256}
    result = cluster(KEY, normal(), K, jnp.ones(N), rule="kmeans", **options)
    np.testing.assert_array_equal(result.history, run("kmeans", normal()).history)
    direct = gskm(KEY, normal(), K, **options)
    result = cluster(KEY, normal(), K, jnp.ones(N), **options)
    np.testing.assert_array_equal(result.history, direct.history)


def test_bad_input():
    x = normal(10)
    for rule in RULES:
        with pytest.raises(InputError, match="11 codewords need as many points, got 10"):
            run(rule, x, k=11)
    with pytest.raises(InputError, match="10 points need 10 weights"):
        kmeans(KEY, x, 4, jnp.ones(9))
    with pytest.raises(InputError, match="init must have the shape"):
        kmeans(KEY, x, 4, init=x[:3])
    with pytest.raises(InputError, match="must be at least 1"):
        kmeans(KEY, x, 4, iterations=0)
    with pytest.raises(InputError, match="must be at least 1"):
        gskm(KEY, x, 4, warmup=0)
    with pytest.raises(InputError, match="unknown shape_update 'round'"):
        gskm(KEY, x, 4, shape_update="round")
    with pytest.raises(InputError, match="chunk must be at least 1, got 0"):
        assign(normal(), normal(K), chunk=0)
    with pytest.raises(InputError, match="unknown rule 'median'"):
        cluster(KEY, x, 4, rule="median")


def test_check_finite():
    x = normal(12).reshape(3, 4, 6)
    check_finite(x)
    bad = x.at[1, 2, 3].set(jnp.nan)
    with pytest.raises(InputError, match=r"keys hold NaN .* 1 of 12 .* first at \[1, 2\]"):
        check_finite(bad, name="keys")
    weights = jnp.ones((3, 4))
    check_finite(bad, weights.at[1, 2].set(0))
    for value in (-1, jnp.inf, jnp.nan):
        with pytest.raises(InputError, match=r"not negative, .* first at \[0, 1\]"):
            check_finite(x, weights.at[0, 1].set(value))


def test_sums_by_products_are_those_of_rows(monkeypatch):
    values = jax.random.normal(jax.random.key(0), (500, 7)) * jnp.array(
        [1e-20, 1e-3, 1, 1, 7, 1e9, 1e30]
    )
    code = jax.random.randint(jax.random.key(1), (500,), 0, 16)
    want = np.zeros((16, 7))
    np.add.at(want, np.asarray(code), np.asarray(values, np.float64))
    size = np.zeros((16, 7))
    np.add.at(size, np.asarray(code), np.abs(np.asarray(values, np.float64)))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    product = cell_sums(values, code, 16)
    assert (np.abs(product - want) <= 1e-6 * size).all()


@pytest.mark.parametrize("rule", ["kmeans", "spherical", "unit"])
def test_fused_passes_give_the_same(rule, plain_kernels):
    """Odd length, points of weight 0 that hold NaN, an empty cell, directions of a zero."""
    n, d, k = 301, 64, 16
    x, w = normal(n, d).at[7].set(jnp.nan), some_weights(n).at[7].set(0)
    x = x.at[9].set(0) if rule == "spherical" else x
    init = normal(k, d, seed=3).at[2].set(100)
    how = {"init": init, "k": k, "iterations": 5}
    fused, xla = (run(rule, x, w, implementation=i, **how) for i in ("mosaic_gpu", "xla"))
    np.testing.assert_allclose(fused.history, xla.history, rtol=1e-5)
    np.testing.assert_allclose(fused.centroids, xla.centroids, atol=1e-5)
    np.testing.assert_allclose(fused.counts, xla.counts, rtol=1e-5)
    np.testing.assert_allclose(fused.angle, xla.angle, rtol=1e-5)
    assert fused.dead == xla.dead


def test_fused_passes_of_mapped_and_of_spread_points(plain_kernels):
    x, rngs = normal(2 * 320, 64).reshape(2, 320, 64), jax.random.split(KEY)

    def fit(implementation, axis_name=None):
        def one(rng, x):
            options = {"axis_name": axis_name, "implementation": implementation}
            return gskm(rng, x, 16, iterations=3, warmup=2, **options).centroids

        return one

    xla = jax.vmap(fit("xla"))(rngs, x)
    np.testing.assert_allclose(jax.vmap(fit("mosaic_gpu"))(rngs, x), xla, atol=1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        fit("mosaic_gpu", "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(spread)(rngs[0], x[0]), xla[0], atol=1e-5)


def test_fused_assignment(plain_kernels):
    x, c = normal(100, 64), normal(16, 64, seed=1)
    for fused, xla in zip(assign(x, c, implementation="mosaic_gpu"), assign(x, c), strict=True):
        np.testing.assert_allclose(fused, xla, rtol=1e-5)


def test_implementations_are_checked():
    with pytest.raises(InputError, match="choose one of xla, mosaic_gpu"):
        run("kmeans", normal(), implementation="triton")
    with pytest.raises(InputError, match=r"multiples of 64 up to 256 as channels, got 6"):
        assign(normal(), normal(K), implementation="mosaic_gpu")


def test_points_are_drawn_one_by_one_as_by_sorting():
    scores = jnp.floor(4 * normal(300, 1)[:, 0]).at[jnp.array([3, 80])].set(-jnp.inf)
    few = jnp.full(300, -jnp.inf).at[jnp.array([4, 90])].set(1.0)
    find = jax.jit(_top_one_by_one, static_argnums=0)
    for x, k, wanted in ((scores, 8, 0), (scores, 8, 5), (scores, 8, 9), (few, 8, 5)):
        top, index = find(k, x, jnp.int32(wanted))
        expected, places = jax.lax.top_k(x, k)
        there = slice(0, min(wanted, k))
        np.testing.assert_array_equal(top[there], expected[there])
        real = jnp.isfinite(expected[there])
        np.testing.assert_array_equal(index[there][real], places[there][real])
        assert (top[min(wanted, k) :] == -jnp.inf).all()
