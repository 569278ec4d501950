"""Eight CPU devices for pmap and shard_map, and a compiler that does not optimise.

Most of the suite's time is compilation of small programs that run once.
"""

import gc
import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # The emitters by way of MLIR take as long as all the rest of a compilation.
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
# Tracing makes many objects and little garbage in cycles: look for it seldom.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay
