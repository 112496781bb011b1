"""What another package adds: found lazily, never in the place of something of ours, and recorded where it was used."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dynprobe as dp
from dynprobe import metrics
from dynprobe._plugins import GROUPS, own, statuses
from dynprobe.cli import main
from dynprobe.errors import MetricError, PluginError, RunFolderError, SpecError, UsageError
from dynprobe.probes import Perturb
from dynprobe.protocols import _panel_work
from dynprobe.protocols._calibrate import _key
from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._evaluate_config import EvaluateConfig
from dynprobe.protocols._plugins_used import plugins_used
from dynprobe.protocols._selfchecks import _cache_file
from dynprobe.runs import RunWriter

#: A metric, a scale and a mode in one file.
TEXT = """
    import numpy as np
    from dynprobe.controllers import Controller
    from dynprobe.metrics import MetricSpec, trajectory_metric
    from dynprobe.probes import NoiseScale

    REACH = trajectory_metric(
        MetricSpec(
            id="acme.reach/1", sentence="Distance from the first depth to the last.", formula="mean_n |x_D - x_0|",
            input="trajectory[depth,unit,dim]", value_range="[0, ∞)", unit="model units",
            invariances=frozenset({"R", "P", "shift"}), source="Acme", column="acme_reach",
            levels={"sample": "mean over units"}, vectors=("0, 3e1 -> 3",),
        ),
        lambda x, ok: float(np.linalg.norm(x[-1] - x[0], axis=-1)[ok[0] & ok[-1]].mean()),
    )

    def update(h, eps, alpha, stats):
        return alpha * h.abs().amax(-1, keepdim=True) * eps

    PEAK = NoiseScale(
        name="peak", meaning="α is in largest coordinates of each state", unit="largest coordinates", update=update,
        equivariances=frozenset("S"),
    )

    class Halve(Controller):
        writes = "layers=1"

        def act(self, state, site, seen, memory):
            return 0.5 * state if seen.decoding else state
