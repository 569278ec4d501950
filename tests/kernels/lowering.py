"""Lowers the fused GPU kernel on a machine without a GPU, and assembles it where ptxas is.

As a program, with a libcuda, fake or not, on the library path:
``python lowering.py assemble NAME=NUMBER …`` (of `operation`) prints what ptxas says about the
kernel, ``nearest``, ``sums`` or ``cluster`` what about those of k-means,
``recent`` what about that of exact tokens, ``planes`` what about that of bit planes,
``finish`` what about that after attention, ``greedy``
what about that which encodes,
``python lowering.py compile …`` the whole operation as XLA compiles it for an H100,
``compile_planes`` that over bit planes, ``python lowering.py loop`` a model's decode loop,
``python lowering.py int8`` a step through the layers of one whose weights have 8 bits, ``python
lowering.py encode`` greedy encoding by XLA, ``python lowering.py pieces`` numbers of float32 in
pieces.
"""

import ctypes
import dataclasses
import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from gsrq_jax.kernels import (
    devices,
    mosaic_gpu,
    mosaic_gpu_cluster,
    mosaic_gpu_encode,
    mosaic_gpu_finish,
    mosaic_gpu_planes,
    mosaic_gpu_recent,
    tiles,
)
from gsrq_jax.kernels.reference import Recent

supported = pytest.mark.skipif(
    not jax.__version__.startswith(("0.11.", "0.12.")),
    reason=f"the kernels for GPUs are for jax 0.11 and 0.12, this is {jax.__version__}",
)


HOW = "every", "fills", "recent"
"""What is no size, of those of an operation."""


