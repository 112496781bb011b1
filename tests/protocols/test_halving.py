"""A unit that does not fit is done in parts, and the tables are those of the whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import ModelError
from dynprobe.models import CsmConfig, CsmForCausalLM
from dynprobe.prompts import Prompt
from dynprobe.protocols import _memory
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._criteria import NULL_ALPHA, Criterion
from dynprobe.protocols._halving import Halving, joined
from dynprobe.protocols._memory import free_memory, row_bytes, rows_fitting, rows_that_fit, weight_bytes
from dynprobe.testing import byte_tokenizer, tiny_llama

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
}


class SmallDevice:
    """A model that has room for so many rows, from the moment the units begin."""

    def __init__(self, model: torch.nn.Module, room: int, error: BaseException) -> None:
        self.room, self.error, self.full, self.rows = room, error, False, []
        self.handle = model.register_forward_pre_hook(self.forward, with_kwargs=True)

    def __call__(self, progress: Any) -> None:
        self.full = self.full or progress.stage == "batch"

    def forward(self, _module: Any, args: Any, kwargs: Any) -> None:
        ids = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if self.full:
            self.rows.append(len(ids))
            if len(ids) > self.room:
                raise self.error


def _tables(run: Any, names: tuple[str, ...], keys: dict[str, list[str]]) -> dict[str, pd.DataFrame]:
    found = {}
    for name in names:
        table = run.table(name)
        for column in table.columns:
            if isinstance(table[column].dtype, pd.CategoricalDtype):
                table[column] = table[column].astype(object)
        found[name] = table.sort_values(keys[name], ignore_index=True)
    return found


def _same(whole: pd.DataFrame, parts: pd.DataFrame, leave: tuple[str, ...] = ()) -> None:
    assert len(whole) == len(parts) > 0
    left = [c for c in whole if c not in leave]
    # The arithmetic of a batch of another shape: a few units in the last place of float32, more where it is a quotient.
    pd.testing.assert_frame_equal(whole[left], parts[left], rtol=2e-3, atol=2e-4, check_dtype=False)


KEYS = {
    "samples": ["sample_id"], "tokens": ["sample_id", "pos"], "depths": ["sample_id", "pos", "track", "depth"],
    "profiles": ["sample_id", "track", "depth"], "trials": ["prompt_id", "write", "criterion", "seed", "alpha"],
    "actions": ["sample_id", "pos", "step"],
}  # fmt: skip


def _events(run: Any, kind: str) -> list[dict[str, Any]]:
    lines = pd.read_json(Path(run.path) / "events.jsonl", lines=True)
    return lines[lines["kind"] == kind].to_dict("records")


@pytest.mark.parametrize("kind", ERRORS)
def test_a_run_whose_batches_do_not_fit_gives_the_same_tables(
    llama_folder: Path, texts: Any, tmp_path: Path, kind: str
) -> None:
    asked: dict[str, Any] = {"perturb": "alpha=0.3", "max_new_tokens": 4, "states": True, "where": "layers=1"}
    whole = dp.run(dp.load(str(llama_folder)), texts, out=tmp_path / "whole", batch_size=5, **asked)
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 2, ERRORS[kind])
    looks: list[Any] = []

    def listen(progress: Any) -> None:
        device(progress)
        if progress.stage == "batch" and progress.summary is not None:
            looks.append(progress.summary)

    # transformers passes hooks of others by; that they are there makes the run one of its own.
    parts = dp.run(subject, texts, out=tmp_path / "parts", batch_size=5, listener=listen, **asked)
    assert max(device.rows) == 5
    assert len([n for n in device.rows if n > 2]) == 1  # tried once, then never again
    one, other = (_tables(run, ("samples", "tokens", "depths", "profiles"), KEYS) for run in (whole, parts))
    for name, table in one.items():
        _same(table, other[name], leave=("digest",))
    states = []
    for run in (whole, parts):
        labels, values = run.states(layer=1)
        order = labels.assign(sample_id=labels["sample_id"].astype(str)).sort_values(["sample_id", "pos"]).index
        states.append(values[labels.index.get_indexer(order)])
    np.testing.assert_allclose(*states, rtol=1e-3, atol=1e-4)
    assert parts.manifest.batch_facts["0"] == {"parts": 3, "halved_rows": [5]}
    assert whole.manifest.batch_facts == {}
    (event,) = _events(parts, "halved")
    assert (event["rows"], event["kept"]) == (5, 2)
    assert len(looks) == 1  # the first samples are told once
    plan = parts.manifest.model_extra["memory_plan"]
    assert plan["rows"] == 5
    assert plan["unit_bytes"] >= plan["row_bytes"] > 0
    assert plan["weight_bytes"] == weight_bytes(subject)


def test_a_sweep_in_parts(llama_folder: Path, texts: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"alphas": [0.1, 0.5], "layers": "0+1", "seeds": "0:2", "tables": "all"}
    whole = dp.sweep(dp.load(str(llama_folder)), texts, out=tmp_path / "whole", **asked)
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 4, ERRORS["cuda"])  # the trial of resuming runs each row twice
    parts = dp.sweep(subject, texts, out=tmp_path / "parts", listener=device, **asked)
    one, other = (_tables(run, ("samples", "tokens", "depths"), KEYS) for run in (whole, parts))
    for name, table in one.items():
        _same(table, other[name])
    facts = parts.manifest.batch_facts["0"]
    assert facts["halved_rows"] == [5]
    assert facts["parts"] == len(facts["roads"]) == 3
    assert facts["halved"]  # the branches of a trunk were halved too


@pytest.mark.parametrize("criterion", ["kl", "kappa"])
def test_a_threshold_in_parts(llama_folder: Path, texts: Any, tmp_path: Path, criterion: str) -> None:
    asked: dict[str, Any] = {"criterion": criterion, "layers": 1, "alphas": [0.05, 0.4], "scale": "relnorm"}
    whole = dp.threshold(dp.load(str(llama_folder)), texts, out=tmp_path / "whole", **asked)
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 4, ERRORS["cuda"])
    parts = dp.threshold(subject, texts, out=tmp_path / "parts", listener=device, **asked)
    assert parts.manifest.batch_facts["0"]["halved_rows"] == [5]
    one, other = (_tables(run, ("trials",), KEYS)["trials"] for run in (whole, parts))
    _same(one, other, leave=("rows_forwarded", "batch", "seconds"))
    if criterion == "kappa":  # the null was made before anything was cut
        assert set(one["level"]) == set(other["level"])


@pytest.mark.parametrize("each", [False, True])
def test_memory_does_not_decide_which_strengths_a_search_tries(
    llama_folder: Path, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: bool
) -> None:
    response = Criterion.response
    loud: list[str] = []

    def noisy(self: Any, branch: Any, trunk: Any) -> np.ndarray:
        """One text answers to rounding with half a nat: with it a level of one is not resolved."""
        found = response(self, branch, trunk)
        for i, request in enumerate(branch.requests):
            if request.perturb.alpha == NULL_ALPHA and trunk.texts[request.text].row_key == loud[0]:
                found[i] = 0.5
        return found

    monkeypatch.setattr(Criterion, "response", noisy)
    asked: dict[str, Any] = {"layers": 1, "scale": "relnorm", "batch_size": 5, "each_position": each}
    asked |= {"positions": "1:3"} if each else {}
    names = dp.run(dp.load(str(llama_folder)), texts, max_new_tokens=0, out=tmp_path / "names").prompts
    in_order = names.assign(n=names["token_ids"].map(len)).sort_values("n")["prompt_id"].tolist()
    # One of the four longest texts, which tell the floor, and the one that does not.
    for text, tells in ((in_order[1], True), (in_order[0], False)):
        loud[:] = [text]
        tried = []
        for room in (99, 4):
            subject = dp.load(str(llama_folder))
            device = SmallDevice(subject.model, room, ERRORS["cuda"])
            done = dp.threshold(subject, texts, out=tmp_path / f"{text}-{room}", listener=device, **asked)
            assert done.manifest.batch_facts["0"].get("parts", 1) == (1 if room == 99 else 3)
            trials = done.table("trials").astype({"prompt_id": str})
            assert bool((trials["floor"] == 0.5).all()) is tells
            assert bool((trials["alpha"] == 0).all()) is tells  # a level that is not resolved is not searched for
            tried.append(trials.sort_values(["prompt_id", "pos", "alpha"], ignore_index=True))
        columns = ["prompt_id", "pos", "alpha"]
        pd.testing.assert_frame_equal(tried[0][columns], tried[1][columns], rtol=1e-3)


def test_a_threshold_that_learns_from_all_prompts_is_not_cut(llama_folder: Path, texts: Any, tmp_path: Path) -> None:
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 2, ERRORS["cuda"])
    with pytest.raises(ModelError, match=r"5 rows of up to .* which have to go together, do not fit .*\(--limit\)"):
        dp.threshold(subject, texts, layers=1, placement="quest", out=tmp_path, listener=device)


def test_iterations_in_parts(tmp_path: Path) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11], [3, 4, 5, 6, 7], [12, 13]]
    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano"))
    whole = dp.iterate(model, rows, iterations=[1, 3], out=tmp_path / "whole")
    device = SmallDevice(model, 2, ERRORS["cuda"])
    parts = dp.iterate(model, rows, iterations=[1, 3], out=tmp_path / "parts", listener=device)
    assert parts.manifest.batch_facts["0"]["halved_rows"] == [4]
    one, other = (_tables(run, ("samples", "tokens", "depths"), KEYS) for run in (whole, parts))
    for name, table in one.items():
        _same(table, other[name])


@pytest.mark.parametrize(
    ("mode", "decode"), [("slerp", "forced"), ("all", "forced"), pytest.param("all", "free", marks=pytest.mark.slow)]
)
def test_recovery_in_parts(llama_folder: Path, texts: Any, tmp_path: Path, mode: str, decode: str) -> None:
    asked: dict[str, Any] = {"mode": mode, "perturb": "alpha=0.5", "max_new_tokens": 5, "decode": decode}
    if mode == "all":
        texts, asked = texts[:4], asked | {"timings": "always"}
    whole = dp.recover(dp.load(str(llama_folder)), texts, out=tmp_path / "whole", **asked)
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 2, ERRORS["cuda"])
    parts = dp.recover(subject, texts, out=tmp_path / "parts", listener=device, **asked)
    assert [f.get("halved_rows") for f in parts.manifest.batch_facts.values()] == [[len(texts)], None]
    one, other = (_tables(run, ("samples", "tokens", "depths"), KEYS) for run in (whole, parts))
    acted = set(one["samples"]["sample_id"].str.extract(r"perturbed\+([a-z]+)")[0].dropna())
    assert acted >= ({"slerp"} if mode == "slerp" else {"passive", "slerp", "clamp", "shrink", "subspace", "str"})
    for name, table in one.items():
        # Whether the clean text in one forward is paired with the clean stream depends on who is padded how.
        steered = [found[found["sample_id"].str.contains("+", regex=False)] for found in (table, other[name])]
        _same(*steered)


def test_the_tokens_that_iterations_are_read_over_do_not_depend_on_who_else_is_in_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    subject = dp.discover(CsmForCausalLM(CsmConfig.preset("nano")), name="nano")
    subject.tokenizer = byte_tokenizer()
    prompts = [Prompt("a", "one and one is", answer=" two"), Prompt("b", "a text that has no answer")]
    runs = [dp.iterate(subject, prompts, iterations=[2], batch_size=n, out=tmp_path / str(n)) for n in (1, 2)]
    _same(*(_tables(run, ("samples",), KEYS)["samples"] for run in runs))


def test_one_row_that_does_not_fit_says_what_to_type(llama_folder: Path, texts: Any, tmp_path: Path) -> None:
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 0, ERRORS["cuda"])
    with pytest.raises(ModelError) as raised:
        dp.run(subject, texts, perturb="alpha=0.3", max_new_tokens=0, out=tmp_path, listener=device)
    told = str(raised.value)
    for word in ("one row of", "--dtype bfloat16", "--device-map auto", "--max-new-tokens", "shorter prompts", "free"):
        assert word in told
    assert device.rows[-1] == 1


def test_a_model_that_does_not_fit_says_what_to_type(texts: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ERRORS["cuda"]

    monkeypatch.setattr("dynprobe.protocols._prepare.load_subject", full)
    with pytest.raises(ModelError, match=r"the weights of tiny-llama in float32.*--dtype bfloat16.*--device-map auto"):
        dp.run("tiny-llama", texts, max_new_tokens=0, out=tmp_path)


def test_another_error_is_not_taken_for_memory(llama_folder: Path, texts: Any, tmp_path: Path) -> None:
    subject = dp.load(str(llama_folder))
    device = SmallDevice(subject.model, 2, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        dp.run(subject, texts, max_new_tokens=0, out=tmp_path, listener=device)
    assert len(device.rows) == 1


def test_a_unit_that_the_plan_says_is_too_large_is_cut_before_it_is_begun(
    llama: Any, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dp.run(llama, texts, perturb="alpha=0.3", max_new_tokens=2, out=tmp_path / "whole", batch_size=5)
    longest = max(map(len, whole.prompts["token_ids"])) + 2
    room = int(2.5 * row_bytes(llama, longest, generated=True) / 0.8)
    monkeypatch.setattr(_memory, "free_memory", lambda device: room)
    parts = dp.run(llama, texts, perturb="alpha=0.3", max_new_tokens=2, out=tmp_path / "parts", batch_size=5)
    assert parts.manifest.batch_facts["0"] == {"parts": 3}
    assert [(e["rows"], e["kept"], e["why"]) for e in _events(parts, "cut")] == [(5, 2, "memory plan")]
    assert parts.manifest.model_extra["memory_plan"]["rows_at_once"] == 2
    _same(*(_tables(run, ("depths",), KEYS)["depths"] for run in (whole, parts)))


class Experiment:
    """Units of rows, of which so many fit."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def rows_of(self, unit: Any) -> Any:
        return unit["rows"]

    def with_rows(self, unit: Any, rows: Any) -> Any:
        return {**unit, "rows": list(rows)}

    def work(self, unit: Any, early: Any) -> Produced:
        self.tried.append(unit["rows"])
        if len(unit["rows"]) > self.room:
            raise MemoryError
        table = pd.DataFrame({"row": unit["rows"]})
        if early is not None:
            early(table)
        return Produced({"samples": table}, facts={"roads": list(unit["rows"]), "one_pass": True, "n": len(table)})


