"""What holds for every test: one thread, no chatter, no network by accident."""

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _grad_mode_is_left_alone() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(scope="session")
def llama_of_width_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model whose width four-bit libraries take."""
    from dynprobe.testing import tiny_llama

    path = tmp_path_factory.mktemp("model")
    tiny_llama(dim=64).model.save_pretrained(path)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Installs a package for the length of a test: ``package(name, {group: {name: value}}, module="its text")``."""
    from dynprobe import _plugins
    from dynprobe.metrics import _measure, _registry

    folder = tmp_path / "site-packages"
    folder.mkdir()
    entries = dict(_registry._ENTRIES)

    def install(name: str, points: Mapping[str, Mapping[str, str]], version: str = "1.0", **modules: str) -> Path:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = (f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for g, named in points.items())
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(textwrap.dedent(text))
            monkeypatch.delitem(sys.modules, module, raising=False)
        forget()
        return folder

    def forget() -> None:
        importlib.invalidate_caches()
        _plugins.plugins.cache_clear()
        _measure._plan.cache_clear()
        for where in _plugins.GROUPS.values():
            _plugins.own(where)._made.clear()
        _registry._ENTRIES.clear()
        _registry._ENTRIES.update(entries)

    monkeypatch.syspath_prepend(str(folder))
    yield install
    monkeypatch.undo()
    forget()
