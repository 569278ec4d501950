"""Methods by name: ``gsrq@1``, ``kivi2``, a folder of codebooks … to codecs of a model.

A name is a family, or a family and a rate, ``family@bits``. Those that learn are all fitted to the
same samples. A family whose stages are learned and encoded one after the other is fitted once, at
the highest rate asked for: its first stages are those of every lower rate.

Residual codes take options after their name, each with a ``+``, as in ``gsrq@1+k16+beam8``:

- ``beam8`` encodes with a beam of that width; folders of codebooks take it, too;
- ``outliers16`` keeps that many coded tokens of each head exact; folders take it, too;
- ``refits2`` fits all stages anew together so often, and trains with the beam;
- ``k16`` has that many codewords a stage, ``vk16`` those of values alone;
- ``heads3`` codes so many adjacent KV heads together;
- ``pre``, ``post`` or ``block512`` is another rotary frame, ``uncentred`` keeps the mean key in;
- ``frame4`` shares a rotary frame between so many blocks, one after the other;
- ``every16`` rotates the mean key at every 16th token (see `gsrq_jax.spec.QuantSpec`);
- ``kgradient``, ``kqueries``, ``vgradient``, ``voutput`` are metrics of keys and values, and
  ``power0.7`` the power of their moments.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from gsrq_jax import calibration, codebook, codec
from gsrq_jax.baselines import commvq, cq, uniform, vqllm
from gsrq_jax.calibration import FitOptions, LayerSamples, SampleStore
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import Codec
from gsrq_jax.errors import InputError
from gsrq_jax.models import llama, loading, text, training
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.models.runfolder import claim
from gsrq_jax.spec import CacheSpec, QuantSpec, check_beam

FULL = "full"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What methods that learn are fitted to.

    Attributes:
        text: text file, or ``python`` for the help topics of this Python.
        dataset: data set instead: hub id or folder, ``name`` or ``name:config``.
        column: text column of the data set.
        split: split of the data set.
        tokens: calibration tokens.
        length: tokens of a sequence.
        seed: of whatever is random.
    """

    text: str = text.PYTHON_TOPICS
    dataset: str | None = None
    column: str = "text"
    split: str = "train"
    tokens: int = 8_192
    length: int = 1024
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """Methods that differ in their rate alone.

    Attributes:
        title: for tables.
        spec: of ``(bits, config, **fields)``; ``fields`` are those of `CacheSpec`.
        fit: of ``(rng, samples, inv_freq, spec)``, one layer's codec, compiled; None where nothing
            is learned and ``spec`` alone makes a `uniform.Uniform`.
        bits: the only rate, for families without ``@bits``.
        nested: whether the first stages of a higher rate are those of a lower one, unless all are
            fitted together.
        options: how residual codes are learned; None for other methods, which take no options.
        weigh: whether residual codes are learned with weights.
    """

    title: str
    spec: Callable[..., Any]
    fit: Callable[..., Any] | None = None
    bits: float | None = None
    nested: bool = False
    options: FitOptions | None = None
    weigh: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands after a name of residual codes.

    Attributes:
        text: as it stands there, but for what `respec` changes.
        encoder: fields for `respec`.
        spec: fields of `QuantSpec.from_bits`.
        fit: fields of `FitOptions`.
    """

    text: str = ""
    encoder: tuple[tuple[str, Any], ...] = ()
    spec: tuple[tuple[str, Any], ...] = ()
    fit: tuple[tuple[str, Any], ...] = ()


# What it is a field of, which, and its value or how that is read from the number.
_OPTIONS: dict[str, tuple[Literal["encoder", "spec", "fit"], str, Any]] = {
    "beam": ("encoder", "beam", int),
    "outliers": ("encoder", "outliers", int),
    "refits": ("fit", "refits", int),
    "k": ("spec", "codewords", int),
    "vk": ("spec", "value_codewords", int),
    "heads": ("spec", "heads", int),
    "block": ("spec", "block", int),
    "every": ("spec", "mean_every", int),
    "frame": ("spec", "frame_blocks", int),
    "pre": ("spec", "frame", "pre"),
    "post": ("spec", "frame", "post"),
    "uncentred": ("fit", "center", False),
    "kgradient": ("fit", "key_metric", "gradient"),
    "kqueries": ("fit", "key_metric", "queries"),
    "vgradient": ("fit", "value_metric", "gradient"),
    "voutput": ("fit", "value_metric", "output"),
    "power": ("fit", "metric_power", float),
}


@functools.partial(jax.jit, static_argnames=("spec", "weighted", "iterations"))
def _coupled(
    rng: Key[Array, ""],
    samples: LayerSamples,
    inv_freq: Float[Array, " half"],
    spec: QuantSpec,
    *,
    weighted: bool,
    iterations: int = 50,
) -> Codebooks:
    if not weighted:
        return codebook.stored(
            cq.fit(rng, samples, inv_freq, spec, weighted=False, iterations=iterations)
        )
    parts = samples.k_norms.shape[-1]
    if spec.key.groups > parts:
        raise InputError(
            f"CQ with {spec.bits:g} bits couples fewer channels than samples have gradients for; "
            f"take at most {spec.bits * parts / spec.key.groups:g} bits"
        )
    k_fisher, v_fisher = (jnp.square(x) for x in (samples.k_norms, samples.v_norms))
    return codebook.stored(
        cq.fit(
            rng,
            samples,
            inv_freq,
            spec,
            k_fisher=k_fisher,
            v_fisher=v_fisher,
            iterations=iterations,
        )
    )


def _of_heads(make: Callable[..., CacheSpec], **options: Any) -> Callable[..., CacheSpec]:
    """The spec that ``make`` gives for ``bits`` on the model's head size."""

    def spec(bits: float, config: LlamaConfig, **fields: Any) -> CacheSpec:
        return make(bits, config.head_dim, **options, **fields)

    return spec


