"""Codebooks: the pytree, its invariants, and checkpoints that are whole or an error."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from gsrq_jax import codebook, layouts
from gsrq_jax.baselines.uniform import Uniform, UniformSpec
from gsrq_jax.codebook import Codebooks, load, read_metadata, save, validate
from gsrq_jax.codec import decoded, respec
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec, ResidualSpec

MODEL = {"family": "llama", "layers": 3, "kv_heads": 2, "head_dim": 8, "weights": "sha256:ab"}


def make(seed: int = 0, dtype=jnp.float32, codewords: int = 16) -> Codebooks:
    spec = QuantSpec(
        key=ResidualSpec(dim=8, group=4, stages=2, codewords=codewords),
        value=ResidualSpec(dim=8, group=8, stages=3, codewords=codewords),
    )
    rng = np.random.default_rng(seed)
    return Codebooks(
        key=jnp.asarray(rng.normal(size=(3, 2, *spec.key.codebook_shape)), dtype),
        value=jnp.asarray(rng.normal(size=(3, 2, *spec.value.codebook_shape)), dtype),
        key_mean=jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32),
        inv_freq=jnp.ones((3, 4)) / 7,
        spec=spec,
    )


def same(a: Codebooks, b: Codebooks) -> bool:
    return a.spec == b.spec and all(
        x.dtype == y.dtype and bool((x == y).all())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_pytree_slices_scans_and_jits():
    books = make()
    layer = jax.tree.map(lambda x: x[1], books)
    assert (layer.layers, books.layers) == (None, 3)
    assert layer.kv_heads == books.kv_heads == 2
    assert layer.spec == books.spec
    validate(layer)
    _, sums = jax.lax.scan(lambda c, layer: (c, layer.key.sum()), 0, books)
    np.testing.assert_allclose(sums, books.key.sum((1, 2, 3, 4, 5)), rtol=1e-5)
    assert jax.jit(lambda b: (validate(b), b)[1])(books).spec == books.spec


def test_nbytes_counts_every_array():
    books = make(dtype=jnp.bfloat16)
    key, value = 3 * 2 * 2 * 2 * 16 * 4, 3 * 2 * 1 * 3 * 16 * 8
    assert books.nbytes == 2 * (key + value) + 4 * (3 * 2 * 8 + 3 * 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: {"key": b.key[..., :3]}, "key has shape"),
        (lambda b: {"key": b.key[0, 0]}, "the axes are"),
        (lambda b: {"value": b.value[:, :1]}, "value has shape"),
        (lambda b: {"key_mean": b.key_mean[..., :4]}, "key_mean has shape"),
        (lambda b: {"inv_freq": b.inv_freq[:2]}, "inv_freq has shape"),
        (lambda b: {"value": b.value.astype(jnp.float16)}, "convert it to float32 or bfloat16"),
        (lambda b: {"key_mean": b.key_mean.astype(jnp.bfloat16)}, "convert it to float32"),
        (lambda b: {"key": b.key.at[0, 0, 0, 0, 0, 0].set(jnp.nan)}, "not finite"),
    ],
)
def test_validate_names_the_misfit(change, says):
    books = make()
    with pytest.raises(InputError, match=says) as error:
        validate(dataclasses.replace(books, **change(books)))
    one_line(error)


def test_validate_refuses_odd_heads():
    code = ResidualSpec(dim=3, group=3, stages=1, codewords=2)
    x = jnp.zeros((1, 1, 2, 3))
    books = Codebooks(x[None], x[None], jnp.zeros((1, 3)), jnp.zeros(1), QuantSpec(code, code))
    with pytest.raises(InputError, match="even head size, got 3"):
        validate(books)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, dtype):
    books, extra = (
        make(dtype=dtype),
        {"steps": 7, "loss": [0.1, 1 / 3], "none": None, "9": {"a": 1}},
    )
    save(tmp_path / "deep" / "books", books, model=MODEL, extra=extra)
    assert same(load(tmp_path / "deep" / "books", model=MODEL), books)
    assert same(load(str(tmp_path / "deep" / "books")), books)
    metadata = read_metadata(tmp_path / "deep" / "books")
    assert metadata["model"] == MODEL
    assert metadata["extra"] == extra
    assert QuantSpec.from_json(metadata["spec"]) == books.spec
    assert names(tmp_path / "deep") == ["books"]


def test_checkpoint_from_before_there_was_a_beam(tmp_path, monkeypatch):
    to_json = QuantSpec.to_json
    with monkeypatch.context() as m:
        m.setattr(
            QuantSpec, "to_json", lambda s: {k: v for k, v in to_json(s).items() if k != "beam"}
        )
        save(tmp_path / "books", make(), model=MODEL)
    assert "beam" not in read_metadata(tmp_path / "books")["spec"]
    books = load(tmp_path / "books")
    assert books.spec.beam == 1
    save(tmp_path / "books", respec(books, beam=8), model=MODEL)
    assert load(tmp_path / "books").spec.beam == 8


def test_the_beam_of_the_spec_encodes():
    layer = jax.tree.map(lambda x: x[0], make())
    rng = np.random.default_rng(7)
    k, v = (jnp.asarray(rng.normal(size=(2, 40, 2, 8)), jnp.float32) for _ in "kv")
    at = jnp.broadcast_to(jnp.arange(40), (2, 40))

    def errors(books):
        decoded = books.decode(*books.encode(k, v, at), at)
        return [jnp.sum((x - y) ** 2, -1) for x, y in zip((k, v), decoded, strict=True)]

    for greedy, beam in zip(errors(layer), errors(respec(layer, beam=8)), strict=True):
        assert (beam <= greedy + 1e-4).all()
        assert beam.mean() < 0.97 * greedy.mean()


def test_what_can_change_after_fitting():
    books = respec(make(), window=3, sinks=5, beam=2)
    assert (books.spec.window, books.spec.sinks, books.spec.beam) == (3, 5, 2)
    with pytest.raises(InputError, match=r"only window, sinks, .*layout can .*, not block"):
        respec(make(), block=8)
    with pytest.raises(InputError, match="a cache of decoded numbers has no outliers"):
        decoded(respec(make(), outliers=2))
    with pytest.raises(InputError, match=r"beam must be from 1 \(greedy\) to 32, got 64"):
        respec(make(), beam=64)
    rounded = Uniform(UniformSpec.kivi(2, 32))
    with pytest.raises(InputError, match=r"only window, sinks can change .*, not beam"):
        respec(rounded, beam=8)


def test_save_replaces_a_checkpoint_and_an_empty_folder(tmp_path):
    (tmp_path / "books").mkdir()
    for seed in (0, 1):
        save(tmp_path / "books", make(seed), model=MODEL)
        assert same(load(tmp_path / "books"), make(seed))
        assert names(tmp_path) == ["books"]


def test_load_on_other_devices_than_saved(tmp_path):
    """Saved sharded over two devices, loaded in this process, which has another number."""
    script = f"""