"""
POINTS = {
    "dynprobe.metrics": {"acme.reach": "of_acme:REACH"},
    "dynprobe.scales": {"peak": "of_acme:PEAK"},
    "dynprobe.controllers": {"halve": "of_acme:Halve"},
}
QUICK: dict[str, Any] = {"max_new_tokens": 4, "perturb": "alpha=0.1,scale=peak", "metrics": ("acme.reach/1",)}
PROMPTS = ["The sky is blue", "A small dog runs"]


def test_every_group_has_its_registry():
    for group, where in GROUPS.items():
        assert own(where).group == group
        for name in own(where).builtin if group != "dynprobe.metrics" else ():
            assert own(where)[name] is not None


def test_nothing_is_imported_before_its_name_is_asked_for(package):
    package("acme", POINTS, of_acme="raise AssertionError('imported')")
    assert "peak" in own(GROUPS["dynprobe.scales"]).names()
    assert str(Perturb.parse("alpha=0.1,scale=mad"))
    metrics.requested(["id.twonn/1"])
    assert "of_acme" not in sys.modules


def test_what_is_broken_says_who_and_what_to_type(package):
    package("acme", POINTS, of_acme="raise OSError('no such thing')")
    for ask in (
        lambda: Perturb.parse("alpha=0.1,scale=peak"), lambda: metrics.spec("acme.reach/1"),
        lambda: dp.controllers.recovery.make_mode("halve", None),
    ):  # fmt: skip
        with pytest.raises(PluginError, match=r"of acme 1\.0 \(.*of_acme:.*OSError: no such thing.*pip uninstall acme"):
            ask()
    with pytest.warns(UserWarning, match=r"left out: the metric 'acme\.reach' of acme 1\.0") as seen:
        known = metrics.ids() + metrics.ids()
    assert "kappa.phase/1" in known
    assert len([w for w in seen if "acme" in str(w.message)]) == 1
    assert "\n" not in str(seen[0].message)


@pytest.mark.parametrize(
    ("group", "value", "why"),
    [
        ("dynprobe.metrics", "of_acme:PEAK", "not a dynprobe.metrics.Metric"),
        ("dynprobe.metrics", "of_acme:REACH", r"is not thing\.x/MAJOR"),
        ("dynprobe.scales", "of_acme:REACH", "not a dynprobe.probes.NoiseScale"),
        ("dynprobe.scales", "of_acme:PEAK", "calls itself 'peak'"),
        ("dynprobe.scales", "of_acme:ABSENT", "AttributeError"),
        ("dynprobe.controllers", "of_acme:np", "neither a Mode nor"),
        ("dynprobe.adapters", "of_acme:PEAK", "not a function"),
        ("dynprobe.exporters", "of_acme:PEAK", r"not a dynprobe\.runs\.Format"),
        ("dynprobe.engines", "of_acme:Halve", "not a subclass of dynprobe.engines.Engine"),
    ],
)
def test_what_is_no_such_thing_is_refused(package, group, value, why):
    name = "thing.x" if group == "dynprobe.metrics" else "thing"
    package("acme", {group: {name: value}}, of_acme=TEXT)
    with pytest.raises(PluginError, match=why):
        own(GROUPS[group])[name]


def test_a_column_of_ours_is_not_taken(package):
    package("acme", POINTS, of_acme=TEXT.replace('column="acme_reach"', 'column="kappa_phase"'))
    with pytest.raises(PluginError, match=r"'kappa_phase' is that of kappa\.phase/1"):
        metrics.spec("acme.reach/1")


@pytest.mark.parametrize(
    ("group", "name"),
    [("dynprobe.scales", "relnorm"), ("dynprobe.metrics", "kappa.phase"), ("dynprobe.engines", "local")],
)
def test_a_name_of_ours_is_never_shadowed(package, group, name):
    registry = own(GROUPS[group])
    before = registry.names()
    package("acme", {group: {name: "of_acme:PEAK"}}, of_acme=TEXT)
    assert registry.names() == before
    assert registry.plugin(name) is None
    (status,) = statuses()
    assert "has a name of dynprobe's own, which is not replaced" in status.error
    assert dp.Perturb(alpha=0.1).noise_scale.name == "relnorm"
    assert metrics.spec("kappa.phase/1").column == "kappa_phase"


def test_a_name_of_two_packages_is_neithers(package):
    package("acme", POINTS, of_acme=TEXT)
    package("bolt", {"dynprobe.scales": {"peak": "of_bolt:PEAK"}}, "2.0", of_bolt=TEXT)
    with pytest.raises(PluginError, match=r"is in acme 1\.0 and in bolt 2\.0"):
        Perturb(alpha=0.1, scale="peak")
    with pytest.raises(SpecError, match=r"unknown scale 'peek'; known: relnorm, [a-z, ]*isokl"):
        Perturb.parse("alpha=0.1,scale=peek")


def test_near_misses_know_them(package):
    package("acme", POINTS, of_acme=TEXT)
    with pytest.raises(SpecError, match="Did you mean 'peak'"):
        Perturb.parse("alpha=0.1,scale=paek")
    with pytest.raises(UsageError, match="Did you mean 'halve'"):
        dp.controllers.recovery.mode_name("halv")
    with pytest.raises(MetricError, match=r"Unknown metric 'acme\.reach/2'"):
        metrics.spec("acme.reach/2")


def test_a_run_uses_and_records_them(package, tmp_path):
    package("acme", POINTS, of_acme=TEXT)
    run = dp.run("tiny-llama", PROMPTS, **QUICK, out=str(tmp_path))
    assert run.manifest.plugins == [
        {"group": "dynprobe.metrics", "name": "acme.reach", "package": "acme", "version": "1.0"},
        {"group": "dynprobe.scales", "name": "peak", "package": "acme", "version": "1.0"},
    ]
    assert run.manifest.scales == {
        "peak": {"meaning": "α is in largest coordinates of each state", "unit": "largest coordinates"}
    }
    measured = run.samples[run.samples["condition_id"] != "sham"]
    assert np.isfinite(measured["acme_reach"].to_numpy(float)).all()
    facts = run.columns().query("table == 'samples' and column == 'acme_reach'").iloc[0]
    assert (facts["id"], facts["digest"]) == ("acme.reach/1", metrics.spec("acme.reach/1").digest)
    perturbed = run.samples[run.samples["condition_id"] == "perturbed.forced"]
    assert (perturbed["acme_reach_d"] != 0).all()
    assert (perturbed["alpha_relnorm"] > 0).all()
    assert (
        "largest coordinates of each state"
        in subprocess.run(  # where it is not installed
            [sys.executable, "-m", "dynprobe", "show", str(run.path)], capture_output=True, text=True, check=True
        ).stdout
    )


def test_a_run_without_them_says_nothing_of_them(package, tmp_path):
    package("acme", POINTS, of_acme=TEXT)
    run = dp.run("tiny-llama", PROMPTS[:1], max_new_tokens=0, out=str(tmp_path))
    assert run.manifest.plugins is None


def test_another_version_goes_on_only_with_force(package, tmp_path, monkeypatch):
    package("acme", POINTS, of_acme=TEXT)
    monkeypatch.setattr(RunWriter, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(dp.errors.InterruptedRunError):
        dp.run("tiny-llama", PROMPTS, **QUICK, out=str(tmp_path))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    (tmp_path / "site-packages" / "acme-1.0.dist-info").rename(tmp_path / "gone")
    package("acme", POINTS, "1.1", of_acme=TEXT)
    with pytest.raises(
        RunFolderError, match=r"by dynprobe \S+ with acme 1\.0, and this is dynprobe \S+ with acme 1\.1"
    ):
        dp.run("tiny-llama", PROMPTS, **QUICK, out=str(tmp_path))
    run = dp.run("tiny-llama", PROMPTS, **QUICK, out=str(tmp_path), force=True)
    assert run.status == "complete"
    assert run.manifest.continuations[-1]["forced"] is True


def _another_version(package, tmp_path, points=POINTS, text=TEXT, *, was="1.0", now="1.1"):
    (tmp_path / "site-packages" / f"acme-{was}.dist-info").rename(tmp_path / f"gone-{was}")
    package("acme", points, now, of_acme=text)


def test_a_finished_run_of_another_version_says_so(package, tmp_path):
    package("acme", POINTS, of_acme=TEXT)
    asked = {**QUICK, "max_new_tokens": 0, "out": str(tmp_path / "runs")}
    first = dp.run("tiny-llama", PROMPTS[:1], **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dp.run("tiny-llama", PROMPTS[:1], **asked).path == first.path
    _another_version(package, tmp_path)
    with pytest.warns(UserWarning, match=r"was made with acme 1\.0, and this is acme 1\.1: these are the numbers"):
        assert dp.run("tiny-llama", PROMPTS[:1], **asked).path == first.path


def test_the_cells_of_a_panel_are_of_one_version(package, tmp_path, monkeypatch):
    package("acme", POINTS, of_acme=TEXT)
    asked = {
        "models": ["panel/llama-depth2-width32-seed0"], "categories": ["factual"], "prompts_per_category": 2,
        "alphas": [0, 0.2], "perturb": "layers=50%,scale=peak", "metrics": ["acme.reach/1"], "max_new_tokens": 0,
        "decompose": ["nll"], "n_boot": 10, "n_permutations": 9, "out": str(tmp_path / "panels"),
    }  # fmt: skip
    run, calls = _panel_work.run, []

    def stopping(*given, **settings):
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(_panel_work, "run", stopping)
        with pytest.raises(dp.errors.InterruptedRunError):
            dp.panel(**asked)
    _another_version(package, tmp_path)
    with pytest.raises(
        RunFolderError, match=r"was begun with acme 1\.0, and this is acme 1\.1: its numbers may differ"
    ):
        dp.panel(**asked)
    done = dp.panel(**asked, force=True)
    assert {p["version"] for p in done.manifest["plugins"]} == {"1.1"}
    record = done.path / "panel.json"
    kept = record.read_text()
    record.write_text(json.dumps({**json.loads(kept), "plugins": [{"group": "dynprobe.scales"}]}))
    with pytest.raises(RunFolderError, match=r"panel\.json is damaged: plugins"):
        dp.panel(done.path)
    record.write_text(kept)
    _another_version(package, tmp_path, was="1.1", now="1.2")
    with pytest.warns(UserWarning, match=r"was made with acme 1\.1, and this is acme 1\.2"):
        assert dp.panel(done.path).path == done.path


ADAPTER = {"dynprobe.adapters": {"llama": "of_acme:blocks"}}
BLOCKS = """
    def blocks(model):
        return "model.layers.*"
