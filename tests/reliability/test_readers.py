"""What parsers and readers refuse, and with which words: the branches that no other test of theirs takes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import BaseModel
from safetensors.numpy import save_file

from dynprobe._ranges import whole_numbers
from dynprobe.cli._commands import settings_of
from dynprobe.errors import DynprobeError, RunFolderError, SpecError, UsageError
from dynprobe.probes import Where
from dynprobe.probes._grammar import Percent, read_pairs
from dynprobe.protocols._attract_config import AttractConfig
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._evaluate_config import EvaluateConfig
from dynprobe.protocols._grid import parse_strengths
from dynprobe.protocols._iterate import IterateConfig
from dynprobe.protocols._panel_config import PanelConfig, check_settings, read_panel
from dynprobe.protocols._recover_config import RecoverConfig
from dynprobe.protocols._strength import read_direction
from dynprobe.protocols._sweep import SweepConfig
from dynprobe.protocols._threshold_config import ThresholdConfig
from dynprobe.runs import read_trajectory
from dynprobe.runs._json import plain
from dynprobe.runs._trajectory_layers import read_depths

CONFIGS = (RunConfig, SweepConfig, ThresholdConfig, RecoverConfig, DissociateConfig, AttractConfig, EvaluateConfig,
           IterateConfig)  # fmt: skip
#: One value of each kind that a file of settings can hold, and some that mean too much.
KINDS = (None, 5, -1, 10**400, 1.5, math.nan, math.inf, True, "x", "0:999999999999", [None], [[]], {"a": 1}, [{}])
MORE = (0, "", "a:b", "1e999", [], ["x"], {}, "@", "1:", "\U0001d538", b"x", [1, "a"], ["0:9"], "-1", [math.nan],
        [10**400], {1: 2})  # fmt: skip


def built(kind: Any, values: dict[str, Any]) -> None:
    """Settings are read, or refused in words."""
    said = "read"
    try:
        kind.build(**values).identity()
    except DynprobeError as error:
        said = str(error).strip()
    assert said


class _Design(PanelConfig):
    """A design, made as settings are."""

    @classmethod
    def build(cls, **values: Any) -> PanelConfig:  # type: ignore[override]
        return PanelConfig.build(values)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("values", [KINDS, pytest.param(MORE, marks=pytest.mark.long)], ids=["kinds", "more"])
def test_no_kind_of_value_of_a_setting_ends_a_reader(kind, values):
    for name in kind.model_fields:
        for value in values:
            built(kind, {"model": "tiny-llama", name: value})


@pytest.mark.parametrize("values", [KINDS, pytest.param(MORE, marks=pytest.mark.long)], ids=["kinds", "more"])
def test_no_kind_of_value_of_a_design_ends_its_reader(values):
    for name in PanelConfig.model_fields:
        for value in values:
            for with_noise in ({}, {"alphas": [0, 0.1], "perturb": "scale=relnorm"}):
                built(_Design, {"models": ["tiny-llama"], **with_noise, name: value})


def test_a_value_that_no_spelling_has_is_named_with_its_setting():
    with pytest.raises(UsageError, match=r"controls=5: a int of this kind cannot be read"):
        SweepConfig.build(model="tiny-llama", controls=5)


def test_a_defect_of_a_reader_keeps_its_error(monkeypatch):
    class Broken(RunConfig):
        def __init__(self, **values: Any) -> None:
            if len(values) > 1:
                raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        Broken.build(model="tiny-llama", limit=1)


@pytest.mark.parametrize("text", ["0:999999999999", "0:60000,0:60000", "1,x", "", "1:2:3", ":"])
@pytest.mark.parametrize("read", [whole_numbers, lambda t: SweepConfig.build(model="m", seeds=t), read_depths])
def test_ranges_without_end_and_lists_of_no_numbers_are_refused(text, read):
    with pytest.raises(ValueError, match=r"\S"):
        read(text)


def test_depths_are_numbers_or_named():
    assert read_depths([3, 1]) == (3, 1)
    assert read_depths(None) is None
    with pytest.raises(UsageError, match="names no depth"):
        read_depths("4:4")


REFUSED = [
    ({"batch_size": 0}, "'auto' or at least 1"), ({"remote": "ftp://x"}, "the URL of a server"),
    ({"remote": "ftp://me:secret@x"}, "a text with an @"), ({"temperature": math.inf}, "finite"),
    ({"temperature": math.nan}, "temperature=nan"), ({"metrics": ("kappa.fase/1",)}, "kappa.phase/1"),
    ({"lenz": True}, "Did you mean 'lens'"), ({"engine": "rey"}, "Did you mean 'ray'"),
    ({"workers": 0}, "at least 1"), ({"slurm": "timeout"}, "'timeout' is no name=value"),
    ({"slurm": 5}, "a list of name=value"), ({"engine": "local", "address": "auto"}, "--engine ray"),
    ({"worker_gpus": 0.5}, "does not take it"), ({"perturb": 3}, "perturb=3"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=lambda v: json.dumps(v, default=str))
def test_settings_that_are_refused(values, said):
    with pytest.raises(UsageError) as error:
        RunConfig.build(model="tiny-llama", **values)
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_a_login_in_the_address_of_a_server_is_not_kept():
    assert "secret" not in str(RunConfig.build(model="m", remote="https://me:secret@host/x").remote)
    assert RunConfig.build(model="m", remote="https://host/x").remote == "https://host/x"


def test_what_was_not_asked_for_is_no_part_of_what_a_run_is():
    usual = RunConfig.build(model="m")
    other = RunConfig.build(
        model="m", metrics="erank.rv/1", backend="nnsight", quantization="nf4", compile_metrics=True, span="all"
    )
    assert not {"metrics", "backend", "remote", "quantization", "compile_metrics"} & usual.identity().keys()
    assert {"metrics", "backend", "quantization", "compile_metrics"} <= other.identity().keys()
    assert (usual.measured_span, other.measured_span) == ("new", "all")
    assert RunConfig.build(model="m", max_new_tokens=0).measured_span == "prompt"
    assert "erank.rv/1" in other.measured_metrics
    assert usual.in_process
    assert not RunConfig.build(model="m", workers=2).in_process


DESIGNS = [
    ("", "is empty"), ("- a\n", "holds list"), ("models: []\n", "is an empty list"),
    ("seeds: [0]\n", "models is missing"),
    ("models:\n  - label: x\n", "model is missing; type model: tiny-llama"),
    ("models: [tiny-llama]\nseedz: [0]\n", "line 2: unknown key 'seedz'. Did you mean 'seeds'"),
    ("models:\n  - model: tiny-llama\n    lable: x\n", "Did you mean 'label'"), ("models: 5\n", "a list of models"),
    ("models: ['nothing-*']\n", "line 1: models: no shipped model fits nothing-*"),
    ("models: [tiny-llama]\nseeds: [0, 0]\n", "line 2: seeds: one of them stands there twice"),
    ("models: [tiny-llama]\nalphas: [-1]\n", "finite numbers from 0 on"),
    ("models: [tiny-llama, tiny-llama]\n", "stands there twice; give one of them a label"),
    ("models: [tiny-llama]\ncovariates: [deph]\n", "covariates: deph is none"),
    ("models: [tiny-llama]\ndecompose: [nlll]\n", "decompose: nlll is no column"),
    ("models: [tiny-llama]\nalphas: [0.1]\n", "alphas above 0 need perturb"),
    ("models: [tiny-llama]\nalphas: [0.1]\nperturb: alpha=1\n", "without alpha"),
    ("models: [tiny-llama]\nalphas: [0.1]\nperturb: seed=1\n", "without seed"),
    ("models: [tiny-llama]\nperturb: scale=relnorm\n", "perturb has no strength"),
    ("models: [tiny-cem]\nprotocol: iterate\ntemperatures: [1]\n", "temperatures: protocol: iterate reads texts"),
    ("models: [tiny-llama]\niterations: [3]\n", "iterations belong to protocol: iterate"),
    ("models: [tiny-llama]\nsettings: {seed: 1}\n", "settings: seed is part of the design"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), DESIGNS)
def test_designs_that_are_refused(text, said, tmp_path):
    file = tmp_path / "panel.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        read_panel(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_a_design_that_is_read(tmp_path):
    (tmp_path / "mine.txt").write_text("One text\n")
    file = tmp_path / "panel.yaml"
    file.write_text(
        "models: [{model: 'panel/cem-depth1*', family: cem, covariates: {size: 3}}, tiny-cem]\nprompts: mine.txt\n"
        "protocol: iterate\niterations: 3\ncovariates: size\ndecompose: [converged_at]\nsettings: {batch_size: 1}\n"
    )
    found = read_panel(file)
    assert found.prompts == str(tmp_path / "mine.txt")
    assert len(found.models) > 2
    assert found.models[-1].name == "tiny-cem"
    assert "batch_size" not in found.identity()["settings"]
    check_settings(found)
    with pytest.raises(UsageError, match="settings of the panel"):
        check_settings(PanelConfig.build({"models": ["tiny-llama"], "settings": {"batch_size": 0}}))
    noisy = PanelConfig.build({"models": "tiny-llama", "alphas": 0.1, "perturb": "skale=relnorm"})
    with pytest.raises(SpecError, match="scale"):
        check_settings(noisy)
    assert PanelConfig.build({"models": [found.models[-1]]}).models == (found.models[-1],)


def test_percents_and_pairs():
    with pytest.raises(UsageError, match="between 0 and 100"):
        Percent(Fraction(101))
    with pytest.raises(UsageError, match="a spec is a text"):
        read_pairs(5, ("layers",))  # type: ignore[arg-type]
    assert Percent(Fraction(50)).of(np.int32([3, 5])).tolist() == [1, 2]
    assert str(Where.parse("layers=50%")) == "layers=50%"


@pytest.mark.parametrize("given", ["", "0.1:1", "0:1:5", "1:1:0", "0.1:3:999999999", "x", [1, "y"], [], 1j])
def test_strengths_that_are_refused(given):
    with pytest.raises((UsageError, ValueError, TypeError)):
        parse_strengths(given)


def test_settings_as_they_are_typed(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("limit: 3\nseed: 1\n")
    given = {
        "dry_run": True, "apply_chat_template": True, "model_args": "pretrained=m,dtype=float64,trust_remote_code=True",
        "config": str(file), "seed": 2, "batch_size": "3", "workers": "2", "perturb": ["alpha=1"], "prompts": "p.txt",
    }  # fmt: skip
    found = settings_of(given)
    assert found["chat_template"] == "auto"
    assert (found["model"], found["dtype"], found["trust_remote_code"]) == ("m", "float64", True)
    assert (found["limit"], found["seed"], found["batch_size"], found["workers"]) == (3, 2, 3, 2)
    assert found["perturb"] == ("alpha=1",)
    assert settings_of({"batch_size": "auto", "quiet": True})["model"] == "tiny-llama"
    assert settings_of({}, looped=True)["model"] == "tiny-csm"
    assert "using tiny-csm" in capsys.readouterr().err
    for wrong, said in (
        ({"num_fewshot": 2}, "--num-fewshot"), ({"model_args": "pretraned=m"}, "known keys"),
        ({"model_args": "m"}, "known keys"), ({"batch_size": "many"}, "batch_size='many'"),
        ({"workers": "many"}, "workers='many': expected a whole number or 'auto'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            RunConfig.build(**settings_of({"model": "m", **wrong}))


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: float


class Model(BaseModel):
    y: int = 3


def test_values_of_every_kind_as_json():
    given = {
        1: Colour.RED, "set": {2, 1}, "point": Point(math.inf), "model": Model(), "array": np.int32([1]),
        "tensor": torch.tensor(2.5), "low": -math.inf, "true": True,
    }  # fmt: skip
    assert plain(given) == {
        "1": "red", "set": [1, 2], "point": {"x": "Infinity"}, "model": {"y": 3}, "array": [1], "tensor": 2.5,
        "low": "-Infinity", "true": True,
    }  # fmt: skip
    with pytest.raises(RunFolderError, match=r"value\.a is a builtins\.object"):
        plain({"a": object()})
    with pytest.raises(RunFolderError, match="two keys that read '1'"):
        plain({1: 0, "1": 0})


def test_directions_that_are_refused(tmp_path):
    two = {"a": np.ones(3), "b": np.ones(3)}
    save_file(two, tmp_path / "two.safetensors")
    save_file({**two, "direction": np.arange(3.0)}, tmp_path / "named.safetensors")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    assert read_direction(tmp_path / "named.safetensors").tolist() == [0, 1, 2]
    for name, said in (("two.safetensors", "holds 2 tensors"), ("text.npy", "dtype"), ("x.bin", "is read from .npy")):
        with pytest.raises(UsageError, match=said):
            read_direction(tmp_path / name)


def _cube(*shape: int) -> list[Any]:
    return torch.rand(*shape).tolist()


DATASETS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"blocks.0.hook_resid_post": _cube(2, 3, 4)}, {"blocks.0.hook_resid_post": [1, 2]}], "import them apart"),
    ([{"blocks.0.hook_resid_post": [0.5, 0.5]}], "Array2D"), ([{"blocks.0.hook_resid_post": _cube(2, 3)}], "Array2D"),
    ([{"blocks.0.hook_resid_post": [[["a"]]]}], "Array2D"), ([{"blocks.0.hook_resid_post": [[], []]}], "Array2D|sizes"),
    ([{"blocks.0.hook_resid_post": [_cube(3, 4), _cube(2, 4)]}], "contexts of one size"),
    ([{"blocks.0.hook_resid_post": _cube(1, 3, 4), "token_ids": [7]}], "a list of numbers per context"),
    ([{"x": [1]}], "no column is a state between blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "said"), DATASETS)
def test_datasets_of_activations_that_are_refused(tables, said, tmp_path):
    for k, columns in enumerate(tables):
        table = pa.table(columns)
        with pa.OSFile(str(tmp_path / f"data-{k}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    with pytest.raises(UsageError, match=said):
        read_trajectory(tmp_path)


@pytest.mark.parametrize("listed", ["{}", "[", '{"_data_files": [1]}', '{"_data_files": [{"filename": 3}]}'])
def test_lists_of_a_dataset_that_are_no_lists(listed, tmp_path):
    table = pa.table({"blocks.0.hook_resid_post": _cube(1, 3, 4)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (tmp_path / "state.json").write_text(listed)
    with pytest.raises(UsageError, match=r"state.json does not list the dataset's files"):
        read_trajectory(tmp_path)
