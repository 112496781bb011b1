"""What holds for every test: one thread, no chatter, no network by accident."""

from collections.abc import Iterator
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
