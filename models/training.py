"""The main job: codebooks for a model, from a text, with a report of what they cost.

`train_codebooks.py` is this with its flags. One folder a run: ``run.json`` (what was asked for),
``work/`` (samples and finished layers while the run lasts), ``codebooks/`` (Orbax), ``report.md``,
``report.json`` and ``report.png``. A run that was stopped goes on where it was.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
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
from gsrq_jax.models import evaluation, llama, loading, report, text
from gsrq_jax.models.config import LlamaConfig
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
        codewords: codewords of a stage, a power of two up to 256.
        group: channels quantised together; whole heads if not given.
        frame: rotary frame of the keys: ``block``, ``pre`` (before RoPE) or ``post``.
        block: tokens that are encoded together.
        window: recent tokens that stay exact.
        sinks: first tokens that stay exact.
        tokens: calibration tokens.
        length: tokens of a sequence.
        weights: ``gradient`` weighs tokens by the loss's sensitivity (GSRQ), ``none`` all alike.
        fit: how codebooks are learned.
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
    tokens: int = 12_288
    length: int = 1024
    weights: Literal["gradient", "none"] = "gradient"
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    eval_text: str | None = None
    eval_sequences: int = 4
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
        InputError: for whatever in ``config`` cannot be used; nothing is lost then.
    """
    run = _open_run(config)
    model = loading.load(config.model, dtype=config.dtype)
    spec = config.spec(model.config.head_dim)
    tokens, held_out = _texts(config, spec, model)
    samples = len(tokens) * (config.length - spec.sinks)
    if samples < max(spec.key.codewords, spec.value.codewords):
        raise InputError(
            f"{samples} calibration tokens are fewer than {config.codewords} codewords; "
            "give more --tokens, more text, or fewer --codewords"
        )
    print(f"{model.name}: {spec}; {len(tokens)} × {config.length} tokens", flush=True)

    out = config.out / "codebooks"
    store = SampleStore.open(
        run / "samples",
        layers=model.config.layers,
        sequences=len(tokens),
        tokens=config.length - spec.sinks,
        heads=model.config.kv_heads,
        dim=spec.head_dim,
        first=spec.sinks,
    )
    _capture(config, model, tokens, store)
    codebooks, layers = _fit(config, spec, model, store, run)
    codebook.save(
        out,
        codebooks,
        model=model.fingerprint,
        extra={"config": _plain(config), "tokens": tokens.size},
    )
    fidelity = evaluation.fidelity(
        model.graphdef, model.params, tqdm(held_out, desc="measure", unit="seq"), codebooks
    )
    found = report.write(
        config.out,
        config=_plain(config),
        model=model,
        codebooks=codebooks,
        layers=layers,
        fidelity=fidelity,
        tokens=tokens.size,
    )
    shutil.rmtree(run)
    print(f"\n{report.table(found)}\n\ncodebooks: {out}\nreport: {config.out / 'report.md'}")
    return out


# --- steps ----------------------------------------------------------------------------------------


def _texts(
    config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "m E"]]:
    """Calibration sequences, and held-out ones that share nothing with them."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} comes without a tokenizer; add its tokenizer.json")
    for name, least in (("length", spec.sinks + 2), ("eval_length", 2), ("tokens", 1)):
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("length", "eval_length"):
        if getattr(config, name) > model.config.max_length:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(config, name)} is beyond the model's context "
                f"of {model.config.max_length} tokens"
            )
    source = config.text if config.dataset is None else config.dataset
    wanted = -(-config.tokens // config.length)
    own_tail = config.eval_text is None
    reserve = -(-config.eval_sequences * config.eval_length // config.length) if own_tail else 0
    pieces = text.read(source, column=config.column, split=config.split)
    rows = text.sequences(
        pieces, model.tokenizer, length=config.length, count=wanted + reserve, name=source
    )
    if not own_tail:
        held_out = text.sequences(
            text.read(config.eval_text or ""),
            model.tokenizer,
            length=config.eval_length,
            count=config.eval_sequences,
            name=config.eval_text or "",
        )
        return rows, held_out
    reserve = min(reserve, max(1, len(rows) // 5))
    if len(rows) <= reserve:
        raise InputError(
            f"the text {source!r} fills {len(rows)} sequence of {config.length} tokens, and one is "
            "needed to measure on; give more text, a smaller --length, or --eval-text"
        )
    tail = rows[-reserve:].reshape(-1)
    length = min(config.eval_length, len(tail))
    count = min(config.eval_sequences, len(tail) // length)
    return rows[:-reserve], tail[: count * length].reshape(count, length)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("first", "weigh"))
def key_value_samples(
    config: LlamaConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    *,
    first: int,
    weigh: bool,
) -> tuple[
    Float[Array, "L B n H d"],
    Float[Array, "L B n H d"],
    Float[Array, "L B n H"],
    Float[Array, "L B n H"],
]:
    """Rotated keys, values, and the norms of the loss's gradient with respect to each of them.

    The loss is the summed cross-entropy of the next tokens; gradients are taken with respect to
    zeros added to keys and values, so none is formed for the parameters. Tokens before ``first``
    are left out. Without ``weigh`` the norms are ones.
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
        norms = [jnp.linalg.norm(g.astype(jnp.float32), axis=-1) for g in gradients]
    else:
        _, (k, v) = forward(None)
        norms = [jnp.ones(k.shape[:-1])] * 2
    k_norms, v_norms = norms
    return tuple(x[:, :, first:] for x in (k, v, k_norms, v_norms))


