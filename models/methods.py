"""Methods by name: ``gsrq@1``, ``kivi2``, a folder of codebooks … to codecs of a model.

A name is a family, or a family and a rate, ``family@bits``. Those that learn are all fitted to the
same samples. A family whose stages are learned and encoded one after the other is fitted once, at
the highest rate asked for: its first stages are those of every lower rate.

``+beam8`` after a name of residual codes, as in ``gsrq@1+beam8``, is another encoder for the same
codebooks.
"""

import dataclasses
import functools
import hashlib
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

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
from gsrq_jax.models import loading, text, training
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
        nested: whether the first stages of a higher rate are those of a lower one.
        beam: whether the encoder may be a beam search.
    """

    title: str
    spec: Callable[..., Any]
    fit: Callable[..., Any] | None = None
    bits: float | None = None
    nested: bool = False
    beam: bool = False


@functools.partial(jax.jit, static_argnames=("spec", "options", "weigh"))
def _residual(
    rng: Key[Array, ""],
    samples: LayerSamples,
    inv_freq: Float[Array, " half"],
    spec: QuantSpec,
    *,
    options: FitOptions,
    weigh: bool,
) -> Codebooks:
    k, v, k_norms, v_norms, positions = map(jnp.asarray, samples)

    def whole(norms: Array) -> Array | None:
        return jnp.sqrt(jnp.sum(jnp.square(norms), axis=-1)) if weigh else None

    books, _ = calibration.fit_layer(
        rng,
        k,
        v,
        positions,
        inv_freq,
        spec,
        k_norms=whole(k_norms),
        v_norms=whole(v_norms),
        options=options,
    )
    return codebook.stored(books)


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
    fit = functools.partial(_residual, options=FitOptions(**options), weigh=weigh)
    return Family(title, _of_heads(QuantSpec.from_bits), fit, nested=True, beam=True)


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
    name, beam = _split_beam(name)
    if beam is not None:
        return f"{title(name)}, beam {beam}"
    if name == FULL:
        return "full precision"
    if _is_folder(name):
        return pathlib.Path(name).name
    return FAMILIES[parse(name)[0]].title


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
    names = list(dict.fromkeys(names))
    parts = {name: _split_beam(name) for name in names}
    fields = {k: v for k, v in (("window", window), ("sinks", sinks)) if v is not None}
    found: dict[str, Codec | None] = {}
    wanted: dict[str, dict[str, Any]] = {}  # of families that learn: name to spec
    for name in dict.fromkeys(name for name, _ in parts.values()):
        if name == FULL:
            found[name] = None
        elif _is_folder(name):
            books = codebook.load(pathlib.Path(name), model=model.fingerprint)
            found[name] = codec.respec(books, **fields)
        else:
            family, bits = parse(name)
            spec = FAMILIES[family].spec(bits, model.config, **fields)
            if FAMILIES[family].fit is None:
                found[name] = uniform.Uniform(spec)
            else:
                wanted.setdefault(family, {})[name] = spec
    if wanted:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary) if work is None else work
            found |= _fitted(wanted, model, calibration or Calibration(), folder)
    return {name: _with_beam(found[part], beam) for name, (part, beam) in parts.items()}


def _split_beam(name: str) -> tuple[str, int | None]:
    """``gsrq@1+beam8`` to ``gsrq@1`` and 8; None for a name without.

    Raises:
        InputError: if there is no such beam, or nothing that it could encode with.
    """
    part, plus, width = name.rpartition("+beam")
    if not plus or _is_folder(name):
        return name, None
    if not (width.isascii() and width.isdigit()):
        raise InputError(f"the method {name!r} has no such beam; write +beam8 for a width of 8")
    check_beam(int(width))
    if not _is_folder(part) and (part == FULL or not FAMILIES[parse(part)[0]].beam):
        able = ", ".join(name for name, family in FAMILIES.items() if family.beam)
        raise InputError(f"{part!r} has no beam; {able} and folders of codebooks have one")
    return part, int(width)


def _with_beam(books: Codec | None, beam: int | None) -> Codec | None:
    return books if beam is None or books is None else codec.respec(books, beam=beam)


def _fitted(
    wanted: dict[str, dict[str, Any]],
    model: loading.LoadedModel,
    calibration: Calibration,
    work: pathlib.Path,
) -> dict[str, Codec]:
    tokens = _tokens(calibration, model)
    specs = [spec for by_name in wanted.values() for spec in by_name.values()]
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
    )
    training.capture(model, tokens, store, weigh=True)
    found: dict[str, Codec] = {}
    for family, by_name in wanted.items():
        if FAMILIES[family].nested:
            top = max(by_name.values(), key=lambda spec: spec.bits)
            whole = _fit(family, top, model, calibration, store, work)
            found |= {name: _first_stages(whole, spec) for name, spec in by_name.items()}
        else:
            for name, spec in by_name.items():
                found[name] = _fit(family, spec, model, calibration, store, work)
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
    family: str,
    spec: Any,
    model: loading.LoadedModel,
    options: Calibration,
    store: SampleStore,
    work: pathlib.Path,
) -> Codec:
    """All layers' codecs, stacked; kept in ``work``."""
    fit = FAMILIES[family].fit
    assert fit is not None
    one = functools.partial(fit, spec=spec)
    inv_freq = jnp.asarray(model.config.inv_freq, jnp.float32)
    rngs = jax.random.split(jax.random.key(options.seed), store.layers)
    shapes = jax.eval_shape(one, rngs[0], store.layer(0), inv_freq)
    file = work / f"{family}-{spec.bits:g}.npz"
    if not file.exists():
        layers = [
            jax.device_get(one(rngs[index], store.layer(index), inv_freq))
            for index in tqdm(range(store.layers), desc=f"fit {family}@{spec.bits:g}", unit="layer")
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
