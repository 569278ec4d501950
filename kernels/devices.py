"""What programs that are traced now are compiled for."""

from typing import Any

import jax


def device() -> Any:
    """The abstract mesh's device if there is one (`jax.shard_map` has it), else jax's first."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def on_tpu() -> bool:
    """Whether that is a TPU."""
    return device().device_kind.startswith("TPU")