def _capture(
    config: TrainConfig,
    model: loading.LoadedModel,
    tokens: Int[np.ndarray, "n T"],
    store: SampleStore,
) -> None:
    bar = tqdm(total=tokens.size, initial=store.done * config.length, desc="capture", unit="tok")
    with bar:
        for index in range(store.done, len(tokens)):
            samples = key_value_samples(
                model.config,
                model.graphdef,
                model.params,
                jnp.asarray(tokens[index])[None],
                first=store.first,
                weigh=config.weights == "gradient",
            )
            store.put(index, *(x[:, 0] for x in samples))
            bar.update(config.length)


def _fit(
    config: TrainConfig,
    spec: QuantSpec,
    model: loading.LoadedModel,
    store: SampleStore,
    run: pathlib.Path,
) -> tuple[Codebooks, LayerReport]:
    """All layers' codebooks and reports, stacked; finished layers are kept in ``run``."""
    inv_freq = jnp.asarray(model.config.inv_freq)
    fit = jax.jit(calibration.fit_layer, static_argnames=("spec", "options"))
    keys = jax.random.split(jax.random.key(config.seed), store.layers)

    def of_layer(index: int, samples: LayerSamples) -> tuple[Codebooks, LayerReport]:
        weigh = config.weights == "gradient"
        return fit(
            keys[index],
            samples.k,
            samples.v,
            samples.positions,
            inv_freq,
            spec=spec,
            k_norms=samples.k_norms if weigh else None,
            v_norms=samples.v_norms if weigh else None,
            options=config.fit,
        )

    layers = []
    tree = jax.tree.structure(jax.eval_shape(functools.partial(of_layer, 0), store.layer(0)))
    for index in tqdm(range(store.layers), desc="fit", unit="layer"):
        file = run / f"layer-{index:03}.npz"
        if not file.exists():
            new = file.with_suffix(".new")
            with new.open("wb") as stream:
                fitted = jax.tree.leaves(of_layer(index, store.layer(index)))
                np.savez(stream, *(np.asarray(x) for x in fitted))
            os.replace(new, file)
        with np.load(file) as saved:
            layers.append(jax.tree.unflatten(tree, [saved[name] for name in saved.files]))
    codebooks, reports = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    half = {"key": codebooks.key, "value": codebooks.value}
    half = {name: x.astype(jnp.bfloat16) for name, x in half.items()}
    return dataclasses.replace(codebooks, **half), reports


# --- the folder of a run --------------------------------------------------------------------------


def _open_run(config: TrainConfig) -> pathlib.Path:
    """The run's working folder, new or left by the same command."""
    out, asked = config.out, _plain(config)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    found = {entry.name for entry in out.iterdir()} if out.exists() else set()
    record = out / "run.json"
    if found and not record.exists():
        raise InputError(
            f"{out} exists and holds something else ({sorted(found)[0]}); choose another --out"
        )
    if record.exists():
        before = json.loads(record.read_text())
        changed = [name for name in asked if asked[name] != before.get(name)]
        if changed:
            raise InputError(
                f"{out} holds a run with another {', '.join(changed)}; "
                "choose another --out, or remove it to start anew"
            )
    (out / "work").mkdir(parents=True, exist_ok=True)
    _write(record, json.dumps(asked, indent=2))
    return out / "work"


def _write(path: pathlib.Path, content: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(content)
    os.replace(new, path)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
