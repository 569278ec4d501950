"""Pallas' interpreter of Mosaic GPU kernels, with products of what is in registers.

The interpreter has products of matrices in shared memory only.
"""

import contextlib
from unittest import mock

import jax
import numpy as np


@contextlib.contextmanager
def products_from_registers():
    """A context in which it has them."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as there

    of_references = there.wgmma

    def wgmma(*, a_allocation_key_as_array, thread, mesh_location, source_info=None, **others):
        left = np.asarray(a_allocation_key_as_array)
        if left.ndim == 1:  # not a matrix, but where one is
            same = {"thread": thread, "mesh_location": mesh_location, "source_info": source_info}
            return of_references(a_allocation_key_as_array=left, **same, **others)
        memory = there._get_shared_memory()
        said = {"logging_info": there.memory.GPULoggingInfo(mesh_location, thread, source_info)}

        def place(name):
            key = there.HostAllocationKey.from_array(others[f"{name}_allocation_key_as_array"])
            steps = there._remove_noop_transforms(others[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, steps))

        right = memory.get_buffer_content(*place("b"), thread, **said)[0]
        sums = memory.get_buffer_content(*place("acc"), thread, **said)[0]
        sums = sums + np.matmul(left, right, dtype=sums.dtype)
        memory.store_buffer_content(*place("acc"), sums, thread, **said)
        return others["token"]

    with mock.patch.object(there, "wgmma", there.fail_on_exception(wgmma)):
        yield
