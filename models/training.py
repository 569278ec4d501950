"""The main job: codebooks for a model, from a text, with a report of what they cost.

`train_codebooks.py` is this with its flags. One folder a run: ``run.json`` (what was asked for),
``work/`` (samples and finished layers while the run lasts), ``codebooks/`` (Orbax),
``report.json``, and ``report.md`` and ``report.png`` made from it. A run that was stopped goes on
where it was. With ``report.json`` it is finished, and is only shown again.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import shutil
from typing import Any, Literal, NamedTuple

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
from gsrq_jax.models.distillation import DistillConfig
from gsrq_jax.models.runfolder import WORK, claim, plain, writing
from gsrq_jax.models.text import PYTHON_SOURCE, PYTHON_TOPICS
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
        beam: partial sums that the encoder keeps, 1 (greedy) to 32, in training and in the cache;
            best together with ``fit.refits``.
        tokens: calibration tokens.
        length: tokens of a sequence.
        weights: ``gradient`` weighs tokens by the loss's sensitivity (GSRQ), ``none`` all alike.
        fit: how codebooks are learned.
        distill: how they are refined after that, if at all.
        eval_text: text file to measure on; else sequences of the calibration text that were held
            out.
        second_text: text of another domain that is measured, too: a file, ``python`` or
            ``python-source`` for the standard library of this Python.
        eval_sequences: sequences to measure on.
        eval_length: tokens of each.
        dtype: of the model.
        seed: of the initial codewords.
        out: folder of the run.
    """

    model: str = "demo"
    text: str = PYTHON_TOPICS
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
    beam: int = 1
    tokens: int = 8_192
    length: int = 1024
    weights: Literal["gradient", "none"] = "gradient"
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    eval_text: str | None = None
    second_text: str = PYTHON_SOURCE
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
            beam=self.beam,
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
    with writing(out):
        found = report.render(out)
        shutil.rmtree(out / WORK, ignore_errors=True)
    books = out / "codebooks"
    print(f"\n{report.table(found)}\n\ncodebooks: {books}\nreport: {out / 'report.md'}")
    return books


# --- steps ----------------------------------------------------------------------------------------


def _run(config: TrainConfig) -> None:
    """Everything up to ``report.json``."""
    model = loading.load(config.model, dtype=config.dtype)
    spec = config.spec(model.config.head_dim)
    texts = _texts(config, spec, model)
    tokens = texts.calibration
    layer = _fitted_shapes(config, spec, model, len(tokens) * (config.length - spec.sinks))
    print(f"{model.name}: {spec}; {len(tokens)} × {config.length} tokens", flush=True)

    with writing(config.out):
        inputs = {"model": model.fingerprint["weights"], "text": texts.digest()}
        claim(config.out, _KIND, plain(config), inputs=inputs)
        work = config.out / WORK
        work.mkdir(exist_ok=True)
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
        codebooks = codebook.stored(codebooks)
        refinement = None
        if config.distill.steps:
            rows = texts.distillation
            if rows is None:
                rows = distillation.sample(
                    model, config.distill, length=config.length, seed=config.seed, work=work
                )
            codebooks, refinement = distillation.refine(
                model, codebooks, rows, config.distill, seed=config.seed, work=work
            )
        codebook.save(
            config.out / "codebooks",
            codebooks,
            model=model.fingerprint,
            extra={"config": plain(config), "tokens": tokens.size},
        )
        measured = {}
        for name, held_out in texts.measured.items():
            bar = tqdm(held_out, desc=f"measure: {name}", unit="seq")
            found = evaluation.fidelity(model.graphdef, model.params, bar, codebooks)
            if not math.isfinite(found.perplexity + found.full_precision + found.kl):
                raise InputError(
                    f"the predictions of {model.name} are not finite; "
                    "check its weights, or use --dtype float32"
                )
            measured[name] = found
        report.write(
            config.out,
            config=plain(config),
            model=model,
            codebooks=codebooks,
            layers=layers,
            measured=measured,
            length=held_out.shape[1],
            tokens=tokens.size,
            refinement=refinement,
        )


class Texts(NamedTuple):
    """Token sequences of a run.

    Attributes:
        calibration: to learn codebooks from, ``[n, T]``.
        distillation: to refine them on, ``[m, T]``; None where there is no refinement, or the model
            is to write it.
        measured: to measure on, by name: the held-out text first, then the second domain, both
            ``[…, E]``.
    """

    calibration: Int[np.ndarray, "n T"]
    distillation: Int[np.ndarray, "m T"] | None
    measured: dict[str, Int[np.ndarray, "e E"]]

    def digest(self) -> str:
        """Changes with every text that codebooks depend on."""
        digest = hashlib.sha256(self.calibration.tobytes())
        if self.distillation is not None:
            digest.update(self.distillation.tobytes())
        return digest.hexdigest()


def _texts(config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel) -> Texts:
    """What there is to read, before anything is begun.

    Raises:
        InputError: if a text cannot be read or is too short, or a size is out of range.
    """
    calibration, held_out = _held_out(config, spec, model)
    name = config.eval_text or "held out of the calibration text"
    if config.second_text in (
        config.eval_text,
        config.distill.text,
        config.text if config.dataset is None else None,
    ):
        raise InputError(
            f"--second-text {config.second_text} is to be another text than the others; choose "
            "one of another domain"
        )
    second = text.sequences(
        text.read(config.second_text),
        model.tokenizer,
        length=held_out.shape[1],
        count=len(held_out),
        name=config.second_text,
    )
    rows = None
    if config.distill.steps:
        rows = distillation.sequences(config.distill, model.tokenizer, calibration)
        if rows is calibration:  # what codebooks were fitted to would speak for them
            calibration = calibration[: -distillation.held_out(len(rows))]
    return Texts(calibration, rows, {name: held_out, config.second_text: second})


def _held_out(
    config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "m E"]]:
    """Calibration sequences, and held-out ones that share no token with them.

    Without an ``eval_text`` the end of the calibration text is held out: what is asked for, but of
    a short text a fifth or one sequence of ``length``, whichever is more.
    """
    tokenizer = model.needed_tokenizer()
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
    name, pieces = text.source(
        config.text, config.dataset, column=config.column, split=config.split
    )
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


# --- what is asked --------------------------------------------------------------------------------


def _is_finished(config: TrainConfig) -> bool:
    """Whether ``out`` holds this very run, done.

    Raises:
        InputError: if it holds something else.
    """
    out = config.out
    claim(out, _KIND, plain(config), begin=False)
    finished = (out / "report.json").exists()
    if finished and not (out / "codebooks").exists():
        raise InputError(
            f"{out} holds a finished run whose codebooks are gone; remove it to start anew"
        )
    return finished


_KIND = "train"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
