"""How training and decoding scale over the GPUs of one host, and that results stay the same.

    python benchmarks/scaling.py                        # on all devices, of which meshes are made
    CUDA_VISIBLE_DEVICES=0 python benchmarks/scaling.py --meshes 1x1

A mesh is ``data x model``: sequences, samples and coded blocks are spread over ``data``, KV heads
over ``model``. ``agree`` compares attention over a coded cache on a mesh with one device's.
``decode`` is the decode loop of LLaMA-3-8B's shapes with random weights over a random cache, coded
and in bfloat16, spread alike. ``fit`` is a layer of such codebooks, ``capture`` keys, values and
their sensitivities of some layers. Nothing here is tuned to a host. Writes
`results/scaling-<devices>.json`, on CPUs `results/scaling-cpu-<devices>.json`; ``--table`` prints
what is there of GPUs.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compile_for_pods import books_on, on_mesh, placed, shape_of
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsrq_jax import attention, sharded
from gsrq_jax.cache import KVCache, Turn, init_cache
from gsrq_jax.calibration import DATA, MODEL, FitOptions, LayerSamples
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.kernels import reference
from gsrq_jax.models import commands, generation, llama, sharding, training
from gsrq_jax.models.config import LLAMA_3_8B, LlamaConfig
from gsrq_jax.results import repeated, write_result
from gsrq_jax.rope import turns
from gsrq_jax.spec import QuantSpec

ROOT = pathlib.Path(__file__).parent.parent
Part = Literal["agree", "decode", "fit", "capture"]
TOY = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=16,
)
MODELS = {"llama-3-8b": LLAMA_3_8B, "toy": TOY}
CODED, EXACT = "1 bit", "bf16"


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        parts: what is measured.
        meshes: ``data x model`` devices.
        model: whose shapes.
        layers: of the decode loop; 0 for all.
        contexts: tokens in the cache at the end; a bfloat16 cache that does not fit is said so.
        steps: tokens that are decoded.
        block: tokens of a cache's block.
        mean_every: tokens between knots of the mean key.
        tokens: that a layer is fitted to (strong scaling), and for each of the devices along
            ``data`` (weak scaling, where there are several).
        bits: of the codebooks that are fitted.
        passes: over the samples for each stage; 0 for as many as training takes.
        captured: layers of the model that is captured.
        length: tokens of a sequence that is captured.
        repeats: timed runs of each, of which the median counts.
        out: folder under which ``results`` lies.
        table: only print what was measured.
    """

    parts: tuple[Part, ...] = ("agree", "decode", "fit", "capture")
    meshes: tuple[str, ...] = ("1x1", "1x2", "2x1", "1x4", "4x1")
    model: Literal["llama-3-8b", "toy"] = "llama-3-8b"
    layers: int = 0
    contexts: tuple[int, ...] = (131_072, 1_048_576)
    steps: int = 32
    block: int = 512
    mean_every: int = 16
    tokens: int = 262_144
    bits: float = 1.0
    passes: int = 0
    captured: int = 4
    length: int = 2048
    repeats: int = 3
    out: pathlib.Path = ROOT
    table: bool = False

    @property
    def sizes(self) -> LlamaConfig:
        """Of the model that decodes."""
        sizes = MODELS[self.model]
        return dataclasses.replace(sizes, layers=self.layers) if self.layers else sizes

    @property
    def spec(self) -> QuantSpec:
        """Of the coded cache."""
        return QuantSpec.from_bits(
            1,
            self.sizes.head_dim,
            codewords=16,
            block=self.block,
            mean_every=self.mean_every,
            layout="tiles",
        )


class Job(NamedTuple):
    """One measurement: programs to compile, and what to do with them.

    Attributes:
        facts: of its row.
        lowered: the programs.
        measure: what it does with the compiled programs; more of the row.
        options: of the compiler.
    """

    facts: dict[str, Any]
    lowered: tuple[Any, ...]
    measure: Callable[..., dict[str, Any]]
    options: dict[str, Any] | None = None


