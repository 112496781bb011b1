"""The numbers behind the pictures, against slow ones; the static pictures; and the page in a real browser."""

import json
import os
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dynprobe.errors import RunFolderError, UsageError
from dynprobe.metrics.statistics import mean_interval
from dynprobe.runs import RunWriter, open_run, report
from dynprobe.runs._curves import curve, profile_numbers, regime_numbers, shown_conditions
from dynprobe.runs._pca import pca_numbers
from dynprobe.runs._token_map import token_map

PROMPTS = ("p0", "p1", "p2", "p3")
ARMS = {"clean": "clean", "perturbed.forced": "perturbed", "perturbed.free": "perturbed"}
N_PROMPT, N_NEW, DEPTHS, DIM = 3, 2, 4, 6
TOKENS = {"p0": ["<b>", " x", "</script>"], "p1": ["a", "b", "c"], "p2": ["a", "$b$", "c"], "p3": ["a", "b", "d"]}


def number(*key):
    return float(np.random.default_rng([ord(c) for c in "|".join(map(str, key))]).normal())


def made(
    out, *, texts=TOKENS, name="org/<script>alert(1)</script>", states=True, poison="plain", arms=ARMS, prompts=PROMPTS,
    new=None, versions="0.1.0", gap=None, **config,
):  # fmt: skip
    """A run; ``new`` are the texts of generated tokens, which runs of schema 1.0 did not store; at ``gap`` no angle."""
    writer = RunWriter.begin(
        out, ident="0123abcd", model_name=name, config={"perturb": ["alpha=0.1"], **config},
        columns={"nll": {"id": "output.nll/1", "unit": "nat", "digest": "aa", "span": "all", "aggregation": "mean"},
                 "kappa_phase": {"id": "kappa.phase/1", "unit": "half-turns", "digest": "bb", "span": "all"},
                 "norm": {"id": "resid.norm/1", "unit": "state", "digest": "cc", "span": "all"}},
        manifest_fields={
            "batch_plan": [0], "versions": {"dynprobe": versions},
            "command": ["dynprobe", "run", "--token", "hf_secretsecretsecret"],
            "self_tests": {
                "null": {"name": "null", "passed": False, "value": 0.5, "limit": 0.0, "unit": "max", "detail": {}}
            },
            "noise_floor": {"noise_floor": 1e-6},
        },
    )  # fmt: skip
    rows = [(f"{p}|{c}|0", p, c) for c in arms for p in prompts]
    samples = pd.DataFrame(rows, columns=["sample_id", "prompt_id", "condition_id"])
    samples = samples.assign(
        replicate=0, n_prompt=N_PROMPT, n_new=N_NEW, text=poison, status="ok",
        nll=np.array([number(s) for s in samples["sample_id"]], dtype=np.float32),
        limen_regime=["HIGH" if p in prompts[:2] else "LOW" for p in samples["prompt_id"]],
        reasons=['{"limen_ratio":"steps"}' if p == prompts[3] else None for p in samples["prompt_id"]],
    )  # fmt: skip
    ids = {t: i for i, t in enumerate(dict.fromkeys(t for ts in texts.values() for t in ts))}
    tokens = pd.DataFrame(
        [{"sample_id": s, "pos": i, "phase": "prefill", "target_id": 0, "nll": 1.0,
          "token_id": ids[texts[p][i]] if i < N_PROMPT else (1 if i == N_PROMPT else 999)}
         for s, p, _ in rows for i in range(N_PROMPT + N_NEW)]
    )  # fmt: skip
    if new is not None:
        tokens["token_text"] = [
            (texts[p][i] if i < N_PROMPT else new[i - N_PROMPT]) for _, p, _ in rows for i in range(N_PROMPT + N_NEW)
        ]
    depths = pd.DataFrame(
        [{"sample_id": s, "pos": i, "track": "resid", "depth": d, "layer": d - 1, "norm": 1.0 + d,
          "angle": np.nan if d == 0 or (s, i, d) == gap else abs(number(s, i, d))}
         for s, _, _ in rows for i in range(N_PROMPT + N_NEW) for d in range(DEPTHS)]
    )  # fmt: skip
    profiles = pd.DataFrame(
        [{"sample_id": s, "track": "resid", "depth": d, "norm": 1.0 + d,
          "kappa_phase": np.nan if d == 0 else number("k", s, d)}
         for s, _, _ in rows for d in range(DEPTHS)]
    )  # fmt: skip
    with writer:
        writer.write_table(
            "prompts",
            pd.DataFrame({"prompt_id": prompts, "text": ["".join(texts[p]) for p in prompts],
                          "category": ["x", "x", "y", "y"],
                          "token_ids": [[ids[t] for t in texts[p]] for p in prompts],
                          "token_texts": [pd.Series(texts[p]).to_json(orient="values") for p in prompts]}),
        )  # fmt: skip
        writer.write_table("conditions", pd.DataFrame({"condition_id": list(arms), "arm": list(arms.values())}))
        if states:
            keys = depths[["sample_id", "pos", "track", "depth", "layer"]]
            writer.write_states(0, keys, state_of(keys), "float32")
        writer.write_batch(0, {"samples": samples, "tokens": tokens, "depths": depths, "profiles": profiles})
        writer.finish({"conditions": {"clean": {"nll": {"mean": 0.5, "low": None, "high": 1.0, "n": 4}}}})
    return open_run(writer.folder)


def state_of(keys):
    """A long axis along depth, a short one along position, and position 0 far away from everything."""
    out = np.zeros((len(keys), DIM), dtype=np.float32)
    out[:, 1] = 10.0 * keys["depth"]
    out[:, 3] = keys["pos"]
    out[:, 5] = np.where(keys["pos"] == 0, 1e4, 0.0)
    return out


