"""The main job: codebooks for a model, from a text, with a report of what they cost.

`train_codebooks.py` is this with its flags. One folder a run: ``run.json`` (what was asked for),
``work/`` (samples and finished layers while the run lasts), ``codebooks/`` (Orbax),
``report.json``, and ``report.md`` and ``report.png`` made from it. A run that was stopped goes on
where it was. With ``report.json`` it is finished, and is only shown again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from gsrq_jax import calibration, codebook
from gsrq_jax.attention import causal
from gsrq_jax.calibration import FitOptions, LayerReport, LayerSamples, SampleStore
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.models import distillation, evaluation, llama, loading, report, text
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.rope import rotate
from gsrq_jax.spec import Frame, QuantSpec, ResidualSpec


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Learn the codebooks of a model's quantised KV cache and measure what they cost.

    Without flags this is the demo: a small model, the text that every Python carries, one bit.

    Attributes:
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        text: text file to calibrate on, or ``python`` for the help topics of this Python.
        dataset: data set instead: hub id or folder, ``name`` or ``name:config``.
        column: text column of the data set.
        split: split of the data set.
        bits: nominal bits a number, if ``stages`` is not given.
        stages: residual stages, instead of ``bits``.
        codewords: codewords of a stage, a power of two up to 65536.
        group: channels quantised together; whole heads if not given.
        frame: rotary frame of the keys: ``block``, ``pre`` (before RoPE) or ``post``.
        block: tokens that are encoded together.
        window: recent tokens that stay exact.
        sinks: first tokens that stay exact.
        tokens: calibration tokens.
        length: tokens of a sequence.
        weights: ``gradient`` weighs tokens by the loss's sensitivity (GSRQ), ``none`` all alike.
        fit: how codebooks are learned.
        distill_steps: steps of end-to-end refinement after that, by the divergence of the model's
            predictions from those at full precision; each costs some six forward passes.
        distill_batch: sequences of a step.
        distill_rate: first learning rate, relative to the codewords.
        distill_copies: passages of each of these sequences that come a second time in it.
        eval_text: text file to measure on; else sequences of the calibration text that were held
            out.
        eval_sequences: sequences to measure on.
        eval_length: tokens of each.
        dtype: of the model.
        seed: of the initial codewords.
        out: folder of the run.
    """

    model: str = "demo"
    text: str = text.PYTHON_TOPICS
    dataset: str | None = None
    column: str = "text"
    split: str = "train"
    bits: float = 1.0
    stages: int | None = None
    codewords: int = 256
    group: int | None = None
    frame: Frame = "block"
    block: int = 128
    window: int = 128
    sinks: int = 4
    tokens: int = 8_192
    length: int = 1024
    weights: Literal["gradient", "none"] = "gradient"
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    distill_steps: int = 0
    distill_batch: int = 4
    distill_rate: float = 0.01
    distill_copies: int = 4
    eval_text: str | None = None
    eval_sequences: int = 2
    eval_length: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/demo")

    def spec(self, head_dim: int) -> QuantSpec:
        """The cache that is asked for, on heads of ``head_dim`` channels.

        Raises:
            InputError: if it cannot be.
        """
        group = head_dim if self.group is None else self.group
        if self.stages is None:
            code = ResidualSpec.from_bits(
                self.bits, head_dim, codewords=self.codewords, group=group
            )
        else:
            code = ResidualSpec(head_dim, group, self.stages, self.codewords)
        return QuantSpec(
            key=code,
            value=code,
            frame=self.frame,
            block=self.block,
            window=self.window,
            sinks=self.sinks,
        )


def train(config: TrainConfig) -> pathlib.Path:
    """Run the whole job, or the rest of it; returns the folder of the codebooks.

    Raises:
        InputError: for whatever in ``config`` cannot be used, and for a disk that is full or not
            ours to write; nothing is lost then, and nothing was begun if ``config`` was at fault.
    """
    out = config.out
    if not _is_finished(config):
        _run(config)
    with _writing(out):
        found = report.render(out)
        shutil.rmtree(out / "work", ignore_errors=True)
    books = out / "codebooks"
    print(f"\n{report.table(found)}\n\ncodebooks: {books}\nreport: {out / 'report.md'}")
    return books


