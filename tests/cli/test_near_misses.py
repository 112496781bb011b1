"""A word that is nearly right is answered with the right one, wherever a word is taken."""

import pytest

from dynprobe.cli import main

RUN = ("run", "--model", "tiny-llama", "--prompt", "x", "--max-new-tokens", "0")
GRID = ("sweep", "--model", "tiny-llama", "--prompt", "x", "--alphas", "0.1")
SEARCH = ("threshold", "--model", "tiny-llama", "--prompt", "x")
LOOP = ("recover", "--model", "tiny-llama", "--prompt", "x")
FIELD = ("attract", "--model", "tiny-llama", "--prompt", "x")
ITEMS = ("dissociate", "--model", "tiny-llama", "--limit", "2")

CASES = [
    (("sweeep",), "sweep"),
    (("claims", "shwo"), "show"),
    (("run", "--modle", "x"), "--model"),
    (("compare", "--confidense", "1"), "--confidence"),
    (("init", "--for", "sweeps"), "sweep"),
    ((*RUN, "--dtype", "bfloat61"), "bfloat16"),
    ((*RUN, "--engine", "slrum"), "slurm"),
    ((*RUN, "--backend", "hoks"), "hooks"),
    ((*RUN, "--span", "promt"), "prompt"),
    ((*RUN, "--padding", "lefft"), "left"),
    ((*RUN, "--chat-template", "atuo"), "auto"),
    ((*RUN, "--quantization", "nf5"), "nf4"),
    ((*RUN, "--device", "cdua"), "cuda"),
    ((*RUN, "--metrics", "erank.rw/1"), "erank.rv/1"),
    ((*RUN, "--metrics", "line.shape"), "line.shape/1"),
    ((*RUN, "--metrics", "line.shp"), "line.shape/1"),
    ((*RUN, "--batch-size", "autoo"), "auto"),
    ((*RUN, "--where", "layer=1"), "layers"),
    ((*RUN, "--where", "component=resid_pots"), "resid_post"),
    ((*RUN, "--perturb", "alpha=0.1,scal=relnorm"), "scale"),
    ((*RUN, "--perturb", "alpha=0.1,scale=cordstd"), "coordstd"),
    ((*RUN, "--perturb", "alpha=0.1,kind=gausian"), "gaussian"),
    ((*RUN, "--perturb", "alpha=0.1,phase=prefil"), "prefill"),
    ((*RUN, "--model-args", "pretrain=gpt2"), "pretrained"),
    (("run", "--model", "tiny-lama"), "tiny-llama"),
    (("run", "--model", "tiny-llama", "--category", "reasonning"), "reasoning"),
    (("run", "--config", "typo.yaml"), "max_new_tokens"),
    (("run", "--config", "runn.yaml"), "run.yaml"),
    (("run", "--prompts", "promts.txt"), "prompts.txt"),
    ((*GRID, "--scale", "relnrom"), "relnorm"),
    ((*GRID, "--kind", "rotat"), "rotate"),
    ((*GRID, "--component", "mlp_ot"), "mlp_out"),
    ((*GRID, "--phase", "prefil"), "prefill"),
    ((*GRID, "--controls", "shma"), "sham"),
    ((*GRID, "--tables", "sampels"), "samples"),
    ((*SEARCH, "--criterion", "flipp"), "flip"),
    ((*SEARCH, "--placement", "serch"), "search"),
    ((*SEARCH, "--estimand", "promt"), "prompt"),
    ((*SEARCH, "--null", "numercal"), "numerical"),
    ((*LOOP, "--mode", "slrep"), "slerp"),
    ((*LOOP, "--detector", "entrpy"), "entropy"),
    ((*LOOP, "--timings", "orcale"), "oracle"),
    ((*LOOP, "--decode", "forcd"), "forced"),
    ((*FIELD, "--task", "reding"), "reading"),
    ((*FIELD, "--arms", "constnt"), "constant"),
    ((*FIELD, "--match", "strenght"), "strength"),
    ((*FIELD, "--record", "lyer"), "layer"),
    ((*FIELD[:3], "--task", "reading", "--reset", "itme"), "item"),
    ((*FIELD[:3], "--task", "reading", "--stories", "shrot"), "short"),
    ((*FIELD, "--attractor", "slotss=4"), "slots"),
    ((*ITEMS, "--semantic", "nll_rihgt"), "nll_right"),
    ((*ITEMS, "--dynamic", "kappa_gem"), "kappa_geom"),
    ((*ITEMS, "--items", "colze"), "cloze"),
    (("eval", "--tasks", "dynprobe_clozee"), "dynprobe_cloze"),
    (("bench", "--only", "captures"), "capture"),
    (("bench", "--peers", "nnsigth"), "nnsight"),
    (("metrics", "kappa.phse/1"), "kappa.phase/1"),
    (("claims", "show", "kappa.rise"), "kappa.rises"),
    (("claims", "--topic", "kapa"), "kappa"),
    (("fetch", "tiny-csn"), "tiny-csm"),
    (("panel", "typo-panel.yaml"), "temperatures"),
    (("panel", "panl.yaml"), "panel.yaml"),
    (("show", "{almost}"), "{run}"),
    (("show", "{run}", "--figure", "f.png", "--plot", "dpeth"), "depth"),
    (("report", "{almost}"), "{run}"),
    (("compare", "{almost}", "{run}"), "{run}"),
    (("compare", "{run}", "{other}", "--metric", "kapa_phase"), "kappa_phase"),
    (("compare", "{run}", "{other}", "--condition", "claen"), "clean"),
    (("diff", "{run}", "{other}", "--condition", "claen"), "clean"),
    (("delay", "{run}", "--column", "entrpy"), "entropy"),
    (("delay", "{run}", "--column", "entropy", "--table", "tokns"), "tokens"),
    (("delay", "{run}", "--column", "entropy", "--condition", "claen"), "clean"),
    (("delay", "{run}", "--column", "entropy", "--surrogates", "iaft"), "iaaft"),
    (("export", "{run}", "there", "--to", "safetensor"), "safetensors"),
    (("export", "{run}", "there", "--table", "sampels"), "samples"),
    (("export", "{run}", "there", "--condition", "claen"), "clean"),
    (("import", "statse.npz"), "states.npz"),
    (("validate", "statse.npz"), "states.npz"),
    (("ls", "rnus"), "runs"),
]


