"""Lowers the fused GPU kernel on a machine without a GPU, and assembles it where ptxas is.

As a program: ``python lowering.py ATTRIBUTE=NUMBER …`` (of `shapes`), with a libcuda, fake or not,
on the library path, prints what ptxas says about the kernel.
"""

import ctypes
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gsrq_jax.kernels import mosaic_gpu, tiles


def shapes(B=2, T=1, H=8, q=4, N=16, b=256, d=128, R=32, K=16, S=32):
    """Arguments of attend_tiles, without numbers."""
    s = jax.ShapeDtypeStruct
    return {
        "query": s((B, T, H, q, N, d), jnp.float32),
        "shift": s((H, 1, b, d), jnp.float32),
        "key_tiles": s((B, H, N, b // tiles.TILE, tiles.key_words(R, K)), jnp.uint32),
        "value_tiles": s((B, H, N, b // tiles.TILE, tiles.value_words(S)), jnp.uint32),
        "key_codewords": s((H, 1, R, K, d), jnp.bfloat16),
        "value_codewords": s((H, 1, S, 16, d), jnp.bfloat16),
        "blocks": s((B,), jnp.int32),
    }


def on_abstract(kind="NVIDIA H100 80GB HBM3"):
    """A context in which jax believes that there is such a GPU."""
    from jax.sharding import AbstractDevice

    device = AbstractDevice(kind, 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def mosaic_module(arguments):
    """The kernel's module, of the only Mosaic call in the lowered operation."""
    with on_abstract():
        traced = jax.jit(lambda x: mosaic_gpu.attend_tiles(**x)).trace(arguments)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def walk(operation):
        for region in operation.regions:
            for block in region:
                for child in block:
                    child = child.operation
                    if child.name == "stablehlo.custom_call" and "mosaic" in str(
                        child.attributes["call_target_name"]
                    ):
                        config = child.attributes["mhlo.backend_config"]
                        found.append(config["module"].value_bytes)
                    walk(child)

    with module.context:
        walk(module.operation)
    (only,) = found
    return only


if __name__ == "__main__":
    import jax_plugins.xla_cuda13 as plugin

    sizes = {name: int(value) for name, value in (a.split("=") for a in sys.argv[1:])}
    code = mosaic_module(shapes(**sizes))
    compile_ = ctypes.CDLL(str(plugin._get_library_path())).MosaicGpuCompile
    compile_.argtypes, compile_.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    compile_(code, len(code))  # prints; what it returns needs a GPU to be loaded
