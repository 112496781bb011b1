"""The study of the attractor layer on the zoo's smallest model, end to end."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.controllers import AttractorLayer, attached
from dynprobe.errors import InterruptedRunError, UsageError
from dynprobe.protocols import AttractConfig, loop_gain
from dynprobe.protocols._arms import Text
from dynprobe.protocols._attract_arms import Condition, Sites, conditions_of
from dynprobe.protocols._attract_doses import DoseTexts, solve_doses
from dynprobe.protocols._attract_items import recall_items
from dynprobe.protocols._attract_rows import lens_words
from dynprobe.protocols._attract_summary import _breakdown, _share
from dynprobe.protocols._text_measures import distinct, longest_repeat
from dynprobe.runs import open_run

PROMPTS = (
    "The old man walked down the road to the sea.", "She put the bread on the table and sat down.",
    "In the morning the king called all his men.",
)  # fmt: skip
SMALL = {"slots": [4], "burn_in": [8], "dose_texts": 2, "dose_tokens": 24, "largest": 16}
NEW = 20


@pytest.fixture(scope="module")
def subject(_own_cache):
    return dp.load("tiny-llama")


@pytest.fixture(scope="module")
def study(subject, tmp_path_factory):
    heard = []
    run = dp.attract(
        subject, PROMPTS, arms="layer,random,cache", doses="0.05,90", lengths="10,500", max_new_tokens=NEW,
        out=tmp_path_factory.mktemp("runs"), listener=heard.append, **SMALL,
    )  # fmt: skip
    return run, heard


def test_doses_come_first_and_are_met(study):
    run, heard = study
    stages = [p.stage for p in heard]
    assert stages.index("doses") < stages.index("batch")
    doses = {d["condition"]: d for d in run.summary["doses"]}
    layer = doses["layer@0.05"]
    assert layer["status"] == "solved"
    assert layer["kl"] == pytest.approx(0.05, rel=0.03)
    assert doses["random@0.05"]["strength"] == layer["strength"]
    assert doses["random@0.05"]["kl"] != layer["kl"]
    assert doses["none"]["kl"] == 0.0
    unreached = doses["layer@90"]
    assert (unreached["status"], unreached["largest"], unreached["kl"]) == ("unreached", 16, None)
    assert 0 < unreached["kl_largest"] < 90
    assert set(run.conditions["condition_id"]) == {"none", "none~sampled", "layer@0.05", "random@0.05", "cache"}
    fits = run.table("fits").set_index("condition_id")
    assert fits.loc["layer@0.05", "strength"] == layer["strength"]


def test_the_kl_of_a_dose_is_that_of_its_trials(study):
    run, _ = study
    trials = run.table("trials")
    layer = next(d for d in run.summary["doses"] if d["condition"] == "layer@0.05")
    last = trials[(trials["condition_id"] == "layer") & np.isclose(trials["alpha"], layer["strength"], rtol=1e-6)]
    assert last["n_tokens"].sum() == layer["n_tokens"]
    mean = np.average(last["kl_clean_pert"], weights=last["n_tokens"])
    assert mean == pytest.approx(layer["kl"], rel=1e-5)


def test_a_dose_is_what_the_layer_does_to_the_model(study, subject):
    """KL computed from bare logits alone, with the layer attached the way a user attaches it."""
    run, _ = study
    dose = next(d for d in run.summary["doses"] if d["condition"] == "layer@0.05")
    text = subject.tokenizer(PROMPTS[0])["input_ids"]
    new = dp.probes.generate(
        subject, dp.probes.make_batch(subject, [text], side="left"), dp.probes.Sampling(24, stop_at_eos=False)
    )[0]
    ids = torch.tensor([text + new[:-1]])
    layer = AttractorLayer(slots=4, burn_in=8, strength=dose["strength"])
    with torch.no_grad():
        bare = subject.model(ids).logits.double().log_softmax(-1)
        with layer.attach(subject):
            pushed = subject.model(ids).logits.double().log_softmax(-1)
    kl = (bare.exp() * (bare - pushed)).sum(-1)[0, 8:]
    trials = run.table("trials")
    prompt = run.prompts.set_index("text").loc[PROMPTS[0], "prompt_id"]
    mine = trials[(trials["prompt_id"] == prompt) & np.isclose(trials["alpha"], dose["strength"], rtol=1e-6)]
    row = mine[mine["condition_id"] == "layer"].iloc[0]
    assert row["n_tokens"] == len(kl)
    assert row["kl_clean_pert"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_every_text_is_as_long_as_asked_and_read_at_each_length(study):
    run, _ = study
    assert (run.samples["n_new"] == NEW).all()
    lengths = run.table("lengths")
    assert sorted(lengths["length"].unique()) == [10, NEW]  # 500 is cut at the largest that is written
    assert (lengths.groupby("sample_id", observed=True).size() == 2).all()
    tokens = run.table("tokens")
    for sample, rows in tokens.groupby("sample_id", observed=True):
        rows = rows.sort_values("pos")
        new = rows["target_id"].to_numpy()[int((rows["phase"] == "prefill").sum()) - 1 :].tolist()
        assert len(new) == NEW
        mine = lengths[lengths["sample_id"] == sample].set_index("length")
        for n in (10, NEW):
            assert mine.loc[n, "distinct_2"] == pytest.approx(distinct(new[:n], 2), abs=1e-6)
            assert mine.loc[n, "longest_repeat"] == longest_repeat(new[:n])
        emits = rows["nll_bare"].to_numpy()[-NEW:]
        assert mine.loc[NEW, "nll_bare"] == pytest.approx(emits.mean(), rel=1e-5)
        assert mine.loc[10, "nll_bare"] == pytest.approx(emits[:10].mean(), rel=1e-5)


def test_the_bare_arm_is_the_bare_model(study):
    run, _ = study
    rows = run.table("lengths").query("condition_id == 'none'")
    assert (rows["written"] == 0).all()
    assert rows["drift"].max() < 1e-3
    np.testing.assert_allclose(rows["nll"], rows["nll_bare"], atol=1e-4)


def test_an_item_does_not_know_the_item_before_it(study, subject):
    """A text of the study is the text that a freshly attached layer writes from that prompt alone."""
    run, _ = study
    strength = next(d for d in run.summary["doses"] if d["condition"] == "layer@0.05")["strength"]
    written = run.samples.set_index("sample_id")["text"]
    for prompt in run.prompts.itertuples():
        layer = AttractorLayer(slots=4, burn_in=8, strength=strength)
        ids = torch.tensor([list(prompt.token_ids)])
        with layer.attach(subject):
            out = subject.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
        text = subject.tokenizer.decode(out[0, ids.shape[1] :].tolist())
        assert written[f"{prompt.prompt_id}|layer@0.05|0"] == text


def test_slots_stand_for_every_token_and_agree_with_the_lengths(study):
    run, _ = study
    slots, lengths = run.table("slots"), run.table("lengths")
    assert set(slots["sample_id"].astype(str).str.split("|").str[1]) == {"layer@0.05"}
    samples = run.samples.set_index("sample_id")
    for sample, rows in slots.groupby("sample_id", observed=True):
        last = rows[rows["pos"] == rows["pos"].max()]
        assert rows["pos"].max() == samples.loc[sample, "n_fed"] - 1
        assert sorted(rows["pos"].unique()) == list(range(samples.loc[sample, "n_fed"]))
        whole = lengths[(lengths["sample_id"] == sample) & (lengths["length"] == NEW)].iloc[0]
        assert whole["n_live"] == len(last)
        assert whole["strength_total"] == pytest.approx(last["strength"].sum(), rel=1e-5)


def test_the_atlas_names_the_tokens_that_reinforced(study, subject):
    run, _ = study
    atlas, tokens = run.table("atlas"), run.table("tokens")
    assert (atlas["hits"] > 0).any()
    for row in atlas.itertuples():
        fed = tokens[tokens["sample_id"] == row.sample_id].sort_values("pos")["token_id"].tolist()
        text = subject.tokenizer.decode(fed)
        found = json.loads(row.tokens) if isinstance(row.tokens, str) else row.tokens
        contexts = json.loads(row.contexts) if isinstance(row.contexts, str) else row.contexts
        assert sum(count for _, count in found) == max(row.hits, 1)
        for context in contexts:
            assert context.replace("⟦", "").replace("⟧", "") in text


def test_lens_words_are_those_of_the_unembedding(subject):
    """Of an RMS-normed model the odd part of the tail is W·(γ ⊙ v) up to a positive factor."""
    v = torch.randn(128, generator=torch.Generator().manual_seed(0))
    up, down = lens_words(subject, [v.numpy()])[0]
    model = subject.model
    logits = model.lm_head.weight.detach() @ (model.model.norm.weight.detach() * v)
    words = [subject.tokenizer.decode([i]) for i in logits.topk(10).indices.tolist()]
    away = [subject.tokenizer.decode([i]) for i in (-logits).topk(10).indices.tolist()]
    assert up == words
    assert down == away


def test_attention_on_the_prompt_is_that_of_the_eager_model(study, subject):
    run, _ = study
    prompt = run.prompts.iloc[0]
    tokens = run.table("tokens")
    rows = tokens[tokens["sample_id"] == f"{prompt.prompt_id}|none|0"].sort_values("pos")
    ids = torch.tensor([rows["token_id"].tolist()])
    n = len(prompt.token_ids)
    subject.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = torch.stack(subject.model(ids, output_attentions=True).attentions)[:, 0]
    finally:
        subject.model.set_attn_implementation("sdpa")
    mass = weights[..., :n].sum(-1).mean((0, 1)).numpy()
    np.testing.assert_allclose(rows["attention_prompt"].to_numpy()[n:], mass[n:], atol=1e-5)
    assert rows["attention_prompt"].iloc[:n].isna().all()


def test_differences_are_paired_by_prompt(study):
    run, _ = study
    means = run.table("lengths").set_index(["condition_id", "length", "prompt_id"])["nll_bare"]
    entry = next(e for e in run.summary["lengths"] if e["condition"] == "layer@0.05" and e["length"] == NEW)
    change = (means["layer@0.05", NEW] - means["none", NEW]).mean()
    assert entry["nll_bare"]["difference"]["mean"] == pytest.approx(change, rel=1e-5)
    assert entry["nll_bare"]["difference"]["n"] == 3
    assert entry["nll_bare"]["difference"]["low"] <= change <= entry["nll_bare"]["difference"]["high"]


def test_the_same_call_finds_the_run(study, subject):
    run, _ = study
    again = dp.attract(
        subject, PROMPTS, arms="layer,random,cache", doses=[90, 0.05], lengths=[10, 500], max_new_tokens=NEW,
        out=run.path.parent, **SMALL,
    )  # fmt: skip
    assert again.path == run.path


def test_columns_are_described(study):
    columns = open_run(study[0].path).columns()
    ours = columns[columns["table"].isin(["lengths", "slots", "atlas", "trials"])]
    assert (ours["description"].fillna("") != "").all(), ours[ours["description"].fillna("") == ""]


def test_pictures_are_drawn(study, tmp_path):
    run, _ = study
    assert {file.name for file in (run.path / "figures").iterdir()} == {
        "lengths.png", "lengths.svg", "slots.png", "slots.svg"
    }  # fmt: skip
    figure = run.plot.lengths()
    line = figure.axes[0].get_lines()[0]
    bare = run.table("lengths").query("condition_id == 'none'").groupby("length")["repetition"].mean()
    np.testing.assert_allclose(line.get_ydata(), bare.to_numpy(), atol=1e-6)


def test_recall(subject, tmp_path):
    run = dp.attract(
        subject, task="recall", arms="layer,cache,phase2_leak", strengths="4", distances="20", limit=2,
        reset="item,never", out=tmp_path, **SMALL,
    )  # fmt: skip
    items = run.table("items").astype({"condition_id": str, "doc_id": str})
    assert set(items["condition_id"]) == {
        "none", "layer@eps4", "layer@eps4;reset=never", "cache", "phase2_leak", "phase2_leak;reset=never",
    }  # fmt: skip
    by = items.pivot(index="doc_id", columns="condition_id", values="choice_margin")
    first = sorted(by.index)[0]
    # The first item of a session is asked from an empty memory, later ones are not.
    assert by.loc[first, "layer@eps4"] == by.loc[first, "layer@eps4;reset=never"]
    assert (by["layer@eps4"] != by["layer@eps4;reset=never"]).sum() >= 1
    leaks = [e for e in run.summary["items"] if "leak" in e]
    assert {e["condition"] for e in leaks if e["metric"] == "chose_right"} == {"layer@eps4;reset=never"}
    bare = next(e for e in run.summary["items"] if e["condition"] == "none" and e["metric"] == "chose_right")
    assert (bare["n"], bare["chance"]) == (2, 0.25)
    assert bare["low"] <= bare["accuracy"] <= bare["high"]


def test_a_distance_is_exact_and_every_name_is_right_equally_often(subject):
    config = AttractConfig.build(task="recall", distances=[10, 30], limit=8)
    items = recall_items(subject, config)
    near, far = items[:8], items[8:]
    assert {len(b.prompt.token_ids) - len(a.prompt.token_ids) for a, b in zip(near, far, strict=True)} == {20}
    assert sorted(a.answers[0] for a in near) == sorted(["Anna", "Peter", "Maria", "David"] * 2)
    for asked in items:
        text = subject.tokenizer.decode(list(asked.prompt.token_ids))
        role = text.rsplit("The name of the ", 1)[1].removesuffix(" is")
        assert f"The name of the {role} is {asked.answers[0]}." in text
        assert asked.choices[0] == f" {asked.answers[0]}"
        assert len(set(asked.choices)) == 4


def test_reading(subject, tmp_path):
    run = dp.attract(
        subject, task="reading", arms="none", stories="short", limit=1, max_new_tokens=8, strengths="1", out=tmp_path,
        **SMALL,
    )  # fmt: skip
    items = run.table("items")
    assert len(items) == 2
    assert set(items["task"].astype(str)) == {"reading.short"}
    assert items["chose_right"].isna().all()
    entry = run.summary["items"][0]
    assert (entry["right"], entry["n"]) == (int(items["correct"].sum()), 2)


def test_matching_kl_gives_every_arm_its_own_strength(subject):
    config = AttractConfig.build(arms="layer,constant", doses=[0.1], match="kl", attractor="centre=running", **SMALL)
    texts = [Text("a", tuple(range(40, 70)), tuple(range(60, 100)))]
    doses = solve_doses(
        DoseTexts(subject, Sites(subject, config), texts), conditions_of(config), match="kl", largest=64.0
    )
    by = {d.condition.condition_id: d for d in doses}
    for arm in ("layer@0.1", "constant@0.1"):
        assert by[arm].kl == pytest.approx(0.1, rel=0.03)
    assert by["layer@0.1"].condition.strength != by["constant@0.1"].condition.strength


def test_burn_in_that_outlasts_the_texts_is_refused(subject):
    config = AttractConfig.build(arms="layer", doses=[0.1], burn_in=[500], attractor="centre=running")
    texts = DoseTexts(subject, Sites(subject, config), [Text("a", (40, 41, 42), (43, 44, 45))])
    with pytest.raises(UsageError, match="burn_in=500"):
        solve_doses(texts, conditions_of(config), match="strength", largest=64.0)


def test_the_loop_through_the_states_is_open_and_closes_where_injections_are_stored(subject):
    """At one block nothing above it comes back, so with the text held fixed a kick calls for nothing at all."""
    settings = {"centre": "running", "theta": 0.5, "theta_read": 0.0, "burn_in": 4, "strength": 1.0, "slots": 4}
    texts = [list(range(40, 60)), list(range(50, 75))]
    kept = {"layers": 1, "horizon": 8, "samples": 1}
    pre = loop_gain(subject, AttractorLayer(**settings), texts, **kept)
    post = loop_gain(subject, AttractorLayer(**settings, observe="post"), texts, **kept)
    assert pre.states == 0.0
    assert math.isfinite(pre.response)
    idle = loop_gain(subject, AttractorLayer(**{**settings, "theta_read": 1.0}), texts, **kept)
    assert idle.reason == "no-injection"
    assert math.isnan(idle.gain)
    assert post.n == 2
    with pytest.raises(UsageError, match="one block"):
        loop_gain(subject, AttractorLayer(**settings), texts, **{**kept, "layers": "0+1"})
    with pytest.raises(UsageError, match="temperature"):
        loop_gain(subject, AttractorLayer(**settings), texts, temperature=0.0)


def test_a_grid_names_only_what_differs():
    config = AttractConfig.build(arms="layer", slots=[4, 8], half_life=[46], doses=[0.1], layers="25%,25%+50%")
    names = [c.condition_id for c in conditions_of(config)]
    assert names[:2] == ["none", "none~sampled"]
    assert names[2:] == [
        "layer@0.1;slots=4;layers=25%", "layer@0.1;slots=4;layers=25%+50%", "layer@0.1;slots=8;layers=25%",
        "layer@0.1;slots=8;layers=25%+50%",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arms": "leeky"}, "leaky"), ({"doses": "-1"}, "positive"), ({"arms": "constant"}, "--match kl"),
        ({"task": "generate", "reset": "never"}, "always start empty"), ({"stop_at_eos": True}, "one length"),
        ({"num_samples": 2}, "temperature"), ({"arms": "layer,phase2"}, "reading and recall"),
        ({"attractor": "slot=3"}, "slots"), ({"attractor": "preset=duality_v1", "arms": "layer,leaky"}, "query_mean"),
        ({"attractor": "burn=strength", "arms": "layer,cache"}, "number of tokens"), ({"dozes": 1}, "doses"),
    ],
)  # fmt: skip
def test_what_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        AttractConfig.build(**settings)


def test_long_repeats_against_every_pair():
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        tokens = rng.integers(0, 3, n).tolist()
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        slow = max((k for i, j in pairs for k in range(n - j + 1) if tokens[i : i + k] == tokens[j : j + k]), default=0)
        assert longest_repeat(tokens) == slow
    assert math.isnan(distinct([1], 2))


def _table(values, condition, nll=1.0):
    import pandas as pd

    return pd.DataFrame({
        "condition_id": condition, "prompt_id": [str(i) for i in range(len(values))], "length": 50,
        "repetition": values, "nll_bare": nll,
    })  # fmt: skip


def test_a_dose_breaks_down_where_more_than_half_of_its_texts_do():
    import pandas as pd

    from dynprobe.protocols._attract_doses import Dose

    config = AttractConfig.build(arms="layer", doses=[0.1, 1, 3])
    conditions = conditions_of(config)
    doses = [Dose(c, 0.1, "solved", 1.0, 0.1, 3, 9) for c in conditions]
    calm = [i / 20 for i in range(10)]  # largest 0.45
    table = pd.concat([
        _table(calm, "none", nll=0.1), _table(calm, "none~sampled", nll=2.0),
        _table([0.4] * 10, "layer@0.1", nll=1.9),  # likelier than sampled texts, though not than greedy ones
        _table([0.5] * 5 + [0.1] * 5, "layer@1"),  # half is not more than half
        _table([0.5] * 5 + [0.1] * 5, "layer@3", nll=2.1),
    ])  # fmt: skip
    found = _breakdown(table, doses, (50,))
    assert found["limits"] == [{"length": 50, "repetition": 0.45, "nll_bare": 2.0}]
    assert {s["condition"]: s["broken"] for s in found["shares"]} == {
        "none": 0, "none~sampled": 0, "layer@0.1": 0, "layer@1": 5, "layer@3": 10
    }  # fmt: skip
    (verdict,) = found["verdicts"]
    assert (verdict["breaks"], verdict["dose"]) == (True, 3.0)
    assert found["reason"] is None
    fewer = _breakdown(table[table["condition_id"] != "layer@3"], doses[:-1], (50,))
    assert (fewer["verdicts"][0]["breaks"], fewer["verdicts"][0]["dose"]) == (False, 1.0)
    assert _share(_table([math.nan, 0.9], "x"), {"repetition": 0.5, "nll_bare": 2.0})["missing"] == 1


def test_arms_stand_for_themselves(subject):
    """Every controller of an arm is the baseline of that name, with the study's seed and settings."""
    config = AttractConfig.build(slots=[4], seed=7, attractor="centre=running")
    sites = Sites(subject, config)
    for condition in conditions_of(config):
        (one,) = sites.controllers(condition)
        assert one.id.startswith("attractor")
        if condition.arm in ("constant", "random"):
            assert one.seed == 7
        if condition.arm == "hopfield":
            assert one.settings.read == "hopfield"
    pushed = Condition("constant", config.cells[0], 1.0, strength=1.0)
    ids = torch.tensor([[40 + i for i in range(40)]])
    with torch.no_grad(), attached(sites.controllers(pushed), subject):
        a = subject.model(ids).logits
    other = Sites(subject, AttractConfig.build(slots=[4], seed=8, attractor="centre=running"))
    with torch.no_grad(), attached(other.controllers(pushed), subject):
        b = subject.model(ids).logits
    assert not torch.equal(a, b)


