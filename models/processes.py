"""Several processes of one run: joined at the start, agreeing on the way, none left to wait.

`joined` connects the processes that a TPU pod, Slurm or ``JAX_COORDINATOR_ADDRESS``,
``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` describe. From then on each says once a second that it
is there. One that stops with an error tells the others, which stop with it; one that is not heard
of for ``GSRQ_PROCESS_TIMEOUT`` seconds (60) is named by all others, which stop, too, whatever they
wait for. In a single process all this does nothing.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gsrq_jax.errors import InputError

Value = TypeVar("Value")

_TIMEOUT = "GSRQ_PROCESS_TIMEOUT"
_DONE, _ERROR = "done", "error: "


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Connects the processes of this run, and ends them together.

    Raises:
        InputError: if the environment describes several processes, but not all that is needed, or
            they do not find each other in time.
    """
    found = cluster(os.environ)
    if found is None:
        yield
        return
    watch = _Watch(_connect(found))
    watch.start()
    try:
        with contextlib.ExitStack() as stack:
            if jax.process_index():  # one of them shows progress
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except (InputError, OSError) as error:
        watch.leave(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        watch.leave("interrupted; the same command goes on from here", 130)
    except Exception:
        watch.join(2 * watch.timeout)  # ends this process if another one was the reason
        raise
    watch.stop()


def cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What ``jax.distributed.initialize`` is to be told; None for a process of its own.

    Raises:
        InputError: if a part is missing or is not a number.
    """
    slurm = int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        found: dict[str, Any] = {"coordinator_address": address}
        for name in ("num_processes", "process_id"):
            variable = f"JAX_{name.upper()}"
            number = environment.get(variable, "")
            if number.isdecimal():
                found[name] = int(number)
            elif number or not slurm:
                raise InputError(
                    f"JAX_COORDINATOR_ADDRESS is set, but {variable} is {number or 'not'}; "
                    "set it to a number, or unset both for a process of its own"
                )
        if ":" not in address:
            raise InputError(f"JAX_COORDINATOR_ADDRESS {address} has no port; give host:port")
        return found
    if any(f"JAX_{x}" in environment for x in ("NUM_PROCESSES", "PROCESS_ID")):
        raise InputError(
            "JAX_NUM_PROCESSES or JAX_PROCESS_ID is set, but JAX_COORDINATOR_ADDRESS is not; set "
            "it to host:port of process 0"
        )
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev").glob("vfio/[0-9]*")]
    tpu = chips and importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS") != "cpu"
    return {} if slurm or tpu else None


def exchange(value: Value) -> list[Value]:
    """What each process says, plain as JSON is, in their order."""
    if jax.process_count() == 1:
        return [value]
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(said.size))
    room = 1 << max(10, int(sizes.max() - 1).bit_length())  # few sizes, for each is compiled
    rows = multihost_utils.process_allgather(np.pad(said, (0, room - said.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(value: Value) -> Value:
    """What process 0 says, for what must not differ."""
    return exchange(value)[0]


def once(action: Callable[[], object]) -> None:
    """Done by process 0, while the others wait for it; its bad input is that of all.

    Raises:
        InputError: what ``action`` raised, in every process.
    """
    reason = None
    try:
        if jax.process_index() == 0:
            action()
    except (InputError, OSError) as error:
        if jax.process_count() == 1:
            raise
        reason = str(error)
    if (reason := agreed(reason)) is not None:
        raise InputError(reason)


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuses processes that differ in what decides a run's result.

    Raises:
        InputError: in every process, naming one that differs and in what.
    """
    first, *others = exchange(dict(facts))
    for index, other in enumerate(others, 1):
        if names := [name for name in first if first[name] != other.get(name)]:
            name = names[0]
            raise InputError(
                f"process {index} has another {name} than process 0 ({other.get(name)}, not "
                f"{first[name]}); start all processes alike"
            )


def check_shared(folder: pathlib.Path) -> None:
    """Refuses a folder that not all processes see.

    Raises:
        InputError: in every process, naming one that does not see it.
    """
    mark = folder / f".seen-by-all-{agreed(time.time_ns())}"
    once(mark.touch)
    seen = exchange(mark.exists())
    once(mark.unlink)
    if not all(seen):
        raise InputError(
            f"process {seen.index(False)} does not see what process 0 wrote to {folder}; give a "
            "folder on a disk that all processes share"
        )


def _connect(found: dict[str, Any]) -> float:
    """Joins the other processes; returns the time after which one is lost."""
    value = os.environ.get(_TIMEOUT, "60")
    try:
        timeout = float(value)
        if not timeout >= 1:
            raise ValueError
    except ValueError:
        raise InputError(f"{_TIMEOUT} must be a number of seconds from 1, got {value}") from None
    # On CPUs programs would run beside each other, and mix up what they send to other processes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=round(5 * timeout),
            # After we ourselves have noticed and said it more clearly.
            heartbeat_timeout_seconds=round(3 * timeout),
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the processes of this run did not find each other in {5 * timeout:g} s ({reason}); "
            "check that all were started, and the coordinator's address"
        ) from error
    return timeout


class _Watch(threading.Thread):
    """Says that this process is there, and ends it when another one is not, or stops."""

    def __init__(self, timeout: float):
        super().__init__(daemon=True)
        from jax._src.distributed import global_state  # its key-value store has no public name

        self.timeout = timeout
        self._interval = min(1, timeout / 10)
        assert global_state.client is not None
        self._store = global_state.client
        self._stopped = threading.Event()

    def run(self) -> None:
        index, count = jax.process_index(), jax.process_count()
        heard = {str(other): ("", time.monotonic()) for other in range(count) if other != index}
        beat = 0
        while not self._stopped.wait(self._interval):
            beat += 1
            try:
                self._say(str(beat))
                said = dict(self._store.key_value_dir_get(_WHO))
            except Exception:  # process 0 is lost: JAX itself ends a process that notices
                continue
            now = time.monotonic()
            for other, (before, when) in heard.items():
                new = said.get(_WHO + other, "")
                if new.startswith(_ERROR):
                    code, _, reason = new.removeprefix(_ERROR).partition(" ")
                    self._end(f"process {other} stopped: {reason}", int(code))
                if new not in (before, _DONE):
                    heard[other] = (new, now)
                elif new != _DONE and now - when > self.timeout:
                    self._end(
                        f"process {other} of {count} is lost: nothing was heard of it for "
                        f"{self.timeout:g} s; start all of them again, and the run goes on from "
                        "what is done",
                        1,
                    )

    def stop(self) -> None:
        """This process is done, without an error."""
        self._stopped.set()
        self.join()
        self._say(_DONE)

    def leave(self, reason: str, code: int) -> NoReturn:
        """Ends this process, and by it all others."""
        self._stopped.set()
        self.join()
        with contextlib.suppress(Exception):
            self._say(f"{_ERROR}{code} {reason}")
        self._end(reason, code)

    def _say(self, what: str) -> None:
        self._store.key_value_set(_WHO + str(jax.process_index()), what, allow_overwrite=True)

    def _end(self, reason: str, code: int) -> NoReturn:
        # A line of its own, also where a bar of progress has not ended its line.
        print(f"\nerror: {reason}", file=sys.__stderr__, flush=True)
        if jax.process_index() == 0:  # without which the others hear nothing
            time.sleep(3 * self._interval)
        os._exit(code)  # an orderly end would wait for those that are not there


_WHO = "gsrq/"
