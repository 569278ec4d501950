"""One process of a run, for test_processes.py: ``process_worker.py WHAT FOLDER FLAGS …``.

``write`` generates, and puts what it prints into the folder. ``die`` trains until the second layer
is to be fitted, where process 3 is killed. ``train`` tries what several processes refuse, trains,
and ends with bad input of process 1. ``distil`` refines the codebooks in the
folder, neither capturing nor fitting, and is interrupted. Nothing is measured.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import time

import jax
import tyro

from gsrq_jax import codebook
from gsrq_jax.calibration import SampleStore
from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, evaluation, processes, report, sharding, training

what, folder, *flags = sys.argv[1:]
if what != "distil":
    evaluation.fidelity = lambda *_: evaluation.Fidelity(1, 1.0, 1.0, 0.0, 1.0)
report.render = lambda out: json.loads((out / "report.json").read_text())


def killed_at_layer_1():
    layer = SampleStore.layer

    def read(store, index):
        if jax.process_index() == 3 and index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return layer(store, index)

    SampleStore.layer = read


def refused():
    index = jax.process_index()
    own = pathlib.Path(folder) / f"only-{index}"
    own.mkdir()
    mesh = sharding.make_mesh(2)  # a device of each process
    for check in (
        lambda: processes.check_same({"seed": index}),
        lambda: processes.check_same({"seed": 0} | {"jax": f"0.1{index}"}),
        lambda: processes.check_shared(own),
        lambda: training._share(9),
        lambda: training._share(1),
        lambda: sharding.make_mesh(2, (5, 1)),
        lambda: sharding.make_mesh(2, (1, 2), [jax.devices()[0], jax.devices()[8]]),
        lambda: sharding.for_tokens(mesh, 7),
        lambda: processes.once(lambda: (own / "not" / "there").touch()),
    ):
        try:
            check()
        except InputError as error:
            yield str(error)


if what == "write":
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        commands.generate(flags)
    (pathlib.Path(folder) / f"written-{jax.process_index()}").write_text(said.getvalue())
    sys.exit()
if what == "distil":

    def stopped(*_, **__):
        raise KeyboardInterrupt

    training.capture = lambda *_, **__: None
    training._learn = lambda *_: (codebook.load(folder), None, None)
    codebook.save = stopped
    commands.train(flags)
with processes.joined():
    if what == "die":
        killed_at_layer_1()
    else:
        said = json.dumps(list(refused()))
        (pathlib.Path(folder) / f"refused-{jax.process_index()}.json").write_text(said)
    training.train(tyro.cli(training.TrainConfig, args=flags))
    if jax.process_index() == 1:
        raise InputError("the second one has had enough")
    time.sleep(60)