@pytest.mark.parametrize("stage", ["doses", "batch"])
def test_an_interrupted_study_goes_on_where_it_was(subject, tmp_path, stage):
    settings = {
        "arms": "layer", "doses": "0.05", "lengths": "8", "max_new_tokens": 8, "batch_size": 1, "slots": [4],
        "burn_in": [8], "dose_texts": 1, "dose_tokens": 16,
    }  # fmt: skip
    whole = dp.attract(subject, PROMPTS[:2], out=tmp_path / "whole", **settings)

    def stop(progress):
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        dp.attract(subject, PROMPTS[:2], out=tmp_path / "parts", listener=stop, **settings)
    (folder,) = (tmp_path / "parts").iterdir()
    assert dp.open(folder).status == "interrupted"
    done = dp.attract(subject, PROMPTS[:2], out=tmp_path / "parts", **settings)
    assert (done.path, done.status) == (folder, "complete")
    for name in ("samples", "tokens", "lengths", "slots", "fits", "trials"):
        one, other = (run.table(name).astype(str) for run in (whole, done))
        order = list(one.columns)
        one, other = (table.sort_values(order).reset_index(drop=True) for table in (one, other))
        pd.testing.assert_frame_equal(one, other)
    told = [{k: v for k, v in json.loads(json.dumps(run.summary)).items() if k != "seconds"} for run in (whole, done)]
    assert told[0] == told[1]
    # Another study of the same prompts is another folder, finished or not.
    assert dp.attract(subject, PROMPTS[:2], out=tmp_path / "parts", **{**settings, "slots": [5]}).path != folder


