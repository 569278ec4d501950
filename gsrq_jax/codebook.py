"""Codebooks of a whole model, and their checkpoints.

A checkpoint is an Orbax folder: the arrays, and as metadata a format version, the spec, the model
that the codebooks were trained for, free extras, and SHA-256 sums of it all. It is written beside
its place and renamed into it, so that a folder under that name is always complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8
from orbax.checkpoint import v1 as ocp

from gsrq_jax import residual
from gsrq_jax.codec import Codes
from gsrq_jax.errors import InputError, known
from gsrq_jax.frame import from_frame, origin, to_frame
from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec, ResidualSpec

FORMAT = "gsrq-jax codebooks"
# 1 had neither metrics nor stages by layer; 2 neither layouts, mean keys at knots nor codes that
# heads share; 3 no frames of several blocks.
VERSION = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebooks:
    """The codewords of every layer and KV head; a pytree whose only static field is ``spec``.

    One layer's slice is the same class without the leading axis ``L``: ``jax.tree.map(lambda x:
    x[i], codebooks)``, or what ``jax.lax.scan`` hands out.

    Invariants (``validate`` checks them): ``key`` has ``spec.key.codebook_shape`` as its last four
    axes, ``value`` has ``spec.value.codebook_shape``, all arrays agree on ``L`` and ``H``,
    codewords are float32 or bfloat16, the other arrays float32, and all numbers are finite. Where
    the spec gives layers stages of their own, codewords of those that a layer does not have are 0.
    Where heads share codes, each has its own part of every codeword.

    Attributes:
        key: codewords of the keys in the frame of ``spec``, ``[L, H, G, R, K, g]``.
        value: codewords of the values, ``[L, H, G, R, K, g]`` with the values' own G, R, K, g.
        key_mean: mean key before RoPE, ``[L, H, d]``; zeros when keys are not centred.
        inv_freq: rotary frequencies of each layer in radians a token, ``[L, d / 2]``.
        spec: what the quantised cache looks like.
        key_metric: factor ``A`` of the distance ``‖A(x − c)‖`` by which the encoder chooses codes,
            in the frame of ``spec``, ``[L, H, d, d]``; None is the identity. Decoding has no use
            for it.
        value_metric: the same of the values.
    """

    key: Float[Array, "*L H G R K g"]
    value: Float[Array, "*L H G R K g"]
    key_mean: Float[Array, "*L H d"]
    inv_freq: Float[Array, "*L half_d"]
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    key_metric: Float[Array, "*L H d d"] | None = None
    value_metric: Float[Array, "*L H d d"] | None = None

    @property
    def layers(self) -> int | None:
        """Layers, or None in one layer's slice."""
        return self.key.shape[0] if self.key.ndim == 6 else None

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.key.shape[-5]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in _arrays(self).values())

    def encode(
        self,
        k: Float[Array, "*lead b H d"],
        v: Float[Array, "*lead b H d"],
        positions: Int[Array, "*lead b"],
    ) -> tuple[Codes, Codes]:
        """Codes of rotated keys and of values, by one layer's codewords and ``spec.beam``.

        A `gsrq_jax.codec.Codec`'s; at any positions, and any number of tokens that the layout takes
        as a block.

        Returns:
            ``[*lead, H, *shape]`` as the layout has them (`gsrq_jax.layouts`), packed uint8
            ``[*lead, H, b, bytes]``; H being the heads over those that share a code.
        """
        framed = to_frame(k, positions, self.spec, self.key_mean, self.inv_freq)
        v, spec = v.astype(jnp.float32), self.spec
        keys = _encode(framed, self.key, self.key_metric, spec.key, spec.beam)
        values = _encode(v, self.value, self.value_metric, spec.value, spec.beam)
        return spec.arrangement.pack(keys, values, spec)

    def decode(
        self, key_codes: Codes, value_codes: Codes, positions: Int[Array, "*lead b"]
    ) -> tuple[Float[Array, "*lead b H d"], Float[Array, "*lead b H d"]]:
        """Rotated keys and values, float32, that codes stand for."""
        spec = self.spec
        keys, values = indices(self, key_codes, value_codes, axis=-4)
        framed = _decode(keys, self.key)
        keys = from_frame(framed, positions, spec, self.key_mean, self.inv_freq)
        return keys, _decode(values, self.value)