def _commvq(bits: float, config: LlamaConfig, **fields: Any) -> CacheSpec:
    return commvq.CommVQSpec.from_bits(bits, config.head_dim, config.kv_heads, **fields)


def _rq(title: str, weigh: bool, **options: Any) -> Family:
    spec = _of_heads(QuantSpec.from_bits)
    return Family(title, spec, nested=True, options=FitOptions(**options), weigh=weigh)


_rounded, _kivi = uniform.UniformSpec.rounded, uniform.UniformSpec.kivi

FAMILIES = {
    "int8": Family("int8, round to nearest", _of_heads(_rounded), bits=8),
    "int4": Family("int4, round to nearest", _of_heads(_rounded, group=32), bits=4),
    "kivi2": Family("KIVI-2", _of_heads(_kivi), bits=2),
    "kivi1": Family("KIVI-1", _of_heads(_kivi), bits=1),
    "vqllm": Family("VQLLM", _of_heads(vqllm.VQLLMSpec.from_bits), vqllm.fit, nested=True),
    "cq": Family("CQ", _of_heads(cq.spec), functools.partial(_coupled, weighted=True)),
    "cq-unweighted": Family(
        "CQ without Fisher weights",
        _of_heads(cq.spec),
        functools.partial(_coupled, weighted=False),
    ),
    "commvq": Family("CommVQ", _commvq, commvq.fit),
    "kmeans": _rq("k-means RQ", weigh=False, rule="kmeans"),
    "spherical": _rq("k-means RQ, spherical start", weigh=False, shape_update="raw"),
    "gsrq": _rq("GSRQ", weigh=True),
}


def parse(name: str) -> tuple[str, float]:
    """Family and bits of a name that is no folder.

    Raises:
        InputError: if there is no such family, or it has no such rate.
    """
    family, at, rate = name.partition("@")
    if family not in FAMILIES:
        raise InputError(
            f"unknown method {name!r}; choose {FULL}, {', '.join(FAMILIES)}, each of those that "
            "learn with @bits, or give a folder of codebooks"
        )
    fixed = FAMILIES[family].bits
    try:
        bits = float(rate) if at else fixed
    except ValueError:
        bits = None
    if bits is None or (fixed is not None and bits != fixed):
        hint = f"{family} has {fixed:g} bits" if fixed else f"write {family}@1 for one bit a number"
        raise InputError(f"the method {name!r} has no such rate; {hint}")
    return family, bits


def title(name: str) -> str:
    """The method's name in a table."""
    base, options = _split(name)
    if base == FULL:
        text = "full precision"
    elif _is_folder(base):
        path = pathlib.Path(base)  # of codebooks in a run's folder the run's name says more
        text = path.parent.name if path.name == "codebooks" and path.parent.name else path.name
    else:
        text = FAMILIES[parse(base)[0]].title
    after = [f"{field} {value}" for field, value in options.encoder]
    return ", ".join([text, *options.text.split("+")[1:], *after])


