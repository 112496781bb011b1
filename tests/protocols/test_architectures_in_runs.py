"""What the self-tests say of an architecture is what its runs do."""

import pytest

import dynprobe as dp
from dynprobe.errors import ModelError
from dynprobe.probes import discover
from dynprobe.prompts import Prompt
from dynprobe.testing import tiny_causal_lm

ROWS = ((5, 17, 9, 33, 21, 64, 90, 11, 42), (7, 100, 23, 51, 8, 77), (3, 88, 19, 4))


def run_of(kind, folder):
    prompts = [Prompt(prompt_id=f"row-{i}", text=f"row {i}", token_ids=row) for i, row in enumerate(ROWS)]
    subject = discover(tiny_causal_lm(kind), name=kind)
    return dp.run(subject, prompts, perturb="alpha=0.3", max_new_tokens=4, stop_at_eos=False, out=folder)


@pytest.mark.parametrize("kind", ["git", "llama"])
def test_a_type_that_only_writes_wrongly_from_padded_batches_is_run_in_exact_lengths(kind, tmp_path):
    run = run_of(kind, tmp_path)
    assert run.manifest.exact_length_batches is (kind == "git")
    assert ("exact-lengths" in set(run.events()["kind"])) is (kind == "git")
    assert run.manifest.self_tests["alone"]["passed"] is (kind == "llama")


def test_a_run_says_that_written_texts_have_other_states_than_read_ones(tmp_path):
    run = run_of("moshi", tmp_path)
    events = run.events()
    (said,) = events[events["kind"] == "decode-differs"]["by"]
    assert said == pytest.approx(run.manifest.self_tests["alone"]["detail"]["decode"])
    assert said > 0.01


@pytest.mark.parametrize("kind", ["deepseek_v4", "hy_v4"])
def test_a_model_of_several_streams_is_refused_with_what_was_found_and_what_to_type(kind, tmp_path):
    with pytest.raises(ModelError, match=rf"{kind} keeps 4 streams of width 32 .*dp\.capture.*dynprobe import FILE"):
        run_of(kind, tmp_path)
    assert list(tmp_path.iterdir()) == []
    streams = dp.capture(discover(tiny_causal_lm(kind), name=kind), [list(ROWS[0])]).states
    one = dp.metrics.measure([s[..., 0, :] for s in streams], streams[0].new_ones(streams[0].shape[:2]).bool())
    assert one.sample[0]["kappa_phase"].reason is None  # what the message says can be typed
