"""From keys, values and sensitivities of a model to codebooks, one layer at a time.

The model is only a function here: whatever yields rotated keys, values and, if wanted, norms of
the loss's gradient for each token can be calibrated. `fit_layer` is pure; `SampleStore` keeps more
samples than memory holds, in files, and knows after an interruption how far it came.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from gsrq_jax import residual
from gsrq_jax.codebook import Codebooks, apart, of_heads, together, under
from gsrq_jax.errors import InputError
from gsrq_jax.frame import to_frame
from gsrq_jax.kmeans import AxisName, Implementation
from gsrq_jax.rope import rotate
from gsrq_jax.sensitivity import log_smooth, metric
from gsrq_jax.spec import QuantSpec, ResidualSpec

KeyMetric = Literal["none", "gradient", "queries"]
ValueMetric = Literal["none", "gradient", "output"]


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How codebooks are learned.

    Attributes:
        rule: centroid rule: ``gskm`` (the paper's), ``kmeans`` or ``spherical`` for comparison.
            Stages of two codewords are fitted jointly instead (ours).
        shape_update: ``unit`` (paper) or ``raw`` (the authors' figure code), for ``gskm``.
        iterations: Lloyd iterations of the rule, each stage; of two codewords rounds of encoding
            and fitting all stages.
        warmup: spherical iterations before them, for ``gskm``.
        center: subtract the mean key of each head (before RoPE) before quantising keys.
        refits: times that all stages are fitted anew together, by weighted least squares, to the
            codes that the encoder gives (ours).
        key_metric: distance by which keys are clustered and coded (ours): Euclidean, ``gradient``
            for the second moment of the loss's gradient, or ``queries`` for that of the queries in
            each rotary pair.
        value_metric: the same of values: Euclidean, ``gradient``, or ``output`` for the output
            projection ``W_oᵀW_o``.
        metric_power: of these moments, see `gsrq_jax.sensitivity.metric`.
        implementation: ``xla``, or ``mosaic_gpu`` for the kernels for Hopper GPUs; None is the
            kernels where they can be had, see `gsrq_jax.kmeans.kmeans`.
    """

    rule: residual.Rule = "gskm"
    shape_update: residual.ShapeUpdate = "unit"
    iterations: int = 10
    warmup: int = 5
    center: bool = True
    refits: int = 0
    key_metric: KeyMetric = "none"
    value_metric: ValueMetric = "none"
    metric_power: float = 0.5
    implementation: Implementation | None = None

    def __post_init__(self):
        for name, kind in (("key_metric", KeyMetric), ("value_metric", ValueMetric)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of "
                    + ", ".join(get_args(kind))
                )
        if not 0 <= self.metric_power <= 1:
            raise InputError(f"metric_power must be from 0 to 1, got {self.metric_power}")

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of gradients or queries are needed."""
        return self.key_metric != "none" or self.value_metric == "gradient"


class LayerReport(NamedTuple):
    """What fitting one layer found: one `residual.FitReport` for keys, one for values."""

    key: residual.FitReport
    value: residual.FitReport


class Moments(NamedTuple):
    """Second moments of one layer, float32, with any leading axes.

    Attributes:
        key: ``[H, d, d]``, of the loss's gradient with respect to keys before RoPE.
        value: ``[H, d, d]``, of that with respect to values.
        query: ``[H, d / 2]``, mean square of the queries of a KV head in each rotary pair.
    """

    key: Any
    value: Any
    query: Any


def mean_key(
    k: Float[Array, "N H d"],
    positions: Int[Array, " N"],
    inv_freq: Float[Array, " d/2"],
    *,
    axis_name: AxisName = None,
) -> Float[Array, "H d"]:
    """Mean of rotated keys before their rotation, float32; over devices, too, by ``axis_name``."""
    mean = rotate(k.astype(jnp.float32), -positions[:, None], inv_freq).mean(axis=0)
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def fit_layer(
    rng: Key[Array, ""],
    k: Float[Array, "N H d"],
    v: Float[Array, "N H d"],
    positions: Int[Array, " N"],
    inv_freq: Float[Array, " d/2"],
    spec: QuantSpec,
    *,
    k_norms: Float[Array, "N H"] | None = None,
    v_norms: Float[Array, "N H"] | None = None,
    moments: Moments | None = None,
    output: Float[Array, "H d d"] | None = None,
    options: FitOptions = FitOptions(),
    axis_name: AxisName = None,
    head_axis: AxisName = None,
) -> tuple[Codebooks, LayerReport]:
    """One layer's codebooks from N tokens.

    Args:
        rng: of the initial codewords.
        k: keys rotated at ``positions``.
        v: values.
        positions: of the tokens in their sequences.
        inv_freq: the layer's rotary frequencies.
        spec: the cache that the codebooks are for; its beam is also what they are learned with.
        k_norms: norm of the loss's gradient with respect to each key; None weighs all alike.
        v_norms: the same for values.
        moments: for the metrics that ``options`` ask for.
        output: ``W_oᵀW_o`` of the query heads of each KV head, for the values' metric ``output``.
        options: how to learn.
        axis_name: mapped axis or axes over which the tokens are spread, the same number each.
        head_axis: mapped axis or axes over which the KV heads are spread.

    Returns:
        The codebooks, and the report; errors and cosines there are those of the metric.

    Raises:
        InputError: if shapes do not fit, there are fewer tokens than codewords, or what a metric
            needs is missing.
    """
    heads = k.shape[:2]
    for name, x, shape in (
        ("keys", k, (*heads, spec.head_dim)),
        ("values", v, (*heads, spec.head_dim)),
        ("positions", positions, heads[:1]),
        ("inv_freq", inv_freq, (spec.head_dim // 2,)),
        ("k_norms", k_norms, heads),
        ("v_norms", v_norms, heads),
    ):
        if x is not None and x.shape != shape:
            raise InputError(f"{name} have the shape {x.shape}; {shape} is needed here")
    mean = mean_key(k, positions, inv_freq, axis_name=axis_name)
    if not options.center:
        mean = jnp.zeros_like(mean)
    framed = to_frame(k, positions, spec, mean, inv_freq)
    key_rng, value_rng = jax.random.split(rng)

    ends = positions.min(), positions.max()
    if axis_name is not None:
        ends = lax.pmin(ends[0], axis_name), lax.pmax(ends[1], axis_name)
    key_metric, value_metric = _metrics(spec, inv_freq, ends, moments, output, options)

    def fit(
        rng: Array, x: Array, code: ResidualSpec, norms: Array | None, metric: Array | None
    ) -> tuple[Array, residual.FitReport]:
        points = jnp.moveaxis(x.astype(jnp.float32), 1, 0)
        points = together(points if metric is None else under(metric, points), code)
        weights = None
        if norms is not None:
            weights = log_smooth(jnp.moveaxis(norms, 1, 0), axis_name=axis_name)
            # Heads that share codes weigh a token by their mean.
            weights = together(weights[..., None], code).mean(axis=-1)
        dim = code.dim * code.heads
        words, report = residual.fit(
            rng,
            points,
            ResidualSpec(dim, code.group * code.heads, code.stages, code.codewords),
            weights,
            rule=options.rule,
            shape_update=options.shape_update,
            iterations=options.iterations,
            warmup=options.warmup,
            beam=spec.beam,
            refits=options.refits,
            axis_name=axis_name,
            problem_axis=head_axis,
            implementation=options.implementation,
        )
        words, report = (
            apart(words, code),
            jax.tree.map(lambda x: of_heads(x, code, axis=0), report),
        )
        return words if metric is None else under(jnp.linalg.inv(metric), words), report

    keys, key_report = fit(key_rng, framed, spec.key, k_norms, key_metric)
    values, value_report = fit(value_rng, v, spec.value, v_norms, value_metric)
    books = Codebooks(
        key=keys,
        value=values,
        key_mean=mean,
        inv_freq=jnp.asarray(inv_freq, jnp.float32),
        spec=spec,
        key_metric=key_metric,
        value_metric=value_metric,
    )
    return books, LayerReport(key_report, value_report)


DATA, MODEL = "data", "model"
"""Axes of a mesh: tokens are spread over the first, heads over the second."""


def fit_sharded(
    mesh: Mesh,
    rng: Key[Array, ""],
    k: Float[Array, "N H d"],
    v: Float[Array, "N H d"],
    positions: Int[Array, " N"],
    inv_freq: Float[Array, " d/2"],
    spec: QuantSpec,
    *,
    k_norms: Float[Array, "N H"] | None = None,
    v_norms: Float[Array, "N H"] | None = None,
    moments: Moments | None = None,
    output: Float[Array, "H d d"] | None = None,
    options: FitOptions = FitOptions(),
) -> tuple[Codebooks, LayerReport]:
    """`fit_layer` on a mesh of axes ``data`` and ``model``: the same codebooks, up to rounding.

    Devices along ``data`` exchange sums over cells and the best scores of each draw, those along
    ``model`` nothing; what comes back is spread over the heads.

    Raises:
        InputError: if the mesh divides tokens or heads unevenly, or as `fit_layer`.
    """
    for axis, size, what in ((DATA, k.shape[0], "tokens"), (MODEL, k.shape[1], "KV heads")):
        if size % mesh.shape[axis]:
            raise InputError(
                f"{size} {what} cannot be shared evenly by {mesh.shape[axis]} devices along "
                f"{axis}; choose a mesh, or a number of tokens, that divides"
            )

    def share(rng, k, v, positions, inv_freq, k_norms, v_norms, moments, output):
        books, report = fit_layer(
            rng,
            k,
            v,
            positions,
            inv_freq,
            spec,
            k_norms=k_norms,
            v_norms=v_norms,
            moments=moments,
            output=output,
            options=options,
            axis_name=DATA,
            head_axis=MODEL,
        )
        arrays = books.key, books.value, books.key_mean, books.key_metric, books.value_metric
        return arrays, report  # whose first axis is that of heads

    vectors, heads = P(DATA, MODEL), P(MODEL)
    mapped = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(P(), vectors, vectors, P(DATA), P(), vectors, vectors, heads, heads),
        out_specs=heads,
    )
    arrays, report = mapped(rng, k, v, positions, inv_freq, k_norms, v_norms, moments, output)
    key, value, mean, key_metric, value_metric = arrays
    books = Codebooks(
        key=key,
        value=value,
        key_mean=mean,
        inv_freq=jnp.asarray(inv_freq, jnp.float32),
        spec=spec,
        key_metric=key_metric,
        value_metric=value_metric,
    )
    return books, report


def _metrics(
    spec: QuantSpec,
    inv_freq: Array,
    ends: tuple[Array, Array],
    moments: Moments | None,
    output: Array | None,
    options: FitOptions,
) -> tuple[Array | None, Array | None]:
    """The factors ``[H, d, d]`` of keys, in the frame of ``spec``, and of values.

    ``ends`` are the first and last position of the tokens.
    """
    for name, kind, code in (
        ("key", options.key_metric, spec.key),
        ("value", options.value_metric, spec.value),
    ):
        if kind != "none" and code.groups > 1:
            raise InputError(f"{name}_metric {kind} is for whole heads; leave out --group or it")
        if kind != "none" and (output if kind == "output" else moments) is None:
            raise InputError(f"{name}_metric {kind} needs the moments or projection of its name")

    def of_keys(moments: Moments) -> Array:
        if options.key_metric == "queries":
            return jnp.eye(spec.head_dim, dtype=jnp.float32) * jnp.tile(moments.query, 2)[..., None]
        match spec.frame:  # how far a key is turned in its frame, every case of it once
            case "block":
                turned = jnp.arange(spec.frame_tokens)
            case "pre":
                turned = jnp.zeros(1, jnp.int32)
            case "post":
                turned = jnp.linspace(*ends, 256).astype(jnp.int32)
        rows = rotate(moments.key, turned[:, None, None], inv_freq)  # [n, H, d, d]
        both = rotate(jnp.swapaxes(rows, -1, -2), turned[:, None, None], inv_freq)
        return both.mean(axis=0)

    key = value = None
    if options.key_metric != "none" and moments is not None:
        key = metric(of_keys(moments), options.metric_power)
    if options.value_metric == "gradient" and moments is not None:
        value = metric(moments.value, options.metric_power)
    elif options.value_metric == "output" and output is not None:
        value = metric(output, options.metric_power)
    return key, value


def by_layer(spec: QuantSpec, key_stages: Sequence[int], value_stages: Sequence[int]) -> QuantSpec:
    """The spec with these stages in each layer; plain where all layers have as many."""
    key = dataclasses.replace(spec.key, stages=max(key_stages))
    value = dataclasses.replace(spec.value, stages=max(value_stages))
    if min(key_stages) == key.stages and min(value_stages) == value.stages:
        return dataclasses.replace(spec, key=key, value=value, key_stages=None, value_stages=None)
    return dataclasses.replace(
        spec, key=key, value=value, key_stages=tuple(key_stages), value_stages=tuple(value_stages)
    )


def widened(
    codebooks: Codebooks, report: LayerReport, spec: QuantSpec
) -> tuple[Codebooks, LayerReport]:
    """One layer's codebooks and report in the shapes of ``spec``, which gives others more stages.

    Codewords of stages that the layer does not have are 0; the report is there that of the last one
    that it has, without dead codewords.
    """

    def wide(x: Array, stages: int, axis: int, mode: str) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, stages - x.shape[axis])
        return jnp.pad(x, widths, mode)

    def words(x: Array, code: ResidualSpec) -> Array:
        return wide(x, code.stages, -3, "constant")

    def found(x: residual.FitReport, code: ResidualSpec) -> residual.FitReport:
        error, cosine = (wide(y, code.stages, -1, "edge") for y in (x.error, x.cosine))
        return residual.FitReport(error, cosine, wide(x.dead, code.stages, -1, "constant"))

    key, value = words(codebooks.key, spec.key), words(codebooks.value, spec.value)
    books = dataclasses.replace(codebooks, key=key, value=value, spec=spec)
    return books, LayerReport(found(report.key, spec.key), found(report.value, spec.value))


def of_layer(spec: QuantSpec, index: int) -> QuantSpec:
    """The spec of one layer alone, with as many stages as it has."""
    key, value = (codes[index if len(codes) > 1 else 0] for codes in spec.layer_codes)
    return dataclasses.replace(spec, key=key, value=value, key_stages=None, value_stages=None)


def shortened(
    codebooks: Codebooks, report: LayerReport, spec: QuantSpec
) -> tuple[Codebooks, LayerReport]:
    """Stacked codebooks and report of the first stages, as many as ``spec`` gives each layer.

    They are those of a fit of so many stages, if that would have no refits.
    """
    layers = []
    for index in range(len(codebooks.key)):
        own = of_layer(spec, index)
        books, found = jax.tree.map(lambda x, i=index: x[i], (codebooks, report))
        books = dataclasses.replace(
            books,
            key=books.key[..., : own.key.stages, :, :],
            value=books.value[..., : own.value.stages, :, :],
        )
        sides = (
            jax.tree.map(lambda x, n=code.stages: x[..., :n], side)
            for side, code in zip(found, (own.key, own.value), strict=True)
        )
        layers.append(widened(books, LayerReport(*sides), spec))
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def first_stages(
    codebooks: Codebooks, key_stages: Int[ArrayLike, " L"], value_stages: Int[ArrayLike, " L"]
) -> Codebooks:
    """Stacked codebooks that use only so many stages of each layer; the codewords of others are 0.

    The spec stays, and the shapes with it: for measuring, without compiling anew.
    """

    def part(words: Array, stages: Any) -> Array:
        used = jnp.arange(words.shape[-3]) < jnp.asarray(stages)[:, None]
        return jnp.where(used[:, None, None, :, None, None], words, 0)

    key, value = part(codebooks.key, key_stages), part(codebooks.value, value_stages)
    return dataclasses.replace(codebooks, key=key, value=value)


class LayerSamples(NamedTuple):
    """Samples of one layer: k, v ``[N, H, d]`` bfloat16, norms ``[N, H]`` float32, positions.

    Norms are ``[N, H, splits]`` where a store has several splits. ``moments`` are None where a
    store keeps none.
    """

    k: np.ndarray
    v: np.ndarray
    k_norms: np.ndarray
    v_norms: np.ndarray
    positions: np.ndarray
    moments: Moments | None = None


@dataclasses.dataclass(frozen=True)
class SampleStore:
    """Samples of every layer in files, filled sequence by sequence.

    Attributes:
        folder: where the files are.
        layers, sequences, tokens, heads, dim: sizes; ``tokens`` samples of each sequence.
        first: position of a sequence's first sample (the sinks before it are never coded).
        splits: parts of a head's channels, each with a gradient norm of its own.
        moments: whether `Moments` of each sequence are kept, too.
    """

    folder: pathlib.Path
    layers: int
    sequences: int
    tokens: int
    heads: int
    dim: int
    first: int
    splits: int = 1
    moments: bool = False

    @classmethod
    def open(cls, folder: pathlib.Path, **sizes: Any) -> Self:
        """A new store, or the one that an interrupted run left in ``folder``.

        Raises:
            InputError: if what is there has other sizes.
        """
        store = cls(folder=folder, **sizes)
        if store._progress.exists():
            found = json.loads(store._progress.read_text())["sizes"]
            if found != sizes:
                raise InputError(
                    f"{folder} holds samples of {found}, not {sizes}; remove it or use another one"
                )
            return store
        folder.mkdir(parents=True, exist_ok=True)
        for name in store._files:
            (folder / name).touch()
        store._mark(0, sizes)
        return store

    @property
    def done(self) -> int:
        """Sequences that are stored."""
        return json.loads(self._progress.read_text())["done"]

    def put(
        self,
        sequence: int,
        k: Array,
        v: Array,
        k_norms: Array,
        v_norms: Array,
        moments: Moments | None = None,
    ) -> None:
        """Store one sequence: k, v ``[L, tokens, H, d]``, norms ``[L, tokens, H]`` (or splits).

        ``moments`` are its means, with a leading ``L``, in a store that keeps them.

        Raises:
            InputError: if a number is not finite; nothing is stored then.
            OSError: if the disk is full; the sequence does not count as stored then.
        """
        arrays = {"k": k, "v": v, "k_norms": k_norms, "v_norms": v_norms}
        if self.moments and moments is not None:
            arrays |= {_MOMENT + name: x[:, None] for name, x in moments._asdict().items()}
        found = {name: np.asarray(x) for name, x in arrays.items()}
        for name, x in found.items():
            if not np.isfinite(x.astype(np.float32)).all():
                raise InputError(
                    f"the model gave a {name} that is not finite in sequence {sequence}; "
                    "check the weights and the text, or use --dtype float32"
                )
        for name, (shape, dtype) in self._files.items():
            x = found[name]
            with (self.folder / name).open("r+b") as file:
                for layer in range(self.layers):
                    file.seek(self._offset(shape, dtype, layer, sequence))
                    file.write(x[layer].astype(dtype).tobytes())
        self._mark(sequence + 1, json.loads(self._progress.read_text())["sizes"])

    def layer(self, index: int) -> LayerSamples:
        """All samples of one layer."""
        parts = {
            name: np.fromfile(
                self.folder / name,
                dtype,
                count=math.prod(shape[1:]),
                offset=self._offset(shape, dtype, index, 0),
            ).reshape(shape[1:])
            for name, (shape, dtype) in self._files.items()
        }
        at = np.tile(np.arange(self.tokens, dtype=np.int32) + self.first, self.sequences)
        means = None
        if self.moments:
            means = Moments(*(parts.pop(_MOMENT + name).mean(axis=0) for name in Moments._fields))
        return LayerSamples(**parts, positions=at, moments=means)

    @property
    def _files(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        vectors = (self.layers, self.sequences * self.tokens, self.heads, self.dim)
        bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
        norms = vectors[:3] if self.splits == 1 else (*vectors[:3], self.splits)
        files: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "k": (vectors, bfloat16),
            "v": (vectors, bfloat16),
            "k_norms": (norms, float32),
            "v_norms": (norms, float32),
        }
        if self.moments:
            heads = (self.layers, self.sequences, self.heads)
            files |= {
                _MOMENT + "key": ((*heads, self.dim, self.dim), float32),
                _MOMENT + "value": ((*heads, self.dim, self.dim), float32),
                _MOMENT + "query": ((*heads, self.dim // 2), float32),
            }
        return files

    def _offset(self, shape: tuple[int, ...], dtype: np.dtype, layer: int, sequence: int) -> int:
        row = layer * shape[1] + sequence * shape[1] // self.sequences
        return row * math.prod(shape[2:]) * dtype.itemsize

    @property
    def _progress(self) -> pathlib.Path:
        return self.folder / "progress.json"

    def _mark(self, done: int, sizes: dict[str, int]) -> None:
        new = self._progress.with_suffix(".new")
        new.write_text(json.dumps({"done": done, "sizes": sizes}))
        os.replace(new, self._progress)


_MOMENT = "moment_"  # begins the names of their files


def save_leaves(path: pathlib.Path, tree: Any) -> None:
    """Write the arrays of a pytree to an npz file that appears whole or not at all."""
    new = path.with_suffix(".new")
    with new.open("wb") as stream:
        np.savez(stream, *(np.asarray(x) for x in jax.tree.leaves(tree)))
    os.replace(new, path)


def load_leaves(path: pathlib.Path) -> list[np.ndarray]:
    """The arrays that `save_leaves` wrote, in order."""
    with np.load(path) as saved:
        return [saved[name] for name in saved.files]
