"""What programs that are traced now are compiled for."""

import re
from typing import Any

import jax

from gsrq_jax.kernels.errors import InputError

PROCESSORS = 132
"""Multiprocessors of an H100 or H200, to be filled."""


def device() -> Any:
    """The abstract mesh's device if there is one (`jax.shard_map` has it), else jax's first."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def on_tpu() -> bool:
    """Whether that is a TPU."""
    return device().device_kind.startswith("TPU")


def check_hopper() -> None:
    """Refuse what kernels for Hopper GPUs cannot be compiled for: another jax, another device.

    Raises:
        InputError: naming what there is and what is supported.
    """
    version = tuple(int(x) for x in re.findall(r"\d+", jax.__version__)[:2])
    if version not in ((0, 11), (0, 12)):
        raise InputError(
            f"the fused GPU kernel is for jax 0.11 and 0.12, this is {jax.__version__}; install "
            "one of these or use another implementation"
        )
    here = device()
    capability = getattr(here, "compute_capability", None)
    hopper = str(capability) == "9.0" or (
        capability is None and re.search(r"\bG?H[12]00\b", here.device_kind) is not None
    )
    if not hopper:
        raise InputError(
            f"the fused GPU kernel is for GPUs of compute capability 9.0 (H100, H200), this is "
            f"{here.device_kind}" + (f" of {capability}" if capability else "") + "; use another "
            "implementation"
        )
