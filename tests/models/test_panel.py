from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest
import torch

import dynprobe as dp
from dynprobe.errors import ModelError, ModelNotFoundError
from dynprobe.models import _panel, fetch, known_models, load_model, panel_models, resolve, zoo_folder

CELLS = panel_models()


def test_every_cell_is_there_in_both_seeds() -> None:
    found = Counter((cell.family, cell.depth, cell.width, cell.seed) for cell in CELLS)
    assert found == Counter(product(("cem", "csm", "llama"), (1, 2, 4), (32,), (0, 1)))
    assert len({cell.name for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell_is_what_its_name_says(cell: object) -> None:
    assert isinstance(cell, dp.models.PanelModel)
    source = resolve(cell.name)
    assert (source.kind, source.weights_id) == ("known", f"dynprobe/{cell.name}")
    model, _, facts = load_model(source, device="cpu")
    config = model.config
    assert config.model_type == {"llama": "llama", "cem": "dynprobe_cem", "csm": "dynprobe_csm"}[cell.family]
    if cell.family == "csm":
        assert (config.trained_iterations, config.memory_size) == (4 * cell.depth, cell.width)
    else:
        assert (config.num_hidden_layers, config.hidden_size) == (cell.depth, cell.width)
    record = json.loads((zoo_folder("panel") / cell.name.removeprefix("panel/") / "dynprobe-model.json").read_text())
    assert record["recipe"]["seed"] == cell.seed
    assert facts["n_parameters"] == cell.parameters
    digest = hashlib.sha256((fetch(cell.name) / "model.safetensors").read_bytes()).hexdigest()
    assert record["files"]["model.safetensors"] == digest
    assert cell.test_nll == record["figures"]["test_nll"] < record["figures"]["ngram_nll"]["bigram"]


def test_all_else_is_equal() -> None:
    records = [
        json.loads((zoo_folder("panel") / cell.name.removeprefix("panel/") / "dynprobe-model.json").read_text())
        for cell in CELLS
    ]
    for same in ("steps", "batch", "length", "warmup", "decay", "clip", "synthetic"):
        assert len({record["recipe"][same] for record in records}) == 1, same
    assert len({json.dumps(record["text"]) for record in records}) == 1
    size = {(c.family, c.depth): c.parameters for c in CELLS}
    for depth in (1, 2, 4):
        assert size["cem", depth] == pytest.approx(size["llama", depth], rel=0.01)


def test_the_card_gives_the_same_figures() -> None:
    card = (zoo_folder("panel") / "README.md").read_text()
    for cell in CELLS:
        assert f"| `{cell.name}` | {cell.parameters:,} | {cell.test_nll:.3f} |" in card


def test_a_held_out_loss_is_that_of_the_table() -> None:
    text = (zoo_folder("panel").parent / "held_out.txt").read_bytes()
    cell = next(c for c in CELLS if (c.family, c.depth, c.seed) == ("llama", 4, 0))
    model, tokenizer, _ = load_model(cell.name, device="cpu")
    ids = torch.tensor(tokenizer(text.decode()).input_ids).view(-1, 161)
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(nll) == pytest.approx(cell.test_nll, rel=0.2)  # the first sixteen windows of the same text


def test_known_models_stays_a_short_list_and_a_slip_is_caught() -> None:
    assert not any(name.startswith("panel/") for name in known_models())
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'panel/cem-depth2-width32-seed[01]'"):
        fetch("panel/cem-depth2-width32-seed")


BROKEN = """
import pathlib, sys
read = pathlib.Path.read_text
def read_text(self, *args, **options):
    if self.name == "panel.json":
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return read(self, *args, **options)
pathlib.Path.read_text = read_text
from dynprobe.errors import DynprobeError, ModelNotFoundError
from dynprobe.models import known_models, panel_models, resolve
assert "tiny-llama" in known_models() and resolve("tiny-llama").kind == "known"
for asked in (panel_models, lambda: resolve("panel/llama-depth1-width32-seed0")):
    try:
        asked()
    except DynprobeError as error:
        assert "installation is incomplete" in str(error) and "panel.json" in str(error), error
        assert not isinstance(error, FileNotFoundError)
    else:
        sys.exit("no error")
try:
    resolve("tiny lama")
except ModelNotFoundError as error:
    assert "Did you mean 'tiny-llama'" in str(error), error
"""


def test_without_its_list_the_room_works_and_the_panel_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", ["{", '[{"name": "x"}]', "5"])
def test_a_damaged_list_is_a_clear_error(content, tmp_path, monkeypatch) -> None:
    (tmp_path / "panel.json").write_text(content)
    monkeypatch.setattr(_panel, "zoo_folder", lambda name: tmp_path)
    with pytest.raises(ModelError, match=r"panel\.json, cannot be read.*pip install --force-reinstall"):
        _panel.panel_models.__wrapped__()


def test_typing_error_in_a_panel_name_is_not_taken_to_the_hub() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model 'panel/cem-depth2-width32-seed9'.*panel_models"):
        resolve("panel/cem-depth2-width32-seed9")
    with pytest.raises(ModelNotFoundError, match="Did you mean 'panel/llama-depth1-width32-seed0'"):
        resolve("panel/lama-depth1-width32-seed0")