# --- steps ----------------------------------------------------------------------------------------


def _run(config: TrainConfig) -> None:
    """Everything up to ``report.json``."""
    model = loading.load(config.model, dtype=config.dtype)
    spec = config.spec(model.config.head_dim)
    tokens, held_out = _texts(config, spec, model)
    layer = _fitted_shapes(config, spec, model, len(tokens) * (config.length - spec.sinks))
    print(f"{model.name}: {spec}; {len(tokens)} × {config.length} tokens", flush=True)

    with _writing(config.out):
        work = _begin(config, model, tokens)
        store = SampleStore.open(
            work / "samples",
            layers=model.config.layers,
            sequences=len(tokens),
            tokens=config.length - spec.sinks,
            heads=model.config.kv_heads,
            dim=spec.head_dim,
            first=spec.sinks,
        )
        capture(model, tokens, store, weigh=config.weights == "gradient")
        codebooks, layers = _fit(config, spec, model, store, work, jax.tree.structure(layer))
        if config.distill_steps:
            codebooks = distillation.refine(
                model,
                codebooks,
                tokens,
                steps=config.distill_steps,
                batch=config.distill_batch,
                rate=config.distill_rate,
                copies=config.distill_copies,
                seed=config.seed,
                work=work,
            )
        codebooks = dataclasses.replace(
            codebooks,
            key=codebooks.key.astype(jnp.bfloat16),
            value=codebooks.value.astype(jnp.bfloat16),
        )
        codebook.save(
            config.out / "codebooks",
            codebooks,
            model=model.fingerprint,
            extra={"config": _plain(config), "tokens": tokens.size},
        )
        fidelity = evaluation.fidelity(
            model.graphdef, model.params, tqdm(held_out, desc="measure", unit="seq"), codebooks
        )
        if not math.isfinite(fidelity.perplexity + fidelity.full_precision + fidelity.kl):
            raise InputError(
                f"the predictions of {model.name} are not finite; "
                "check its weights, or use --dtype float32"
            )
        report.write(
            config.out,
            config=_plain(config),
            model=model,
            codebooks=codebooks,
            layers=layers,
            fidelity=fidelity,
            length=held_out.shape[1],
            tokens=tokens.size,
        )


