"""The command line in this process, on a tiny model; the user's cache and current folder are left alone."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dynprobe.cli import main
from dynprobe.testing import save_tiny_model


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DYNPROBE_CACHE")
    os.environ["DYNPROBE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("DYNPROBE_CACHE")
    if before is not None:
        os.environ["DYNPROBE_CACHE"] = before


@pytest.fixture
def users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the person who runs the tests, where real weights may lie."""
    monkeypatch.delenv("DYNPROBE_CACHE")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., Outcome]:
    """``cli("run", "--model", …)``: exit code, standard output, standard error."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(w) for w in words])
        found = capsys.readouterr()
        return Outcome(code, found.out, found.err)

    return call


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a perturbed arm."""
    out = tmp_path_factory.mktemp("finished")
    words = ["run", "--model", model, "--prompt", "Hello there", "--prompt", "And so on", "--prompt", "Third one"]
    assert (
        main([str(w) for w in [*words, "--max-new-tokens", 3, "--perturb", "alpha=0.2", "--out", out, "--quiet"]]) == 0
    )
    (run,) = out.iterdir()
    return run
