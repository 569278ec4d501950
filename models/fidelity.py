"""``gsrq-fidelity``: perplexity, KL and top-1 agreement of methods against full precision.

Protocol: sequences of ``length`` tokens of a held-out text, the first at its beginning, the others
``stride`` tokens after the one before; each one teacher-forced pass, sinks and exactly ``window``
past tokens exact (`gsrq_jax.models.evaluation`). Each prediction counts once. With
``--attention codes`` or ``fused`` instead over the cache of the decode loop, which has between
``window`` and ``window`` and a block less one exact, some tokens at a time.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Int
from tqdm import tqdm

from gsrq_jax import codec, results
from gsrq_jax.cache import init_cache
from gsrq_jax.codec import Codec
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.layouts import LAYOUTS
from gsrq_jax.models import evaluation, loading, methods, text
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.models.methods import Calibration
from gsrq_jax.models.runfolder import claim, writing
from gsrq_jax.spec import CacheSpec


@dataclasses.dataclass(frozen=True)
class FidelityConfig:
    """Perplexity, KL and top-1 agreement of quantised caches against full precision.

    Attributes:
        method: ``gsrq@1``, ``kivi2`` …, or folders of codebooks, ``+`` options as in
            ``gsrq@1+k16+beam8``; an unknown method or option names them all.
        eval_text: held-out text file to measure on.
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        window: numbers of recent tokens that stay exact, one result each.
        sinks: first tokens that stay exact.
        sequences: at most so many.
        length: tokens of each.
        stride: tokens from one to the next; by default they do not overlap.
        calibration: what methods that learn are fitted to.
        work: folder where fitted methods are kept for the next run.
        dtype: of the model.
        attention: ``pass``, one teacher-forced pass; or over a real cache in the layout of a GPU
            kernel that takes the codes, 8 tokens at a time, by plain jnp (``codes``) or the kernel
            (``fused``).
        out: folder of the results, for each length one of a JSON file a method and window; what
            is there is not measured again.
    """

    method: tyro.conf.UseAppendAction[tuple[str, ...]]
    eval_text: str
    model: str = "demo"
    window: tuple[int, ...] = (128,)
    sinks: int = 4
    sequences: int = 24
    length: int = 2048
    stride: int | None = None
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    work: pathlib.Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["pass", "codes", "fused"] = "pass"
    out: pathlib.Path = pathlib.Path("results/fidelity")


def _laid_out(method: Codec) -> Codec:
    """The same codec for caches in the layout of a GPU kernel.

    Raises:
        InputError: if none takes its codes, with the reason of each.
    """
    reasons = []
    for name, layout in LAYOUTS.items():
        if layout.kernel == "gpu":
            try:
                return codec.respec(method, layout=name)
            except InputError as error:
                reasons.append(str(error))
    raise InputError("; or ".join(dict.fromkeys(reasons)))


def measure(config: FidelityConfig) -> list[pathlib.Path]:
    """Run what is not there yet; returns all files that were asked for.

    Raises:
        InputError: for whatever in ``config`` cannot be used, and where ``out`` holds results of
            another model, text, calibration or other sinks.
    """
    if min(config.window, default=-1) < 0:
        raise InputError("--window takes numbers from 0 up, at least one")
    at_least(1, "--", sequences=config.sequences)
    names = [name for name in dict.fromkeys(config.method) if name != methods.FULL]
    if not names:
        raise InputError("no method to measure is named; give at least one, such as gsrq@1")
    model = loading.load(config.model, dtype=config.dtype)
    sequences = _sequences(config, model)
    out = config.out / str(config.length)
    asked = {
        "model": model.fingerprint,
        "eval_text": hashlib.sha256(sequences.tobytes()).hexdigest(),
        "stride": config.stride,
        "sinks": config.sinks,
        "dtype": config.dtype,
        "calibration": dataclasses.asdict(config.calibration)
        | {"text": pathlib.Path(config.calibration.text).name},
    }
    with writing(out):
        claim(out, "fidelity", asked, begin=False)
        streamed = None if config.attention == "pass" else config.attention
        way = "" if streamed is None else f"-{streamed}"
        files = {
            (name, window): out / f"{file_name(name)}-w{window}{way}.json"
            for name in names
            for window in dict.fromkeys(config.window)
        }
        if len(set(files.values())) < len(files):
            raise InputError(f"two of {', '.join(names)} would share a file; rename one")
        left = {key: file for key, file in files.items() if not file.exists()}
        codecs = methods.resolve(
            dict.fromkeys(name for name, _ in left),
            model,
            config.calibration,
            config.work,
            window=128,
            sinks=config.sinks,
        )
        if streamed is not None:
            codecs = {name: _laid_out(one) for name, one in codecs.items() if one is not None}
        claim(out, "fidelity", asked)
        arguments = (model.graphdef, model.params)
        tokens = [jnp.asarray(s)[None] for s in sequences] if left else []
        exact = [evaluation.exact_hidden(*arguments, row) for row in tokens]
        for (name, window), file in files.items():
            if (name, window) in left:
                method = codecs[name]
                assert method is not None
                if streamed is not None:
                    method = codec.respec(method, window=window)
                found = evaluation.fidelity(
                    *arguments,
                    tqdm(sequences, desc=f"{name}, window {window}", unit="seq"),
                    method,
                    window=window,
                    stride=config.stride,
                    exact=exact,
                    streamed=streamed,
                )
                rows = _rows(config, model, name, method.spec, window, found)
                command = results.repeated(
                    "gsrq-fidelity",
                    instead={"--method": name, "--window": window},
                    without=("--work",),
                )
                results.write_result(file, rows, command=command)
            row = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
            rise = row["value"] / row["full_precision"] - 1
            print(f"{name}, window {window}: perplexity {row['value']:.3f}, {rise:+.2%}")
    return list(files.values())


def _sequences(config: FidelityConfig, model: loading.LoadedModel) -> Int[np.ndarray, "n T"]:
    tokenizer = model.needed_tokenizer()
    if not 2 <= config.length <= model.config.max_length:
        raise InputError(
            f"--length must be from 2 to the context of {model.name}, {model.config.max_length}, "
            f"got {config.length}"
        )
    start = tokenizer.encode("")
    room = config.length - len(start)
    stride = room if config.stride is None else config.stride
    if not 1 <= stride <= room:
        raise InputError(f"--stride must be from 1 to {room}, got {config.stride}")
    pieces = text.read(config.eval_text)
    wanted = room + (config.sequences - 1) * stride
    ids = text.tokens(pieces, tokenizer, count=wanted)
    begins = range(0, len(ids) - room + 1, stride)
    if not begins:
        raise InputError(
            f"the text {config.eval_text!r} has {len(ids)} tokens, too few for a sequence of "
            f"{config.length}; give more text or a smaller --length"
        )
    return np.stack(
        [np.concatenate([np.asarray(start, np.int32), ids[b : b + room]]) for b in begins]
    )


def effective_bits(spec: CacheSpec | None, config: LlamaConfig, length: int) -> float:
    """Bits a number of a cache of ``length`` tokens: codes, scales, window and sinks in bfloat16.

    From the arrays of the cache; codebooks are not in it.
    """
    cache = jax.eval_shape(
        lambda: init_cache(
            spec,
            batch=1,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_length=length,
            layers=config.layers,
        )
    )
    return 8 * cache.nbytes / (2 * length * config.layers * config.kv_heads * config.head_dim)


def facts(
    model: loading.LoadedModel, method: str, spec: CacheSpec | None, length: int
) -> dict[str, Any]:
    """What every result says of a method whose cache holds ``length`` tokens."""
    return {
        "model": model.name,
        "method": method,
        "title": methods.title(method),
        "bits": 16.0 if spec is None else spec.bits,
        "bits_stored": 16.0 if spec is None else spec.stored_bits,
        "bits_effective": effective_bits(spec, model.config, length),
        "length": length,
    }


def _rows(
    config: FidelityConfig,
    model: loading.LoadedModel,
    name: str,
    spec: CacheSpec,
    window: int,
    found: evaluation.Fidelity,
) -> list[dict[str, Any]]:
    row = {
        **facts(model, name, dataclasses.replace(spec, window=window), config.length),
        "window": window,
        "sinks": spec.sinks,
        "dataset": pathlib.Path(config.eval_text).stem,
        "stride": config.stride,
        "n": found.n,
        "attention": config.attention,
    }
    metrics = {
        "perplexity": (found.perplexity, found.full_precision),
        "kl": (found.kl, 0.0),
        "top1": (found.top1, 1.0),
    }
    return [
        row | {"metric": metric, "value": value, "full_precision": full}
        for metric, (value, full) in metrics.items()
    ]


def file_name(method: str) -> str:
    """A method's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9.@-]+", "-", method).strip("-")