"""


def test_what_is_kept_of_a_model_is_of_one_adapter(package, tmp_path):
    def kept():
        subject = dp.load("tiny-llama")
        return _cache_file(subject).name, _key(subject, [], [], [])

    file, key = kept()
    assert "adapter" not in key
    package("acme", ADAPTER, of_acme=BLOCKS)
    first_file, first_key = kept()
    _another_version(package, tmp_path, ADAPTER, BLOCKS)
    second_file, second_key = kept()
    assert len({file, first_file, second_file}) == 3
    assert {k: v for k, v in second_key.items() if k != "adapter"} == key
    assert (first_key["adapter"]["version"], second_key["adapter"]["version"]) == ("1.0", "1.1")


def test_a_mode_in_another_loop_is_recorded(package):
    package("acme", {"dynprobe.controllers": {"brake": "of_acme:BRAKE"}}, of_acme="""
        from dynprobe.controllers.recovery import Mode, Recovery, Slerp
        BRAKE = Mode(lambda timing, site=None, **_: Recovery(timing(), Slerp(), site=site))
    """)  # fmt: skip
    config = EvaluateConfig.build(
        model="tiny-llama", tasks=("x",), controllers=("attractor:slots=16", "recover:brake,timing=always,gain=0.25")
    )
    assert [p["name"] for p in plugins_used(config, [], dp.load("tiny-llama"))] == ["brake"]


def test_a_study_of_dissociation_imports_those_that_it_names(package):
    package("acme", POINTS, of_acme=TEXT)
    assert DissociateConfig.build(model="tiny-llama", dynamic="kappa_geom").dynamic == "kappa_geom"
    assert "of_acme" not in sys.modules
    assert DissociateConfig.build(model="tiny-llama", dynamic="acme.reach/1").dynamic == "acme_reach"


@pytest.mark.slow
def test_workers_find_them(package, tmp_path):
    package("acme", POINTS, of_acme=TEXT)
    here = dp.run("tiny-llama", PROMPTS, **QUICK, out=str(tmp_path / "a"))
    there = dp.run("tiny-llama", PROMPTS, **QUICK, out=str(tmp_path / "b"), workers=2)
    files = [sorted((run.path / "samples").glob("*.parquet")) for run in (here, there)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert here.manifest.plugins == there.manifest.plugins


def test_a_mode_in_a_study(package, tmp_path):
    package("acme", POINTS, of_acme=TEXT)
    study = dp.recover(
        "tiny-llama", PROMPTS[:1], perturb="alpha=0.3", mode="halve", decode="forced", timings="always",
        max_new_tokens=6, out=str(tmp_path),
    )  # fmt: skip
    assert [p["name"] for p in study.manifest.plugins or ()] == ["halve"]
    assert study.samples["condition_id"].str.contains("halve").any()


def test_the_command_lists_them(package, capsys):
    package("acme", POINTS, of_acme=TEXT)
    assert main(["plugins"]) == 0
    printed = capsys.readouterr().out
    assert "acme.reach" in printed
    assert "acme 1.0" in printed
    package("bolt", {"dynprobe.scales": {"flat": "of_bolt:ABSENT"}}, of_bolt=TEXT)
    assert main(["plugins", "--json"]) == 1
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["peak"]["error"] is None
    assert "AttributeError" in found["flat"]["error"]
    assert main(["metrics", "acme.reach/1"]) == 0
    assert "Distance from the first depth" in capsys.readouterr().out


def test_without_any_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr("dynprobe._plugins.plugins", lambda group: ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert statuses() == []
        assert main(["plugins"]) == 0
        assert "docs/extending.md" in capsys.readouterr().out


def test_help_reads_no_metadata():
    code = (
        "import importlib.metadata as m\nm.entry_points = None\nfrom dynprobe.cli import main\n"
        "assert main(['--help']) == 0\nimport sys\nassert 'dynprobe._plugins' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1])