def test_the_residual_site_of_the_zoo_s_cem(tmp_path):
    cem = dp.load("tiny-cem")
    run = dp.attract(
        cem, PROMPTS[:2], arms="layer", doses="0.05", attractor="site=residual,read=field,layers=50%", lengths="8",
        max_new_tokens=8, out=tmp_path, **SMALL,
    )  # fmt: skip
    (dose,) = (d for d in run.summary["doses"] if d["condition"] == "layer@0.05")
    assert dose["status"] == "solved"
    assert run.summary["sites"][0]["site"].startswith("resid_post.")
    assert (run.table("slots")["strength"] > 0).all()
    ids = torch.tensor([cem.tokenizer(PROMPTS[0])["input_ids"]])
    layer = AttractorLayer(site="residual", slots=4, burn_in=8, strength=dose["strength"])
    with torch.no_grad():
        bare = cem.model(ids).logits
        with layer.attach(cem) as handle:
            pushed = cem.model(ids).logits
        assert torch.equal(pushed[:, :8], bare[:, :8])
        assert not torch.equal(pushed, bare)
        with AttractorLayer(site="residual", slots=4, burn_in=8, gate=0.0).attach(cem):
            assert torch.equal(cem.model(ids).logits, bare)
        assert torch.equal(cem.model(ids).logits, bare)
    assert next(iter(handle.states.values()))["n"].tolist() == [ids.shape[1]]


def test_texts_are_judged_alike_however_many_at_once(subject, monkeypatch):
    from dynprobe.protocols import _attract_rows
    from dynprobe.protocols._arms import Text, forced

    texts = [Text(str(i), tuple(subject.tokenizer(p).input_ids), tuple(range(70, 76))) for i, p in enumerate(PROMPTS)]
    whole = forced(subject, texts, side="left", which=())
    for room in (1, 4 * subject.vocab_size * whole.mask.shape[1] * 2, 2**30):
        monkeypatch.setattr(_attract_rows, "_LOGIT_BYTES", room)
        nll, last = _attract_rows.judged(subject, texts, whole.mask)
        kept = whole.mask.numpy()
        np.testing.assert_allclose(nll[kept], whole.outputs["nll"][kept], rtol=0, atol=1e-5)
        torch.testing.assert_close(last[whole.mask], whole.tape.states[-1][whole.mask], rtol=1e-4, atol=1e-4)