def slow_interval(values):
    """Expanded percentiles of a bootstrap, from the definition: prompts are drawn, and few of them widen the tails."""
    n, values = len(values), sorted(values)
    draws = [np.mean([values[i] for i in pick]) for pick in np.random.default_rng(0).integers(0, n, (2000, n))]
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))
    return [np.quantile(draws, tail, method="lower"), np.quantile(draws, 1 - tail, method="higher")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"))


def test_a_profile_is_the_mean_over_prompts_with_its_interval(run):
    found = profile_numbers(run, ["kappa_phase"], ["clean", "perturbed.forced", "perturbed.free"])
    for condition in ARMS:
        own = found[(found["measure"] == "kappa_phase") & (found["condition"] == condition)]
        assert list(own["depth"]) == [1, 2, 3]  # depth 0 has no step
        for _, row in own.iterrows():
            values = np.array(
                [np.float32(number("k", f"{p}|{condition}|0", int(row["depth"]))) for p in PROMPTS], dtype=float
            )
            assert row["mean"] == pytest.approx(values.mean(), rel=1e-12)
            assert [row["low"], row["high"]] == pytest.approx(slow_interval(values), rel=1e-12)
            assert row["n"] == 4


def test_only_a_given_text_is_paired(run):
    found = profile_numbers(run, ["kappa_phase"], list(ARMS))
    paired = found[found["measure"] == "kappa_phase_d"]
    assert set(paired["condition"]) == {"perturbed.forced"}
    values = [
        np.float32(number("k", f"{p}|perturbed.forced|0", 2)) - float(np.float32(number("k", f"{p}|clean|0", 2)))
        for p in PROMPTS
    ]
    assert paired.loc[paired["depth"] == 2, "mean"].item() == pytest.approx(np.mean(values), abs=1e-7)


def test_two_prompts_have_no_interval():
    found = curve(pd.DataFrame({3: [1.0, 2.0], 5: [np.nan, 4.0], 7: [np.nan, np.nan]}))
    assert list(found["x"]) == [3, 5]
    assert list(found["mean"]) == [1.5, 4.0]
    assert list(found["n"]) == [2, 1]
    assert found[["low", "high"]].isna().all(axis=None)


def test_the_map_holds_what_is_stored_and_labels_tokens(run):
    rows = token_map(run, ["p0"], ["clean"], ["angle"])
    assert len(rows) == (N_PROMPT + N_NEW) * DEPTHS
    cell = rows[(rows["pos"] == 2) & (rows["depth"] == 3)].iloc[0]
    assert cell["angle"] == np.float32(abs(number("p0|clean|0", 2, 3)))
    labels = rows.drop_duplicates("pos").set_index("pos")["token"]
    assert list(labels) == ["<b>", " x", "</script>", " x", "#999"]  # id 1 stands in a prompt, 999 in none
    assert list(rows.drop_duplicates("pos")["new"]) == [False, False, False, True, True]
    with pytest.raises(UsageError, match="no prompt 'p9'"):
        token_map(run, ["p9"], ["clean"], ["angle"])


def test_the_map_labels_generated_tokens_with_their_own_texts(tmp_path):
    run = made(tmp_path, new=["\n", None], states=False)
    rows = token_map(run, ["p0"], ["clean"], ["angle"]).drop_duplicates("pos")
    assert list(rows["token"]) == ["<b>", " x", "</script>", "\n", "#999"]  # without a text of its own, by its id
    labels = run.plot.heatmap_tokens("angle", prompt="p0", condition="clean").axes[0].get_xticklabels()
    assert [t.get_text() for t in labels] == ["<b>", "·x", "</script>", "⏎", "#999"]


def test_principal_components_leave_position_0_out_and_have_a_fixed_sign(run):
    rows, facts = pca_numbers(run)
    own = rows[(rows["prompt_id"] == "p0") & (rows["condition_id"] == "clean") & (rows["unit"] == "mean over tokens")]
    assert np.diff(own.sort_values("depth")["pc1"]) == pytest.approx([10.0] * 3, rel=1e-5)  # grows with the long axis
    assert own["n"].tolist() == [N_PROMPT + N_NEW - 1] * DEPTHS
    last = rows[(rows["prompt_id"] == "p0") & (rows["condition_id"] == "clean") & (rows["unit"] == "last prompt token")]
    assert abs(last["pc2"].iloc[0]) == pytest.approx(0.5, abs=1e-5)  # position 2 of 1 … 4, from their mean 2.5
    along, across = 125.0, 1.25  # variances of 10·depth and of positions 1 … 4
    assert facts["share1"] == pytest.approx(along / (along + across), abs=1e-4)


def test_without_states_there_is_no_plane(tmp_path):
    with pytest.raises(RunFolderError, match="--states"):
        pca_numbers(made(tmp_path, states=False))


def test_regimes_leave_out_remarked_ratios(run):
    found = regime_numbers(run)
    own = found[found["condition"] == "clean"].set_index("regime")
    assert own.loc["HIGH", "share"] == pytest.approx(2 / 3)
    assert own.loc["LOW", "count"] == 1
    assert set(own["n"]) == {3}


def test_clean_and_perturbed_conditions_come_before_controls(run):
    assert shown_conditions(run, "profiles", most=2) == (["clean", "perturbed.forced"], 3)


def test_the_static_map_draws_the_stored_cells(run, tmp_path):
    figure = run.plot.heatmap_tokens("angle", prompt="p2", condition="perturbed.forced", save=tmp_path / "map.svg")
    mesh = figure.axes[0].collections[0]
    cells = mesh.get_array().reshape(DEPTHS, N_PROMPT + N_NEW)
    assert cells.mask[0].all()
    assert float(cells[2, 1]) == pytest.approx(abs(number("p2|perturbed.forced|0", 1, 2)), rel=1e-6)
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels == ["a", "$b$", "c", "·x", "#999"]
    assert (tmp_path / "map.svg").stat().st_size > 1000
    with pytest.raises(UsageError, match="angle"):
        run.plot.heatmap_tokens("angel")


def test_the_static_plane_and_regimes_draw_their_numbers(run):
    rows, _ = pca_numbers(run)
    lines = {line.get_gid(): line for line in run.plot.pca("p1").axes[0].lines}
    assert set(lines) == set(ARMS)
    own = rows[(rows["prompt_id"] == "p1") & (rows["condition_id"] == "clean") & (rows["unit"] == "mean over tokens")]
    np.testing.assert_array_equal(lines["clean"].get_xdata(), own["pc1"])
    bars = run.plot.regimes().axes[0].containers
    assert [bar.get_width() for bar in bars[0]] == pytest.approx([2 / 3] * 3)
    with pytest.raises(UsageError, match="no states of prompt"):
        run.plot.pca("p7")


# ---- the page -------------------------------------------------------------------------------------------------------

POISON = "</script><script>window.hurt=1</script><img src=x onerror='window.hurt=1'>{{7*7}}\u2028"


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    return made(tmp_path_factory.mktemp("poisoned"), poison=POISON)


@pytest.fixture(scope="module")
def page(poisoned):
    return poisoned.report()


def test_the_page_lies_in_the_run_and_is_the_same_every_time(poisoned, page, tmp_path):
    assert page == poisoned.path.resolve() / "report.html"
    again = report(poisoned.path, out=tmp_path / "again.html")
    assert again.read_bytes() == page.read_bytes()
    assert not list(poisoned.path.glob(".tmp-*"))
    poisoned.verify()


def test_no_text_becomes_markup_and_no_secret_is_told(page):
    text = page.read_text(encoding="utf-8")
    before = text[: text.index('<script type="application/json"')]
    assert "<script" not in before
    assert "org/&lt;script&gt;alert(1)&lt;/script&gt;" in before
    assert "hf_secretsecretsecret" not in text
    assert "<script>window.hurt" not in text
    assert "[redacted]" in before
    assert "default-src &#39;none&#39;" in before
    assert not re.search(r"<(link|img|iframe|object)[^>]+(src|href)=.(http|//)", text)


def test_every_trace_is_one_that_plotly_knows(page):
    from plotly.graph_objects import Figure

    def plain(value):
        if isinstance(value, dict):
            return (
                [1.0]
                if set(value) & {"$", "$minus"}
                else {k: plain(v) for k, v in value.items() if not k.startswith("$")}
            )
        if isinstance(value, list):
            return [plain(v) for v in value]
        return "#123456" if isinstance(value, str) and value.startswith("var:") else value

    figures = data_of(page)["figures"]
    assert {f["key"] for f in figures} == {"run1-profiles", "run1-tokens", "run1-pca", "run1-regimes"}
    for figure in figures:
        for chart in figure["charts"]:
            Figure(data=plain(chart["traces"]), layout=plain(chart["layout"]))


def test_what_is_embedded_is_what_is_stored_and_what_is_cut_is_said(poisoned, page, tmp_path):
    frame = data_of(page)["frames"]["run1-samples"]
    columns = {c["name"]: c for c in frame["columns"]}
    stored = poisoned.samples["nll"].to_numpy()
    np.testing.assert_array_equal(np.array(columns["nll"]["values"], dtype=np.float32), stored)
    small = report(poisoned, out=tmp_path / "small.html", rows=100)
    frame = data_of(small)["frames"]["run1-tokens"]
    assert frame["rows"] < frame["total"] == len(ARMS) * len(PROMPTS) * (N_PROMPT + N_NEW) * DEPTHS
    assert "1 of 4 prompts are shown" in small.read_text()


def test_what_is_asked_wrongly_is_said(run, tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.html"):
        report(run, out=tmp_path / "page.pdf")
    with pytest.raises(UsageError, match="no folder"):
        report(run, out=tmp_path / "nowhere" / "page.html")
    with pytest.raises(UsageError, match="no run"):
        report([])
    with pytest.raises(RunFolderError):
        report(tmp_path)


def test_two_runs_are_compared_on_one_page(tmp_path, run):
    pytest.importorskip("duckdb")
    other = made(tmp_path, name="org/other")
    target = report([run, other], out=tmp_path / "both.html")
    content = data_of(target)
    assert "compare-profiles" in content["frames"]
    assert {"run1-profiles", "run2-profiles"} <= set(content["frames"])
    means = {c["name"]: c for c in content["frames"]["compare-means"]["columns"]}
    assert len(set(means["run"]["levels"])) == 2
    assert str(tmp_path) not in target.read_text()


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        why = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("DYNPROBE_REQUIRE_BROWSER") == "1":
            pytest.fail(why)
        pytest.skip(why)
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options, downloads = Options(), tmp_path_factory.mktemp("downloads")
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.add_experimental_option(
        "prefs",
        {
            "download.default_directory": str(downloads),
            "profile.default_content_setting_values.automatic_downloads": 1,
        },
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = Chrome(options=options, service=Service(driver))
    found.downloads = downloads
    found.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    found.execute_cdp_cmd("Network.enable", {})
    found.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    yield found
    found.quit()


def wait(browser, condition, seconds=60):
    until = time.time() + seconds
    while time.time() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


def unfolded(browser, selector):
    """Open what an element lies in, with the keyboard, and return the element."""
    found = browser.find_element("css selector", selector)
    around = browser.execute_script(
        """const found = [];
        for (let d = arguments[0].closest("details"); d; d = d.parentElement.closest("details")) found.unshift(d);
        return found""",
        found,
    )
    for details in around:
        if not details.get_property("open"):
            details.find_element("css selector", "summary").send_keys("\ue007")  # Enter
            assert details.get_property("open")
    return found


@pytest.fixture
def loaded(browser, page):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return browser


def test_the_page_loads_without_errors_network_or_foreign_scripts(loaded):
    assert [entry for entry in loaded.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in loaded.get_log("performance")]
    urls = {e["params"]["request"]["url"].split(":")[0] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert urls <= {"file", "data", "blob"}
    assert loaded.execute_script("return window.hurt") is None
    charts = loaded.execute_script(
        "return [...document.querySelectorAll('figure')].map(f => f.querySelectorAll('.main-svg').length)"
    )
    assert len(charts) == 4
    assert min(charts) >= 1
    assert loaded.execute_script("return document.querySelectorAll('.empty').length") == 0
    assert loaded.title.startswith("org/<script>alert(1)</script>")
    labels = loaded.execute_script(
        "return [...document.querySelectorAll('[data-figure=run1-tokens] .xtick text')].map(t => t.textContent)"
    )
    assert labels == ["<b>", "·x", "</script>", "·x", "#999"]


def test_three_numbers_on_the_page_are_those_of_the_parquet(loaded, poisoned):
    stored = poisoned.samples.astype({"sample_id": str, "prompt_id": str, "condition_id": str})
    rows = loaded.execute_script(
        """const t = document.querySelector('[data-table=run1-samples]');
        const at = [...t.querySelectorAll('th button')].map(b => b.firstChild.textContent);
        return [...t.querySelectorAll('tbody tr')].map(r => Object.fromEntries([...r.cells].map(
            (c, i) => [at[i], c.dataset.value ?? c.textContent])));"""
    )
    assert len(rows) == len(stored)
    for row in rows[:3]:
        own = stored[(stored["prompt_id"] == row["prompt"]) & (stored["condition_id"] == row["condition"])].iloc[0]
        assert np.float32(row["nll"]) == own["nll"]
    assert "</script>" in rows[0]["text"]
    drawn = loaded.execute_script(
        """const g = [...document.querySelectorAll('[data-figure=run1-profiles] .js-plotly-plot')];
        return g[0].data.filter(t => t.name === 'clean').map(t => [t.x, t.y])[0];"""
    )
    numbers = profile_numbers(poisoned, ["kappa_phase"], ["clean"])
    assert drawn[0] == [1, 2, 3]
    assert drawn[1] == pytest.approx(list(numbers["mean"]), rel=1e-15)
    cells = loaded.execute_script(
        "return document.querySelector('[data-figure=run1-tokens] .js-plotly-plot').data[0].z"
    )
    assert np.float32(cells[2][2]) == np.float32(abs(number("p0|clean|0", 2, 3)))


def test_sorting_and_filtering_work_by_keyboard(loaded):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    loaded.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    first = loaded.switch_to.active_element
    assert first.get_attribute("class") == "skip"
    assert loaded.execute_script("return getComputedStyle(arguments[0]).outlineStyle", first) == "solid"
    table = unfolded(loaded, "[data-table=run1-samples]")
    head = next(h for h in table.find_elements(By.TAG_NAME, "th") if h.text.startswith("nll"))
    column = table.find_elements(By.TAG_NAME, "th").index(head)

    def values():
        return [
            float(v)
            for v in loaded.execute_script(
                "return [...arguments[0].querySelectorAll('tbody tr')].map(r => r.cells[arguments[1]].dataset.value)",
                table,
                column,
            )
        ]

    button = head.find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(values())
    button.send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    table.find_element(By.CSS_SELECTOR, "select[data-column=condition_id]").send_keys("clean")
    assert len(values()) == len(PROMPTS)
    search = table.find_element(By.CSS_SELECTOR, "input[type=search]")
    search.send_keys("p2")
    assert len(values()) == 1
    assert "1–1 of 1 rows" in table.find_element(By.CSS_SELECTOR, "[data-count]").text
    search.send_keys(Keys.END, Keys.BACKSPACE, "9")
    assert values() == []


def test_a_choice_draws_other_rows(loaded):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    figure = loaded.find_element(By.CSS_SELECTOR, "[data-figure=run1-tokens]")
    Select(figure.find_element(By.CSS_SELECTOR, "select[data-column=prompt_id]")).select_by_visible_text("p3")
    Select(figure.find_element(By.CSS_SELECTOR, "select[data-column=condition_id]")).select_by_visible_text(
        "perturbed.free"
    )
    cells = loaded.execute_script("return arguments[0].querySelector('.js-plotly-plot').data[0].z", figure)
    assert np.float32(cells[1][4]) == np.float32(abs(number("p3|perturbed.free|0", 4, 2)))  # depth 0 has no angle
    Select(figure.find_element(By.CSS_SELECTOR, "select[data-column='@measure']")).select_by_index(1)
    cells = loaded.execute_script("return arguments[0].querySelector('.js-plotly-plot').data[0].z", figure)
    assert cells[3][0] == pytest.approx(np.log10(4.0))  # the norm is drawn on a logarithmic scale


def test_downloads_hold_the_numbers(loaded, poisoned):
    from selenium.webdriver.common.by import By

    for kind in ("csv", "json"):
        loaded.execute_script(
            "arguments[0].click()", loaded.find_element(By.CSS_SELECTOR, f"[data-{kind}=run1-profiles]")
        )
    file = loaded.downloads / "run1-profiles.csv"
    wait(loaded, lambda: file.exists() and (loaded.downloads / "run1-profiles.json").exists(), 20)
    found = pd.read_csv(file, float_precision="round_trip")
    expected = profile_numbers(poisoned, ["kappa_phase", "norm"], list(ARMS))
    np.testing.assert_array_equal(found["mean"], expected["mean"])
    np.testing.assert_array_equal(found["high"], expected["high"])
    content = json.loads((loaded.downloads / "run1-profiles.json").read_text())
    assert [r["mean"] for r in content["rows"]] == list(expected["mean"])


def test_a_downloaded_text_is_no_formula(browser, tmp_path):
    from selenium.webdriver.common.by import By

    texts = dict(
        TOKENS, p0=["=1+1", "|cmd", "!A0"], p1=["+", "1", "2"], p2=["@SUM", "(A1", ",2)"], p3=["-", "a", '"b"']
    )
    run = made(tmp_path, texts=texts, name="=HYPERLINK(1)", poison="=cmd|' /C calc'!A0", states=False)
    browser.get(run.report().as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    button = browser.find_element(By.CSS_SELECTOR, "[data-table=run1-prompts] [data-csv]")
    browser.execute_script("arguments[0].click()", button)
    file = browser.downloads / "run1-prompts.csv"
    wait(browser, file.exists, 20)
    found = pd.read_csv(file)
    assert list(found["text"]) == ["'=1+1|cmd!A0", "'+12", "'@SUM(A1,2)", '\'-a"b"']
    shown = browser.execute_script(
        "return [...document.querySelectorAll('[data-table=run1-prompts] tbody tr')].map(r => r.textContent)"
    )
    assert "=1+1|cmd!A0" in shown[0]
    assert "'=1+1" not in shown[0]


def test_themes_and_a_phone(loaded, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    def paper():
        return loaded.execute_script("return getComputedStyle(document.body).backgroundColor")

    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    loaded.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    wait(loaded, lambda: paper() == "rgb(20, 23, 28)", 5)
    theme = Select(loaded.find_element(By.ID, "theme"))
    theme.select_by_value("light")
    assert paper() == "rgb(255, 255, 255)"
    loaded.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
    theme.select_by_value("dark")
    assert paper() == "rgb(20, 23, 28)"
    ink = loaded.execute_script("return document.querySelector('.js-plotly-plot').layout.font.color")
    assert ink == "#e7eaee"
    theme.select_by_value("auto")
    loaded.save_screenshot(str(tmp_path / "desktop.png"))
    loaded.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    wait(
        loaded, lambda: loaded.execute_script("return document.querySelector('.js-plotly-plot').clientWidth") < 390, 10
    )
    wait(loaded, lambda: loaded.execute_script("return document.documentElement.scrollWidth") <= 390, 10)
    loaded.save_screenshot(str(tmp_path / "phone.png"))
    assert (tmp_path / "phone.png").stat().st_size > 5000


# ---- hostile values -------------------------------------------------------------------------------------------------

SCRIPT = "</script><script>alert(1)</script>"
IMAGE = '"><img src=x onerror=window.hurt=1>'
HOSTILE = (SCRIPT, IMAGE, "{{ 7*7 }} %{y} ${x}", "a\u2028b\u2029'\"`<!--")
HOSTILE_ARMS = {"clean": "clean", IMAGE: "perturbed", "'\"{{ 7*7 }}\u2028<b>": "perturbed", SCRIPT: SCRIPT}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    texts = {p: [SCRIPT, IMAGE, "{{ 7*7 }}"] for p in HOSTILE}
    return made(
        tmp_path_factory.mktemp("hostile"), texts=texts, name=f"{IMAGE}{SCRIPT}", poison=f"{SCRIPT}{IMAGE}\u2028'\"",
        arms=HOSTILE_ARMS, prompts=HOSTILE, new=["<i>\u2028", "'\"\x00"], versions=f"{SCRIPT}{IMAGE}",
        note=f"{IMAGE}{SCRIPT}",
    )  # fmt: skip


def test_hostile_values_are_shown_as_they_are_and_do_nothing(browser, hostile):
    from selenium.common.exceptions import NoAlertPresentException

    browser.get_log("browser")
    browser.get(hostile.report().as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    for opener in browser.find_elements("css selector", "details[data-numbers]"):
        browser.execute_script("arguments[0].open = true", opener)
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert browser.execute_script("return window.hurt") is None
    made_of = browser.execute_script(
        "return ['img', 'i', 'b', 'script'].map(tag => document.querySelectorAll(tag).length)"
    )
    assert made_of == [0, 0, 0, 3]  # the data, plotly, and the page's own script
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []

    def texts(selector):
        return browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector
        )

    assert texts("h1") == [f"{IMAGE}{SCRIPT}: run"]
    assert texts("[data-figure=run1-tokens] select[data-column=prompt_id] option") == list(HOSTILE)
    assert texts("[data-figure=run1-tokens] select[data-column=condition_id] option") == list(HOSTILE_ARMS)
    assert texts("[data-figure=run1-tokens] .xtick text") == [
        "</script><scr…", "\"><img·src=x·…", "{{·7*7·}}", "<i>\\u2028", "'\"\\x00",
    ]  # fmt: skip
    legend = set(texts("[data-figure=run1-profiles] .legendtext"))
    assert legend == {"clean", IMAGE, "'\"{{ 7*7 }}\u2028<b>", SCRIPT}
    assert set(texts("[data-figure=run1-regimes] .ytick text")) == legend
    cells = texts("[data-table=run1-samples] tbody td")
    assert {*HOSTILE, *HOSTILE_ARMS, f"{SCRIPT}{IMAGE}\u2028'\""} <= set(cells)
    assert {*HOSTILE} <= set(texts("[data-table=run1-prompts] tbody td"))
    provenance = texts("#run1-provenance dd")
    assert f"{SCRIPT}{IMAGE}" in provenance
    shown = json.loads(texts("#run1-provenance pre")[0])
    assert shown["note"] == f"{IMAGE}{SCRIPT}"


# ---- axes, strokes and intervals ------------------------------------------------------------------------------------


def test_what_is_counted_has_whole_ticks_and_a_logarithmic_axis_says_so(loaded):
    ticks = loaded.execute_script(
        """return [...document.querySelectorAll('[data-figure=run1-profiles] .xtick text'),
                   ...document.querySelectorAll('[data-figure=run1-tokens] .ytick text')].map(t => t.textContent)"""
    )
    assert len(ticks) > 8
    assert [t for t in ticks if not re.fullmatch(r"\d+", t)] == []
    titles = loaded.execute_script(
        """return [...document.querySelectorAll('[data-figure=run1-profiles] .js-plotly-plot')].map(
            p => [p._fullLayout.yaxis.type, p._fullLayout.yaxis.title.text])"""
    )
    assert ["log", "norm (state, log scale)"] in titles
    assert all(("log scale" in text) == (kind == "log") for kind, text in titles)


def test_arms_are_told_apart_by_colour_and_stroke_and_their_bands_by_their_edges(loaded):
    found = loaded.execute_script(
        """const p = document.querySelector('[data-figure=run1-profiles] .js-plotly-plot');
        return p.data.map(t => [t.legendgroup, t.fill ?? '', t.line.color, t.line.dash, t.line.width])"""
    )
    lines = {name: (colour, dash) for name, fill, colour, dash, _ in found if not fill}
    bands = {name: (dash, width) for name, fill, _, dash, width in found if fill}
    assert set(lines) == set(bands) == set(ARMS)
    assert len(set(lines.values())) == len({c for c, _ in lines.values()}) == len({d for _, d in lines.values()}) == 3
    assert all(bands[name] == (lines[name][1], 1) for name in ARMS)
    legend = loaded.execute_script(
        """return [...document.querySelector('[data-figure=run1-profiles] .js-plotly-plot').querySelectorAll(
            '.legendtext')].map(t => t.textContent)"""
    )
    assert legend == list(ARMS)


def test_interval_bars_of_means_are_those_of_the_numbers(browser, run, tmp_path):
    pytest.importorskip("duckdb")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    other = made(tmp_path, name="org/other", states=False)
    browser.get(report([run, other], out=tmp_path / "both.html").as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    figure = browser.find_element(By.CSS_SELECTOR, "[data-figure=compare-means]")
    condition = Select(figure.find_element(By.CSS_SELECTOR, "select[data-column=condition]"))
    for name in ARMS:
        condition.select_by_visible_text(name)
        mean, above, below = browser.execute_script(
            """const t = arguments[0].querySelector('.js-plotly-plot').data[0];
            return [t.x[0], t.error_x.array[0], t.error_x.arrayminus[0]]""",
            figure,
        )
        values = run.samples[run.samples["condition_id"] == name]["nll"].to_numpy(np.float64)
        assert mean == pytest.approx(values.mean(), rel=1e-12)
        assert [mean - below, mean + above] == pytest.approx(slow_interval(values), rel=1e-9)
        assert list(mean_interval(values)) == pytest.approx(slow_interval(values), rel=1e-9)


def test_the_keyboard_alone_reaches_a_header_and_sorts(loaded):
    from selenium.webdriver.common.keys import Keys

    assert loaded.execute_script("return [...document.querySelectorAll('[tabindex]')].every(n => n.tabIndex <= 0)")
    table = unfolded(loaded, "[data-table=run1-samples]")
    here = table.find_element("css selector", "input[type=search]")
    seen = []
    for _ in range(12):
        here.send_keys(Keys.TAB)
        here = loaded.switch_to.active_element
        seen.append(here.tag_name)
        if here.tag_name == "button":
            break
    assert seen[-2:] == ["div", "button"]  # menus, then the table, which scrolls, then its first header
    head = here.find_element("xpath", "..")
    assert (head.tag_name, head.get_attribute("aria-sort")) == ("th", "none")
    here.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    here.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "descending"
    here.send_keys(Keys.TAB)
    other = loaded.switch_to.active_element
    other.send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") == "none"
    assert other.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize(("grave", "shown"), [(0, 5), (7, 7), (2, 5)])
def test_grave_warnings_are_never_folded_away(grave, shown):
    from dynprobe.runs._report._html import rendered
    from dynprobe.runs._report._parts import Report, Section

    section = Section("compare", "Comparison", warnings=[f"warning-{n}" for n in range(9)], n_grave=grave)
    text = rendered(Report("page", "now", [section])).decode()
    open_part, folded = text.split("<details>", 1)[0], text.split("<details>", 1)[1].split("</details>")[0]
    assert [f"warning-{n}" in open_part for n in range(9)] == [n < shown for n in range(9)]
    assert [f"warning-{n}" in folded for n in range(9)] == [n >= shown for n in range(9)]
    assert f"{9 - shown} more of 9" in folded


def test_depths_that_never_have_a_value_are_no_rows_and_a_cell_without_one_says_so(loaded, browser, tmp_path):
    from selenium.webdriver.support.ui import Select

    def cells():
        return browser.execute_script(
            """const [t] = document.querySelector('[data-figure=run1-tokens] .js-plotly-plot').data;
            return [t.y, t.z.length, t.text, t.hoverongaps]"""
        )

    assert cells()[:2] == [[1, 2, 3], 3]
    select = Select(browser.find_element("css selector", "[data-figure=run1-tokens] [data-column='@measure']"))
    select.select_by_index(1)
    assert cells()[0] == [0, 1, 2, 3]  # the norm is known from the first state on
    run = made(tmp_path, states=False, gap=("p0|clean|0", 1, 2))
    browser.get(run.report().as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    y, _, text, over_gaps = cells()
    assert y == [1, 2, 3]
    assert over_gaps
    assert text[1][1] == "“·x”<br>pos 1<br>depth 2<br>angle has no value"
    assert text[1][2].startswith("“&lt;/script&gt;”<br>pos 2<br>depth 2<br>angle 0.")


def test_the_axis_of_a_paired_change_names_its_own_metric(loaded):
    found = loaded.execute_script(
        """return [...document.querySelectorAll('[data-figure=run1-profiles] .chart')].map(c => [
            c.querySelector('h4').textContent, c.querySelector('.js-plotly-plot')._fullLayout.yaxis.title.text])"""
    )
    assert found == [
        ["κ phase of the step", "κ phase of the step (half-turns)"],
        ["paired change of κ phase of the step", "change of κ phase (half-turns)"],
        ["norm", "norm (state, log scale)"],
        ["paired change of norm", "change of norm (state)"],
    ]


FOLDED = "return document.querySelectorAll('main details:not([open], [data-numbers])').length"

# ---- folding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory, run):
    pytest.importorskip("duckdb")
    folder = tmp_path_factory.mktemp("both")
    return report([run, made(folder, name="org/other")], out=folder / "both.html")


@pytest.fixture
def compared(browser, both):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(both.as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return browser


def opened(browser):
    return browser.execute_script("return [...document.querySelectorAll('.part')].map(d => d.open)")


def drawn(browser):
    return set(
        browser.execute_script(
            "return [...document.querySelectorAll('figure')].filter(f => f.querySelector('.main-svg')).map(f => f.id)"
        )
    )


def test_a_comparison_is_open_and_its_runs_are_folded(compared):
    assert opened(compared) == [True, False, False]
    assert drawn(compared) == {"compare-profiles", "compare-means"}
    short = compared.execute_script("return document.documentElement.scrollHeight")
    warned = [w.text for w in compared.find_elements("css selector", ".warning")]  # of what is folded too
    assert [w.split("\n")[0] for w in warned[1:]] == [
        "Before you believe org/<script>alert(1)</script> · run", "Before you believe org/other · run",
    ]  # fmt: skip
    assert all("Self-test null failed" in w for w in warned[1:])
    said = compared.find_elements("css selector", ".part > summary .within")
    assert said[1].text == "1 warning, 4 pictures, 4 tables"
    unfolded(compared, "#run2-tokens")
    wait(compared, lambda: "run2-tokens" in drawn(compared), 10)
    assert opened(compared) == [True, False, True]
    width, inner = compared.execute_script(
        """const p = document.querySelector('[data-figure=run2-tokens] .js-plotly-plot');
        return [p.clientWidth, p._fullLayout.width]"""
    )
    assert width == inner > 800  # drawn in the width it has, not in that of something folded
    compared.find_element("id", "unfold").send_keys("\ue007")
    wait(compared, lambda: "run1-regimes" in drawn(compared), 10)
    assert (
        compared.execute_script("return document.querySelectorAll('main details:not([open], [data-numbers])').length")
        == 0
    )
    assert compared.execute_script("return document.documentElement.scrollHeight") > 3 * short
    assert [entry for entry in compared.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.parametrize("target", ["run2-pca", "t-run2-conditions", "t-run1-selftests"])
def test_an_anchor_opens_what_it_lies_in(compared, both, target):
    link = compared.find_element("css selector", f".contents a[href='#{target}']") if "self" not in target else None
    for by_link in (False, True) if link else (False,):
        if by_link:
            compared.execute_script("for (const d of document.querySelectorAll('main details')) d.open = false")
            unfolded(compared, f".contents a[href='#{target}']").send_keys("\ue007")
        else:
            compared.get("about:blank")
            compared.get(f"{both.as_uri()}#{target}")
            wait(compared, lambda: compared.execute_script("return document.documentElement.dataset.ready"))
        wait(
            compared,
            lambda: compared.execute_script(
                """const t = document.getElementById(arguments[0]), box = t.getBoundingClientRect();
                return !t.closest('details:not([open])') && box.top >= -5 && box.top < innerHeight""",
                target,
            ),
            10,
        )
        assert target != "run2-pca" or target in drawn(compared)


def test_everything_is_open_on_paper_and_folded_again_after_it(compared):
    before = compared.execute_script(FOLDED)
    assert before > 10
    compared.execute_script(
        """document.getElementById('theme').value = 'dark';
        document.getElementById('theme').dispatchEvent(new Event('change'));
        addEventListener('beforeprint', () => { window.printed = [
            document.querySelectorAll('main details:not([open], [data-numbers])').length,
            document.querySelectorAll('figure .main-svg').length, document.documentElement.dataset.theme,
            document.querySelector('.js-plotly-plot').layout.font.color]; });"""
    )
    paper = compared.print_page()
    count, plots, theme, ink = compared.execute_script("return window.printed")
    assert (count, theme, ink) == (0, "light", "#1b1f24")
    assert plots >= 10
    assert len(paper) > 100_000
    assert compared.execute_script(FOLDED) == before
    assert compared.execute_script("return document.documentElement.dataset.theme") == "dark"


def test_the_profile_of_a_comparison_has_its_unit_and_its_ids_behind_a_fold(compared):
    from selenium.webdriver.support.ui import Select

    def titles():
        return compared.execute_script(
            """return [...document.querySelectorAll('[data-figure=compare-profiles] .js-plotly-plot')].map(
                p => p._fullLayout.yaxis.title.text)"""
        )

    assert titles() == ["kappa_phase (half-turns)", "kappa_phase, summed (rad)"]
    metric = Select(compared.find_element("css selector", "[data-figure=compare-profiles] [data-column=metric]"))
    metric.select_by_visible_text("norm")
    assert titles()[0] == "norm (state)"
    caption = compared.find_element("css selector", "[data-figure=compare-profiles] figcaption")
    note = caption.find_element("css selector", "details.note")
    assert note.text == "Steps of every run"
    assert "Metrics: resid.norm/1, kappa.phase/1." in caption.text


def test_more_than_three_ids_stand_behind_a_fold():
    from dynprobe.runs._report._html import rendered
    from dynprobe.runs._report._looks import id_notes, metrics_said
    from dynprobe.runs._report._parts import Chart, Figure, Frame, Report, Section

    ids = ["a.b/1", "c.d/1", "e.f/1", "<g>/1"]
    assert metrics_said(ids[:3]) == " Metrics: a.b/1, c.d/1, e.f/1."
    assert id_notes(ids[:3]) == []
    frame = Frame("f", pd.DataFrame({"x": [1.0]}))
    figure = Figure("f", "f", f"Short.{metrics_said(ids)}", "f", [frame], [Chart([], {})], notes=id_notes(ids))
    text = rendered(Report("page", "now", [Section("s", "S", figures=[figure])])).decode()
    note = text.split('<details class="note">')[1].split("</details>")[0]
    assert "<summary>4 metric ids</summary>" in note
    assert [i in note for i in ("a.b/1", "c.d/1", "e.f/1", "&lt;g&gt;/1")] == [True] * 4
    assert "Metrics:" not in text.split("<script", 1)[0]


def test_warnings_alike_are_one_and_grave_ones_of_other_kinds_stay():
    from dynprobe.runs._report._html import rendered
    from dynprobe.runs._report._parts import Report, Section
    from dynprobe.runs._report._warned import put_together

    runs, arms = ["llama", "cem", "csm"], ["clean", "perturbed.forced"]
    tail = "metrics that grow with length (kappa_path, erank) cannot be compared as they are"
    unequal = [
        f"unequal T in {c}: {a} read {20.5 + n} tokens a prompt and {b} {31 + n}; {tail}"
        for c in arms for n, (a, b) in enumerate([("llama", "cem"), ("llama", "csm"), ("cem", "csm")])
    ]  # fmt: skip
    weights = [f"{a} and {b} are both called m and have other weights (0{n} against 1{n})" for n, (a, b) in
               enumerate([("llama", "cem"), ("llama", "csm"), ("cem", "csm"), ("csm", "cem")])]  # fmt: skip
    light = [f"pseudo-replication: clean of {r} has {n} rows of 4 prompts" for n, r in enumerate(runs, 9)]
    shown, n_grave, several = put_together([*weights, *unequal, *light], 10, runs + arms)
    said = f"6 times: unequal T in …: … read … tokens a prompt and …; {tail}"
    assert shown == [*weights, said, *light]  # three alike are few enough to stand
    assert n_grave == 5
    assert several == {said: unequal}
    section = Section("compare", "Comparison", warnings=shown, n_grave=n_grave, several=several)
    text = rendered(Report("page", "now", [section])).decode()
    open_part, _, rest = text.partition('<details class="several">')
    assert all(w in open_part for w in [*weights, said])
    behind = rest.split("</details>")[0]
    assert "each of the 6" in behind
    assert all(w in behind for w in unequal)
    assert not any(w in rest.split("</details>", 1)[1] for w in unequal)


def shown(browser, tmp_path, figure):
    """A page of one picture, in the browser."""
    from dynprobe.runs._report._html import rendered
    from dynprobe.runs._report._parts import Report, Section

    page = tmp_path / "one.html"
    page.write_bytes(rendered(Report("page", "now", [Section("s", "S", figures=[figure])])))
    browser.get(page.as_uri())
    wait(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))


def title_of(browser, name):
    return browser.execute_script(
        "return document.querySelector('.js-plotly-plot')._fullLayout[arguments[0]].title.text", name
    )


def test_the_axis_of_a_map_over_strengths_names_the_scale(browser, tmp_path):
    from selenium.webdriver.support.ui import Select

    from dynprobe.runs._report._parts import Chart, Figure, Frame, axis, axis_of, grid

    rows = pd.DataFrame(
        [(w, a, k, a * k) for w in ("relnorm", "<mad>") for a in (0.1, 1.0) for k in (0, 1)],
        columns=["write", "alpha", "layer", "mean"],
    )
    titles = {"relnorm": "α, relnorm (shares of a norm)", "<mad>": "α, <mad>"}
    chart = Chart(
        [grid("alpha", "layer", "mean")], {"xaxis": axis_of("write", titles, type="category"), "yaxis": axis("layer")}
    )
    choose = [{"label": "scale", "column": "write"}]
    shown(browser, tmp_path, Figure("f", "F", "c", "a", [Frame("f", rows)], [chart], choose))
    assert title_of(browser, "xaxis") == "α, relnorm (shares of a norm)"
    Select(browser.find_element("css selector", "[data-column=write]")).select_by_visible_text("<mad>")
    assert title_of(browser, "xaxis") == "α, &lt;mad&gt;"  # as text, no markup


@pytest.mark.parametrize(("height", "stretched"), [(60.0, False), (2.0, True)])
def test_a_plane_that_would_be_a_strip_is_stretched_and_says_so(browser, tmp_path, height, stretched):
    from dynprobe.runs._report._parts import Chart, Figure, Frame, axis, line

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 812, "deviceScaleFactor": 1, "mobile": True}
    )
    rows = pd.DataFrame({"x": np.linspace(0.0, 100.0, 9), "y": np.linspace(0.0, height, 9) ** 2 / height})
    layout = {
        "xaxis": axis("PC1", constrain="domain"), "yaxis": axis("PC2", scaleanchor="x", constrain="domain"),
        "$plane": True,
    }  # fmt: skip
    chart = Chart([line("x", "y", "a", "#0072B2")], layout, height=460)
    shown(browser, tmp_path, Figure("f", "F", "c", "a", [Frame("f", rows)], [chart]))
    width, tall, per_x, per_y = browser.execute_script(
        """const {xaxis: x, yaxis: y} = document.querySelector('.js-plotly-plot')._fullLayout;
        const per = (a) => a._length / Math.abs(a.range[1] - a.range[0]);
        return [x._length, y._length, per(x), per(y)]"""
    )
    title = title_of(browser, "yaxis")
    if stretched:
        said = float(re.fullmatch(r"PC2, stretched about ([\d.]+)×", title)[1])
        assert per_y / per_x == pytest.approx(said, rel=0.35)
        assert tall > 200
    else:
        assert title == "PC2"
        assert per_y == pytest.approx(per_x, rel=1e-6)
    assert width > 200


@pytest.mark.parametrize("lengths", [(40,), (20, 40)])
def test_one_length_of_texts_is_drawn_side_by_side(monkeypatch, lengths):
    from dynprobe.runs._report import _figures_studies as studies

    rows = pd.DataFrame(
        [(c, m, n, 0.5, 0.4, 0.6, 3) for c in ("none", "layer") for m in studies.MEASURES for n in lengths],
        columns=["condition", "measure", "length", "mean", "low", "high", "n"],
    )
    monkeypatch.setattr(studies, "length_numbers", lambda run: rows)
    figure = studies.length_figure(None, "run1")
    assert len(figure.charts) == len(studies.MEASURES)
    for chart in figure.charts:
        if len(lengths) == 1:
            (trace,) = chart.traces
            assert (trace["x"], trace["y"]) == ({"$": "mean"}, {"$": "condition"})
            assert trace["error_x"]["array"] == {"$minus": ["high", "mean"]}
            assert chart.title.endswith(", 40 new tokens")
        else:
            assert [t["x"] for t in chart.traces if "x" in t] == [{"$": "length"}] * 2
    assert ("; bars: " in figure.caption) == (len(lengths) == 1)


def test_two_runs_of_one_model_are_told_apart(tmp_path, run):
    pytest.importorskip("duckdb")
    other = made(tmp_path, arms={"clean": "clean"}, states=False, note="another")
    text = report([run, other, run], out=tmp_path / "same.html").read_text(encoding="utf-8")
    titles = re.findall(r'<h2 id="run\d-title">(.*?)</h2>', text)
    name = "org/&lt;script&gt;alert(1)&lt;/script&gt; 0123"
    assert titles == [f"{name} #{n} · run" for n in (1, 2, 3)]  # all were made under one id
    alone = report(run, out=tmp_path / "alone.html").read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="run\d-title">(.*?)</h2>', alone) == ["org/&lt;script&gt;alert(1)&lt;/script&gt; · run"]
