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
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from gsrq_jax import allocation, calibration, codebook, codec, results
from gsrq_jax.allocation import Allocation
from gsrq_jax.attention import causal
from gsrq_jax.calibration import (
    DATA,
    MODEL,
    FitOptions,
    LayerReport,
    LayerSamples,
    Moments,
    SampleStore,
)
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.kernels.planes import UNIT
from gsrq_jax.models import (
    distillation,
    evaluation,
    generation,
    llama,
    loading,
    processes,
    report,
    sharding,
    text,
)
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.models.distillation import DistillConfig
from gsrq_jax.models.runfolder import WORK, claim, plain, writing
from gsrq_jax.models.text import PYTHON_SOURCE, PYTHON_TOPICS, SAMPLED, SOURCE
from gsrq_jax.rope import rotate
from gsrq_jax.spec import Frame, QuantSpec, ResidualSpec

Preset = Literal["demo", "fast", "balanced", "best"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Learn the codebooks of a model's quantised KV cache and measure what they cost.

    Without flags this is the demo: a small model, the text that every Python carries, one bit.

    Attributes:
        preset: other defaults of the flags below: a demo for a CPU, or three for a GPU, each slower
            than the last (the README has a table of what they cost); each flag still counts.
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        text: text file to calibrate on, or ``python`` for the help topics of this Python.
        dataset: data set instead: hub id or folder, ``name`` or ``name:config``.
        column: text column of the data set.
        split: split of the data set.
        mix: further texts, of which as many tokens are taken: files, ``python``, or ``sampled`` for
            what the model writes itself. Codebooks serve best what is like what they saw.
        bits: nominal bits a number, if ``stages`` is not given.
        stages: residual stages, instead of ``bits``.
        codewords: codewords of a stage, a power of two up to 65536.
        group: channels quantised together; whole heads if not given.
        heads: adjacent KV heads that share every code: fewer errors at the same bits, and so many
            times more work in decoding; ``auto`` is as many as divide the model's, at most four.
            Of the layouts of fused kernels only ``planes`` takes more than 1, its kernel 2 or 4.
        frame: rotary frame of the keys: ``block``, ``pre`` (before RoPE) or ``post``.
        block: tokens that are encoded together.
        frame_blocks: blocks that share a rotary frame, see `QuantSpec`.
        window: recent tokens that stay exact.
        sinks: first tokens that stay exact.
        mean_every: tokens from one to the next at which the mean key is rotated, see `QuantSpec`.
        beam: partial sums that the encoder keeps, 1 (greedy) to 32, in training and in the cache;
            best together with ``fit.refits``.
        outliers: coded tokens of a sequence that every layer and KV head also keeps exact.
        allocate: ``uniform`` gives all vectors as many stages; ``sides`` gives keys and values, and
            ``layers`` each layer's keys and values, what measured sensitivities say, at the same
            bits in the mean.
        tokens: calibration tokens, of all texts together.
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
        mesh: devices over which tokens, and heads, are spread, such as ``4 2``; by default all, but
            one of those of a CPU.
        seed: of the initial codewords.
        out: folder of the run.
    """

    preset: Preset = "demo"
    model: str = "demo"
    text: str = PYTHON_TOPICS
    dataset: str | None = None
    column: str = "text"
    split: str = "train"
    mix: tuple[str, ...] = ()
    bits: float = 1.0
    stages: int | None = None
    codewords: int = 256
    group: int | None = None
    heads: int | Literal["auto"] = 1
    frame: Frame = "block"
    block: int = 128
    frame_blocks: int = 1
    window: int = 128
    sinks: int = 4
    mean_every: int = 1
    beam: int = 1
    outliers: int = 0
    allocate: Allocation = "uniform"
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
    mesh: tuple[int, int] | None = None
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/demo")

    def shared_heads(self, kv_heads: int) -> int:
        """KV heads that share codes, in a model whose layers have so many.

        Raises:
            InputError: if those cannot be.
        """
        if self.heads == "auto":
            return max(n for n in range(1, _MOST_SHARED + 1) if kv_heads % n == 0)
        if self.heads < 1 or kv_heads % self.heads:
            raise InputError(
                f"--heads must divide the {kv_heads} KV heads of the model, got {self.heads}"
            )
        return self.heads

    def spec(self, head_dim: int, kv_heads: int) -> QuantSpec:
        """The cache that is asked for, on ``kv_heads`` heads of ``head_dim`` channels.

        Raises:
            InputError: if it cannot be.
        """
        heads = self.shared_heads(kv_heads)
        group = head_dim if self.group is None else self.group
        if self.stages is None:
            code = ResidualSpec.from_bits(
                self.bits, head_dim, codewords=self.codewords, group=group, heads=heads
            )
        else:
            code = ResidualSpec(head_dim, group, self.stages, self.codewords, heads)
        if self.allocate != "uniform" and code.groups > 1:
            raise InputError(
                f"--allocate {self.allocate} is for whole heads; leave out --group, or give "
                "--allocate uniform"
            )
        return QuantSpec(
            key=code,
            value=code,
            frame=self.frame,
            block=self.block,
            frame_blocks=self.frame_blocks,
            window=self.window,
            sinks=self.sinks,
            mean_every=self.mean_every,
            beam=self.beam,
            outliers=self.outliers,
        )


_MOST_SHARED = 4  # KV heads that ``auto`` lets share codes


def _presets() -> dict[Preset, TrainConfig]:
    metrics = FitOptions(key_metric="gradient", value_metric="output")
    fast = TrainConfig(
        preset="fast",
        tokens=98_304,
        length=2048,
        eval_length=2048,
        fit=metrics,
        out=pathlib.Path("runs/codebooks"),
    )
    balanced = dataclasses.replace(
        fast,
        preset="balanced",
        mix=(SAMPLED,),
        allocate="layers",
        distill=DistillConfig(
            steps=210, batch=2, windows=(128, 32, 0), text=(SOURCE, SAMPLED), tokens=524_288
        ),
    )
    best = dataclasses.replace(
        balanced,
        preset="best",
        heads="auto",
        distill=dataclasses.replace(balanced.distill, steps=420),
    )
    return {"demo": TrainConfig(), "fast": fast, "balanced": balanced, "best": best}


PRESETS = _presets()
"""Defaults by name: the demo on a CPU; three for a GPU, each slower than the last."""


def train(config: TrainConfig) -> pathlib.Path:
    """Run the whole job, or the rest of it; returns the folder of the codebooks.

    Raises:
        InputError: for whatever in ``config`` cannot be used, and for a disk that is full or not
            ours to write; nothing is lost then, and nothing was begun if ``config`` was at fault.
    """
    out, books = config.out, config.out / "codebooks"
    processes.check_same(plain(config) | results.versions())

    def show() -> None:
        found = report.render(out)
        shutil.rmtree(out / WORK, ignore_errors=True)
        print(f"\n{report.table(found)}\n\ncodebooks: {books}\nreport: {out / 'report.md'}")

    if not processes.agreed(_is_finished(config)):
        _run(config)
    with writing(out):
        processes.once(show)
    return books


# --- steps ----------------------------------------------------------------------------------------


def _run(config: TrainConfig) -> None:
    """Everything up to ``report.json``."""
    began = time.monotonic()

    def make_mesh(found: LlamaConfig) -> Mesh | None:
        together = config.shared_heads(found.kv_heads)
        return sharding.make_mesh(found.kv_heads, config.mesh, together=together)

    def shardings(found: LlamaConfig, params: nnx.State) -> nnx.State | None:
        mesh = make_mesh(found)
        return None if mesh is None else sharding.shardings(mesh, params)

    model = loading.load(config.model, dtype=config.dtype, shardings=shardings)
    mesh = make_mesh(model.config)
    # Where several processes sample and distil; one does it on its own devices.
    together = mesh if jax.process_count() > 1 else None
    devices = None if together is None else list(together.devices.flat)
    if devices is not None and config.distill.steps:
        distillation.sharing(config.distill, devices)
    spec = config.spec(model.config.head_dim, model.config.kv_heads)
    texts = _texts(config, spec, model)
    count = texts.calibrated(config)
    share, folder = _share(count)
    _fitted_shapes(config, spec, model, count * (config.length - spec.sinks))
    print(f"{model.name}: {spec}; {count} × {config.length} tokens", flush=True)

    with writing(config.out):
        inputs = {"model": model.fingerprint["weights"], "text": texts.digest()}
        work = config.out / WORK
        resumed = work.exists()
        processes.once(lambda: claim(config.out, _KIND, plain(config), inputs=inputs))
        processes.once(lambda: work.mkdir(exist_ok=True))
        processes.check_shared(work)
        write = functools.partial(
            distillation.sample,
            model,
            length=config.length,
            seed=config.seed,
            work=work,
            mesh=together,
        )
        tokens, rows = texts.calibration, texts.distillation
        if texts.written:
            tokens = text.interleaved([tokens, write(texts.written, name="mix")])
        if config.distill.on_calibration:
            rows, tokens = tokens, tokens[:count]
        store = SampleStore.open(
            work / folder,
            layers=model.config.layers,
            sequences=len(tokens[share]),
            tokens=config.length - spec.sinks,
            heads=model.config.kv_heads,
            dim=spec.head_dim,
            first=spec.sinks,
            moments=config.fit.needs_moments,
        )
        capture(model, tokens[share], store, weigh=config.weights == "gradient", mesh=mesh)
        codebooks, layers, allocated = _learn(config, spec, model, tokens, store, work, mesh)
        codebooks = codebook.stored(codebooks)
        refinement = None
        if config.distill.steps:
            if texts.to_distil:
                rows = text.interleaved([rows, write(texts.to_distil, name="distil")])
            codebooks, refinement = distillation.refine(
                model,
                codebooks,
                rows,
                config.distill,
                seed=config.seed,
                work=work,
                devices=devices,
            )
        codebook.save(
            config.out / "codebooks",
            _as_kept(codebooks),
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
        finish = functools.partial(
            report.write,
            config.out,
            config=plain(config),
            model=model,
            codebooks=codebooks,
            layers=layers,
            measured=measured,
            length=held_out.shape[1],
            tokens=tokens.size,
            refinement=refinement,
            allocation=allocated,
            seconds=None if resumed else time.monotonic() - began,
        )
        processes.once(finish)


def _as_kept(codebooks: Codebooks) -> Codebooks:
    """The codebooks in the layout that attention reads fastest: `planes` where it takes them."""
    if codebooks.spec.key.codewords > 2 or codebooks.spec.value.codewords > 2:
        return codebooks
    try:
        return codec.respec(codebooks, layout="planes")
    except InputError:  # such as outliers, or blocks of a few tokens
        return codebooks


def _share(sequences: int) -> tuple[slice, str]:
    """Which sequences are this process's, and the folder of its samples.

    Raises:
        InputError: if processes cannot share them evenly.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return slice(None), "samples"
    each, rest = divmod(sequences, count)
    if rest:
        raise InputError(
            f"{count} processes cannot share {sequences} sequences evenly; choose --tokens so that "
            "their number is a multiple of the processes"
        )
    return slice(index * each, (index + 1) * each), f"samples-{index}-of-{count}"


class Texts(NamedTuple):
    """Token sequences of a run.

    Attributes:
        calibration: to learn codebooks from, ``[n, T]``.
        distillation: to refine them on, ``[m, T]``; none where there is no refinement, or it is on
            the calibration text.
        measured: to measure on, by name: the held-out text first, then the second domain, both
            ``[…, E]``.
        written: sequences that the model is to write for calibration beside those.
        to_distil: sequences that it is to write for the refinement beside those.
    """

    calibration: Int[np.ndarray, "n T"]
    distillation: Int[np.ndarray, "m T"]
    measured: dict[str, Int[np.ndarray, "e E"]]
    written: int
    to_distil: int

    def calibrated(self, config: TrainConfig) -> int:
        """Sequences that codebooks are fitted to: not those that a refinement checks itself on."""
        count = len(self.calibration) + self.written
        return count - distillation.held_out(count) * config.distill.on_calibration

    def digest(self) -> str:
        """Changes with every text that codebooks depend on."""
        digest = hashlib.sha256(self.calibration.tobytes())
        digest.update(self.distillation.tobytes())
        return digest.hexdigest()


def _texts(config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel) -> Texts:
    """What there is to read, before anything is begun.

    Raises:
        InputError: if a text cannot be read or is too short, or a size is out of range.
    """
    distill = _named_source(config)
    calibration, source, held_out = _held_out(config, spec, model, distill)
    share, tokenizer = len(calibration), model.needed_tokenizer()
    others = [
        text.sequences(text.read(x), tokenizer, length=config.length, count=share, name=x)
        for x in config.mix
        if x != SAMPLED
    ]
    calibration = text.interleaved([calibration, *others])
    written = share * config.mix.count(SAMPLED)
    name = config.eval_text or "held out of the calibration text"
    if config.second_text in (
        config.eval_text,
        *config.distill.text,
        *config.mix,
        config.text if config.dataset is None else None,
    ):
        raise InputError(
            f"--second-text {config.second_text} is to be another text than the others; choose "
            "one of another domain"
        )
    second = text.sequences(
        text.read(config.second_text),
        tokenizer,
        length=held_out.shape[1],
        count=len(held_out),
        name=config.second_text,
    )
    rows, to_distil = calibration[:0], 0
    if config.distill.steps:
        rows, to_distil = distillation.sequences(
            *(distill, tokenizer, source),
            length=config.length,
            calibrated=len(calibration) + written,
        )
    return Texts(
        calibration, rows, {name: held_out, config.second_text: second}, written, to_distil
    )


def _named_source(config: TrainConfig) -> DistillConfig:
    """The refinement, with the text that is calibrated on by that name: so it leaves out what of
    that text is measured on."""
    file = config.text if config.dataset is None else None
    names = tuple(SOURCE if name == file else name for name in config.distill.text)
    return dataclasses.replace(config.distill, text=names)


def _held_out(
    config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel, distill: DistillConfig
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "s T"], Int[np.ndarray, "m E"]]:
    """Calibration sequences, those of the same text to distil on, and held-out ones that share no
    token with either.

    Without an ``eval_text`` the end of the calibration text is held out: what is asked for, but of
    a short text a fifth or one sequence of ``length``, whichever is more.
    """
    tokenizer = model.needed_tokenizer()
    start = len(tokenizer.encode(""))  # tokens that each sequence begins with
    at_least(spec.sinks + start + 1, "--", length=config.length)
    at_least(start + 2, "--", eval_length=config.eval_length)
    at_least(1, "--", tokens=config.tokens, eval_sequences=config.eval_sequences)
    generation.check_seed(config.seed, "--")
    for flag, length in (("--length", config.length), ("--eval-length", config.eval_length)):
        if length > model.config.max_length:
            raise InputError(
                f"{flag} {length} is beyond the context of {model.name}, "
                f"{model.config.max_length} tokens; choose a smaller one"
            )
    name, pieces = text.source(
        config.text, config.dataset, column=config.column, split=config.split
    )
    room = config.length - start
    wanted = -(-config.tokens // (config.length * (1 + len(config.mix))))
    to_distil = 0
    if distill.steps and SOURCE in distill.text:
        to_distil = distillation.share(distill, length=config.length)
    needed = max(wanted, to_distil)
    if config.eval_text is not None:
        held_out = text.sequences(
            text.read(config.eval_text),
            tokenizer,
            length=config.eval_length,
            count=config.eval_sequences,
            name=config.eval_text,
        )
        rows = text.sequences(pieces, tokenizer, length=config.length, count=needed, name=name)
        return rows[:wanted], rows[:to_distil], held_out
    asked = config.eval_sequences * (config.eval_length - start)
    ids = text.tokens(pieces, tokenizer, count=needed * room + asked)
    reserve = min(asked, max(len(ids) // 5, room, len(ids) - needed * room))
    if len(ids) < room + reserve or reserve < 2:
        raise InputError(
            f"the text {name!r} has {len(ids)} tokens, too few for one sequence of {config.length} "
            "and another to measure on; give more text, a smaller --length, or --eval-text"
        )
    split = len(ids) - reserve
    length = min(config.eval_length, reserve + start)
    rows = text.cut(ids[:split], tokenizer, length=config.length)
    held_out = text.cut(ids[split:], tokenizer, length=length)
    return rows[:wanted], rows[:to_distil], held_out


@functools.partial(
    jax.jit, static_argnums=(0, 1), static_argnames=("first", "weigh", "splits", "moments", "mesh")
)
def key_value_samples(
    config: LlamaConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    *,
    first: int,
    weigh: bool,
    splits: int = 1,
    moments: bool = False,
    mesh: Mesh | None = None,
) -> tuple[
    Float[Array, "L B n H d"],
    Float[Array, "L B n H d"],
    Float[Array, "L B n H ..."],
    Float[Array, "L B n H ..."],
    Moments | None,
]:
    """Rotated keys, values, the norms of the loss's gradient with respect to each, and moments.

    The loss is the summed cross-entropy of the next tokens; gradients are taken with respect to
    zeros added to keys and values, so none is formed for the parameters. Tokens before ``first``
    are left out. Without ``weigh`` the norms are ones.

    With several ``splits`` norms have one more axis: of each of that many parts of a head's
    channels, those of keys before RoPE (which mixes parts; whole heads keep their norm).

    With ``moments`` there are also `calibration.Moments` of each sequence, ``[L, B, …]``; gradients
    are taken for them whatever ``weigh`` is.

    On a mesh hidden states are spread over the sequences alone; see `sharded_samples`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def place(hidden: Array) -> Array:
        if mesh is None:
            return hidden
        return jax.lax.with_sharding_constraint(hidden, NamedSharding(mesh, sharding.SEQUENCES))

    def power(q: Array) -> Array:  # [B, T, Q, d] to [B, H, d / 2]
        pairs = jnp.square(q.astype(jnp.float32)).reshape(
            *q.shape[:2], config.kv_heads, -1, 2, q.shape[-1] // 2
        )
        return pairs.mean(axis=(1, 3, 4))

    def forward(added: tuple[Array, Array] | None):
        def layer(q: Array, k: Array, v: Array, more: tuple[Array, Array] | None):
            if more is not None:
                k, v = k + more[0], v + more[1]
            return causal(q, k, v), (k, v, power(q) if moments else None)

        hidden, kv = llama.apply(
            graphdef, params, tokens, positions, layer, added, remat=added is not None, place=place
        )
        return hidden, kv

    def loss(added: tuple[Array, Array]):
        hidden, kv = forward(added)
        logits = llama.logits(graphdef, params, hidden[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -picked.sum(), kv

    means = None
    if weigh or moments:
        shape = (config.layers, *tokens.shape, config.kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, jax.tree.leaves(params)[0].dtype)
        gradients, (k, v, query) = jax.grad(loss, has_aux=True)((zeros, zeros))
        of_keys, of_values = (g.astype(jnp.float32) for g in gradients)
        if splits > 1 or moments:
            of_keys = rotate(of_keys, -positions[..., None], config.inv_freq)
        if moments:
            key, value = (
                jnp.einsum("LBnHd,LBnHe->LBHde", g, g) / g.shape[2]
                for g in (of_keys[:, :, first:], of_values[:, :, first:])
            )
            means = Moments(key, value, query)
    if weigh:
        parts = [g.reshape(*g.shape[:-1], splits, -1) for g in (of_keys, of_values)]
        norms = [jnp.linalg.norm(g, axis=-1) for g in parts]
    else:
        if not moments:
            _, (k, v, _) = forward(None)
        norms = [jnp.ones((*k.shape[:-1], splits))] * 2
    if splits == 1:
        norms = [n[..., 0] for n in norms]
    k_norms, v_norms = norms
    k, v, k_norms, v_norms = (x[:, :, first:] for x in (k, v, k_norms, v_norms))
    return k, v, k_norms, v_norms, means


def sharded_samples(
    mesh: Mesh,
    config: LlamaConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    *,
    first: int,
    weigh: bool,
    splits: int = 1,
    moments: bool = False,
) -> Callable[[nnx.State, Int[Array, "B T"]], tuple]:
    """`key_value_samples` of parameters and tokens, spread over a mesh as `sharding.RULES` say."""
    found = functools.partial(
        key_value_samples,
        config,
        graphdef,
        first=first,
        weigh=weigh,
        splits=splits,
        moments=moments,
        mesh=mesh,
    )
    return jax.jit(
        found,
        in_shardings=(
            sharding.shardings(mesh, params),
            NamedSharding(mesh, sharding.SEQUENCES),
        ),
        out_shardings=jax.tree.map(
            lambda axes: NamedSharding(mesh, axes), _sample_axes(moments), is_leaf=_is_axes
        ),
    )


def _sample_axes(moments: bool) -> tuple:
    means = Moments(*[sharding.MOMENTS] * 3) if moments else None
    return (*[sharding.SAMPLES] * 4, means)


def _is_axes(x: Any) -> bool:
    return isinstance(x, P)


def capture(
    model: loading.LoadedModel,
    tokens: Int[np.ndarray, "n T"],
    store: SampleStore,
    *,
    weigh: bool,
    mesh: Mesh | None = None,
) -> None:
    """Fill ``store`` with the samples of these sequences, from where it is; shows progress.

    With a mesh its devices take one sequence each along ``data``; of several processes each has
    sequences and a store of its own, and all of them as many.
    """
    length = tokens.shape[1]
    run: Callable[..., tuple]
    options: dict[str, Any] = {
        "first": store.first,
        "weigh": weigh,
        "splits": store.splits,
        "moments": store.moments,
    }
    if mesh is None:
        run = functools.partial(key_value_samples, model.config, model.graphdef, **options)
        together = 1
    else:
        run = sharded_samples(mesh, model.config, model.graphdef, model.params, **options)
        together = mesh.shape[DATA] // jax.process_count()
    done = min(processes.exchange(store.done))
    with tqdm(total=tokens.size, initial=done * length, desc="capture", unit="tok") as bar:
        for first in range(done, len(tokens), together):
            rows = tokens[first : first + together]
            count = len(rows)
            if mesh is None:
                samples = run(model.params, jnp.asarray(rows))
            else:
                padded = np.concatenate([rows, np.repeat(rows[-1:], together - count, axis=0)])
                spread = sharding.spread(mesh, padded, sharding.SEQUENCES)
                samples = run(model.params, spread)
                samples = sharding.own(mesh, samples, _sample_axes(store.moments))
            for index in range(count):
                store.put(first + index, *jax.tree.map(lambda x, i=index: x[:, i], samples))
            bar.update(count * length)


def fit_layer(
    rng: Key[Array, ""],
    samples: LayerSamples,
    inv_freq: Float[Array, " half"],
    output: Float[Array, "H d d"] | None,
    spec: QuantSpec,
    *,
    options: FitOptions,
    weigh: bool,
    mesh: Mesh | None = None,
) -> tuple[Codebooks, LayerReport]:
    """`calibration.fit_layer` of stored samples; on a mesh `calibration.fit_sharded`."""
    k, v, k_norms, v_norms, positions, moments = jax.tree.map(jnp.asarray, samples)

    def whole(norms: Array) -> Array | None:
        if not weigh:
            return None
        return norms if norms.ndim == 2 else jnp.sqrt(jnp.sum(jnp.square(norms), axis=-1))

    if mesh is None:
        fit = calibration.fit_layer
    else:
        fit = functools.partial(calibration.fit_sharded, mesh)
    return fit(
        rng,
        k,
        v,
        positions,
        inv_freq,
        spec,
        k_norms=whole(k_norms),
        v_norms=whole(v_norms),
        moments=moments,
        output=output,
        options=options,
    )


fit_layer_compiled = jax.jit(fit_layer, static_argnames=("spec", "options", "weigh", "mesh"))
"""`fit_layer` as one program, in which keys and values are learned side by side."""


def layer_rngs(seed: int, layers: int) -> Key[Array, " L"]:
    """A key for fitting each layer."""
    return jax.random.split(jax.random.key(seed), layers)


def _fitted_shapes(
    config: TrainConfig, spec: QuantSpec, model: loading.LoadedModel, count: int
) -> tuple[Codebooks, LayerReport]:
    """What fitting one layer on ``count`` tokens gives, without fitting.

    Raises:
        InputError: if it cannot be fitted, so that this is known before the samples are taken.
    """
    heads, d = (count, model.config.kv_heads), spec.head_dim

    def shape(dtype: jax.typing.DTypeLike, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    vectors, norms = shape(jnp.bfloat16, *heads, d), shape(jnp.float32, *heads)
    square = shape(jnp.float32, heads[1], d, d)
    moments = Moments(square, square, shape(jnp.float32, heads[1], d // 2))
    samples = LayerSamples(vectors, vectors, norms, norms, shape(jnp.int32, count), moments)
    fit = functools.partial(fit_layer, spec=spec, options=config.fit, weigh=True)
    return jax.eval_shape(fit, jax.random.key(0), samples, shape(jnp.float32, d // 2), square)


def _learn(
    config: TrainConfig,
    spec: QuantSpec,
    model: loading.LoadedModel,
    tokens: Int[np.ndarray, "n T"],
    store: SampleStore,
    work: pathlib.Path,
    mesh: Mesh | None,
) -> tuple[Codebooks, LayerReport, dict[str, Any] | None]:
    """Codebooks, what fitting them found, and sensitivities if stages were given by them.

    For those, codebooks of twice the stages are fitted first: their first stages serve any lower
    number. Without refits they are also the ones that stay. Stages of two codewords are fitted
    together, so there each number of stages that is tried has a fit of its own.
    """
    if config.allocate == "uniform":
        return *_fit(config, spec, model, store, work, mesh), None
    base = spec.key.stages
    low, high = _tried(base)

    def fitted(stages: int, **options: Any) -> tuple[Codebooks, LayerReport]:
        wide = _with_stages(spec, stages)
        if options:
            wide = dataclasses.replace(wide, beam=1)
        return _fit(config, wide, model, store, work, mesh, **options)

    quick = dataclasses.replace(config.fit, refits=0, iterations=5, warmup=3)
    if spec.key.codewords == 2:
        probes = {n: fitted(n, options=quick, kind=f"probe-{n}") for n in (low, base, high)}
        spec, found = _allocate(config, spec, model, tokens, Tried.of_each(probes), work)
        return *_fit(config, spec, model, store, work, mesh), found
    if not config.fit.refits:
        probe = fitted(2 * base)
        spec, found = _allocate(config, spec, model, tokens, Tried.first_stages(*probe), work)
        return *calibration.shortened(*probe, spec), found
    probe = fitted(2 * base, options=quick, kind="probe")
    spec, found = _allocate(config, spec, model, tokens, Tried.first_stages(*probe), work)
    return *_fit(config, spec, model, store, work, mesh), found


def _tried(base: int) -> tuple[int, int]:
    """A lower and a higher number of stages, whose losses give slopes."""
    step = max(1, round(base * 3 / 8))
    return max(1, base - step), base + step


def _with_stages(spec: QuantSpec, stages: int) -> QuantSpec:
    """The spec with this number of stages for keys and for values."""
    key, value = (dataclasses.replace(code, stages=stages) for code in (spec.key, spec.value))
    return dataclasses.replace(spec, key=key, value=value)


class Tried(NamedTuple):
    """Codebooks by which stages are allocated.

    Attributes:
        books: of stages ``[L]`` of the keys and of the values of each layer, all in one shape.
        distortion: of each layer and side after 0, 1 … stages, ``[L, 2, most + 1]``.
    """

    books: Callable[[np.ndarray, np.ndarray], Codebooks]
    distortion: Float[np.ndarray, "L 2 stages+1"]

    @classmethod
    def first_stages(cls, books: Codebooks, report: LayerReport) -> "Tried":
        """Codebooks whose first stages serve any lower number, encoded greedily."""
        books = codec.respec(codebook.stored(books), beam=1)
        sides = [np.asarray(found.error)[..., 0, :].mean(axis=1) for found in report]
        distortion = np.pad(np.stack(sides, axis=1), ((0, 0), (0, 0), (1, 0)), constant_values=1)
        return cls(functools.partial(calibration.first_stages, books), distortion)

    @classmethod
    def of_each(cls, probes: dict[int, tuple[Codebooks, LayerReport]]) -> "Tried":
        """Codebooks of a few numbers of stages, each layer and side of one of them.

        The logarithm of the distortion is linear between these numbers, and beyond them.
        """
        most = max(probes)
        spec = _with_stages(probes[most][0].spec, most)
        wide = {n: calibration.widened(*found, spec) for n, found in probes.items()}
        numbers = sorted(probes)

        def pick(key_stages: np.ndarray, value_stages: np.ndarray) -> Codebooks:
            def side(name: str, stages: np.ndarray) -> Array:
                parts = jnp.stack([getattr(codebook.stored(wide[n][0]), name) for n in numbers])
                return parts[np.searchsorted(numbers, stages), np.arange(len(stages))]

            books = wide[most][0]
            return dataclasses.replace(
                books, key=side("key", key_stages), value=side("value", value_stages)
            )

        logs = np.log(
            [
                [np.asarray(found.error)[..., 0, n - 1].mean(axis=1) for found in probes[n][1]]
                for n in numbers
            ]
        )  # [numbers, 2, L]
        at = np.concatenate([[0], numbers])
        logs = np.concatenate([np.zeros_like(logs[:1]), logs])
        slope = (logs[-1] - logs[-2]) / (at[-1] - at[-2])
        every = np.arange(2 * numbers[1] + 1)

        def curve(known: np.ndarray, slope: float) -> np.ndarray:
            return np.interp(every, at, known) + slope * np.maximum(every - at[-1], 0)

        sides, layers = slope.shape
        distortion = np.exp(
            [[curve(logs[:, s, i], slope[s, i]) for s in range(sides)] for i in range(layers)]
        )
        return cls(pick, distortion)


def _fit(
    config: TrainConfig,
    spec: QuantSpec,
    model: loading.LoadedModel,
    store: SampleStore,
    work: pathlib.Path,
    mesh: Mesh | None,
    *,
    options: FitOptions | None = None,
    kind: str = "layer",
) -> tuple[Codebooks, LayerReport]:
    """All layers' codebooks and reports, stacked; finished layers are kept in ``work``."""
    rngs = layer_rngs(config.seed, store.layers)
    inv_freq = jnp.asarray(model.config.inv_freq, jnp.float32)
    outputs = jax.jit(llama.output_moments, static_argnums=0)(model.graphdef, model.params)
    if mesh is not None:
        outputs = np.asarray(sharding.replicated(mesh, outputs))
        mesh = sharding.for_tokens(mesh, store.sequences * store.tokens * jax.process_count())
    # Where stages differ, pairs of keys and values are many, and share programs only as singles.
    alike = spec.key_stages is None
    fit = fit_layer_compiled if alike or mesh is not None else fit_layer
    trees: dict[QuantSpec, Any] = {}
    layers = []
    for index in tqdm(range(store.layers), desc="fit", unit="layer"):
        own = calibration.of_layer(spec, index)
        file = work / f"{kind}-{index:03}.npz"
        if not processes.agreed(file.exists()):
            samples = store.layer(index)
            fitted = fit(
                rngs[index],
                samples if mesh is None else _spread(mesh, samples),
                inv_freq,
                outputs[index],
                own,
                options=config.fit if options is None else options,
                weigh=config.weights == "gradient",
                mesh=mesh,
            )
            if mesh is not None:
                fitted = sharding.replicated(mesh, fitted)
            processes.once(functools.partial(calibration.save_leaves, file, fitted))
        if own not in trees:
            count = store.sequences * store.tokens
            trees[own] = jax.tree.structure(_fitted_shapes(config, own, model, count))
        books, report = jax.tree.unflatten(trees[own], calibration.load_leaves(file))
        layers.append(calibration.widened(books, report, spec))
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _spread(mesh: Mesh, samples: LayerSamples) -> LayerSamples:
    """This process's samples among those of all."""
    positions, moments = samples.positions, samples.moments
    if moments is not None and jax.process_count() > 1:
        moments = jax.tree.map(lambda x: x.mean(axis=0), multihost_utils.process_allgather(moments))
    k, v, k_norms, v_norms = sharding.spread(mesh, tuple(samples[:4]), P(DATA, MODEL))
    positions = sharding.spread(mesh, positions, P(DATA))
    return LayerSamples(k, v, k_norms, v_norms, positions, moments)


def _allocate(
    config: TrainConfig,
    spec: QuantSpec,
    model: loading.LoadedModel,
    tokens: Int[np.ndarray, "n T"],
    tried: Tried,
    work: pathlib.Path,
) -> tuple[QuantSpec, dict[str, Any]]:
    """The spec with stages by measured sensitivity, and what was measured, for the report.

    The divergence of the model is measured with fewer and with more stages in one side of one layer
    at a time.
    """
    base, (layers, _, numbers) = spec.key.stages, tried.distortion.shape
    most, (low, high) = numbers - 1, _tried(base)
    distortion = tried.distortion
    rows = tokens[-_PROBED:]
    exact = [
        evaluation.exact_hidden(model.graphdef, model.params, jnp.asarray(x)[None]) for x in rows
    ]

    def measured(stages: Int[np.ndarray, "L 2"]) -> float:
        part = tried.books(stages[:, 0], stages[:, 1])
        return evaluation.fidelity(model.graphdef, model.params, rows, part, exact=exact).kl

    file = work / "sensitivity.npz"
    losses = processes.agreed(calibration.load_leaves(file)[0].tolist() if file.exists() else [])
    probes = [(*at, n) for at in np.ndindex(layers, 2) for n in (low, high)]
    for layer, side, n in tqdm(
        probes[len(losses) :], initial=len(losses), total=len(probes), desc="probe", unit="code"
    ):
        stages = np.full((layers, 2), base)
        stages[layer, side] = n
        losses.append(measured(stages))
        processes.once(functools.partial(calibration.save_leaves, file, np.asarray(losses)))
    of_low, of_high = np.moveaxis(np.reshape(losses, (layers, 2, 2)), -1, 0)
    slopes = allocation.slopes(of_low, of_high, distortion[..., low], distortion[..., high])
    loss = slopes[..., None] * distortion

    if config.allocate == "sides":
        loss = loss.sum(axis=0, keepdims=True)
    unit = _granularity(spec)
    given = allocation.allocate(
        loss[..., ::unit].reshape(2 * len(loss), -1), 2 * len(loss) * base // unit
    )
    key_stages, value_stages = unit * given.reshape(-1, 2).T
    spec = calibration.by_layer(spec, key_stages.tolist(), value_stages.tolist())
    facts = {"low": low, "high": high, "most": most, "sequences": len(rows)}
    arrays = {"kl_low": of_low, "kl_high": of_high, "slopes": slopes}
    return spec, facts | {name: x.tolist() for name, x in arrays.items()}


def _granularity(spec: QuantSpec) -> int:
    """Stages that are given together: those of a byte, or of two codewords those of a word, which
    the kernels read; fewer if the stages to give are no multiple."""
    unit = UNIT if spec.key.codewords == 2 else max(1, 8 // spec.key.code_bits)
    return math.gcd(spec.key.stages, unit)


_PROBED = 4  # sequences on which sensitivities are measured


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
