"""Eight CPU devices for pmap and shard_map, and a compiler that does not optimise.

Most of the suite's time is compilation of small programs that run once.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
