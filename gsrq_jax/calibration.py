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
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Key

from gsrq_jax import residual
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.frame import to_frame
from gsrq_jax.rope import rotate
from gsrq_jax.sensitivity import log_smooth
from gsrq_jax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How codebooks are learned.

    Attributes:
        rule: centroid rule: ``gskm`` (the paper's), ``kmeans`` or ``spherical`` for comparison.
        shape_update: ``unit`` (paper) or ``raw`` (the authors' figure code), for ``gskm``.
        iterations: Lloyd iterations of the rule, each stage.
        warmup: spherical iterations before them, for ``gskm``.
        center: subtract the mean key of each head (before RoPE) before quantising keys.
        refits: times that all stages are fitted anew together, by weighted least squares, to the
            codes that the encoder gives (ours).
    """

    rule: residual.Rule = "gskm"
    shape_update: residual.ShapeUpdate = "unit"
    iterations: int = 10
    warmup: int = 5
    center: bool = True
    refits: int = 0


class LayerReport(NamedTuple):
    """What fitting one layer found: one `residual.FitReport` for keys, one for values."""

    key: residual.FitReport
    value: residual.FitReport


def mean_key(
    k: Float[Array, "N H d"], positions: Int[Array, " N"], inv_freq: Float[Array, " d/2"]
) -> Float[Array, "H d"]:
    """Mean of rotated keys before their rotation, float32."""
    return rotate(k.astype(jnp.float32), -positions[:, None], inv_freq).mean(axis=0)


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
    options: FitOptions = FitOptions(),
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
        options: how to learn.

    Raises:
        InputError: if there are fewer tokens than codewords.
    """
    mean = mean_key(k, positions, inv_freq)
    if not options.center:
        mean = jnp.zeros_like(mean)
    framed = to_frame(k, positions, spec, mean, inv_freq)
    key_rng, value_rng = jax.random.split(rng)

    def fit(rng, x, code, norms):
        return residual.fit(
            rng,
            jnp.moveaxis(x.astype(jnp.float32), 1, 0),
            code,
            None if norms is None else log_smooth(jnp.moveaxis(norms, 1, 0)),
            rule=options.rule,
            shape_update=options.shape_update,
            iterations=options.iterations,
            warmup=options.warmup,
            beam=spec.beam,
            refits=options.refits,
        )

    keys, key_report = fit(key_rng, framed, spec.key, k_norms)
    values, value_report = fit(value_rng, v, spec.value, v_norms)
    books = Codebooks(
        key=keys, value=values, key_mean=mean, inv_freq=jnp.asarray(inv_freq), spec=spec
    )
    return books, LayerReport(key_report, value_report)


class LayerSamples(NamedTuple):
    """Samples of one layer: k, v ``[N, H, d]`` bfloat16, norms ``[N, H]`` float32, positions.

    Norms are ``[N, H, splits]`` where a store has several splits.
    """

    k: np.ndarray
    v: np.ndarray
    k_norms: np.ndarray
    v_norms: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class SampleStore:
    """Samples of every layer in files, filled sequence by sequence.

    Attributes:
        folder: where the files are.
        layers, sequences, tokens, heads, dim: sizes; ``tokens`` samples of each sequence.
        first: position of a sequence's first sample (the sinks before it are never coded).
        splits: parts of a head's channels, each with a gradient norm of its own.
    """

    folder: pathlib.Path
    layers: int
    sequences: int
    tokens: int
    heads: int
    dim: int
    first: int
    splits: int = 1

    @classmethod
    def open(cls, folder: pathlib.Path, **sizes: int) -> Self:
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

    def put(self, sequence: int, k: Array, v: Array, k_norms: Array, v_norms: Array) -> None:
        """Store one sequence: k, v ``[L, tokens, H, d]``, norms ``[L, tokens, H]`` (or splits).

        Raises:
            InputError: if a number is not finite; nothing is stored then.
            OSError: if the disk is full; the sequence does not count as stored then.
        """
        arrays = {"k": k, "v": v, "k_norms": k_norms, "v_norms": v_norms}
        found = {name: np.asarray(x) for name, x in arrays.items()}
        for name, x in found.items():
            if not np.isfinite(x.astype(np.float32)).all():
                raise InputError(
                    f"the model gave a {name} that is not finite in sequence {sequence}; "
                    "check the weights and the text, or use --dtype float32"
                )
        for name, x in found.items():
            shape, dtype = self._files[name]
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
        return LayerSamples(**parts, positions=at)

    @property
    def _files(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        vectors = (self.layers, self.sequences * self.tokens, self.heads, self.dim)
        bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
        norms = vectors[:3] if self.splits == 1 else (*vectors[:3], self.splits)
        return {
            "k": (vectors, bfloat16),
            "v": (vectors, bfloat16),
            "k_norms": (norms, float32),
            "v_norms": (norms, float32),
        }

    def _offset(self, shape: tuple[int, ...], dtype: np.dtype, layer: int, sequence: int) -> int:
        row = layer * shape[1] + sequence * self.tokens
        return row * math.prod(shape[2:]) * dtype.itemsize

    @property
    def _progress(self) -> pathlib.Path:
        return self.folder / "progress.json"

    def _mark(self, done: int, sizes: dict[str, int]) -> None:
        new = self._progress.with_suffix(".new")
        new.write_text(json.dumps({"done": done, "sizes": sizes}))
        os.replace(new, self._progress)


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