def errors(
    codebooks: Codebooks,
    k: Float[Array, "*lead b H d"],
    v: Float[Array, "*lead b H d"],
    old_k: Float[Array, "*lead b H d"],
    old_v: Float[Array, "*lead b H d"],
    positions: Int[Array, "*lead b"],
) -> Float[Array, "*lead b H"]:
    """How badly one layer's codes stand for tokens, to find outliers by (ours).

    Squared errors of key and value in the encoder's metrics, each over the mean square of its first
    stage's codewords.

    Args:
        codebooks: of the layer.
        k: rotated keys.
        v: values.
        old_k: what their codes decode to.
        old_v: what their codes decode to.
        positions: of the tokens.
    """
    start = origin(codebooks.spec, positions)[..., None]
    wrong = rotate(k - old_k, -start, codebooks.inv_freq)

    def relative(wrong: Array, words: Array, metric: Array | None) -> Array:
        wrong = jnp.moveaxis(wrong.astype(jnp.float32), -2, 0)
        first = words[:, :, 0].astype(jnp.float32)  # [H, G, K, g]
        if metric is not None:
            wrong, first = under(metric, wrong), under(metric, first)
        scale = jnp.sum(jnp.square(first), axis=(1, 3)).mean(axis=-1)  # [H]
        return jnp.moveaxis(jnp.sum(jnp.square(wrong), axis=-1), 0, -1) / scale

    return relative(wrong, codebooks.key, codebooks.key_metric) + relative(
        v - old_v, codebooks.value, codebooks.value_metric
    )


def stored(codebooks: Codebooks) -> Codebooks:
    """The codebooks as they are deployed and kept: codewords in bfloat16."""
    key, value = (x.astype(jnp.bfloat16) for x in (codebooks.key, codebooks.value))
    return dataclasses.replace(codebooks, key=key, value=value)


def indices(
    codebooks: Codebooks, key_codes: Codes, value_codes: Codes, *, axis: int
) -> tuple[UInt8[Array, "*lead H b G R"], UInt8[Array, "*lead H b G R"]]:
    """Take the codeword indices of every head of a layer out of codes in their layout.

    Args:
        codebooks: of the layer.
        key_codes: codes of the keys, ``[*lead, H/s, *shape]`` where s heads share one.
        value_codes: codes of the values.
        axis: place of the heads in what is returned.
    """
    spec = codebooks.spec
    keys, values = spec.arrangement.unpack(key_codes, value_codes, spec)
    return of_heads(keys, spec.key, axis=axis), of_heads(values, spec.value, axis=axis)


def of_heads(codes: Array, code: ResidualSpec, *, axis: int) -> Array:
    """The codes of each head on its own: those that heads share, once for each of them."""
    return codes if code.heads == 1 else jnp.repeat(codes, code.heads, axis=axis)