def shapes(B=2, T=1, H=8, q=4, N=16, b=256, d=128, R=32, K=16, S=32):
    """Arguments of attend_tiles, without numbers."""
    s = jax.ShapeDtypeStruct
    return {
        "query": s((B, T, H, q, d), jnp.float32),
        "mean": s((H, d), jnp.float32),
        "inv_freq": s((d // 2,), jnp.float32),
        "key_tiles": s((B, H, N, b // tiles.TILE, tiles.key_words(R, K)), jnp.uint32),
        "value_tiles": s((B, H, N, b // tiles.TILE, tiles.value_words(S)), jnp.uint32),
        "key_codewords": s((H, 1, R, K, d), jnp.bfloat16),
        "value_codewords": s((H, 1, S, 16, d), jnp.bfloat16),
        "blocks": s((B,), jnp.int32),
    }


def exact(B=2, T=1, H=8, d=128, sinks=4, ring=640, **_):
    """Tokens that are exact, without numbers."""
    s, bfloat16 = jax.ShapeDtypeStruct, jnp.bfloat16
    stored = s((B, H, sinks, d), bfloat16), s((B, H, ring, d), bfloat16), s((B, T, H, d), bfloat16)
    return Recent(*stored, *stored, *(s((B,), jnp.int32),) * 4)


def operation(sizes):
    """`attend_tiles` as a function of its arguments, and these; ``recent=1`` if it has `exact`
    tokens."""
    sizes = dict(sizes)
    how = {name: sizes.pop(name) for name in HOW if name in sizes}
    arguments = shapes(**sizes)
    if how.pop("recent", 0):
        arguments["recent"] = exact(**sizes)
    attend = functools.partial(mosaic_gpu.attend_tiles, **how)
    return lambda x: attend(**x), arguments


def on_abstract(kind="NVIDIA H100 80GB HBM3"):
    """A context in which jax believes that there is such a GPU."""
    from jax.sharding import AbstractDevice

    device = AbstractDevice(kind, 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def mosaic_module(sizes):
    """Module of the kernel of an `operation`; `finish_module` has that which follows."""
    return max(modules(*operation(sizes)), key=len)


def nearest_module(P=2, n=4096, d=128, K=256, unit=0, **given):
    """Module of the kernel that finds the nearest codewords; what else is given is not chosen."""
    s, c = jax.ShapeDtypeStruct, mosaic_gpu_cluster
    chosen = c.choose_nearest(c.Problem(P, n, d, K), **given)
    find = functools.partial(c.nearest, unit=bool(unit), config=chosen)
    return only_module(find, s((P, n, d), jnp.float32), s((P, K, d), jnp.float32))


def sums_module(P=2, n=4096, d=128, K=256, kinds=1, **given):
    """Module of the kernel that adds up cells; what else is given is not chosen."""
    s, c = jax.ShapeDtypeStruct, mosaic_gpu_cluster
    chosen = c.choose_sums(c.Problem(P, n, d, K), kinds, **given)
    add = functools.partial(c.cell_sums, codewords=K, config=chosen)
    points, code = s((P, n, d), jnp.float32), s((P, n), jnp.int32)
    return only_module(add, points, code, *(s((P, i, n), jnp.float32) for i in (kinds, 2)))


def planes_shapes(B=2, T=1, H=8, s=1, q=4, N=16, b=1024, d=128, R=128, S=128):
    """Arguments of attend_planes, without numbers."""
    a = jax.ShapeDtypeStruct
    return {
        "query": a((B, T, H, q, d), jnp.float32),
        "mean": a((H, d), jnp.float32),
        "inv_freq": a((d // 2,), jnp.float32),
        "key_planes": a((B, H // s, N, b // 32, R), jnp.uint32),
        "value_planes": a((B, H // s, N, b // 32, S), jnp.uint32),
        "key_codewords": a((H, 1, R, 2, d), jnp.bfloat16),
        "value_codewords": a((H, 1, S, 2, d), jnp.bfloat16),
        "blocks": a((B,), jnp.int32),
    }


def planes_operation(sizes):
    """`attend_planes` as a function of its arguments, and these; ``recent=1`` as `operation`."""
    sizes = dict(sizes)
    how = {name: sizes.pop(name) for name in HOW if name in sizes}
    arguments = planes_shapes(**sizes)
    if how.pop("recent", 0):
        arguments["recent"] = exact(**sizes)
    attend = functools.partial(mosaic_gpu_planes.attend_planes, **how)
    return lambda x: attend(**x), arguments


def planes_module(**sizes):
    """Module of the kernel of a `planes_operation`."""
    return max(modules(*planes_operation(sizes)), key=len)


def recent_module(B=2, H=8, q=4, d=128, S=4, C=640):
    """Module of the kernel of exact tokens."""
    query = jax.ShapeDtypeStruct((B, 1, H, q, d), jnp.float32)
    return only_module(mosaic_gpu_recent.attend_recent, query, exact(B, 1, H, d, S, C))


def finish_module(B=2, T=1, H=8, q=4, d=128, S=32, parts=32, P=10, short=0):
    """Module of the kernel that ends attention over codes."""
    s, sizes = jax.ShapeDtypeStruct, {"batch": B, "tokens": T, "heads": H, "group": q, "dim": d}
    problem = mosaic_gpu.Problem(**sizes, blocks=2, block=256, key=None, value_stages=S, every=0)
    rows, histogram = (B, T, H, q), (problem.pairs, parts, 4)
    dtype = jnp.bfloat16 if short else jnp.float32
    return only_module(
        functools.partial(mosaic_gpu_finish.finish, problem, dtype=dtype),
        s((*rows, d), jnp.float32),
        s((B,), jnp.int32),
        s((*histogram, S, 16), jnp.float32),
        s(histogram, jnp.int32),
        s((H, 1, S, 16, d), jnp.bfloat16),
        (s((P, *rows, d), jnp.float32), s((P, *rows), jnp.float32)),
    )


def encode_module(P=8, n=8192, G=1, R=32, K=16, g=128):
    """Module of the kernel that encodes greedily."""
    s = jax.ShapeDtypeStruct
    words = s((P, G, R, K, g), jnp.bfloat16)
    return only_module(mosaic_gpu_encode.encode, s((P, n, G * g), jnp.float32), words)


def only_module(function, *arguments):
    """The kernel's module, of the only Mosaic call in the lowered operation."""
    (only,) = modules(function, *arguments)
    return only


def modules(function, *arguments):
    """Those of all Mosaic calls in the lowered operation."""
    with on_abstract():
        traced = jax.jit(function).trace(*arguments)
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
    return found


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def assemble(code, library):
    """Make ptxas say what it has to say about a module."""
    compile_ = ctypes.CDLL(library).MosaicGpuCompile
    compile_.argtypes, compile_.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    compile_(code, len(code))  # prints; what it returns needs a GPU to be loaded


def compiled(function, arguments, library, how=None, **options):
    """A function of arguments without numbers after XLA's passes for an H100, as text."""
    from jax._src import xla_bridge
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    xla_bridge.register_plugin("cuda", priority=-1, library_path=library, options={})
    with mock.patch.object(xla_bridge, "discover_pjrt_plugins"):
        device = topologies.get_topology_desc(
            "h100", platform="cuda", target_config=H100, topology="1x1x1"
        ).devices[0]
    everywhere = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments
    )
    with mock.patch.object(devices, "check_hopper"):
        lowered = jax.jit(function, **options).lower(*arguments)
    how = {"xla_gpu_autotune_level": 0} | (how or {})
    return lowered.compile(compiler_options=how).as_text()


def small_config(layers):
    """Of a model with two KV heads of 128 channels."""
    from gsrq_jax.models.config import LLAMA_3_8B

    small = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 512}
    return dataclasses.replace(LLAMA_3_8B, **small, layers=layers, heads=8, kv_heads=2)


def int8_step(batch=8, layers=3):
    """New tokens through the layers, whose attention does nothing, and its arguments."""
    from gsrq_jax.models import llama

    graphdef, params = llama.abstract(small_config(layers), jnp.bfloat16, int8=True)

    def attention(q, k, v, _):
        return q + jnp.repeat(k + v, 4, axis=2), None

    def step(params, tokens):
        hidden, _ = llama.apply(graphdef, params, tokens, jnp.zeros_like(tokens), attention)
        return llama.logits(graphdef, params, hidden)

    return step, (params, jax.ShapeDtypeStruct((batch, 1), jnp.int32))


def decode_loop(batch=8, context=4096, layers=3):
    """The decode loop of a model of `small_config`, and its arguments."""
    from gsrq_jax.cache import init_cache
    from gsrq_jax.codebook import Codebooks
    from gsrq_jax.models import generation, llama
    from gsrq_jax.spec import QuantSpec

    config = small_config(layers)
    spec = QuantSpec.from_bits(
        1, config.head_dim, codewords=16, block=512, mean_every=16, layout="tiles"
    )
    graphdef, params = llama.abstract(config, jnp.bfloat16)
    s, lead = jax.ShapeDtypeStruct, (layers, config.kv_heads)
    books = Codebooks(
        key=s((*lead, *spec.key.codebook_shape), jnp.bfloat16),
        value=s((*lead, *spec.value.codebook_shape), jnp.bfloat16),
        key_mean=s((*lead, config.head_dim), jnp.float32),
        inv_freq=s((layers, config.head_dim // 2), jnp.float32),
        spec=spec,
    )
    cache = functools.partial(
        init_cache,
        spec,
        batch=batch,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_length=context,
        layers=layers,
    )
    state = generation.DecodeState(
        cache=jax.eval_shape(cache),
        token=s((batch,), jnp.int32),
        done=s((batch,), bool),
        tokens=s((batch, 8), jnp.int32),
        count=s((batch,), jnp.int32),
        key=jax.eval_shape(lambda: jax.random.key(0)),
    )
    loop = functools.partial(generation.decode, graphdef, sampler=generation.Sampler(), eos=())
    return loop, (params, books, state, s((), jnp.int32))


if __name__ == "__main__":
    import jax_plugins.xla_cuda13 as plugin

    what, *sizes = sys.argv[1:]
    numbers = {name: int(value) for name, value in (a.split("=") for a in sizes)}
    library = str(plugin._get_library_path())
    if what in ("nearest", "sums", "recent", "finish", "greedy", "planes"):
        make = {
            "planes": planes_module,
            "nearest": nearest_module,
            "sums": sums_module,
            "recent": recent_module,
            "finish": finish_module,
            "greedy": encode_module,
        }[what]
        assemble(make(**numbers), library)
        sys.exit()
    if what == "assemble":
        assemble(mosaic_module(numbers), library)
    elif what == "cluster":
        assemble(nearest_module(), library)
        assemble(sums_module(kinds=2), library)
    elif what in ("compile", "compile_planes"):
        attend, arguments = (planes_operation if what == "compile_planes" else operation)(numbers)
        print(compiled(attend, (arguments,), library))
    elif what == "pieces":
        from gsrq_jax.kernels.precision import in_pieces

        number = jax.ShapeDtypeStruct((64, 128), jnp.float32)
        print(compiled(lambda x: in_pieces(x, 2, jnp.float16), (number,), library))
    elif what in ("loop", "int8"):
        from gsrq_jax.models.generation import ON_GPU

        if what == "loop":
            print(compiled(*decode_loop(), library, ON_GPU, donate_argnums=2))
        else:
            print(compiled(*int8_step(), library, ON_GPU))
    else:
        from gsrq_jax.residual import _encode

        s = jax.ShapeDtypeStruct
        points, words = s((2, 4096, 128), jnp.float32), s((2, 1, 32, 16, 128), jnp.bfloat16)
        with mock.patch.object(jax, "default_backend", return_value="gpu"):
            plain = functools.partial(_encode, beam=1, chunk=None)
            print(compiled(plain, (points, words), library))