import jax, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from jax.sharding import NamedSharding, PartitionSpec
from test_codebook import MODEL, make, save
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("x",))
books = jax.device_put(make(), NamedSharding(mesh, PartitionSpec()))
books = jax.tree.map(
    lambda x: x if x.ndim < 3 else jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "x"))),
    books,
)
assert len(books.key.addressable_shards) == 2
save({str(tmp_path / "books")!r}, books, model=MODEL)
"""
    run(script, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert same(load(tmp_path / "books", model=MODEL), make())


def run(script: str, *, wrap: tuple[str, ...] = (), **env: str) -> None:
    done = subprocess.run(
        [*wrap, sys.executable, "-c", script],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_other_model_lists_each_difference_with_both_values(tmp_path):
    save(tmp_path / "books", make(), model=MODEL)
    with pytest.raises(InputError, match="another model") as error:
        load(tmp_path / "books", model=MODEL | {"layers": 32, "weights": "sha256:cd", "new": 1})
    text = one_line(error)
    assert "layers is 32 in the model and 3 in the codebooks" in text
    assert 'weights is "sha256:cd" in the model and "sha256:ab" in the codebooks' in text
    assert "new is 1 in the model and absent in the codebooks" in text
    assert "kv_heads" not in text
    assert "train codebooks for this model" in text


def test_other_head_size(tmp_path):
    save(tmp_path / "books", make(), model=MODEL)
    with pytest.raises(InputError, match="head_dim is 128 in the model and 8 in the codebooks"):
        load(tmp_path / "books", model={"head_dim": 128})
    with pytest.raises(InputError, match="head_dim is 16 in the model and 8 in the codebooks"):
        save(tmp_path / "other", make(), model=MODEL | {"head_dim": 16})
    assert names(tmp_path) == ["books"]


def test_newer_format(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(codebook, "VERSION", codebook.VERSION + 1)
        save(tmp_path / "books", make(), model=MODEL)
    with pytest.raises(InputError, match=r"format 5, newer than format 4.*upgrade") as error:
        load(tmp_path / "books")
    one_line(error)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"there are no codebooks at .*nope") as error:
        load(tmp_path / "nope")
    one_line(error)


@pytest.mark.parametrize("call", [load, read_metadata])
def test_remote_paths_are_refused(call):
    with pytest.raises(InputError, match="not a local folder"):
        call("gs://bucket/books")


def test_save_refuses_one_layer_and_metadata_that_are_not_json(tmp_path):
    with pytest.raises(InputError, match="codebooks of one layer"):
        save(tmp_path / "books", jax.tree.map(lambda x: x[0], make()), model=MODEL)
    with pytest.raises(InputError, match="plain JSON"):
        save(tmp_path / "books", make(), model=MODEL, extra={"array": np.ones(3)})
    assert names(tmp_path) == []


def foreign_file(path: Path):
    path.write_text("mine")


def foreign_folder(path: Path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def foreign_checkpoint(path: Path):
    ocp.save(path, {"a": np.ones(3)}, custom_metadata={"b": 1})


@pytest.mark.parametrize("put", [foreign_file, foreign_folder, foreign_checkpoint])
def test_anything_else_is_neither_overwritten_nor_loaded(tmp_path, put):
    put(tmp_path / "books")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="exists and is not a codebook checkpoint") as error:
        save(tmp_path / "books", make(), model=MODEL)
    one_line(error)
    assert contents(tmp_path) == before
    with pytest.raises(InputError, match="not a codebook checkpoint") as error:
        load(tmp_path / "books")
    one_line(error)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, at: float):
    data = bytearray(path.read_bytes())
    if data:
        data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda p: p.unlink(), id="missing"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), id="cut"),
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: flip(p, 0.3), id="flipped early"),
        pytest.param(lambda p: flip(p, 0.5), id="flipped"),
        pytest.param(lambda p: flip(p, 0.9), id="flipped late"),
    ],
)
def test_damage_of_any_file_is_noticed_or_harmless(tmp_path, harm):
    save(tmp_path / "sound", make(), model=MODEL)
    noticed = {}
    for name in contents(tmp_path / "sound"):
        shutil.copytree(tmp_path / "sound", tmp_path / "books")
        harm(tmp_path / "books" / name)
        try:
            assert same(load(tmp_path / "books", model=MODEL), make()), name
        except InputError as error:
            noticed[name] = str(error)
        shutil.rmtree(tmp_path / "books")
    sizes = {name: len(data) for name, data in contents(tmp_path / "sound").items()}
    assert all("damaged" in text and "\n" not in text for text in noticed.values())
    assert max(sizes, key=sizes.__getitem__) in noticed  # the file with the codewords
    assert "state/manifest.ocdbt" in noticed


def test_wrong_arrays_are_noticed_where_orbax_sees_nothing(tmp_path):
    """A well-formed checkpoint whose arrays are not those that the metadata speak of."""
    save(tmp_path / "books", make(0), model=MODEL)
    save(tmp_path / "other", make(1), model=MODEL)
    shutil.rmtree(tmp_path / "books" / "state")
    shutil.copytree(tmp_path / "other" / "state", tmp_path / "books" / "state")
    with pytest.raises(InputError, match="arrays do not match"):
        load(tmp_path / "books")


def test_edited_metadata_are_noticed(tmp_path):
    save(tmp_path / "books", make(), model=MODEL)
    file = tmp_path / "books" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"window": 128', '"window": 129'))
    with pytest.raises(InputError, match="metadata do not match"):
        read_metadata(tmp_path / "books")


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupt()])
@pytest.mark.parametrize("when", ["writing", "first rename", "second rename"])
def test_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch, error, when):
    save(tmp_path / "books", make(0), model=MODEL)
    rename = Path.rename
    calls = []

    def write(*args, **kwargs):
        raise error

    def broken_rename(self, target):
        calls.append(target)
        if len(calls) == {"first rename": 1, "second rename": 2}[when]:
            raise error
        return rename(self, target)

    with monkeypatch.context() as m:
        if when == "writing":
            m.setattr(ocp, "save", write)
        else:
            m.setattr(Path, "rename", broken_rename)
        with pytest.raises(InputError if isinstance(error, OSError) else Interrupt) as caught:
            save(tmp_path / "books", make(1), model=MODEL)
    if isinstance(error, OSError):
        assert "No space left on device" in one_line(caught)
    assert same(load(tmp_path / "books", model=MODEL), make(0))
    assert names(tmp_path) == ["books"]


def test_killed_between_the_renames(tmp_path):
    """What a dead process leaves at the worst moment still loads, and the next save clears it."""
    save(tmp_path / "books", make(0), model=MODEL)
    work = tmp_path / ".books.saving"
    work.mkdir()
    (tmp_path / "books").rename(work / "previous")
    (work / "new").mkdir()
    assert same(load(tmp_path / "books", model=MODEL), make(0))
    save(tmp_path / "books", make(1), model=MODEL)
    assert same(load(tmp_path / "books", model=MODEL), make(1))
    assert names(tmp_path) == ["books"]


SAVE_ON_FULL_DISK = """
import sys
sys.path.insert(0, {here!r})
from test_codebook import MODEL, InputError, load, make, names, same, save
from pathlib import Path
folder = Path({folder!r})
{before}
save(folder / "books", make(0, codewords=2), model=MODEL)
{limit}
try:
    save(folder / "books", make(1, codewords=256), model=MODEL)
