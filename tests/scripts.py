"""Scripts of the checkout as modules."""

import importlib
import pathlib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def script(folder: str, name: str) -> Any:
    """A fixture: the module of ``folder/name.py``, which finds those beside it as long as it is."""

    @pytest.fixture(scope="module")
    def module():
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / folder)
            yield importlib.import_module(name)

    return module
