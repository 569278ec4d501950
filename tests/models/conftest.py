"""The demo model's file, and goldens made from it by tools/make_gguf_golden.py."""

from pathlib import Path

import pytest
import tiny

from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, demo, gguf


@pytest.fixture(scope="session")
def demo_model() -> Path:
    try:
        return demo.path()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def read_demo_model(demo_model):
    """Config, tensors and tokenizer, read from the file once."""
    return gguf.read(demo_model)


@pytest.fixture
def gguf_goldens() -> Path:
    return Path(__file__).parent / "goldens_gguf"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model folder of tests/models/tiny.py."""
    return tiny.make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_model, tmp_path_factory) -> Path:
    """The folder of a finished training run of it, with `tiny.FLAGS`."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    commands.train(["--model", str(tiny_model), "--out", str(out), *tiny.FLAGS])
    return out