def together(
    vectors: Float[Array, "H *n g"], code: ResidualSpec
) -> Float[Array, "H/heads *n heads*g"]:
    """Vectors (or codewords) of the heads that share codes, one after the other."""
    if code.heads == 1:
        return vectors
    heads = len(vectors)
    if heads % code.heads:
        raise InputError(
            f"{heads} KV heads (of a device) are not a multiple of the {code.heads} that share "
            "codes; choose another number of heads, or another mesh"
        )
    split = vectors.reshape(heads // code.heads, code.heads, *vectors.shape[1:])
    return jnp.moveaxis(split, 1, -2).reshape(*split.shape[:1], *split.shape[2:-1], -1)


def apart(
    vectors: Float[Array, "H/heads *n heads*g"], code: ResidualSpec
) -> Float[Array, "H *n g"]:
    """The inverse of `together`."""
    if code.heads == 1:
        return vectors
    split = vectors.reshape(*vectors.shape[:-1], code.heads, -1)
    return jnp.moveaxis(split, -2, 1).reshape(-1, *split.shape[1:-2], split.shape[-1])


def _encode(
    x: Array, codewords: Array, metric: Array | None, code: ResidualSpec, beam: int
) -> Array:
    """``[*lead, b, H, d]`` to codes ``[*lead, H/heads, b, G, R]``."""
    heads, dim = x.shape[-2:]
    points = jnp.moveaxis(x, -2, 0).reshape(heads, math.prod(x.shape[:-2]), dim)
    if metric is not None:
        points, codewords = under(metric, points), under(metric, codewords.astype(jnp.float32))
    points, codewords = together(points, code), together(codewords, code)
    codes = residual.encode(points, codewords, beam=beam)
    return jnp.moveaxis(codes.reshape(len(codes), *x.shape[:-2], *codes.shape[-2:]), 0, -4)


def under(metric: Float[Array, "H d d"], x: Float[Array, "H *n d"]) -> Float[Array, "H *n d"]:
    """``A x`` of each head's vectors: where its distance is the Euclidean one."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    moved = jnp.einsum("Hde,Hne->Hnd", metric, flat, precision=jax.lax.Precision.HIGHEST)
    return moved.reshape(x.shape)


def _decode(codes: Array, codewords: Array) -> Array:
    """The way back: ``[*lead, H, b, G, R]`` to ``[*lead, b, H, d]``, float32."""
    codes = jnp.moveaxis(codes, -4, 0)  # [H, *lead, b, G, R]
    flat = codes.reshape(codes.shape[0], math.prod(codes.shape[1:-2]), *codes.shape[-2:])
    x = residual.decode(flat, codewords)
    return jnp.moveaxis(x.reshape(*codes.shape[:-2], x.shape[-1]), 0, -2)


def _arrays(codebooks: Codebooks) -> dict[str, Any]:
    """Those that there are, by name."""
    arrays = {
        f.name: getattr(codebooks, f.name)
        for f in dataclasses.fields(codebooks)
        if not f.metadata.get("static")
    }
    return {name: x for name, x in arrays.items() if x is not None}


def validate(codebooks: Codebooks) -> None:
    """Check the invariants of ``Codebooks``; numbers only where they are known (not under jit).

    Raises:
        InputError: naming the array that does not fit, what it is and what it should be.
    """
    spec, arrays = codebooks.spec, _arrays(codebooks)
    if spec.head_dim % 2:
        raise InputError(f"rotary keys need an even head size, got {spec.head_dim}")
    if codebooks.key.ndim not in (5, 6):
        raise InputError(
            f"key codebooks have shape {codebooks.key.shape}; "
            "the axes are [layers,] heads, groups, stages, codewords, channels"
        )
    lead, heads = codebooks.key.shape[:-5], codebooks.key.shape[-5]
    shapes = {
        "key": (*lead, heads, *spec.key.codebook_shape),
        "value": (*lead, heads, *spec.value.codebook_shape),
        "key_mean": (*lead, heads, spec.head_dim),
        "inv_freq": (*lead, spec.head_dim // 2),
        "key_metric": (*lead, heads, spec.head_dim, spec.head_dim),
        "value_metric": (*lead, heads, spec.head_dim, spec.head_dim),
    }
    by_layer = {"key": spec.key_stages, "value": spec.value_stages}
    for name, code in (("key", spec.key), ("value", spec.value)):
        if heads % code.heads:
            raise InputError(
                f"{name} codebooks are of {heads} KV heads, not a multiple of the {code.heads} "
                "that the spec codes together"
            )
    for name, code in (("key", spec.key), ("value", spec.value)):
        if f"{name}_metric" in arrays and code.groups > 1:
            raise InputError(f"{name}_metric is for whole heads; quantise them or leave it out")
    for name, x in arrays.items():
        if x.shape != shapes[name]:
            raise InputError(f"{name} has shape {x.shape}; the spec asks for {shapes[name]}")
        allowed = (jnp.float32, jnp.bfloat16) if name in ("key", "value") else (jnp.float32,)
        if x.dtype not in allowed:
            names = " or ".join(jnp.dtype(t).name for t in allowed)
            raise InputError(f"{name} is {x.dtype}; convert it to {names}")
        numbers = known(x)
        if numbers is not None and not np.isfinite(numbers).all():
            raise InputError(f"{name} holds numbers that are not finite; train the codebooks again")
        stages = by_layer.get(name)
        if stages is not None and lead:
            if len(stages) != lead[0]:
                raise InputError(f"the spec has stages of {len(stages)} layers, {name} {lead[0]}")
            if numbers is not None and any(
                (of[:, :, n:] != 0).any() for of, n in zip(numbers, stages, strict=True)
            ):
                raise InputError(
                    f"{name} has codewords in stages that the spec does not give to their layer; "
                    "they must be 0"
                )


def save(
    path: str | os.PathLike[str],
    codebooks: Codebooks,
    *,
    model: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder; one that stands at ``path`` is replaced only by a complete one.

    In a program of several processes all call it, with replicated arrays and a folder that all
    of them see; process 0 writes.

    Args:
        path: a local folder.
        codebooks: of all layers.
        model: fingerprint of the model, flat JSON (family, layers, kv_heads, head_dim, weights …);
            ``load`` compares it.
        extra: anything else to remember as JSON, such as how the codebooks were trained.

    Raises:
        InputError: if the codebooks are malformed or do not fit ``model``, if something else
            stands at ``path``, or if writing fails; then ``path`` is as it was.
    """
    validate(codebooks)
    if codebooks.layers is None:
        raise InputError("these are the codebooks of one layer; save those of all layers together")
    facts = {
        "layers": codebooks.layers,
        "kv_heads": codebooks.kv_heads,
        "head_dim": codebooks.spec.head_dim,
    }
    if differences := _differences({k: v for k, v in model.items() if k in facts}, facts):
        raise InputError(
            f"the model and its codebooks differ: {differences}; train codebooks for this model"
        )
    path, first = _local(path), jax.process_index() == 0
    arrays = {name: np.asarray(x) for name, x in _arrays(codebooks).items()}
    metadata = _sealed(
        {
            "format": FORMAT,
            "version": VERSION,
            "spec": codebooks.spec.to_json(),
            "model": model,
            "extra": extra or {},
            "arrays_sha256": _arrays_sum(arrays),
        }
    )
    work, fresh, previous = _places(path)
    try:
        if first:
            _tidy(path)
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                _refuse_foreign(path)
            work.mkdir(parents=True)
        with _orbax():
            ocp.save(fresh, arrays, custom_metadata=metadata)
        if first:
            if path.exists():
                path.rename(previous)
            fresh.rename(path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"saved {path}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"could not write the codebooks to {path} ({_reason(error)}); what stood there is "
            "unchanged, so make room or choose another folder, and save again"
        ) from error
    finally:
        if first:
            with contextlib.suppress(OSError):
                _tidy(path)


def load(path: str | os.PathLike[str], *, model: dict[str, Any] | None = None) -> Codebooks:
    """The codebooks that ``save`` wrote, on the default device whatever they were saved from.

    Args:
        path: the checkpoint folder.
        model: fingerprint of the model to run, or None to skip the comparison. Each field given
            must have the stored value; stored fields that are not given are not compared.

    Raises:
        InputError: if there is no checkpoint, it is damaged or of a newer format, or it was made
            for another model.
    """
    folder = _find(path)
    metadata = read_metadata(folder)
    if model is not None and (differences := _differences(model, metadata["model"])):
        raise InputError(
            f"the codebooks in {path} were trained for another model: {differences}; "
            "train codebooks for this model or run the one they belong to"
        )
    try:
        with _orbax():
            arrays = {name: np.asarray(x) for name, x in ocp.load(folder).items()}
    except Exception as error:
        raise _damaged(path, _reason(error)) from error
    if _arrays_sum(arrays) != metadata["arrays_sha256"]:
        raise _damaged(path, "its arrays do not match their checksum")
    codebooks = Codebooks(
        **{name: jnp.asarray(x) for name, x in arrays.items()},
        spec=QuantSpec.from_json(metadata["spec"]),
    )
    validate(codebooks)
    return codebooks


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``spec``, ``model`` and ``extra`` of a checkpoint (and its format), without its arrays.

    Raises:
        InputError: if there is no checkpoint, its metadata are damaged or of a newer format.
    """
    folder = _find(path)
    try:
        with _orbax():
            metadata = ocp.metadata(folder).custom_metadata
    except Exception as error:
        raise _damaged(path, _reason(error)) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _damaged(path, "it is some other Orbax checkpoint")
    if isinstance(version := metadata.get("version"), int) and version > VERSION:
        raise InputError(
            f"the codebooks in {path} have format {version}, newer than format {VERSION} of this "
            "gsrq-jax; upgrade gsrq-jax or train the codebooks again"
        )
    seal = metadata.pop("sha256", None)
    if _sealed(metadata)["sha256"] != seal:
        raise _damaged(path, "its metadata do not match their checksum")
    return metadata


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(path):
        raise InputError(f"{path} is not a local folder; save or load there, then copy the folder")
    return Path(path).expanduser().resolve()


def _places(path: Path) -> tuple[Path, Path, Path]:
    """A folder beside ``path`` for a save under way: itself, the new checkpoint, the old one."""
    work = path.with_name(f".{path.name}.saving")
    return work, work / "new", work / "previous"


def _find(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint is: at ``path``, or set aside by a save that died between renames."""
    folder = _local(path)
    previous = _places(folder)[2]
    if not folder.exists() and previous.exists():
        return previous
    if not folder.exists():
        raise InputError(f"there are no codebooks at {path}; train them or correct the path")
    if (folder / "codebooks").is_dir():
        raise InputError(f"{path} is the folder of a run; its codebooks are {path}/codebooks")
    return folder


def _tidy(path: Path) -> None:
    """Undo what an interrupted save left: the old checkpoint back in place, the rest gone."""
    work, _, previous = _places(path)
    if previous.exists() and not path.exists():
        previous.rename(path)
    shutil.rmtree(work, ignore_errors=True)


def _refuse_foreign(path: Path) -> None:
    try:
        read_metadata(path)
    except InputError as error:
        raise InputError(
            f"{path} exists and is not a codebook checkpoint that could be replaced; "
            "remove it or choose another folder"
        ) from error


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of it, so that it compares equal to what a checkpoint gives back."""
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"model and extra must be plain JSON ({error}); convert them to numbers and strings"
        ) from error


def _sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata with their own checksum."""
    metadata = _plain(metadata)
    text = json.dumps(metadata, sort_keys=True)
    return metadata | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _arrays_sum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype.name} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def _differences(model: dict[str, Any], stored: dict[str, Any]) -> str:
    """The fields of ``model`` that ``stored`` has otherwise, with both values; empty if none."""
    absent = object()

    def show(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value)

    return ", ".join(
        f"{name} is {show(value)} in the model and {show(other)} in the codebooks"
        for name, value in _plain(model).items()
        if (other := stored.get(name, absent)) != value
    )


def _damaged(path: str | os.PathLike[str], reason: str) -> InputError:
    return InputError(
        f"{path} is not a codebook checkpoint or is damaged ({reason}); "
        "copy it again, train again or correct the path"
    )


def _reason(error: Exception) -> str:
    """The last clause of an error's first line, or its type."""
    text = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [""])[0]
    return text.rsplit(": ", 1)[-1].split(". ")[0][:200] or type(error).__name__


@contextlib.contextmanager
def _orbax() -> Iterator[None]:
    """Orbax kept silent: its threads log tracebacks where we report on one line."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    was, log.disabled = log.disabled, True
    # When one array fails, TensorStore reports the others to an event loop that Orbax has closed.
    sys.unraisablehook = lambda event: (
        None if "loop is closed" in str(event.exc_value) else hook(event)
    )
    try:
        yield
    except Exception:
        time.sleep(0.1)  # those reports come from other threads, a moment later
        raise
    finally:
        log.disabled, sys.unraisablehook = was, hook