def mesh_of(shape: str) -> Mesh:
    """Of the first devices.

    Raises:
        InputError: if there are too few, or it is not ``data x model``.
    """
    try:
        data, model = map(int, shape.split("x"))
    except ValueError:
        raise InputError(f"--meshes takes data x model, such as 1x4, got {shape}") from None
    if min(data, model) < 1 or data * model > len(jax.devices()):
        raise InputError(f"a mesh of {shape} does not fit {len(jax.devices())} devices")
    return Mesh(np.reshape(jax.devices()[: data * model], (data, model)), (DATA, MODEL))


def one_or(mesh: Mesh) -> Mesh | None:
    """None for one device, which is not mapped over."""
    return None if mesh.size == 1 else mesh


# --- arrays where they live -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _drawn(key: jax.Array, size: float, shape: tuple[int, ...], dtype: Any, where: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        x = jax.random.bits(key, shape, dtype)
    else:
        x = (size * jax.random.uniform(key, shape, jnp.bfloat16, -1, 1)).astype(dtype)
    return jax.lax.with_sharding_constraint(x, where)


def drawn(tree: Any, seed: int, size: Callable[[tuple[int, ...]], float] = lambda _: 1.7) -> Any:
    """Random arrays of these shapes where they live: bits, or numbers from ``-size`` to ``size``
    (by default of variance 1 or so)."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    with ThreadPoolExecutor() as pool:  # compiled beside each other
        waiting = [
            pool.submit(_drawn, k, size(x.shape), x.shape, x.dtype, x.sharding)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, [x.result() for x in waiting])


def weights(tree: Any) -> Any:
    """Random parameters, small enough for numbers to stay finite."""
    return drawn(tree, 0, lambda shape: shape[-1] ** -0.5)


def random_books(shapes: Codebooks, sizes: LlamaConfig) -> Codebooks:
    """Codebooks of these shapes, with the model's rotary frequencies."""
    books = drawn(shapes, 1, lambda shape: 0.5 if len(shape) == 6 else 1)
    inv_freq = jnp.broadcast_to(jnp.asarray(sizes.inv_freq, jnp.float32), books.inv_freq.shape)
    return dataclasses.replace(books, inv_freq=jax.device_put(inv_freq, books.inv_freq.sharding))