class Ready:
    """As much of a prepared run as is asked for."""

    def __init__(self, n: int) -> None:
        self.subject = tiny_llama()
        self.rows, self.saved = [[1, 2, 3]] * n, ()
        self.config = type("Config", (), {"max_new_tokens": 0})()


def test_the_size_that_fitted_is_kept_for_the_units_that_follow() -> None:
    told: list[Any] = []
    notes: list[Any] = []
    experiment = Experiment(3)
    parts = Halving(Ready(20), experiment, lambda kind, **fields: notes.append((kind, fields["rows"])))  # type: ignore[arg-type]
    first = parts.work({"rows": list(range(10))}, told.append)
    second = parts.work({"rows": list(range(10, 16))}, None)
    assert first.tables["samples"]["row"].tolist() == list(range(10))
    assert [len(t) for t in experiment.tried] == [10, 5, 2, 2, 2, 2, 2, 2, 2, 2]
    assert first.facts == {"roads": list(range(10)), "one_pass": True, "n": 2, "parts": 5, "halved_rows": [10, 5]}
    assert second.facts["roads"] == list(range(10, 16))
    assert "halved_rows" not in second.facts
    assert notes == [("halved", 10), ("halved", 5)]
    assert [t["row"].tolist() for t in told] == [[0, 1]]


