"""Time of decode attention, and of whole decode steps, over a coded cache and over a bf16 one.

    python benchmarks/decode_speed.py                          # all of it, on this machine's device
    python benchmarks/decode_speed.py --seconds 300            # what comes first, and no longer
    python benchmarks/decode_speed.py --part attention --quick # a first look

``attention`` is one layer's operation at LLaMA-3-8B's shapes, timed in a program of several layers
one after the other, as a decode step has them; random codes. ``model`` is a decode loop of a model
of these shapes with random weights, over a cache that is filled with random numbers; ``prefill`` is
that model reading a prompt. Writes `results/decode-speed/<device>.json` row by row, those that
matter most first, and beside it a table and a plot; the same command goes on where one was cut off.
``--render FILE`` writes only these again.

Rivals are measured where torch is installed: its own attention, FlashAttention-3 (its package or
vLLM's) and FlashInfer, over bf16 caches and over fp8 ones (e4m3, scales of 1). One that is missing
or fails has a row that says why. Before a rival is timed, its output is compared with torch's
attention over the same numbers in bf16.

The largest batches have arrays of a quarter of the memory, which jax must own in one piece for
them. It does where torch needs none of it: with ``--part model``, or where no torch is installed.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import uniform_attention
from flax import nnx

from gsrq_jax.baselines.uniform import UniformSpec
from gsrq_jax.cache import init_cache
from gsrq_jax.codebook import Codebooks
from gsrq_jax.kernels import decode
from gsrq_jax.kernels.reference import Recent, scale_of
from gsrq_jax.models import commands, generation, llama
from gsrq_jax.models.config import LLAMA_3_8B, LlamaConfig
from gsrq_jax.results import commit, device, versions, write_result
from gsrq_jax.rope import turns
from gsrq_jax.spec import QuantSpec

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
TOY = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
)
MODELS = {"llama-3-8b": LLAMA_3_8B, "toy": TOY}
FULL, FP8 = "bf16", "fp8"
SINKS = 4
PAGE = 64  # tokens of a page of FlashInfer's caches: the largest that both its kernels take
# Bytes a second of the memory by the vendor's data sheet.
BY_VENDOR = "the vendor's data sheet"
VENDOR = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
# How far a rival's output may be from attention in bf16 over the same numbers, relatively. A query,
# probabilities and an output in fp8 are each 2 or 3 % off; what is read wrongly is 100 % off.
TOLERANCE = 0.15
ATTEND, APPEND = (
    "attend",
    "append",
)  # scopes of `gsrq_jax.attention.attend`, `gsrq_jax.cache.append`


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        part: ``attention``, ``model``, ``prefill`` or all.
        quick: the first shape, the first batch and context, and fewer layers and repetitions.
        shapes: batch x context of attention; the model's loop comes first, and with int8 weights,
            too, at the first four.
        bits: rates of the codes.
        layout: of the codes: ``tiles``, with 16 codewords a stage, or ``planes``, with two.
        together: rates at which planes that two KV heads share are measured, too.
        exact: tokens of the window beside the coded ones, in the same softmax, with sinks and a new
            token; 0 for coded tokens alone.
        fp8: also caches in fp8 (e4m3), by every attention for them.
        without: rows of bf16 and fp8 that are left out, such as ``fp8, FlashInfer XQA``: a kernel
            that reads where it may not takes the GPU from all that come after it.
        peers: uniformly rounded caches, ``int8`` and ``kivi2``, whose attention XLA compiles.
        block: tokens of a rotary frame; by default 1024 for contexts from 32k tokens on, else 512.
        unit: tokens that are encoded together, of which a frame has several; 0 for all of one.
        mean_every: tokens between knots of the mean key.
        repeat: layers of a program of attention; 0 for the model's. Their keys and values are those
            of as many as fill 2 GiB, at least two, time and again.
        at_least: seconds that a program of attention takes: its start takes some milliseconds.
        times: programs that are timed.
        model: whose shapes.
        layers: of the model's loop; 0 for all.
        batches: sequences of the model's loop.
        contexts: tokens in its cache at the end.
        steps: tokens that are decoded.
        unroll: the coded loop has its layers one after the other, as bf16's always has.
        prompts: tokens of prompts that are read and encoded.
        only_coded: leave out the model's loop in bf16.
        long: tokens of one more context, of one sequence; 0 for none.
        largest: also the largest batch that fits, by context, and the longest context of one
            sequence.
        weights: of the model's loop.
        memory: bytes of the device; by default what it says that it has.
        seconds: after which nothing more is begun; 0 for no end.
        jobs: programs that are compiled at a time; nothing is timed meanwhile.
        out: folder under which ``results`` lies.
        render: only write table and plot of this result file again.
    """

    part: Literal["attention", "model", "prefill", "all"] = "all"
    quick: bool = False
    shapes: tuple[str, ...] = (
        *("8x131072", "8x32768", "1x131072", "32x8192"),
        *("1x4096", "8x4096", "1x8192", "1x32768"),
    )
    bits: tuple[float, ...] = (1.0, 0.5)
    layout: Literal["tiles", "planes"] = "tiles"
    together: tuple[float, ...] = (1.0,)
    exact: int = 0
    fp8: bool = True
    without: tuple[str, ...] = ()
    peers: tuple[Literal["int8", "kivi2"], ...] = ("int8", "kivi2")
    block: int | None = None
    unit: int = 256
    mean_every: int = 16
    repeat: int = 0
    at_least: float = 0.3
    times: int = 15
    model: Literal["llama-3-8b", "toy"] = "llama-3-8b"
    layers: int = 0
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    steps: int = 128
    unroll: bool = True
    prompts: tuple[int, ...] = (8192, 32768)
    only_coded: bool = False
    long: int = 2**20
    largest: bool = True
    weights: tuple[Literal["bf16", "int8"], ...] = ("bf16", "int8")
    memory: float = 0
    seconds: float = 0
    jobs: int = max(1, min(16, (os.cpu_count() or 1) // 2))
    out: pathlib.Path = ROOT
    render: pathlib.Path | None = None

    @property
    def sizes(self) -> LlamaConfig:
        """Of the model."""
        sizes = MODELS[self.model]
        return dataclasses.replace(sizes, layers=self.layers) if self.layers else sizes

    def blocks(self, context: int) -> tuple[int, int]:
        """Tokens of a block in a cache of this length, and blocks of a frame."""
        frame = self.block or (1024 if context >= 32768 else 512)
        block = min(self.unit or frame, frame)
        return block, frame // block

    def spec(self, bits: float, context: int) -> QuantSpec:
        """Of a cache at this rate and of this length."""
        block, frame_blocks = self.blocks(context)
        layout: Any = self.layout
        return QuantSpec.from_bits(
            bits,
            self.sizes.head_dim,
            codewords=2 if layout == "planes" else 16,
            block=block,
            frame_blocks=frame_blocks,
            mean_every=self.mean_every,
            layout=layout,
        )

    @property
    def operations(self) -> int:
        """Layers of a program of attention."""
        return self.repeat or self.sizes.layers

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """`shapes` as numbers."""
        return [
            (int(batch), int(context)) for batch, context in (s.split("x") for s in self.shapes)
        ]

    @property
    def room(self) -> float:
        """Bytes of the device's memory, infinite where it does not say."""
        stats = jax.devices()[0].memory_stats() or {}
        return self.memory or float(stats.get("bytes_limit", math.inf))


def peer_spec(name: str, dim: int) -> UniformSpec:
    """Of a peer's cache."""
    make = {"int8": (UniformSpec.rounded, 8), "kivi2": (UniformSpec.kivi, 2)}
    of, bits = make[name]
    return of(bits, dim, block=128)


def on_gpu() -> bool:
    """Whether the device is one."""
    return jax.devices()[0].platform == "gpu"


def card() -> str:
    """The device's name in a file's."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    """Arrays from one compiled program, finished."""
    return jax.block_until_ready(jax.jit(make)(*arguments))


def microseconds(run: Callable[[], Any], count: int, times: int) -> dict[str, float]:
    """Median and interquartile range of ``run``'s time over ``count``."""
    jax.block_until_ready(run())
    took = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append((time.perf_counter() - start) / count * 1e6)
    quarters = np.percentile(took, [25, 50, 75])
    return {"microseconds": float(quarters[1]), "spread": float(quarters[2] - quarters[0])}


@functools.cache
def measured_bandwidth(times: int) -> float:
    """Bytes a second that the device's memory gives a program that only reads; the best time."""
    x = _made(lambda: jnp.ones((2**28 if on_gpu() else 2**20,), jnp.float32))

    @jax.jit
    def read(x: jax.Array) -> jax.Array:
        # Each round needs the one before, so that none is left out.
        return jax.lax.fori_loop(0, 20, lambda _, mean: jnp.abs(x - mean).mean(), x[0])

    took = [microseconds(lambda: read(x), 20, 1)["microseconds"] for _ in range(times)]
    return x.nbytes / min(took) * 1e6


def bandwidth(times: int) -> tuple[float, str]:
    """Bytes a second of the device's memory, and who says so."""
    if vendor := VENDOR.get(jax.devices()[0].device_kind):
        return vendor, BY_VENDOR
    return measured_bandwidth(times), "the best read measured here"


# --- attention ------------------------------------------------------------------------------------


def coded_layer(
    key: jax.Array, config: Config, bits: float, batch: int, context: int
) -> tuple[Any, ...]:
    """What `gsrq_jax.kernels.decode.attend_tiles` takes, but query and frequencies; random."""
    c, spec = config.sizes, config.spec(bits, context)
    frames, at = context // spec.frame_tokens, jax.random.split(key, 5)
    lead = batch, c.kv_heads, frames
    keys, values = (
        jax.random.bits(k, (*lead, spec.frame_blocks * s.shape[0], s.shape[1]), s.dtype)
        for k, s in zip(at, spec.code_shapes(), strict=False)
    )
    words, value_words = (
        jax.random.normal(k, (c.kv_heads, *code.codebook_shape)).astype(jnp.bfloat16)
        for k, code in ((at[2], spec.key), (at[3], spec.value))
    )
    mean = jax.random.normal(at[4], (c.kv_heads, c.head_dim))
    words *= jnp.bfloat16(spec.key.stages**-0.5)
    full = jnp.full((batch,), frames * spec.frame_blocks, jnp.int32)
    return mean, keys, values, words, value_words, full


def planes_layer(
    key: jax.Array, config: Config, bits: float, batch: int, context: int, heads: int
) -> tuple[Any, ...]:
    """What `gsrq_jax.kernels.decode.attend_planes` takes, like `coded_layer`; random.

    Args:
        heads: KV heads that share the bits of a token.
    """
    c, (block, fills) = config.sizes, config.blocks(context)
    frames, at = context // (block * fills), jax.random.split(key, 5)
    stages = round(bits * c.head_dim * heads)
    lead = batch, c.kv_heads // heads, frames, block * fills // 32, stages
    keys, values = (jax.random.bits(k, lead, jnp.uint32) for k in at[:2])
    words, value_words = (
        jax.random.normal(k, (c.kv_heads, 1, stages, 2, c.head_dim)) * stages**-0.5 for k in at[2:4]
    )
    mean = jax.random.normal(at[4], (c.kv_heads, c.head_dim))
    full = jnp.full((batch,), frames * fills, jnp.int32)
    return mean, keys, values, words.astype(jnp.bfloat16), value_words.astype(jnp.bfloat16), full


def exact_part(key: jax.Array, config: Config, batch: int) -> Recent | None:
    """Sinks, a full window and a new token, in bfloat16; random. None without a window."""
    if not config.exact:
        return None
    c, at = config.sizes, jax.random.split(key, 2)
    slots, full = (SINKS, config.exact, 1), functools.partial(jnp.full, (batch,), dtype=jnp.int32)
    keys, values = (
        [jax.random.normal(k, (batch, c.kv_heads, n, c.head_dim), jnp.bfloat16) for n in slots]
        for k in at
    )
    for made in keys, values:
        made[2] = jnp.swapaxes(made[2], 1, 2)
    return Recent(
        *keys, *values, sinks=full(SINKS), first=full(0), held=full(slots[1]), new=full(1)
    )


def exact_layer(
    key: jax.Array, config: Config, batch: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """Random keys and values in bfloat16."""
    c = config.sizes
    shape = (context, c.kv_heads, c.head_dim)

    def sequences(key: jax.Array) -> jax.Array:  # one at a time: what drawing needs is not little
        keys = jax.random.split(key, batch)
        return jax.lax.map(lambda key: jax.random.normal(key, shape, jnp.bfloat16), keys)

    k, v = map(sequences, jax.random.split(key))
    return k, v


def fp8_layer(
    key: jax.Array, config: Config, batch: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """The same in fp8."""
    k, v = exact_layer(key, config, batch, context)
    return k.astype(jnp.float8_e4m3fn), v.astype(jnp.float8_e4m3fn)


def rounded_layer(
    key: jax.Array, spec: UniformSpec, heads: int, batch: int, context: int
) -> tuple[Any, Any]:
    """Random codes of keys and values, and random grids."""
    lead = (batch, heads, context // spec.block)

    def draw(key: jax.Array, of: Any) -> jax.Array:
        shape = (*lead, *of.shape)
        if of.dtype == jnp.uint8:
            return jax.random.bits(key, shape, jnp.uint8)
        return (0.01 * jax.random.normal(key, shape)).astype(of.dtype)

    leaves, tree = jax.tree.flatten(spec.code_shapes())
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, list(map(draw, keys, leaves)))


@jax.named_scope(ATTEND)
def exact_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """The bf16 attention that jax has for this device."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if on_gpu() else "xla",
    )


def fp8_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """cuDNN's attention over fp8 with a query in fp8, as jax has it inside; the output, too, is in
    fp8, times `output_scale`."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def number(x: float) -> jax.Array:
        return jnp.full((1, 1, 1, 1), x, jnp.float32)

    scales: Any = dict.fromkeys(cudnn.fp8_params_keys, number(1))
    # Probabilities are at most 1: they get the range of fp8.
    scales |= {"scale_s": number(256), "descale_s": number(1 / 256)}
    scales["scale_o"] = number(output_scale(key.shape[1]))
    out, *_ = cudnn.dot_product_attention(
        query, key, value, fp8_params=scales, scale=scale_of(query.shape[-1]), use_fp8=True
    )
    return out


def output_scale(context: int) -> float:
    """What an output is multiplied by so that fp8 can hold it: a mean of random values is the
    smaller, the more tokens there are."""
    return 16 * math.sqrt(context)


def profile(run: Callable[[], Any], count: int, hlo: str) -> dict[str, float]:
    """Microseconds of the device over ``count``, by operation; empty where no device reports it.

    Where an operation comes from in the traced function of the compiled program ``hlo`` is noted
    behind it, after `` | ``. What runs in a CUDA graph is known by its kernel's name alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(file)
        scopes, kernels = scopes_of(hlo), kernels_of(hlo)
        found: dict[str, float] = collections.defaultdict(float)
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                for event in line.events if "Stream" in line.name else ():
                    made = scopes.get(str(dict(event.stats).get("hlo_op")))
                    scope = made or kernels.get(event.name)
                    name = f"{event.name} | {scope}" if scope else event.name
                    found[name] += event.duration_ns / 1e3 / count
    return dict(sorted(found.items(), key=lambda x: -x[1]))


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = ")


def scopes_of(hlo: str) -> dict[str, str]:
    """Where in the traced function each instruction of a compiled program comes from."""
    found: dict[str, str] = {}
    inner: dict[str, str] = {}  # of a computation: its last instruction that knows
    body = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?(\S+) \(.*\{$", line):
            body = opened[1]
        if not (made := INSTRUCTION.match(line)):
            continue
        named, calls = re.search(r'op_name="([^"]*)"', line), re.search(r"calls=%?([^\s,]+)", line)
        if named:
            scope = re.sub(r"\b(?:jit\(\w+\)|while|body|closed_call|eval_jaxpr)/", "", named[1])
            found[made[1]] = inner[body] = scope
        elif calls and calls[1] in inner:  # computations stand before their callers
            found[made[1]] = inner[calls[1]]
    return found


def kernels_of(hlo: str) -> dict[str, str]:
    """Where the kernels come from that XLA has made and named after an instruction.

    Equal instructions share one kernel: then as much as their scopes have in common.
    """
    scopes, found = scopes_of(hlo), collections.defaultdict(list)
    for line in hlo.splitlines():
        if made := INSTRUCTION.match(line):
            first = re.search(r'deduplicated_name="([^"]*)"', line)
            for name in {made[1], first[1] if first else made[1]}:
                found[re.sub(r"\W", "_", name)].append(scopes.get(made[1], ""))
    common = {name: os.path.commonpath(several) for name, several in found.items()}
    return {name: scope for name, scope in common.items() if scope}


def by_part(profile: Mapping[str, float]) -> dict[str, float]:
    """A profile's ``kernel`` of coded tokens, ``attend`` without it, ``append`` with encoding, the
    ``products`` (of weights, and all that are not known to be of those two) and the ``rest``."""
    parts = {"products": 0.0, "rest": 0.0}
    for operation, took in profile.items():
        name, _, scope = operation.partition(" | ")
        scoped = [part for part in scope.split("/") if part in (ATTEND, APPEND)]
        if name.startswith("attend_codes"):
            part = "kernel"
        elif re.match(r"attend_\w+_mosaic|(void )?cudnn", name):
            part = ATTEND
        elif scoped:
            part = scoped[0]
        elif re.search(r"gemm|gemv|nvjet|cutlass|cublas|dot", operation):
            part = "products"
        else:
            part = "rest"
        parts[part] = parts.get(part, 0.0) + took
    return parts if profile else {}


@dataclasses.dataclass(frozen=True)
class Way:
    """One attention that is timed.

    Attributes:
        what: its name.
        bits: of a stored number.
        query: makes a query from a key: scaled, where what rotates a model's query does it.
        attend: ``(query, *layer)`` to the output.
        layer: makes one layer's arrays from a key.
        want: ``(query, *layer)`` to what the output has to be within `TOLERANCE`, where others have
            written the attention.
    """

    what: str
    bits: float
    query: Callable[[jax.Array], jax.Array]
    attend: Callable[..., jax.Array]
    layer: Callable[[jax.Array], tuple[Any, ...]]
    want: Callable[..., jax.Array] | None = None


def ways(config: Config, batch: int, context: int) -> list[Way]:
    """All that jax runs: bf16, fp8, the peers, then each rate."""
    c = config.sizes
    group, scale = c.heads // c.kv_heads, scale_of(c.head_dim)

    def drawn(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (batch, 1, c.heads, c.head_dim))

    def in_fp8(key: jax.Array) -> jax.Array:
        return drawn(key).astype(jnp.float8_e4m3fn)

    def of_heads(key: jax.Array) -> jax.Array:
        return drawn(key).reshape(batch, 1, c.kv_heads, group, c.head_dim) * scale

    def rounded(query: jax.Array, key: Any, value: Any, spec: UniformSpec) -> jax.Array:
        return uniform_attention.attend(query[:, 0], key, value, spec)

    fills = config.blocks(context)[1]

    def coded(query: jax.Array, recent: Any, mean: jax.Array, *layer: Any) -> jax.Array:
        inv_freq = jnp.asarray(c.inv_freq)  # as in a model, the same in all layers
        attend = getattr(decode, f"attend_{config.layout}")
        how = {"first": SINKS, "every": config.mean_every, "fills": fills, "recent": recent}
        out, _ = attend(query, mean, inv_freq, *layer, **how)
        return out

    def with_exact(key: jax.Array, make: Callable[[jax.Array], tuple[Any, ...]]) -> tuple[Any, ...]:
        return exact_part(jax.random.fold_in(key, 1), config, batch), *make(key)

    def in_bf16(*arrays: jax.Array) -> jax.Array:
        exact = exact_attention(*(x.astype(jnp.bfloat16) for x in arrays))
        return exact.astype(jnp.float32) * output_scale(context)

    size: dict[str, Any] = {"batch": batch, "context": context}
    exact = functools.partial(exact_layer, config=config, **size)
    name = f"{FULL}, jax ({'cuDNN' if on_gpu() else 'XLA'})"
    found = [Way(name, 16, lambda key: drawn(key).astype(jnp.bfloat16), exact_attention, exact)]
    if config.fp8 and on_gpu():
        layer = functools.partial(fp8_layer, config=config, **size)
        found.append(Way(f"{FP8}, jax (cuDNN)", 8, in_fp8, fp8_attention, layer, in_bf16))
    for name in config.peers:
        spec = peer_spec(name, c.head_dim)
        layer = functools.partial(rounded_layer, spec=spec, heads=c.kv_heads, **size)
        attend = functools.partial(rounded, spec=spec)
        found.append(Way(f"{name}, XLA", spec.stored_bits, of_heads, attend, layer))
    for bits, heads in coded_rates(config):
        given: dict[str, Any] = {"config": config, "bits": bits, **size}
        if config.layout == "planes":
            layer = functools.partial(planes_layer, heads=heads, **given)
        else:
            layer = functools.partial(coded_layer, **given)
        layer = functools.partial(with_exact, make=layer)
        found.append(Way(coded_name(bits, heads), bits, of_heads, coded, layer))
    return found


def coded_rates(config: Config) -> list[tuple[float, int]]:
    """Rates of codes whose attention is measured, and KV heads that share them."""
    shared = config.together if config.layout == "planes" else ()
    both = {(bits, 1) for bits in config.bits} | {(bits, 2) for bits in shared}
    return sorted(both, key=lambda x: (-x[0], x[1]))


def coded_name(bits: float, heads: int = 1) -> str:
    """Of a row of codes."""
    return f"{bits:g} bit" + (f", {heads} heads together" if heads > 1 else "")


def distinct(nbytes: int, config: Config) -> int:
    """Layers of so many bytes that are made: more than the second-level cache holds."""
    return min(max(2, 2**31 // nbytes + 1), config.operations)


def rounds_within(batch: int, context: int) -> int:
    """Rounds through all layers that a program makes without the host, which else asks after each
    whether it was the last."""
    return min(32, max(1, 2**20 // (batch * context)))


def chained(way: Way, config: Config, batch: int, context: int) -> Any:
    """A query against all layers, one after the other, so many times `rounds_within`; compiled."""
    attend = jax.jit(way.attend)  # traced once
    query, layers = jax.eval_shape(way.query, jax.random.key(0)), layers_of(way, config)

    def through(_: Any, given: Any) -> Any:
        made, query, layers = given
        last, new = made[-1], []
        for i in range(config.operations):
            # Nothing is found once for all that have a layer's arrays.
            query, layer, last = jax.lax.optimization_barrier(
                (query, layers[i % len(layers)], last)
            )
            last = attend(query, *layer)
            new.append(last)
        return new, query, layers

    def run(query: jax.Array, layers: list[Any], rounds: jax.Array) -> Any:
        def again(_: Any, given: Any) -> Any:
            return jax.lax.fori_loop(0, rounds_within(batch, context), through, given)

        made = jax.eval_shape(attend, query, *layers[0])
        # What no one reads would not be made.
        nothing = [jnp.zeros(made.shape, made.dtype)] * config.operations
        return jax.lax.fori_loop(0, rounds, again, (nothing, query, layers))[0]

    return jax.jit(run).lower(query, layers, jnp.int32(1)).compile()


def layers_of(way: Way, config: Config) -> list[tuple[Any, ...]]:
    """The shapes of the layers that are made for it."""
    layer = jax.eval_shape(way.layer, jax.random.key(0))
    return [layer] * distinct(_bytes(layer), config)


def _bytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def measure_attention(
    way: Way, program: Any, config: Config, batch: int, context: int
) -> dict[str, Any]:
    """Of a program that `chained` made."""
    make = jax.jit(way.layer)
    keys = jax.random.split(jax.random.key(0), len(layers_of(way, config)))
    query, layers = way.query(jax.random.key(1)), list(map(make, keys))
    off = {}
    if way.want is not None:
        got, want = jax.jit(way.attend)(query, *layers[0]), jax.jit(way.want)(query, *layers[0])
        off = checked(*(np.asarray(x.astype(jnp.float32)) for x in (got, want)))
    run = functools.partial(program, query, layers)
    once = microseconds(lambda: run(jnp.int32(1)), 1, 3)["microseconds"]
    rounds, count = math.ceil(config.at_least * 1e6 / once), rounds_within(batch, context)
    count *= config.operations
    took = microseconds(lambda: run(jnp.int32(rounds)), rounds * count, config.times)
    operations = profile(lambda: run(jnp.int32(1)), count, program.as_text())
    if operations:
        took["device_microseconds"] = sum(operations.values())
    return took | off | by_part(operations) | {"operations": operations}


def checked(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """How far a rival's output is from what it has to be, relatively.

    Raises:
        RivalError: if that is further than `TOLERANCE`.
    """
    off = float(np.linalg.norm(got.reshape(want.shape) - want) / np.linalg.norm(want))
    if not off < TOLERANCE:
        raise RivalError(f"wrong: its output is {off:.3g} from that of bf16, relatively")
    return {"relative_error": off}


class RivalError(Exception):
    """Why an attention of others is not measured, in one line."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """An attention for torch.

    Attributes:
        load: imports it and returns ``(query [B,1,Q,d], key, value)`` to the output, which has the
            query's size; keys and values are ``[B,T,H,d]``, or ``[pages,H,64,d]`` in pages.
        fp8: the cache is in fp8.
        query8: so is the query.
        paged: the cache is in pages.
    """

    load: Callable[[], Callable[..., Any]]
    fp8: bool = False
    query8: bool = False
    paged: bool = False

    @property
    def bits(self) -> int:
        """Of a number of the cache."""
        return 8 if self.fp8 else 16


def rivals(fp8: bool) -> dict[str, Rival]:
    """All attentions for torch, by the names of their rows, whether they are there or not."""
    found = {
        "torch SDPA": Rival(lambda: sdpa),
        "FlashAttention-3": Rival(flash_attention),
        "FlashInfer": Rival(flashinfer_batch, paged=True),
        "FlashInfer XQA": Rival(flashinfer_xqa, paged=True),
    }
    rows = {f"{FULL}, {name}": rival for name, rival in found.items()}
    if fp8:
        for name, rival in list(found.items())[1:]:
            query8 = name == "FlashAttention-3"
            rows[f"{FP8}, {name}"] = dataclasses.replace(rival, fp8=True, query8=query8)
    return rows


def torch_attentions(fp8: bool = False) -> dict[str, Rival]:
    """`rivals` where torch has a GPU; else none, and one line that says so."""
    if not on_gpu():
        return {}
    try:
        import torch
    except ImportError as error:
        print(f"torch's attentions are left out: {error}", flush=True)
        return {}
    if not torch.cuda.is_available():
        print("torch's attentions are left out: it finds no GPU", flush=True)
        return {}
    return rivals(fp8)


def loaded(rival: Rival) -> Callable[..., Any]:
    """Its attention.

    Raises:
        RivalError: if it is not installed or does not load.
    """
    try:
        return rival.load()
    except ModuleNotFoundError as error:
        raise RivalError(f"not installed: no module {error.name!r}") from error
    except Exception as error:
        raise RivalError(f"does not load: {one_line(error)}") from error


def sdpa(query: Any, key: Any, value: Any) -> Any:
    """torch's own attention."""
    import torch

    by_head = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(*by_head, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attention() -> Callable[..., Any]:
    """FlashAttention-3: its own package, or else the part of vLLM's that does not need the rest.

    In fp8 it takes a query in fp8, too.

    Raises:
        ModuleNotFoundError: if neither is installed.
    """
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ModuleNotFoundError:
        pass
    else:
        return flash_attn_with_kvcache
    import torch
    from vllm.vllm_flash_attn import _vllm_fa3_C  # noqa: F401  (says what keeps it from loading)
    from vllm.vllm_flash_attn import flash_attn_interface as flash

    @functools.cache
    def planned(
        batch: int, heads: int, kv_heads: int, dim: int, tokens: int, dtype: Any
    ) -> dict[str, Any]:
        """What all layers of a step have in common, as vLLM makes it: once, before them."""
        kind = {"dtype": torch.int32, "device": "cuda"}
        starts, used = torch.arange(batch + 1, **kind), torch.full((batch,), tokens, **kind)
        plan = flash.get_scheduler_metadata(
            *(batch, 1, tokens, heads, kv_heads, dim, used), qkv_dtype=dtype, cu_seqlens_q=starts
        )
        return {"cu_seqlens_q": starts, "seqused_k": used, "scheduler_metadata": plan}

    def attend(query: Any, key: Any, value: Any) -> Any:
        (batch, _, heads, dim), (_, tokens, kv_heads, _) = query.shape, key.shape
        return flash.flash_attn_varlen_func(
            *(query[:, 0], key, value),
            max_seqlen_q=1,
            max_seqlen_k=tokens,
            fa_version=3,
            **planned(batch, heads, kv_heads, dim, tokens, key.dtype),
        )[:, None]

    return attend


def flashinfer_batch() -> Callable[..., Any]:
    """FlashInfer's decode over pages on tensor cores, planned once for all layers of a step."""
    import flashinfer
    import torch

    @functools.lru_cache(1)
    def planned(batch: int, heads: int, kv_heads: int, dim: int, pages: int, dtype: Any) -> Any:
        kind = {"dtype": torch.int32, "device": "cuda"}
        work = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            work, "HND", use_tensor_cores=True, backend="fa2"
        )
        starts, last = torch.arange(batch + 1, **kind) * pages, torch.full((batch,), PAGE, **kind)
        wrapper.plan(
            *(starts, torch.arange(batch * pages, **kind), last, heads, kv_heads, dim, PAGE),
            q_data_type=torch.bfloat16,
            kv_data_type=dtype,
        )
        return wrapper

    def attend(query: Any, key: Any, value: Any) -> Any:
        (batch, _, heads, dim), (pages, kv_heads, *_) = query.shape, key.shape
        wrapper = planned(batch, heads, kv_heads, dim, pages // batch, key.dtype)
        return wrapper.run(query[:, 0], (key, value))[:, None]

    return attend


def flashinfer_xqa() -> Callable[..., Any]:
    """FlashInfer's XQA over pages, TensorRT-LLM's decode kernel; in fp8 one made for Hopper."""
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    @functools.lru_cache(1)
    def planned(batch: int, pages: int) -> tuple[Any, Any, Any]:
        kind = {"dtype": torch.int32, "device": "cuda"}
        work = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
        table = torch.arange(batch * pages, **kind).reshape(batch, pages)
        return work, table, torch.full((batch,), pages * PAGE, **kind)

    def attend(query: Any, key: Any, value: Any) -> Any:
        (batch, _, _, dim), pages = query.shape, key.shape[0] // query.shape[0]
        return xqa_batch_decode_with_kv_cache(
            *(query[:, 0], (key, value), *planned(batch, pages), pages * PAGE),
            bmm1_scale=scale_of(dim),
            kv_layout="HND",
        )[:, None]

    return attend


def in_rows(pages: Any, batch: int) -> Any:
    """Pages ``[pages,H,64,d]`` of sequences one after the other as ``[B,T,H,d]``."""
    _, heads, tokens, dim = pages.shape
    apart = pages.reshape(batch, -1, heads, tokens, dim).swapaxes(2, 3)
    return apart.reshape(batch, -1, heads, dim)


def measure_torch(rival: Rival, config: Config, batch: int, context: int) -> dict[str, Any]:
    """Attention by torch, called from Python or replayed as a CUDA graph, whichever is faster."""
    import torch

    attend = loaded(rival)
    c, kind = config.sizes, {"dtype": torch.bfloat16, "device": "cuda"}
    # As SDPA likes them: heads before tokens. Seen the other way around, FlashAttention takes them.
    past: tuple[int, ...] = (batch, c.kv_heads, context, c.head_dim)
    if rival.paged:
        past = (batch * context // PAGE, c.kv_heads, PAGE, c.head_dim)

    def drawn(*shape: int, small: bool) -> Any:
        x = torch.randn(*shape, **kind)
        return x.to(torch.float8_e4m3fn) if small else x

    def right() -> dict[str, float]:
        full = (x.to(torch.bfloat16) for x in (query, *layers[0]))
        query16, *layer = full
        want = sdpa(query16, *(in_rows(x, batch) if rival.paged else x for x in layer))
        return checked(*(x.float().cpu().numpy() for x in (attend(query, *layers[0]), want)))

    try:
        query = drawn(batch, 1, c.heads, c.head_dim, small=rival.query8)
        layers = [
            [drawn(*past, small=rival.fp8) for _ in range(2)]
            for _ in range(distinct(2 * rival.bits * math.prod(past) // 8, config))
        ]
        if not rival.paged:
            layers = [[x.transpose(1, 2) for x in layer] for layer in layers]
        off = right()
        torch.cuda.empty_cache()

        def through() -> None:
            for i in range(config.operations):
                attend(query, *layers[i % len(layers)])

        def timed(step: Callable[[], None]) -> dict[str, float]:
            def run(rounds: int) -> None:
                for _ in range(rounds):
                    step()
                torch.cuda.synchronize()

            once = microseconds(lambda: run(1), 1, 3)["microseconds"]
            rounds = math.ceil(config.at_least * 1e6 / once)
            return microseconds(lambda: run(rounds), rounds * config.operations, config.times)

        found = [timed(through)]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                through()
            found.append(timed(graph.replay))
        except RuntimeError:  # not all can be captured
            traceback.print_exc()
        return min(found, key=lambda took: took["microseconds"]) | off
    except torch.cuda.OutOfMemoryError:
        return {"error": UNFIT}
    finally:
        torch.cuda.empty_cache()


# --- a model's decode loop ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.uniform(key, shape, dtype, -1, 1) * dtype.type(shape[-1] ** -0.5)


def random_params(shapes: Any) -> Any:
    """Parameters of these shapes, small enough for numbers to stay finite."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [_drawn(k, x.shape, jnp.dtype(x.dtype)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def compiled(program: Any, *arguments: Any) -> tuple[Any, float]:
    """It, compiled for the arguments, and the most bytes that it has at a time."""
    done = program.lower(*arguments).compile(compiler_options=generation.loop_options())
    m = done.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return done, float(held + m.temp_size_in_bytes)


def random_books(key: jax.Array, c: LlamaConfig, spec: QuantSpec) -> Codebooks:
    """Codebooks of all layers."""
    at = jax.random.split(key, 3)
    lead = (c.layers, c.kv_heads)
    words, value_words = (
        (0.3 * jax.random.normal(k, (*lead, *code.codebook_shape))).astype(jnp.bfloat16)
        for k, code in ((at[0], spec.key), (at[1], spec.value))
    )
    mean = jax.random.normal(at[2], (*lead, c.head_dim))
    inv_freq = jnp.broadcast_to(c.inv_freq, (c.layers, c.head_dim // 2))
    return Codebooks(words, value_words, mean, inv_freq, spec)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A decode loop: ``carry = step(*given, carry, steps)``, compiled before its arrays are made.

    Attributes:
        step: the loop.
        nbytes: the most bytes that it has at a time.
        make: ``(given, carry)``.
    """

    step: Any
    nbytes: float
    make: Callable[[], tuple[tuple[Any, ...], Any]]


def coded_loop(config: Config, bits: float, batch: int, context: int, weights: str) -> Loop:
    """`gsrq_jax.models.generation.decode`."""
    c, spec = config.sizes, config.spec(bits, context)
    graphdef, shapes = llama.abstract(c, jnp.bfloat16, int8=weights == "int8")
    if config.unroll:
        shapes = jax.eval_shape(functools.partial(llama.unrolled, graphdef), shapes)
    room = 2 * config.steps + 2

    def state(key: jax.Array) -> generation.DecodeState:
        cache = init_cache(
            spec,
            batch=batch,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            max_length=context + spec.block,
            layers=c.layers,
        )
        keys, values = (
            jax.lax.map(
                lambda k, of=of: jax.random.bits(k, of.shape[1:], of.dtype),
                jax.random.split(k, c.layers),
            )
            for k, of in zip(
                jax.random.split(key), (cache.key_codes, cache.value_codes), strict=True
            )
        )
        length = jnp.full_like(cache.length, context - room)
        return generation.DecodeState(
            cache=cache.replace(key_codes=keys, value_codes=values, length=length),
            token=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
            tokens=jnp.zeros((batch, room), jnp.int32),
            count=jnp.zeros(batch, jnp.int32),
            key=jax.random.key(0),
        )

    books = functools.partial(random_books, c=c, spec=spec)
    loop = functools.partial(generation.decode, graphdef, sampler=generation.Sampler(), eos=())
    keys = jax.random.split(jax.random.key(1))
    given = shapes, jax.eval_shape(books, keys[0])
    now = jax.eval_shape(state, keys[1])
    step, nbytes = compiled(jax.jit(loop, donate_argnums=2), *given, now, jnp.int32(1))

    filled = jax.jit(state).lower(keys[1]).compile()

    def make() -> tuple[tuple[Any, ...], Any]:
        return (random_params(shapes), _made(books, keys[0])), filled(keys[1])

    return Loop(step, nbytes, make)


def exact_loop(config: Config, batch: int, context: int, weights: str) -> Loop:
    """The same over keys and values in bf16, by the best attention that jax has.

    Layers are unrolled, each with weights and a cache of its own, which is updated in place: no
    array is ever cut out of a stack.
    """
    c = config.sizes
    one = dataclasses.replace(c, layers=1)
    stacked = llama.abstract(one, jnp.bfloat16, int8=weights == "int8")
    apart = jax.eval_shape(functools.partial(llama.unrolled, stacked[0]), stacked[1])
    graphdef, shapes = apart.graphdef, apart.first
    blocks, of_layer = nnx.split(nnx.merge(graphdef, shapes).layers)
    of_cache = functools.partial(exact_layer, config=config, batch=batch, context=context)
    start = jnp.int32(context - 2 * config.steps - 2), jnp.zeros(batch, jnp.int32)

    def token(params: Any, layers: Any, carry: Any) -> Any:
        at, tokens, caches = carry
        model = nnx.merge(graphdef, params)
        h = model.embed_tokens(tokens[:, None])
        lengths, new = jnp.full((batch,), at + 1), []
        turn = turns(jnp.full((batch, 1, 1), at), c.inv_freq)
        for layer, (keys, values) in zip(layers, caches, strict=True):

            def attention(
                q: Any, k: Any, v: Any, _: Any, keys: Any = keys, values: Any = values
            ) -> Any:
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
                keys, values = put(keys, k, start_index=at), put(values, v, start_index=at)
                return exact_attention(q, keys, values, lengths), (keys, values)

            h, cache = nnx.merge(blocks, layer)(h, turn, attention, None)
            new.append(cache)
        logits = model.logits(model.norm(h))[:, 0]
        return at + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), new

    def loop(params: Any, layers: Any, carry: Any, steps: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, x: token(params, layers, x), carry)

    keys = jax.random.split(jax.random.key(0), c.layers)
    now = (*start, [jax.eval_shape(of_cache, keys[0])] * c.layers)
    given = shapes, [of_layer] * c.layers
    step, nbytes = compiled(jax.jit(loop, donate_argnums=2), *given, now, jnp.int32(1))

    made = jax.jit(of_cache).lower(keys[0]).compile()

    def make() -> tuple[tuple[Any, ...], Any]:
        layers = [random_params(of_layer) for _ in range(c.layers)]
        return (random_params(shapes), layers), (*start, [made(key) for key in keys])

    return Loop(step, nbytes, make)


def loop_of(config: Config, what: str, batch: int, context: int, weights: str) -> Loop:
    """The decode loop over this cache."""
    if what == FULL:
        return exact_loop(config, batch, context, weights)
    return coded_loop(config, float(what.split()[0]), batch, context, weights)


def measure_model(loop: Loop, config: Config, batch: int) -> dict[str, Any]:
    """Tokens a second of all sequences together.

    ``bytes`` are what the compiled loop holds, ``peak_bytes`` what the device had in use at most,
    if it never had more before.
    """

    def peak() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    before = peak()
    given, carry = loop.make()

    def run(steps: int) -> Any:
        nonlocal carry
        carry = loop.step(*given, carry, jnp.int32(steps))
        return jax.block_until_ready(carry)

    run(2)
    start = time.perf_counter()
    run(config.steps)
    took = time.perf_counter() - start
    row = {"tokens_per_second": batch * config.steps / took, "bytes": loop.nbytes}
    if peak() > before:
        row["peak_bytes"] = peak()
    operations = profile(lambda: run(config.steps), config.steps, loop.step.as_text())
    return row | by_part(operations) | {"operations": operations}


def prefill_of(config: Config, what: str, context: int) -> Loop:
    """The program that reads one prompt of so many tokens and encodes it, layer by layer."""
    c = config.sizes
    graphdef, shapes = llama.abstract(c, jnp.bfloat16)
    spec = None if what == FULL else config.spec(float(what.split()[0]), context)

    def books() -> Codebooks | None:
        return None if spec is None else random_books(jax.random.key(1), c, spec)

    tokens, count = jnp.zeros((1, context), jnp.int32), jnp.full(1, context)
    read = functools.partial(generation.prefill, graphdef, max_length=context)
    program = jax.jit(read).lower(shapes, tokens, count, jax.eval_shape(books)).compile()
    return Loop(program, 0, lambda: ((random_params(shapes), tokens, count), _made(books)))


def measure_prefill(program: Loop) -> dict[str, Any]:
    """Its time; ``device_microseconds`` is that of its operations."""
    given, codec = program.make()
    run = functools.partial(program.step, *given, codec)
    row: dict[str, Any] = dict(microseconds(run, 1, 3))
    operations = profile(run, 1, program.step.as_text())
    parts = by_part(operations)
    if operations:
        row["device_microseconds"] = sum(operations.values())
    return row | parts | {"operations": operations}


def cache_bytes(config: Config, what: str, batch: int, context: int) -> int:
    """Of a model's cache, without making it."""
    c = config.sizes
    if what == FULL:
        return 4 * batch * context * c.layers * c.kv_heads * c.head_dim
    spec = config.spec(float(what.split()[0]), context)
    make = functools.partial(
        init_cache,
        spec,
        batch=batch,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_length=context + spec.block,
        layers=c.layers,
    )
    return jax.eval_shape(make).nbytes


def weight_bytes(config: Config, weights: str) -> int:
    """Of a model's parameters, without making them."""
    _, shapes = llama.abstract(config.sizes, jnp.bfloat16, int8=weights == "int8")
    return _bytes(shapes)


def fits(config: Config, what: str, memory: float, context: int | None) -> tuple[int, int]:
    """Batch and context of the largest cache, by estimate: one of the two is sought.

    A tenth of the memory is left for what is on the way. Many sequences are a multiple of 8, so
    that products need no filling up.
    """
    left = 0.9 * memory - weight_bytes(config, "bf16")
    if context is not None:
        one, two = (cache_bytes(config, what, n, context) for n in (1, 2))
        most = max(1, math.floor(1 + (left - one) / (two - one)))
        return most - most % 8 if most >= 64 else most, context
    step = 64 * 1024
    one, two = (cache_bytes(config, what, 1, n * step) for n in (1, 2))
    return 1, max(1, math.floor(1 + (left - one) / (two - one))) * step


# --- the command ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row to be.

    Attributes:
        row: what it is of. A batch that is as large as fits has its ``estimate`` beside it:
            it may become smaller when it is measured.
        rank: those of a lower one come first.
        prepare: compiles what it needs.
        measure: the rest of the row, from what was prepared.
    """

    row: dict[str, Any]
    rank: int
    prepare: Callable[[], Any]
    measure: Callable[[Any], dict[str, Any]]


def planned(config: Config) -> list[Measurement]:
    """All rows, those that matter most first: the first shapes of attention, then of the model the
    same shapes, the most sequences and one long one, the other shapes of attention, prompts, int8
    weights, and the other shapes; of several rates the first."""
    found: list[Measurement] = []
    whats = [FULL, *(f"{bits:g} bit" for bits in config.bits)]
    late = {what: 5 for what in whats[2:]}

    def attention(rank: int, batch: int, context: int) -> None:
        def add(what: str, bits: float, prepare: Any, measure: Any) -> None:
            if what in config.without:
                return
            row = {"part": "attention", "what": what, "batch": batch, "context": context}
            found.append(Measurement(row | {"bits": bits}, rank, prepare, measure))

        def by_jax(way: Way, program: Any) -> dict[str, Any]:
            return measure_attention(way, program, config, batch, context)

        def by_torch(rival: Rival, _: None) -> dict[str, Any]:
            return measure_torch(rival, config, batch, context)

        for way in ways(config, batch, context):
            add(
                way.what,
                way.bits,
                functools.partial(chained, way, config, batch, context),
                functools.partial(by_jax, way),
            )
            for name, rival in torch.items():
                if name.split(",")[0] == way.what.split(",")[0]:
                    add(
                        name,
                        rival.bits,
                        lambda: None,
                        functools.partial(by_torch, rival),
                    )

    def model(
        rank: int, what: str, batch: int, context: int, weights: str, largest: bool = False
    ) -> None:
        row = {"part": "model", "what": what, "batch": batch, "context": context}
        row |= {"weights": weights, "layers": config.sizes.layers, "steps": config.steps}
        if any(other.row.items() >= row.items() for other in found):
            return

        def prepare(batch: int = batch) -> Loop | None:
            needed = weight_bytes(config, weights) + cache_bytes(config, what, batch, context)
            return loop_of(config, what, batch, context, weights) if needed < config.room else None

        def measure(loop: Loop | None, batch: int = batch) -> dict[str, Any]:
            return {"error": UNFIT} if loop is None else measure_model(loop, config, batch)

        def measure_fewer(loop: Loop | None) -> dict[str, Any]:
            return largest_of(batch, lambda n: measure(loop if n == batch else prepare(n), n))

        if largest:
            row["estimate"] = batch
        found.append(Measurement(row, rank, prepare, measure_fewer if largest else measure))

    first = config.pairs[:4]
    if config.part in ("all", "attention"):
        torch = torch_attentions(config.fp8)
        for shape in config.pairs:
            attention(0 if shape in first else 2, *shape)
    if config.part in ("all", "prefill"):
        for i, (context, what) in enumerate(itertools.product(config.prompts, whats)):
            row = {"part": "prefill", "what": what, "batch": 1, "context": context}
            prepare = functools.partial(prefill_of, config, what, context)
            rank = late.get(what, 2 if i < len(whats) else 4)
            row |= {"layers": config.sizes.layers}
            found.append(Measurement(row, rank, prepare, measure_prefill))
    if config.part in ("all", "model"):
        whats = whats[1:] if config.only_coded else whats
        room = config.room if config.largest else math.inf
        shapes = [(b, n) for n, b in itertools.product(config.contexts, config.batches)]
        shapes.sort(key=lambda shape: shape not in first)
        for weights, shape, what in itertools.product(config.weights, shapes, whats):
            if shape in first:
                model(late.get(what, 1 if weights == "bf16" else 3), what, *shape, weights)
            elif weights == "bf16":
                model(late.get(what, 4), what, *shape, weights)
        for context, what in itertools.product(config.contexts, whats):
            if room < math.inf:
                middle = context == sorted(config.contexts)[len(config.contexts) // 2]
                rank = late.get(what, 1 if middle else 4)
                model(rank, what, *fits(config, what, room, context), "bf16", largest=True)
        for what in whats:
            if config.long:
                model(late.get(what, 2), what, 1, config.long, "bf16")
            if room < math.inf:
                model(late.get(what, 4), what, *fits(config, what, room, None), "bf16")
    return sorted(found, key=lambda m: m.rank)


def is_of(row: Mapping[str, Any], planned: Mapping[str, Any]) -> bool:
    """Whether a row is what was planned, measured."""
    sought = {"batch"} if "estimate" in planned else set()
    return all(name in sought or row.get(name) == x for name, x in planned.items())


def run(config: Config, done: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
    """Rows that are not ``done``, as they are measured.

    Some are compiled at a time, by as many threads, and then timed one after the other.
    """
    end = time.monotonic() + (config.seconds or math.inf)
    missing = [m for m in planned(config) if not any(is_of(row, m.row) for row in done)]
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        for i in range(0, len(missing), config.jobs):
            some: list[Any] = []
            if time.monotonic() < end:
                some = [(m, pool.submit(m.prepare)) for m in missing[i : i + config.jobs]]
                concurrent.futures.wait([made for _, made in some])
            if time.monotonic() > end:
                print("the time is up; the same command goes on from here", flush=True)
                return
            while some:
                m, made = some.pop(0)  # forgets what the one before held
                row = m.row | _outcome(lambda m=m, made=made: m.measure(made.result()))
                if row["part"] == "attention" and "error" not in row:
                    row["floor_microseconds"] = floor(config, row, bandwidth(config.times)[0])
                print({name: x for name, x in row.items() if name != "operations"}, flush=True)
                yield row


UNFIT = "does not fit"


def _outcome(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measured, or the error that kept it from that: other rows are to be had yet."""
    try:
        return measure()
    except RivalError as error:
        return {"error": str(error)}
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return {"error": UNFIT}
        traceback.print_exc()
        return {"error": one_line(error)}


def one_line(error: Exception) -> str:
    """Its type and the first line of what it says."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def largest_of(batch: int, measure: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """A row of so many sequences, or where they do not fit, of up to four times 5 % fewer."""
    row = _outcome(functools.partial(measure, batch))
    for _ in range(4):
        if row.get("error") != UNFIT or batch == 1:
            break
        batch = batch * 19 // 20
        row = _outcome(functools.partial(measure, batch))
    return row | {"batch": batch}


def floor(config: Config, row: Mapping[str, Any], speed: float) -> float:
    """Microseconds that keys and values alone take at ``speed`` bytes a second."""
    c = config.sizes
    numbers = row["batch"] * row["context"] * 2 * c.kv_heads * c.head_dim
    return numbers * row["bits"] / 8 / speed * 1e6


def floored(data: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A result's rows with floors, and what these are.

    Floors by the vendor's bandwidth are computed here. Files of before December 2026 have floors by
    a copy that was measured, and their tables are then right, too.
    """
    rows = [dict(row) for row in data["rows"]]
    speed, of = data.get("memory", {}).get("bytes_per_second"), data.get("memory", {}).get("of")
    if vendor := VENDOR.get(data["device"]):
        speed, of = vendor, BY_VENDOR
        config = Config(model=data["config"].get("model", Config.model))
        for row in rows:
            if "floor_microseconds" in row:
                row["floor_microseconds"] = floor(config, row, vendor)
    if speed is None:
        return rows, "Floor: the bytes of keys and values alone."
    return rows, (f"Floor: the bytes of keys and values alone, at {speed / 1e12:.3g} TB/s ({of}).")


def best_of(
    rows: Sequence[Mapping[str, Any]], kind: str
) -> dict[tuple[int, int], Mapping[str, Any]]:
    """Of each shape, the fastest row of attention over a cache of this kind."""
    best: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        if row["part"] == "attention" and row["what"].startswith(kind) and "error" not in row:
            shape = row["batch"], row["context"]
            if shape not in best or row["microseconds"] < best[shape]["microseconds"]:
                best[shape] = row
    return best


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of attention with how many times as fast as the best bf16 and the best fp8 of their
    shape they are."""
    best, best8 = best_of(rows, FULL), best_of(rows, FP8)
    found = []
    for row in rows:
        more = {}
        if row["part"] == "attention" and "error" not in row:
            shape = row["batch"], row["context"]
            if base := best.get(shape):
                more["times"] = base["microseconds"] / row["microseconds"]
                if "kernel" in row:
                    more["times_kernel"] = base["microseconds"] / row["kernel"]
            if base := best8.get(shape):
                more["times_fp8"] = base["microseconds"] / row["microseconds"]
        found.append({**row, **more})
    return found


def bars(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table with a line a shape: the best bf16 and fp8, and every rate of codes beside both."""
    rows = [r for r in rows if r["part"] == "attention"]
    best, best8 = best_of(rows, FULL), best_of(rows, FP8)
    rates = list(dict.fromkeys(r["what"] for r in rows if re.match(r"[\d.]+ bit", r["what"])))
    if not (rates and best):
        return []

    def of(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return "–"
        return f"{row['microseconds']:.1f} ({row['what'].partition(', ')[2]})"

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None or "error" in row:
            return row["error"] if row else "–"
        both = (f"{row[name]:.1f} ×" if name in row else "–" for name in ("times", "times_fp8"))
        return f"{row['microseconds']:.1f}: " + ", ".join(both)

    lines = [
        "Microseconds of the whole operation; codes: how many times as fast as the best bf16, as "
        "the best fp8:",
        "",
        f"| batch × context | best bf16 | best fp8 | {' | '.join(rates)} |",
        "| --- | --- | --- |" + " --- |" * len(rates),
    ]
    of_codes = {(r["batch"], r["context"], r["what"]): r for r in rows if r["what"] in rates}
    for shape in dict.fromkeys((r["batch"], r["context"]) for r in rows):
        cells = (cell(of_codes.get((*shape, rate))) for rate in rates)
        lines.append(
            f"| {shape[0]} × {shape[1]:,} | {of(best.get(shape))} | {of(best8.get(shape))} "
            f"| {' | '.join(cells)} |"
        )
    return [*lines, ""]


def markdown(data: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        f"`{data['command']}` on {data['device']}, jax {data['versions']['jax']}, "
        f"{data['date'][:10]}.",
        "",
    ]
    found, floors = floored(data)
    rows = [r for r in compared(found) if r["part"] == "attention"]
    if rows:
        lines += [
            *bars(rows),
            floors,
            "",
            "| batch × context | attention | µs | on the device | of it the kernel | floor "
            "| times bf16 | the kernel alone | times fp8 |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for r in rows:
        device, kernel, least, took = (
            f"{r[name]:.1f}" if name in r else "–"
            for name in ("device_microseconds", "kernel", "floor_microseconds", "microseconds")
        )
        times, alone, times8 = (
            f"{r[n]:.1f} ×" if r.get(n) else "–" for n in ("times", "times_kernel", "times_fp8")
        )
        lines.append(
            f"| {r['batch']} × {r['context']:,} | {r['what']} | {r.get('error', took)} | {device} "
            f"| {kernel} | {least} | {times} | {alone} | {times8} |"
        )
    rows = [r for r in data["rows"] if r["part"] == "model"]
    parts = ("kernel", ATTEND, APPEND, "products", "rest")
    if rows:
        lines += [
            "",
            f"Decode loop of {data['config']['model']}'s shapes, {rows[0]['layers']} layers, "
            "random weights, random cache; a step by part, in ms of the device: the kernel of "
            "coded tokens, the rest of attention, the cache's growth, matrix products (all of "
            "cuBLAS, small ones of attention among them), all else:",
            "",
            "| batch × context | cache | weights | tokens/s | memory, GB | "
            + " | ".join(parts)
            + " |",
            "| --- | --- | --- | --- | --- |" + " --- |" * len(parts),
        ]
    for r in rows:
        speed = f"{r['tokens_per_second']:.0f}" if "error" not in r else r["error"]
        memory = f"{r['bytes'] / 1e9:.1f}" if "error" not in r else "–"
        took = " | ".join(f"{r[part] / 1e3:.2f}" if part in r else "–" for part in parts)
        lines.append(
            f"| {r['batch']} × {r['context']:,} | {r['what']} | {r.get('weights', FULL)} | {speed} "
            f"| {memory} | {took} |"
        )
    rows = [r for r in data["rows"] if r["part"] == "prefill"]
    if rows:
        lines += [
            "",
            f"Reading one prompt, {rows[0]['layers']} layers, exact attention, each layer's keys "
            "and values encoded greedily:",
            "",
            "| tokens | cache | ms | more than bf16 | of the device, not taken by bf16 |",
            "| --- | --- | --- | --- | --- |",
        ]
    good = [r for r in rows if "error" not in r]
    exact = {r["context"]: r for r in good if r["what"] == FULL}
    for r in good:
        full = exact.get(r["context"], {})
        more = r["microseconds"] / full.get("microseconds", math.nan) - 1
        taken = "device_microseconds"
        share = f"{1 - full[taken] / r[taken]:.1%}" if taken in r and taken in full else "–"
        lines.append(
            f"| {r['context']:,} | {r['what']} | {r['microseconds'] / 1e3:.1f} | {more:+.1%} "
            f"| {share} |"
        )
    lines += [
        f"| {r['context']:,} | {r['what']} | {r['error']} | | |" for r in rows if r not in good
    ]
    return "\n".join([*lines, ""])


def picture(data: Mapping[str, Any], path: pathlib.Path) -> None:
    """Microseconds of attention by shape, against the floor of their bytes."""
    found, _ = floored(data)
    rows = [r for r in found if r["part"] == "attention" and "error" not in r]
    shapes = list(dict.fromkeys((r["batch"], r["context"]) for r in rows))
    whats = list(dict.fromkeys(r["what"] for r in rows))
    figure, axis = plt.subplots(figsize=(8, 4))
    for i, what in enumerate(whats):
        of = {(r["batch"], r["context"]): r for r in rows if r["what"] == what}
        places = [n + 0.8 * (i / len(whats) - 0.5) for n, s in enumerate(shapes) if s in of]
        took = [of[s]["microseconds"] for s in shapes if s in of]
        bars = axis.bar(places, took, 0.8 / len(whats), align="edge", label=what)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
        floors = [of[s]["floor_microseconds"] for s in shapes if s in of]
        width = 0.8 / len(whats)
        axis.hlines(floors, places, [p + width for p in places], colors="black", lw=1)
    axis.set_yscale("log")
    axis.set_ylabel("µs a layer; the line: its bytes alone")
    axis.set_xticks(range(len(shapes)), [f"{b} × {n:,}" for b, n in shapes])
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def earlier(file: pathlib.Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that the same command has measured here with the same code before it was cut off."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    here = {"config": fields, "device": device(), "commit": commit(), "versions": versions()}
    if any(data.get(name) != value for name, value in here.items()):
        return []
    return [row for row in data["rows"] if row.get("error", UNFIT) == UNFIT]


def main(config: Config) -> None:
    """Measures, writes the result file, and table and plot from it."""
    if config.part in ("attention", "all") and importlib.util.find_spec("torch"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too
    if config.quick:
        config = dataclasses.replace(
            config,
            shapes=config.shapes[:1],
            batches=config.batches[:1],
            contexts=config.contexts[:1],
            prompts=config.prompts[:1],
            long=0,
            largest=False,
            layers=min(4, config.sizes.layers),
            repeat=min(3, config.operations),
            times=min(5, config.times),
        )
    file = config.render or config.out / "results" / "decode-speed" / f"{card()}.json"
    if config.render is None:
        fields = dataclasses.asdict(config)
        for name in ("out", "render", "seconds", "jobs"):
            fields.pop(name)
        fields = json.loads(json.dumps(fields))
        command = shlex.join(["python", "benchmarks/decode_speed.py", *sys.argv[1:]])
        rows = earlier(file, fields)
        more: dict[str, Any] = {"config": fields}
        for row in run(config, rows):
            rows.append(row)
            if "floor_microseconds" in row:
                more["memory"] = dict(
                    zip(("bytes_per_second", "of"), bandwidth(config.times), strict=True)
                )
            write_result(file, compared(rows), command=command, **more)
        if not rows:
            return
    data = json.loads(file.read_text(encoding="utf-8"))
    table = markdown(data)
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    if any(r["part"] == "attention" and "error" not in r for r in data["rows"]):
        picture(data, file.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    commands.run(Config, main, None)