except InputError as error:
    print(error, file=sys.stderr)
    assert "could not write" in str(error) and {reason!r} in str(error), error
    assert len(str(error).splitlines()) == 1
else:
    raise SystemExit("it fitted")
assert same(load(folder / "books", model=MODEL), make(0, codewords=2))
assert names(folder) == ["books"], names(folder)
"""


def test_files_may_not_grow(tmp_path):
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))"
    )
    run(
        SAVE_ON_FULL_DISK.format(
            here=str(Path(__file__).parent),
            folder=str(tmp_path),
            before="",
            limit=limit,
            reason="File too large",
        )
    )
    assert same(load(tmp_path / "books", model=MODEL), make(0, codewords=2))


def test_full_disk(tmp_path):
    """A file system of its own, 128 KiB large, where the system lets us mount one."""
    wrap = ("unshare", "--user", "--map-root-user", "--mount")
    mount = f"mount -t tmpfs -o size=128k tmpfs {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*wrap, *mount.split()]).returncode:
        pytest.skip("no private mounts here")
    run(
        SAVE_ON_FULL_DISK.format(
            here=str(Path(__file__).parent),
            folder=str(tmp_path),
            before=f"import subprocess; subprocess.run({mount.split()!r}, check=True)",
            limit="",
            reason="No space left on device",
        ),
        wrap=wrap,
    )


# Metrics and stages by layer


def with_metrics(seed: int = 0, layout: str = "packed") -> Codebooks:
    """Whole heads whose layers have 2, 1 and 3 stages of keys, 1, 3 and 2 of values.

    In planes, where they have two codewords each, 32 times as many.
    """
    each, codewords = (32, 2) if layout == "planes" else (1, 16)
    code = ResidualSpec(8, 8, 3 * each, codewords)
    by_layer = [tuple(each * n for n in stages) for stages in ((2, 1, 3), (1, 3, 2))]
    spec = QuantSpec(code, code, key_stages=by_layer[0], value_stages=by_layer[1], layout=layout)
    rng = np.random.default_rng(seed)

    def words(stages):
        used = np.arange(code.stages) < np.asarray(stages)[:, None]
        x = rng.normal(size=(3, 2, *code.codebook_shape)) * used[:, None, None, :, None, None]
        return jnp.asarray(x, jnp.float32)

    return Codebooks(
        key=words(spec.key_stages),
        value=words(spec.value_stages),
        key_mean=jnp.zeros((3, 2, 8)),
        inv_freq=jnp.ones((3, 4)),
        spec=spec,
        key_metric=jnp.asarray(rng.normal(size=(3, 2, 8, 8)), jnp.float32),
        value_metric=jnp.asarray(rng.normal(size=(3, 2, 8, 8)), jnp.float32),
    )


@pytest.mark.parametrize("layout", ["packed", "planes"])
def test_metrics_and_stages_by_layer_are_kept(tmp_path, layout):
    books = with_metrics(layout=layout)
    validate(books)
    save(tmp_path / "books", books, model=MODEL)
    assert same(load(tmp_path / "books"), books)
    assert books.nbytes == sum(x.nbytes for x in jax.tree.leaves(books))
    layer = jax.tree.map(lambda x: x[1], books)
    validate(layer)


def test_codes_are_the_nearest_in_the_metric():
    books = jax.tree.map(lambda x: x[2], with_metrics())  # keys of 3 stages, values of 2
    rng = np.random.default_rng(1)
    v = jnp.asarray(rng.normal(size=(40, 2, 8)), jnp.float32)
    at = jnp.arange(40)
    _, codes = jax.jit(lambda b: b.encode(v, v, at))(books)
    first = layouts.unpacked(codes, books.spec.value)[..., 0, 0]  # [H, b]
    offered = v[:, :, None] - books.value[:, 0, 0]  # [b, H, K, d]
    moved = jnp.einsum("hde,bhke->bhkd", books.value_metric, offered)
    np.testing.assert_array_equal(first.T, jnp.sum(moved**2, -1).argmin(-1))
    plain = dataclasses.replace(books, value_metric=None)
    assert (jax.jit(lambda b: b.encode(v, v, at))(plain)[1] != codes).any()


def test_heads_together_are_one_vector_to_the_encoder():
    rng = np.random.default_rng(3)
    code = ResidualSpec(8, 8, stages=2, codewords=16, heads=2)
    spec = QuantSpec(key=code, value=dataclasses.replace(code, stages=1))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    metric = normal(4, 8, 8)
    books = Codebooks(
        key=normal(4, *spec.key.codebook_shape),
        value=normal(4, *spec.value.codebook_shape),
        key_mean=jnp.zeros((4, 8)),
        inv_freq=jnp.zeros(4),
        spec=spec,
        value_metric=metric,
    )
    validate(books)
    v, at = normal(40, 4, 8), jnp.arange(40)
    packed = jax.jit(lambda b: b.encode(v, v, at))(books)
    assert [x.shape for x in packed] == [(2, 40, 1), (2, 40, 1)]
    keys, values = (
        layouts.unpacked(x, code)[:, :, 0]
        for x, code in zip(packed, (spec.key, spec.value), strict=True)
    )

    def squares(x):  # of pairs of heads: [b, H, …, d] -> [b, 2, …]
        x = jnp.sum(x**2, axis=-1)
        return x.reshape(40, 2, 2, *x.shape[2:]).sum(axis=2)

    left = v
    for stage in range(2):
        want = squares(left[:, :, None] - books.key[:, 0, stage]).argmin(-1)  # [b, 2]
        np.testing.assert_array_equal(keys[..., stage].T, want)
        left = left - jnp.stack([books.key[h, 0, stage][want[:, h // 2]] for h in range(4)], 1)
    moved = jnp.einsum("hde,bhke->bhkd", metric, v[:, :, None] - books.value[:, 0, 0])
    np.testing.assert_array_equal(values[..., 0].T, squares(moved).argmin(-1))
    old, _ = books.decode(*packed, at)
    np.testing.assert_allclose(old, v - left, atol=1e-5)
    odd = dataclasses.replace(
        jax.tree.map(lambda x: x[:3] if x.ndim > 1 else x, books), value_metric=None
    )
    with pytest.raises(InputError, match="of 3 KV heads, not a multiple of the 2 that the spec"):
        validate(odd)


def test_errors_are_measured_in_the_metrics():
    books = jax.tree.map(lambda x: x[2], with_metrics())
    rng = np.random.default_rng(2)
    k, v = (jnp.asarray(rng.normal(size=(3, 5, 2, 8)), jnp.float32) for _ in "kv")
    at = jnp.broadcast_to(130 + jnp.arange(5), (3, 5))
    old = books.decode(*books.encode(k, v, at), at)
    got = codebook.errors(books, k, v, *old, at)
    want = 0
    for x, y, words, metric in (
        (k, old[0], books.key, books.key_metric),
        (v, old[1], books.value, books.value_metric),
    ):
        wrong = x - y
        if x is k:  # metrics are those of the frame: of the offset in the block, not the position
            wrong = rotate(wrong, -(at[..., None] - (at[..., None] - 4) % 128), books.inv_freq)
        square = jnp.sum(jnp.einsum("hde,...he->...hd", metric, wrong) ** 2, -1)
        first = jnp.einsum("hde,hke->hkd", metric, words[:, 0, 0])
        want += square / jnp.sum(first**2, -1).mean(-1)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: {"key_metric": b.key_metric[..., :3]}, "key_metric has shape"),
        (lambda b: {"value_metric": b.value_metric * jnp.nan}, "value_metric holds numbers that"),
        (lambda b: {"key": b.key + 1}, "key has codewords in stages that the spec does not give"),
        (
            lambda b: {"spec": dataclasses.replace(b.spec, key_stages=(3, 1), value_stages=(3, 1))},
            "the spec has stages of 2 layers, key 3",
        ),
        (
            lambda b: {
                "spec": dataclasses.replace(
                    make().spec, key=ResidualSpec(8, 4, 3, 16), value=ResidualSpec(8, 8, 3, 16)
                ),
                "key": jnp.zeros((3, 2, 2, 3, 16, 4)),
            },
            "key_metric is for whole heads",
        ),
    ],
)
def test_malformed_metrics_and_stages(change, says):
    books = with_metrics()
    with pytest.raises(InputError, match=says):
        validate(dataclasses.replace(books, **change(books)))
