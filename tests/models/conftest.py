"""The demo model's file, and goldens made from it by tools/make_gguf_golden.py."""

from pathlib import Path

import pytest

from gsrq_jax.errors import InputError
from gsrq_jax.models import demo


@pytest.fixture(scope="session")
def demo_model() -> Path:
    try:
        return demo.path()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def gguf_goldens() -> Path:
    return Path(__file__).parent / "goldens_gguf"