def cache_on(mesh: Mesh, config: Config, context: int, layers: int | None) -> KVCache:
    """Shapes of one sequence's coded cache where they live."""
    sizes, spec = config.sizes, config.spec
    parts = mesh.shape[DATA] * spec.block
    cache = jax.eval_shape(
        functools.partial(
            init_cache,
            spec,
            batch=1,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            max_length=spec.sinks + spec.window + -(-context // parts) * parts,
            layers=layers,
        )
    )
    return placed(mesh, sharded.cache_axes(spec, stacked=layers is not None), cache)


def filled(cache: KVCache, length: int) -> KVCache:
    """A random cache of these shapes that holds so many tokens."""
    made = drawn(cache.replace(length=None), 2)
    lengths = jnp.full(cache.length.shape, length, jnp.int32)
    return made.replace(length=jax.device_put(lengths, cache.length.sharding))


def bytes_of(tree: Any) -> int:
    """Of arrays, on the device that has most of them."""
    found: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return max(found.values())


def timed(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and interquartile range of seconds."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    low, middle, high = np.percentile(took, [25, 50, 75])
    return {"seconds": float(middle), "spread": float(high - low)}


# --- attention, compared --------------------------------------------------------------------------


def agree(config: Config, mesh: Mesh, context: int) -> Job:
    """How far attention over one layer's cache on the mesh is from one device's."""
    sizes, spec = config.sizes, config.spec
    device, n = Mesh([[mesh.devices.flat[0]]], mesh.axis_names), mesh.shape[DATA]
    one = dataclasses.replace(sizes, layers=1)
    spread = cache_on(mesh, config, context, None)
    whole = cache_on(device, config, spec.block * spread.blocks, None)
    stack = books_on(device, one, spec)

    def vectors(on: Mesh) -> list[jax.ShapeDtypeStruct]:
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        shapes = [(1, 1, h, sizes.head_dim) for h in heads]
        return [shape_of(on, shape, jnp.float32, *sharded.VECTORS) for shape in shapes]

    def of_layer(on: Mesh) -> Codebooks:
        books = jax.eval_shape(lambda x: jax.tree.map(lambda y: y[0], x), stack)
        return placed(on, sharded.codec_axes(books, stacked=False), books)

    programs = (
        jax.jit(attention.attend).lower(*vectors(device), whole, of_layer(device)),
        jax.jit(functools.partial(sharded.attend, mesh)).lower(
            *vectors(mesh), spread, of_layer(mesh)
        ),
    )

    def put(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda x, of: jax.device_put(x, of.sharding), tree, like)

    def measure(alone: Any, together: Any) -> dict[str, float]:
        books = jax.tree.map(lambda x: x[0], random_books(stack, one))
        cache = filled(whole, context)
        order = np.concatenate([Turn(i, n).blocks(cache.blocks // n) for i in range(n)])
        dealt = cache.replace(
            key_codes=cache.key_codes[:, :, order], value_codes=cache.value_codes[:, :, order]
        )
        rng = np.random.default_rng(0)
        qkv = [rng.standard_normal(x.shape, np.float32) for x in vectors(device)]
        want = np.asarray(alone(*put(qkv, vectors(device)), cache, put(books, of_layer(device))))
        got = together(*put(qkv, vectors(mesh)), put(dealt, spread), put(books, of_layer(mesh)))
        error = np.linalg.norm(np.asarray(got) - want, axis=-1) / np.linalg.norm(want, axis=-1)
        return {"error": float(error.max())}

    return Job({"part": "agree", "what": CODED, "context": context}, programs, measure)


# --- decoding -------------------------------------------------------------------------------------


def coded_loop(config: Config, mesh: Mesh, context: int) -> Job:
    """`gsrq_jax.models.generation.decode` over codes."""
    sizes, spec, room = config.sizes, config.spec, config.steps * (config.repeats + 1)
    graphdef, params = on_mesh(mesh, sizes)
    books, cache = books_on(mesh, sizes, spec), cache_on(mesh, config, context, sizes.layers)
    tokens = placed(
        mesh,
        P(),
        {
            "token": jax.ShapeDtypeStruct((1,), jnp.int32),
            "done": jax.ShapeDtypeStruct((1,), bool),
            "tokens": jax.ShapeDtypeStruct((1, room + 1), jnp.int32),
            "count": jax.ShapeDtypeStruct((1,), jnp.int32),
            "key": jax.eval_shape(lambda: jax.random.key(0)),
        },
    )
    loop = functools.partial(
        generation.decode, graphdef, sampler=generation.Sampler(), eos=(), mesh=one_or(mesh)
    )
    steps = shape_of(mesh, (), jnp.int32)
    state = generation.DecodeState(cache, **tokens)
    lowered = jax.jit(loop, donate_argnums=2).lower(params, books, state, steps)

    def measure(compiled: Any) -> dict[str, Any]:
        zeros = {
            name: jax.device_put(
                jax.random.key(0) if name == "key" else jnp.zeros(x.shape, x.dtype), x.sharding
            )
            for name, x in tokens.items()
        }
        now = generation.DecodeState(filled(cache, context - room), **zeros)
        arrays = _weights_on(mesh, config), random_books(books, sizes)
        held = {"cache_bytes": bytes_of(now.cache), "weight_bytes": bytes_of(arrays[0])}
        count = jax.device_put(jnp.int32(config.steps), steps.sharding)

        def run() -> Any:
            nonlocal now
            now = compiled(*arrays, now, count)
            return now.token

        return held | rates(run, config)

    facts = {"part": "decode", "what": CODED, "context": context, "layers": sizes.layers}
    return Job(facts, (lowered,), measure, generation.loop_options())


@functools.lru_cache(maxsize=1)
def _weights_on(mesh: Mesh, config: Config) -> Any:
    return weights(on_mesh(mesh, config.sizes)[1])


def rates(run: Callable[[], Any], config: Config) -> dict[str, Any]:
    """Tokens a second of a loop's steps, after some that do not count."""
    jax.block_until_ready(run())
    took = timed(run, config.repeats)
    return took | {"tokens_per_second": config.steps / took["seconds"]}


def exact_loop(config: Config, mesh: Mesh, context: int) -> Job:
    """The same over keys and values in bfloat16, by jax's best attention of each device's part.

    Layers are unrolled, each with weights and a cache of its own, which is updated in place.
    Devices along ``data`` have ranges of the sequence, and merge as ours do.
    """
    sizes, room = config.sizes, config.steps * (config.repeats + 1)
    graphdef, params = on_mesh(mesh, dataclasses.replace(sizes, layers=1))
    blocks, _ = nnx.split(nnx.merge(graphdef, params).layers)
    layer = jax.tree.map(
        lambda x: shape_of(mesh, x.shape[1:], x.dtype, *x.sharding.spec[1:]), params["layers"]
    )
    shape = (1, context, sizes.kv_heads, sizes.head_dim)
    past = shape_of(mesh, shape, jnp.bfloat16, None, DATA, MODEL)
    gpu = jax.devices()[0].platform == "gpu"

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(sharded.VECTORS,) * 3 + (past.sharding.spec,) * 2 + (P(),),
        out_specs=(sharded.VECTORS, past.sharding.spec, past.sharding.spec),
        check_vma=False,
    )
    def attend(q: Any, k: Any, v: Any, keys: Any, values: Any, at: Any) -> Any:
        first = keys.shape[1] * jax.lax.axis_index(DATA)
        slot = jnp.clip(at - first, 0, keys.shape[1] - 1)

        def put(past: Any, new: Any) -> Any:
            old = jax.lax.dynamic_slice_in_dim(past, slot, 1, axis=1)
            new = jnp.where(slot + first == at, new, old)
            return jax.lax.dynamic_update_slice_in_dim(past, new, slot, axis=1)

        keys, values = put(keys, k), put(values, v)
        out, lse = jax.nn.dot_product_attention(
            q,
            keys,
            values,
            key_value_seq_lengths=jnp.clip(at + 1 - first, 1, keys.shape[1])[None],
            implementation="cudnn" if gpu else "xla",
            return_residual=True,
        )
        if mesh.shape[DATA] > 1:
            out, _ = reference.merge_over(
                (out.astype(jnp.float32), lse.astype(jnp.float32)), axis_name=DATA
            )
        return out.astype(q.dtype), keys, values

    def token(params: Any, layers: Any, carry: Any) -> Any:
        at, tokens, caches = carry
        model = nnx.merge(graphdef, params)
        h, new = sharding.by_channels(mesh, model.embed_tokens(tokens[:, None])), []
        turn = turns(jnp.full((1, 1, 1), at), sizes.inv_freq)
        for own, past in zip(layers, caches, strict=True):

            def attention(q: Any, k: Any, v: Any, _: Any, past: Any = past) -> Any:
                out, *grown = attend(q, k, v, *past, at)
                return out, tuple(grown)

            h, grown = nnx.merge(blocks, own)(h, turn, attention, None)
            h = sharding.by_channels(mesh, h)
            new.append(grown)
        logits = model.logits(model.norm(h))[:, 0]
        return at + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), new

    def loop(params: Any, layers: Any, carry: Any, steps: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, x: token(params, layers, x), carry)

    number = shape_of(mesh, (), jnp.int32)
    shapes = (params, [layer] * sizes.layers)
    carry = number, shape_of(mesh, (1,), jnp.int32), [(past, past)] * sizes.layers
    lowered = jax.jit(loop, donate_argnums=2).lower(*shapes, carry, number)

    def measure(compiled: Any) -> dict[str, Any]:
        caches = [drawn((past, past), i) for i in range(sizes.layers)]
        held = {"cache_bytes": bytes_of(caches)}
        arrays = weights(params), [weights(layer) for _ in range(sizes.layers)]
        others = {name: x for name, x in arrays[0].items() if name != "layers"}
        held["weight_bytes"] = bytes_of((others, arrays[1]))
        start = context - room, jnp.zeros(1, jnp.int32)
        now: Any = (*(jax.device_put(jnp.int32(x), number.sharding) for x in start), caches)
        del caches
        count = jax.device_put(jnp.int32(config.steps), number.sharding)

        def run() -> Any:
            nonlocal now
            now = compiled(*arrays, now, count)
            return now[1]

        return held | rates(run, config)

    facts = {"part": "decode", "what": EXACT, "context": context, "layers": sizes.layers}
    return Job(facts, (lowered,), measure, generation.loop_options())


# --- training -------------------------------------------------------------------------------------


def fit(config: Config, mesh: Mesh, tokens: int, scaling: str) -> Job:
    """One layer's codebooks from random keys and values."""
    sizes = config.sizes
    heads, dim = sizes.kv_heads, sizes.head_dim
    spec = QuantSpec.from_bits(config.bits, dim, codewords=256 if dim > 64 else 16)
    options = FitOptions()
    if config.passes:
        options = dataclasses.replace(options, iterations=config.passes - 1, warmup=1)
    vectors = shape_of(mesh, (tokens, heads, dim), jnp.bfloat16, DATA, MODEL)
    norms = shape_of(mesh, (tokens, heads), jnp.float32, DATA, MODEL)
    samples = LayerSamples(
        vectors, vectors, norms, norms, shape_of(mesh, (tokens,), jnp.int32, DATA)
    )
    others = {
        "rng": jax.random.key(0),
        "inv_freq": jnp.asarray(sizes.inv_freq, jnp.float32),
        "output": None,
    }
    others = jax.device_put(others, NamedSharding(mesh, P()))
    lowered = training.fit_layer_compiled.lower(
        samples=samples, **others, spec=spec, options=options, weigh=True, mesh=one_or(mesh)
    )

    def measure(compiled: Any) -> dict[str, Any]:
        k, v, key_norms, value_norms = drawn(tuple(samples[:4]), 3)
        positions = jax.device_put(np.arange(tokens, dtype=np.int32), samples.positions.sharding)
        made = LayerSamples(k, v, jnp.square(key_norms), jnp.square(value_norms), positions)

        def run() -> Any:
            return compiled(samples=made, **others)

        books, found = jax.block_until_ready(run())
        error = np.mean([np.asarray(side.error)[..., -1].mean() for side in found])
        rows = {"distortion": float(error), "key_norm": float(jnp.linalg.norm(books.key))}
        return rows | timed(run, config.repeats)

    facts = {"part": "fit", "what": scaling, "tokens": tokens, "stages": spec.key.stages}
    return Job(facts, (lowered,), measure)


def capture(config: Config, mesh: Mesh) -> Job:
    """Keys, values and sensitivities of a sequence for each of the devices along ``data``."""
    sizes = dataclasses.replace(config.sizes, layers=config.captured)
    graphdef, params = on_mesh(mesh, sizes)
    step = training.sharded_samples(mesh, sizes, graphdef, params, first=4, weigh=True)
    sequences = mesh.shape[DATA]
    tokens = shape_of(mesh, (sequences, config.length), jnp.int32, DATA)

    def measure(compiled: Any) -> dict[str, Any]:
        arrays = weights(params)
        rng = np.random.default_rng(0)
        rows = rng.integers(0, sizes.vocab_size, tokens.shape).astype(np.int32)
        rows = jax.device_put(rows, tokens.sharding)
        jax.block_until_ready(compiled(arrays, rows))
        took = timed(lambda: compiled(arrays, rows), config.repeats)
        rate = sequences * config.length / took["seconds"]
        return took | {"tokens_per_second": rate, "weight_bytes": bytes_of(arrays)}

    facts = {"part": "capture", "tokens": sequences * config.length, "layers": sizes.layers}
    return Job(facts, (step.lower(params, tokens),), measure)


# --- the command ----------------------------------------------------------------------------------


def jobs(config: Config) -> Iterator[tuple[dict[str, Any], Callable[[], Job]]]:
    """What is to be measured, in that order: the mesh, and what makes the job."""
    meshes = {shape: mesh_of(shape) for shape in config.meshes}
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    sizes = config.sizes
    token = 4 * sizes.layers * sizes.kv_heads * sizes.head_dim  # bytes in bfloat16
    _, shapes = llama.abstract(sizes, jnp.bfloat16)
    for part in config.parts:
        for shape, mesh in meshes.items():
            on = {"mesh": shape, "devices": mesh.size}
            if part in ("agree", "decode"):
                for context in config.contexts:
                    if part == "agree":
                        if mesh.size > 1:
                            yield on, functools.partial(agree, config, mesh, context)
                        continue
                    yield on, functools.partial(coded_loop, config, mesh, context)
                    needed = (token * context + 2 * llama.count(shapes)) / mesh.size
                    if needed < 0.9 * memory:
                        yield on, functools.partial(exact_loop, config, mesh, context)
            elif part == "fit":
                yield on, functools.partial(fit, config, mesh, config.tokens, "strong")
                if mesh.shape[DATA] > 1:
                    tokens = config.tokens * mesh.shape[DATA]
                    yield on, functools.partial(fit, config, mesh, tokens, "weak")
            else:
                yield on, functools.partial(capture, config, mesh)


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """Rows, as they are found; programs are compiled beside each other first."""
    with ThreadPoolExecutor(8) as pool:
        waiting = []
        for on, make in jobs(config):
            job = make()
            compiled = [pool.submit(x.compile, compiler_options=job.options) for x in job.lowered]
            waiting.append((on, job._replace(lowered=()), compiled))
    for on, job, compiled in waiting:
        yield job.facts | on | job.measure(*(x.result() for x in compiled))


def file_of(config: Config) -> pathlib.Path:
    """Of the rows of this many devices; CPU devices, which share their cores, have one apart."""
    kind = "cpu-" if jax.default_backend() == "cpu" else ""
    return config.out / "results" / f"scaling-{kind}{len(jax.devices())}.json"


def table(rows: list[Mapping[str, Any]]) -> str:
    """All rows as Markdown, beside those of one device."""
    lines = []
    found = [r for r in rows if r["part"] == "decode"]
    if found:
        lines += [
            "| tokens in the cache | mesh (data × model) | cache | tokens/s | cache, GB a GPU | "
            "weights, GB a GPU | difference from one GPU |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
    errors = {(r["context"], r["mesh"]): r["error"] for r in rows if r["part"] == "agree"}
    for r in sorted(found, key=lambda r: (r["context"], r["devices"])):
        error = errors.get((r["context"], r["mesh"])) if r["what"] == CODED else None
        lines.append(
            f"| {r['context']:,} | {r['mesh'].replace('x', ' × ')} | {r['what']} | "
            f"{r['tokens_per_second']:.1f} | {r['cache_bytes'] / 1e9:.2f} | "
            f"{r['weight_bytes'] / 1e9:.2f} | {'–' if error is None else f'{error:.1e}'} |"
        )
    found = [r for r in rows if r["part"] in ("fit", "capture")]
    if found:
        lines += [
            "",
            "| part | scaling | mesh (data × model) | tokens | seconds | times one device |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    ones = {r["part"]: r for r in found if r["devices"] == 1}
    for r in sorted(found, key=lambda r: (r["part"], r.get("what", ""), r["devices"])):
        one = ones.get(r["part"])
        times = "–"
        if one is not None:
            rate = r["tokens"] / r["seconds"] / (one["tokens"] / one["seconds"])
            times = f"{rate:.2f} ×"
        lines.append(
            f"| {r['part']} | {r.get('what', '–')} | {r['mesh'].replace('x', ' × ')} | "
            f"{r['tokens']:,} | {r['seconds']:.3f} | {times} |"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measures and writes, and prints the table of all result files there are."""
    if not config.table:
        rows: list[dict[str, Any]] = []
        command = f"python {repeated('benchmarks/scaling.py', instead={}, without=('--out',))}"
        for row in measure(config):
            print(json.dumps(row), flush=True)
            rows.append(row)
            write_result(file_of(config), rows, command=command, model=config.model)
    kind = "cpu-*" if jax.default_backend() == "cpu" and not config.table else "[0-9]*"
    files = sorted((config.out / "results").glob(f"scaling-{kind}.json"))
    print(table([r for f in files for r in json.loads(f.read_text(encoding="utf-8"))["rows"]]))


if __name__ == "__main__":
    commands.run(Config, main, None)