def _texts(
    config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "m E"]]:
    """Calibration sequences, and held-out ones that share no token with them.

    Without an ``eval_text`` the end of the calibration text is held out: what is asked for, but of
    a short text a fifth or one sequence of ``length``, whichever is more.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.name} comes without a tokenizer; add its tokenizer.json")
    start = len(tokenizer.encode(""))  # tokens that each sequence begins with
    leasts = {"length": spec.sinks + start + 1, "eval_length": start + 2}
    for name, least in (leasts | {"tokens": 1, "eval_sequences": 1}).items():
        if getattr(config, name) < least:
            raise InputError(f"{_flag(name)} must be at least {least}, got {getattr(config, name)}")
    for name in leasts:
        if getattr(config, name) > model.config.max_length:
            raise InputError(
                f"{_flag(name)} {getattr(config, name)} is beyond the context of {model.name}, "
                f"{model.config.max_length} tokens; choose a smaller one"
            )
    if config.dataset is None:
        name, pieces = config.text, text.read(config.text)
    else:
        name = config.dataset
        pieces = text.read_dataset(name, column=config.column, split=config.split)
    room = config.length - start
    wanted = -(-config.tokens // config.length) * room
    if config.eval_text is not None:
        held_out = text.sequences(
            text.read(config.eval_text),
            tokenizer,
            length=config.eval_length,
            count=config.eval_sequences,
            name=config.eval_text,
        )
        rows = text.sequences(
            pieces, tokenizer, length=config.length, count=wanted // room, name=name
        )
        return rows, held_out
    asked = config.eval_sequences * (config.eval_length - start)
    ids = text.tokens(pieces, tokenizer, count=wanted + asked)
    short = len(ids) < wanted + asked
    reserve = min(asked, max(len(ids) // 5, room)) if short else asked
    if len(ids) < room + reserve or reserve < 2:
        raise InputError(
            f"the text {name!r} has {len(ids)} tokens, too few for one sequence of {config.length} "
            "and another to measure on; give more text, a smaller --length, or --eval-text"
        )
    split = len(ids) - reserve
    length = min(config.eval_length, reserve + start)
    return (
        text.cut(ids[:split], tokenizer, length=config.length),
        text.cut(ids[split:], tokenizer, length=length),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("first", "weigh", "splits"))
def key_value_samples(
    config: LlamaConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    *,
    first: int,
    weigh: bool,
    splits: int = 1,
) -> tuple[
    Float[Array, "L B n H d"],
    Float[Array, "L B n H d"],
    Float[Array, "L B n H ..."],
    Float[Array, "L B n H ..."],
]:
    """Rotated keys, values, and the norms of the loss's gradient with respect to each of them.

    The loss is the summed cross-entropy of the next tokens; gradients are taken with respect to
    zeros added to keys and values, so none is formed for the parameters. Tokens before ``first``
    are left out. Without ``weigh`` the norms are ones.

    With several ``splits`` norms have one more axis: of each of that many parts of a head's
    channels, those of keys before RoPE (which mixes parts; whole heads keep their norm).
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def forward(added: tuple[Array, Array] | None):
        def layer(q: Array, k: Array, v: Array, more: tuple[Array, Array] | None):
            if more is not None:
                k, v = k + more[0], v + more[1]
            return causal(q, k, v), (k, v)

        hidden, kv = llama.apply(
            graphdef, params, tokens, positions, layer, added, remat=added is not None
        )
        return hidden, kv

    def loss(added: tuple[Array, Array]):
        hidden, kv = forward(added)
        logits = llama.logits(graphdef, params, hidden[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -picked.sum(), kv

    if weigh:
        shape = (config.layers, *tokens.shape, config.kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, jax.tree.leaves(params)[0].dtype)
        gradients, (k, v) = jax.grad(loss, has_aux=True)((zeros, zeros))
        of_keys, of_values = (g.astype(jnp.float32) for g in gradients)
        if splits > 1:
            of_keys = rotate(of_keys, -positions[..., None], config.inv_freq)
        parts = [g.reshape(*g.shape[:-1], splits, -1) for g in (of_keys, of_values)]
        norms = [jnp.linalg.norm(g, axis=-1) for g in parts]
    else:
        _, (k, v) = forward(None)
        norms = [jnp.ones((*k.shape[:-1], splits))] * 2
    if splits == 1:
        norms = [n[..., 0] for n in norms]
    k_norms, v_norms = norms
    return tuple(x[:, :, first:] for x in (k, v, k_norms, v_norms))


def capture(
    model: loading.LoadedModel, tokens: Int[np.ndarray, "n T"], store: SampleStore, *, weigh: bool
) -> None:
    """Fill ``store`` with the samples of these sequences, from where it is; shows progress."""
    length = tokens.shape[1]
    with tqdm(total=tokens.size, initial=store.done * length, desc="capture", unit="tok") as bar:
        for index in range(store.done, len(tokens)):
            samples = key_value_samples(
                model.config,
                model.graphdef,
                model.params,
                jnp.asarray(tokens[index])[None],
                first=store.first,
                weigh=weigh,
                splits=store.splits,
            )
            store.put(index, *(x[:, 0] for x in samples))
            bar.update(length)


_fit_layer = jax.jit(calibration.fit_layer, static_argnames=("spec", "options"))


def _fit_one(
    config: TrainConfig,
    spec: QuantSpec,
    model: loading.LoadedModel,
    index: int,
    samples: LayerSamples,
) -> tuple[Codebooks, LayerReport]:
    rng = jax.random.split(jax.random.key(config.seed), model.config.layers)[index]
    weigh = config.weights == "gradient"
    return _fit_layer(
        rng,
        samples.k,
        samples.v,
        samples.positions,
        jnp.asarray(model.config.inv_freq),
        spec=spec,
        k_norms=samples.k_norms if weigh else None,
        v_norms=samples.v_norms if weigh else None,
        options=config.fit,
    )


def _fitted_shapes(
    config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel, count: int
) -> tuple[Codebooks, LayerReport]:
    """What fitting one layer on ``count`` tokens gives, without fitting.

    Raises:
        InputError: if it cannot be fitted, so that this is known before the samples are taken.
    """
    heads = (count, model.config.kv_heads)

    def shape(dtype: jax.typing.DTypeLike, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    vectors, norms = shape(jnp.bfloat16, *heads, spec.head_dim), shape(jnp.float32, *heads)
    samples = LayerSamples(vectors, vectors, norms, norms, shape(jnp.int32, count))
    return jax.eval_shape(functools.partial(_fit_one, config, spec, model, 0), samples)


def _fit(
    config: TrainConfig,
    spec: QuantSpec,
    model: loading.LoadedModel,
    store: SampleStore,
    work: pathlib.Path,
    tree: jax.tree_util.PyTreeDef,
) -> tuple[Codebooks, LayerReport]:
    """All layers' codebooks and reports, stacked; finished layers are kept in ``work``."""
    layers = []
    for index in tqdm(range(store.layers), desc="fit", unit="layer"):
        file = work / f"layer-{index:03}.npz"
        if not file.exists():
            fitted = _fit_one(config, spec, model, index, store.layer(index))
            calibration.save_leaves(file, fitted)
        layers.append(jax.tree.unflatten(tree, calibration.load_leaves(file)))
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


# --- the folder of a run --------------------------------------------------------------------------

_INPUTS = "inputs"  # beside the flags in run.json: checksums of what they stood for
_NEW_RECORD = ".run.json.new"


def _is_finished(config: TrainConfig) -> bool:
    """Whether ``out`` holds this very run, done.

    Raises:
        InputError: if it holds something else.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    found = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    before = _record(out)
    if before is None and found not in ([], [_NEW_RECORD]):
        raise InputError(
            f"{out} exists and holds something else ({found[0]}); choose another --out"
        )
    asked = _plain(config)
    changed = [name for name in asked if asked[name] != (before or asked).get(name)]
    if changed:
        raise InputError(
            f"{out} holds a run with another {', '.join(map(_flag, changed))}; "
            "choose another --out, or remove it to start anew"
        )
    finished = (out / "report.json").exists()
    if finished and not (out / "codebooks").exists():
        raise InputError(
            f"{out} holds a finished run whose codebooks are gone; remove it to start anew"
        )
    return finished


def _begin(
    config: TrainConfig, model: loading.LoadedModel, tokens: Int[np.ndarray, "n T"]
) -> pathlib.Path:
    """The run's working folder, new or left by the same command on the same model and text.

    Raises:
        InputError: if the model or the text is no longer what it was when the run began.
    """
    inputs = {
        "model": model.fingerprint["weights"],
        "text": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    before = (_record(config.out) or {}).get(_INPUTS, inputs)
    if changed := [name for name in inputs if inputs[name] != before.get(name)]:
        raise InputError(
            f"the {' and the '.join(changed)} changed since the run in {config.out} began; "
            "choose another --out, or remove it to start anew"
        )
    work = config.out / "work"
    config.out.mkdir(parents=True, exist_ok=True)
    new = config.out / _NEW_RECORD
    new.write_text(json.dumps(_plain(config) | {_INPUTS: inputs}, indent=2))
    os.replace(new, config.out / "run.json")
    work.mkdir(exist_ok=True)
    return work


def _record(out: pathlib.Path) -> dict[str, Any] | None:
    """What ``run.json`` holds, if it is there and ours."""
    try:
        record = json.loads((out / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and "out" in record else None


@contextlib.contextmanager
def _writing(out: pathlib.Path) -> Iterator[None]:
    """A failing disk is bad input."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror or error}); make room or choose another "
            "--out. What is done is kept: the same command goes on from there"
        ) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
