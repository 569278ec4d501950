"""Tables in the documents are those of the result files."""

import pathlib
import subprocess
import sys

import pytest

TOOLS = pathlib.Path(__file__).parents[1] / "tools"


@pytest.mark.parametrize("tool", ["make_tables.py", "make_results.py"])
def test_up_to_date(tool):
    done = subprocess.run(
        [sys.executable, TOOLS / tool, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run python tools/{tool}\n{done.stderr}"