def test_a_unit_without_parts_is_an_error_at_once() -> None:
    experiment = Experiment(3)
    experiment.rows_of = lambda unit: ()  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="which have to go together") as raised:
        Halving(Ready(4), experiment).work({"rows": [0, 1, 2, 3]})  # type: ignore[arg-type]
    assert isinstance(raised.value.__cause__, MemoryError)
    assert len(experiment.tried) == 1


def test_facts_that_differ_are_all_kept() -> None:
    parts = [Produced({}, facts={"deviation": 0.1, "same": 1}), Produced({}, facts={"deviation": 0.2, "same": 1})]
    assert joined(parts).facts == {"deviation": [0.1, 0.2], "same": 1}


def test_a_plan_says_what_is_needed_and_what_is_free(llama: Any, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = dp.plan(llama, texts, perturb="alpha=0.1", max_new_tokens=4, measure=False)
    assert cost.weight_bytes == weight_bytes(llama)
    assert cost.rows_at_once == len(texts)
    monkeypatch.setattr(_memory, "free_memory", lambda device: int(cost.memory_bytes / 2))
    short = dp.plan(llama, texts, perturb="alpha=0.1", max_new_tokens=4, measure=False)
    assert short.free_bytes == int(cost.memory_bytes / 2)
    assert short.rows_at_once == 2  # four fifths of what is free


def test_the_count_of_a_row_grows_with_the_model() -> None:
    small, large = tiny_llama(dim=32), tiny_llama(dim=64)
    assert row_bytes(large, 10) > row_bytes(small, 10)
    assert row_bytes(small, 10, generated=True) > row_bytes(small, 10)
    assert rows_that_fit(8, 1000, 10_000) == 8
    assert rows_that_fit(8, 1000, 5000) == 4


def test_workers_share_what_is_free_and_what_waits_for_the_disk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_llama()
    each = row_bytes(subject, 10)
    monkeypatch.setattr(_memory, "free_memory", lambda device: int(8.5 * each / 0.8))
    assert [rows_fitting(subject, 99, 10, sharers=n) for n in (1, 2, 4, 16)] == [8, 4, 2, 1]
    kept = each / 10 / 4  # four finished units of it are as much as one row that is done
    assert [rows_fitting(subject, 99, 10, kept=kept, sharers=n) for n in (1, 2)] == [4, 2]


def test_what_waits_on_the_cpu_does_not_fill_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_llama()
    each, device = row_bytes(subject, 10), torch.device("cuda:0")
    there = type("There", (), {"device": device, "__getattr__": lambda _, name: getattr(subject, name)})()
    rooms = {"cuda": int(6.5 * each / 0.8), "cpu": int(3.5 * each / 0.8)}
    monkeypatch.setattr(_memory, "free_memory", lambda place: rooms[torch.device(place).type])
    assert rows_fitting(there, 99, 10) == 6
    assert rows_fitting(there, 99, 10, kept=each / 10 / 4) == 3


def test_the_tables_of_a_unit_are_counted_for_the_next_ones() -> None:
    parts = Halving(Ready(6), Experiment(99))  # type: ignore[arg-type]
    parts.work({"rows": [0, 1, 2]})
    index_and_column = 8 * 3 + pd.RangeIndex(3).memory_usage()
    assert parts.kept == index_and_column / 9  # three rows of three tokens


def test_states_that_wait_are_counted_before_the_run(llama: Any, texts: Any, tmp_path: Path) -> None:
    done = dp.run(llama, texts, perturb="alpha=0.3", states=True, where="layers=1", max_new_tokens=2, out=tmp_path)
    plan = done.manifest.model_extra["memory_plan"]
    longest = max(map(len, done.prompts["token_ids"])) + 2
    arms, finished = 3, 4  # clean and both perturbed ones; made, being written, and two that wait
    assert plan["waiting_bytes"] == finished * arms * plan["rows"] * longest * llama.width * 4
    assert plan["sharers"] == 1


def test_what_is_free_is_what_the_machine_or_its_container_says(tmp_path: Path) -> None:
    free = free_memory("cpu")
    assert free is None or free > 2**20
    files = {"memory.max": "1000000", "memory.current": "600000", "memory.stat": "anon 5\ninactive_file 100000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _memory._container_memory(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max")
    assert _memory._container_memory(tmp_path) is None