def resolve(
    names: Iterable[str],
    model: loading.LoadedModel,
    calibration: Calibration | None = None,
    work: pathlib.Path | None = None,
    *,
    window: int | None = None,
    sinks: int | None = None,
) -> dict[str, Codec | None]:
    """Stacked codecs of these methods; None for ``full``.

    Args:
        names: methods.
        model: whose cache they code.
        calibration: what those that learn are fitted to; None is its defaults.
        work: folder where samples and fitted codecs are kept for the next run; None keeps nothing.
        window: recent tokens that stay exact; None is the folder's, 128 otherwise.
        sinks: first tokens that stay exact; None is the folder's, 4 otherwise.

    Raises:
        InputError: for a name, rate, folder, text or work folder that cannot be used; before
            anything is fitted where it can be known.
    """
    parts = {name: _split(name) for name in names}
    fields = {k: v for k, v in (("window", window), ("sinks", sinks)) if v is not None}
    found: dict[str, Codec | None] = {}
    folders: dict[str, Codec] = {}
    wanted: dict[_Fit, dict[float, Any]] = {}  # what is fitted: bits to spec
    for name, (base, options) in parts.items():
        if base == FULL:
            found[name] = None
        elif _is_folder(base):
            if base not in folders:
                books = codebook.load(pathlib.Path(base), model=model.fingerprint)
                folders[base] = codec.respec(books, **fields)
            found[name] = folders[base]
        else:
            family, bits = parse(base)
            spec = FAMILIES[family].spec(bits, model.config, **fields, **dict(options.spec))
            if FAMILIES[family].fit is None and FAMILIES[family].options is None:
                found[name] = uniform.Uniform(spec)
                continue
            fit = _Fit(family, _of_fit(options))
            spec = dataclasses.replace(spec, **dict(fit.options.encoder))
            wanted.setdefault(fit, {})[bits] = spec
    if wanted:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary) if work is None else work
            fitted = _fitted(wanted, model, calibration or Calibration(), folder)
        for name, (base, options) in parts.items():
            if name not in found:
                family, bits = parse(base)
                found[name] = fitted[_Fit(family, _of_fit(options)), bits]
    for name, (_, options) in parts.items():
        if options.encoder and (fitted_one := found[name]) is not None:
            found[name] = codec.respec(fitted_one, **dict(options.encoder))
    return {name: found[name] for name in parts}


class _Fit(NamedTuple):
    """Codecs of all rates that are learned in the same way."""

    family: str
    options: Options


def _of_fit(options: Options) -> Options:
    """What of the options decides how codebooks are learned: of joint stages their beam does."""
    beam = tuple(x for x in options.encoder if x[0] == "beam" and _jointly(options))
    return dataclasses.replace(options, encoder=beam)


def _jointly(options: Options) -> bool:
    """Whether all stages are fitted together, to the codes that the encoder finds: by refits, or
    because a stage has two codewords."""
    words = [x for field, x in options.spec if field in ("codewords", "value_codewords")]
    return dict(options.fit).get("refits", 0) > 0 or 2 in words


def _split(name: str) -> tuple[str, Options]:
    """``gsrq@1+k16+beam8`` to ``gsrq@1`` and its options.

    Raises:
        InputError: if there is no such option, or nothing that could have it.
    """
    if _is_folder(name):
        return name, Options()
    base, *texts = name.split("+")
    while texts and not _is_folder(base) and _is_folder(f"{base}+{texts[0]}"):
        base = f"{base}+{texts.pop(0)}"  # a folder with a plus in its name
    if not texts:
        return name, Options()
    folder = _is_folder(base)
    if not folder and (base == FULL or FAMILIES[parse(base)[0]].options is None):
        able = ", ".join(name for name, family in FAMILIES.items() if family.options is not None)
        raise InputError(f"{base!r} takes no options; {able} do, and folders of codebooks some")
    known = {word: o for word, o in _OPTIONS.items() if o[0] == "encoder" or not folder}
    fields: dict[str, dict[str, Any]] = {"encoder": {}, "spec": {}, "fit": {}}
    kept = ""
    for part in texts:
        option = re.fullmatch(r"([a-z]+)([0-9.]*)", part)
        word, number = option.groups() if option else ("", "")
        if word not in known or callable(known[word][2]) != bool(number):
            names = ", ".join(f"+{w}{'N' if callable(o[2]) else ''}" for w, o in known.items())
            raise InputError(f"the method {name!r} has no option +{part}; there are {names}")
        where, field, value = known[word]
        try:
            fields[where][field] = value(number) if number else value
        except ValueError:
            raise InputError(f"+{part} in the method {name!r} needs a whole number") from None
        kept += f"+{part}" if where != "encoder" else ""
    check_beam(fields["encoder"].get("beam", 1))
    return base, Options(kept, *(tuple(x.items()) for x in fields.values()))


