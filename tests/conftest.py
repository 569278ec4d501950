"""Eight CPU devices for pmap and shard_map, and a compiler that does not optimise.

Most of the suite's time is compilation of small programs that run once.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile

_flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
old = importlib.metadata.version("jaxlib").startswith("0.10.")
if old and importlib.util.find_spec("libtpu") is None:
    # The emitters by way of MLIR take as long as all the rest of a compilation. (Later compilers,
    # libtpu's among them, have no others, and end the process at a flag that they do not know.)
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_flags)
# Where libtpu is: its compiler, in several workers at once and without a TPU host to ask.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one worker, one test or one process of a test has compiled the others load.
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # until the first process ends
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _compiled.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",  # less takes as long to write
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
# Tracing makes many objects and little garbage in cycles: look for it seldom.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay


_MOST_MAPS = 30_000  # of a process; Linux allows 65530, and at that XLA crashes


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs between modules before they take all memory maps there are."""
    if nextitem is not None and nextitem.path == item.path:
        return
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > _MOST_MAPS:
        import jax  # after the flags above

        jax.clear_caches()
        gc.collect()