@pytest.fixture(scope="module")
def other(model, tmp_path_factory):
    """A run that is not the finished one, on the same prompts."""
    out = tmp_path_factory.mktemp("other")
    texts = [word for text in ("Hello there", "And so on", "Third one") for word in ("--prompt", text)]
    words = ["run", "--model", str(model), *texts, "--max-new-tokens", "0", "--dtype", "float64", "--out", str(out)]
    assert main([*words, "--quiet"]) == 0
    (run,) = out.iterdir()
    return run


@pytest.mark.parametrize(("words", "near"), CASES, ids=lambda v: " ".join(v[-3:]) if isinstance(v, tuple) else "")
def test_a_near_miss_is_answered(cli, here, finished, other, words, near):
    (here / "runs").mkdir()
    for run in (finished, other):
        (here / "runs" / run.name).symlink_to(run)
    (here / "states.npz").touch()
    (here / "prompts.txt").write_text("One.\n")
    (here / "run.yaml").write_text("limit: 1\n")
    (here / "panel.yaml").write_text("models: [tiny-llama]\n")
    (here / "typo.yaml").write_text("max_new_token: 1\n")
    (here / "typo-panel.yaml").write_text("models: [tiny-llama]\ntemperature: [0]\n")
    names = {
        "run": f"runs/{finished.name}",
        "almost": f"runs/{finished.name}"[:-1] + "x",
        "other": f"runs/{other.name}",
    }
    found = cli(*[word.format(**names) for word in words])
    assert found.code in (1, 2)
    assert "dynprobe: " in found.err
    assert "Traceback" not in found.err
    wanted = near.format(**names)
    assert f"Did you mean '{wanted}'" in found.err or f"Did you mean {wanted}" in found.err, found.err
