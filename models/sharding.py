"""Where a model's parameters and samples live on many devices.

A mesh has two axes. Sequences and tokens are spread over ``data``, heads over ``model`` (tensor
parallel); parameters are spread over both and gathered along ``data`` where a layer needs them
(FSDP). `RULES` is the one table that says so; XLA does the rest.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from gsrq_jax.calibration import DATA, MODEL
from gsrq_jax.errors import InputError

RULES: dict[str, str | None] = {
    "batch": DATA,
    "embed": DATA,
    "heads": MODEL,
    "mlp": MODEL,
    "vocab": MODEL,
    "layers": None,
    "norm": None,
    "length": None,
}
"""Mesh axis of each logical axis; None is every device's own copy."""

_INWARD, _OUTWARD = ("embed", "heads"), ("heads", "embed")
_KERNELS = {
    "q_proj": _INWARD,
    "k_proj": _INWARD,
    "v_proj": _INWARD,
    "o_proj": _OUTWARD,
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}

SEQUENCES = P(RULES["batch"])
SAMPLES = P(None, RULES["batch"], None, RULES["heads"])
MOMENTS = P(None, RULES["batch"], RULES["heads"])
"""Axes of tokens ``[B, T]``, of keys, values and norms ``[L, B, n, H, …]`` and of their moments
``[L, B, H, …]``."""


def make_mesh(
    kv_heads: int,
    shape: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    together: int = 1,
) -> Mesh | None:
    """The mesh for a model of so many KV heads, or None for one device alone.

    Devices of a process follow each other, so that heads of a token never leave it.

    Args:
        kv_heads: of a layer.
        shape: sizes of ``data`` and ``model``; by default as many of a process's devices share the
            heads as divide them, and all others the tokens.
        devices: by default all of them, but one a process where they are CPUs, which share cores.
        together: adjacent KV heads that share codes and so stay on one device; divides them all.

    Raises:
        InputError: if that cannot be.
    """
    groups = kv_heads // together
    if devices is None:
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        if shape is None and devices[0].platform == "cpu":
            firsts = {d.process_index: d for d in reversed(devices)}
            devices = [firsts[index] for index in sorted(firsts)]
    processes = len({d.process_index for d in devices})
    if shape is None:
        model = math.gcd(groups, len(devices) // processes)
        shape = (len(devices) // model, model)
    data, model = shape
    if min(shape) < 1 or (
        data * model != len(devices) and (processes > 1 or data * model > len(devices))
    ):
        raise InputError(
            f"a mesh of {data} × {model} does not fit {len(devices)} devices; choose two sizes "
            "with that product, or none"
        )
    if groups % model:
        codes = f", of which {together} share codes," if together > 1 else ""
        raise InputError(
            f"{model} devices cannot share {kv_heads} KV heads{codes} evenly; the second size of "
            f"the mesh must divide {groups}"
        )
    if processes > 1 and (len(devices) // processes) % model:
        raise InputError(
            f"the heads of a token stay in one process, so {model} must divide its "
            f"{len(devices) // processes} devices; choose another second size of the mesh"
        )
    if data * model == 1:
        return None
    return Mesh(np.reshape(devices[: data * model], shape), (DATA, MODEL))


def for_tokens(mesh: Mesh, tokens: int) -> Mesh:
    """The mesh, or in a single process the part of it that shares so many tokens evenly.

    Raises:
        InputError: if several processes cannot share them.
    """
    data = math.gcd(tokens, mesh.shape[DATA])
    if data == mesh.shape[DATA]:
        return mesh
    if jax.process_count() > 1:
        raise InputError(
            f"{mesh.shape[DATA]} devices cannot share {tokens} samples evenly; choose --tokens so "
            "that the number of sequences is a multiple of it"
        )
    return Mesh(mesh.devices[:data], mesh.axis_names)


def logical_axes(path: Sequence[Any]) -> tuple[str, ...]:
    """Logical axes of the parameter at this path of names, such as ``layers``, ``norm``."""
    *modules, leaf = path
    axes: tuple[str, ...]
    if modules[-1] == "embed_tokens":
        axes = ("vocab", "embed")
    elif modules[-1] in _KERNELS:
        n_in, n_out = _KERNELS[modules[-1]]
        axes = {"kernel": (n_in, n_out), "weight": (n_out, n_in)}.get(leaf, (n_out,))
    else:
        axes = ("norm",)
    return ("layers", *axes) if modules[0] == "layers" else axes


def shardings(mesh: Mesh, params: nnx.State) -> nnx.State:
    """The sharding of each parameter; an axis that its devices cannot share evenly is copied.

    Args:
        mesh: of `make_mesh`.
        params: arrays or ``ShapeDtypeStruct``.
    """

    def of(path: Sequence[Any], shape: tuple[int, ...]) -> NamedSharding:
        axes = [RULES[axis] for axis in logical_axes(path)]
        return NamedSharding(
            mesh,
            P(
                *(
                    a if a and not n % mesh.shape[a] else None
                    for a, n in zip(axes, shape, strict=True)
                )
            ),
        )

    return nnx.from_flat_state(
        [
            (path, leaf.replace(of(path, leaf.get_value().shape)))
            for path, leaf in nnx.to_flat_state(params)
        ]
    )


def by_channels(mesh: Mesh, hidden: Float[Array, "B T hidden"]) -> Float[Array, "B T hidden"]:
    """Hidden states spread as the weights that they meet are, where devices can share them evenly.

    So weights stay where they are, and what is exchanged are sums of activations: for few tokens
    by far the less.
    """
    if hidden.shape[-1] % mesh.shape[DATA]:
        return hidden
    return jax.lax.with_sharding_constraint(hidden, NamedSharding(mesh, P(None, None, DATA)))


def replicated(mesh: Mesh, tree: Any) -> Any:
    """The arrays whole on every device, so that each process can read them."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(tree)


def spread(mesh: Mesh, tree: Any, axes: Any) -> Any:
    """Arrays of all processes from the part that each has.

    ``axes`` are a ``PartitionSpec`` for all, or a pytree of them.
    """
    return multihost_utils.host_local_array_to_global_array(tree, mesh, axes)


def own(mesh: Mesh, tree: Any, axes: Any) -> Any:
    """What this process has of arrays of all processes: the inverse of `spread`."""
    return multihost_utils.global_array_to_host_local_array(tree, mesh, axes)