def _fitted(
    wanted: dict[_Fit, dict[float, Any]],
    model: loading.LoadedModel,
    calibration: Calibration,
    work: pathlib.Path,
) -> dict[tuple[_Fit, float], Codec]:
    tokens = _tokens(calibration, model)
    specs = [spec for by_bits in wanted.values() for spec in by_bits.values()]
    first = specs[0].sinks
    claim(
        work,
        "methods",
        {
            "model": model.fingerprint,
            "sinks": first,
            "calibration": dataclasses.asdict(calibration),
        },
        inputs={"text": hashlib.sha256(tokens.tobytes()).hexdigest()},
        flag="--work",
    )
    store = SampleStore.open(
        work / "samples",
        layers=model.config.layers,
        sequences=len(tokens),
        tokens=calibration.length - first,
        heads=model.config.kv_heads,
        dim=model.config.head_dim,
        first=first,
        splits=_splits(model.config.head_dim),
        moments=True,
    )
    training.capture(model, tokens, store, weigh=True)
    found: dict[tuple[_Fit, float], Codec] = {}
    for fit, by_bits in wanted.items():
        if FAMILIES[fit.family].nested and not _jointly(fit.options):
            top = max(by_bits.values(), key=lambda spec: spec.bits)
            whole = _fit(fit, top, model, calibration, store, work)
            found |= {(fit, bits): _first_stages(whole, spec) for bits, spec in by_bits.items()}
        else:
            for bits, spec in by_bits.items():
                found[fit, bits] = _fit(fit, spec, model, calibration, store, work)
    return found


def _splits(head_dim: int) -> int:
    """Parts of a head with gradient norms of their own: CQ's finest groups have four channels."""
    return head_dim // 4 if head_dim % 4 == 0 and head_dim > 4 else 2


def _tokens(calibration: Calibration, model: loading.LoadedModel) -> Int[np.ndarray, "n T"]:
    tokenizer = model.needed_tokenizer()
    c = calibration
    name, pieces = text.source(c.text, c.dataset, column=c.column, split=c.split)
    count = -(-c.tokens // c.length)
    return text.sequences(pieces, tokenizer, length=c.length, count=count, name=name)


def _fit(
    fit: _Fit,
    spec: Any,
    model: loading.LoadedModel,
    options: Calibration,
    store: SampleStore,
    work: pathlib.Path,
) -> Codec:
    """All layers' codecs, stacked; kept in ``work``."""
    family = FAMILIES[fit.family]
    inv_freq = jnp.asarray(model.config.inv_freq, jnp.float32)
    rngs = training.layer_rngs(options.seed, store.layers)
    outputs = llama.output_moments(model.graphdef, model.params)
    changed = family.options and dataclasses.replace(family.options, **dict(fit.options.fit))

    def one(index: int, samples: LayerSamples) -> Codec:
        if changed is None:
            assert family.fit is not None
            return family.fit(rngs[index], samples, inv_freq, spec=spec)
        books, _ = training.fit_layer_compiled(
            rngs[index],
            samples,
            inv_freq,
            outputs[index],
            spec,
            options=changed,
            weigh=family.weigh,
        )
        return codebook.stored(books)

    shapes = jax.eval_shape(functools.partial(one, 0), store.layer(0))
    beam = "".join(f"+{field}{value}" for field, value in fit.options.encoder)
    name = f"{fit.family}@{spec.bits:g}{fit.options.text}{beam}"
    file = work / f"{name}.npz"
    if not file.exists():
        layers = [
            jax.device_get(one(index, store.layer(index)))
            for index in tqdm(range(store.layers), desc=f"fit {name}", unit="layer")
        ]
        # In float32, for npz files do not know bfloat16.
        calibration.save_leaves(
            file, jax.tree.map(lambda *x: np.stack(x, dtype=np.float32), *layers)
        )
    leaves = [
        jnp.asarray(x, shape.dtype)
        for x, shape in zip(calibration.load_leaves(file), jax.tree.leaves(shapes), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _first_stages(whole: Any, spec: Any) -> Codec:
    """The codec of fewer stages, codewords being ``[…, R, K, g]``."""

    def first(words: Array, stages: int) -> Array:
        return words[..., :stages, :, :]

    key, value = (spec.key, spec.value) if isinstance(spec, QuantSpec) else (spec.code, spec.code)
    return dataclasses.replace(
        whole,
        key=first(whole.key, key.stages),
        value=first(whole.value, value.stages),
        spec=spec,
    )


def _is_folder(name: str) -> bool:
    return name not in FAMILIES and name != FULL and pathlib.Path(name).is_dir()
