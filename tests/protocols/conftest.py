"""Tiny models and a few runs over them, made once; the user's cache is left alone."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import transformers

import dynprobe as dp
from dynprobe.probes import Subject, discover
from dynprobe.testing import byte_tokenizer, save_tiny_model

#: Of different lengths, so that there is padding; one of a single token.
TEXTS = ("Hello there, world", "A second prompt that is longer", "Hell", "Another one, short", "x")
KEYS = {
    "samples": ["sample_id"],
    "tokens": ["sample_id", "pos"],
    "depths": ["sample_id", "pos", "track", "depth"],
    "profiles": ["sample_id", "track", "depth"],
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DYNPROBE_CACHE")
    os.environ["DYNPROBE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("DYNPROBE_CACHE")
    if before is not None:
        os.environ["DYNPROBE_CACHE"] = before


@pytest.fixture
def users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the person who runs the tests, where real weights may lie."""
    monkeypatch.delenv("DYNPROBE_CACHE")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", "gpt2")


@pytest.fixture(scope="session")
def llama(llama_folder: Path, _own_cache: None) -> Subject:
    """Shared: a test that changes the model loads its own."""
    return dp.load(str(llama_folder))


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path, _own_cache: None) -> Subject:
    return dp.load(str(gpt2_folder))


@pytest.fixture(scope="session")
def full_run(llama: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every arm with its states and the logit lens."""
    return dp.run(
        llama, list(TEXTS), perturb="alpha=0.3", max_new_tokens=6, states=True, lens=True,
        out=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip


@pytest.fixture(scope="session")
def ending(gpt2_folder: Path, _own_cache: None) -> Subject:
    """A GPT-2 whose commonest tokens end a text, so that rows of a batch end at different times."""
    subject = dp.load(str(gpt2_folder))
    rows = dp.run(
        subject, list(TEXTS), max_new_tokens=8, stop_at_eos=False, out=gpt2_folder.parent / "which-tokens"
    ).tokens
    common = rows[rows["phase"] == "decode"]["token_id"].value_counts().index[:2]
    subject.model.generation_config.eos_token_id = [int(t) for t in common]
    return subject


class _NoPositions(transformers.GPT2LMHeadModel):
    """A GPT-2 that cannot be told where its tokens stand: padding on the left moves them."""

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, logits_to_keep=0, **other
    ):
        other.pop("position_ids", None)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            use_cache=use_cache, logits_to_keep=logits_to_keep, **other,
        )  # fmt: skip


@pytest.fixture(scope="session")
def no_positions(gpt2: Subject) -> Subject:
    model = _NoPositions(gpt2.model.config)
    model.load_state_dict(gpt2.model.state_dict())
    return discover(model, tokenizer=byte_tokenizer(), name="no-positions")


def plain(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A table without categories, in the order of its labels."""
    labels = {c: "object" for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)}
    return frame.astype(labels).sort_values(list(keys)).set_index(list(keys))


@pytest.fixture(scope="session")
def table() -> Callable[..., pd.DataFrame]:
    """``table(run, name)``: the table, indexed by its labels, with the arm of each row as column ``arm``."""

    held: dict[tuple[int, str], tuple[Any, pd.DataFrame]] = {}

    def read(run: Any, name: str, arm: str | None = None) -> pd.DataFrame:
        if (id(run), name) not in held:
            frame = plain(run.table(name), KEYS[name])
            ids = frame.index.get_level_values("sample_id").astype(str)
            frame["arm"] = ids.str.split("|").str[1]
            held[id(run), name] = (run, frame)  # the run is kept, so that its id stays its own
        frame = held[id(run), name][1]
        return frame if arm is None else frame[frame["arm"] == arm]

    return read


@pytest.fixture(scope="session")
def same_tables(table: Callable[..., pd.DataFrame]) -> Callable[..., None]:
    """``same_tables(a, b, exact=False)``: two runs hold the same rows, whatever order they stand in."""

    def check(a: Any, b: Any, *, exact: bool = False, part: bool = False) -> None:
        for name in KEYS:
            one, other = table(a, name), table(b, name)
            if part:  # b holds some of the rows of a
                one = one.loc[other.index]
            pd.testing.assert_index_equal(one.index, other.index)
            assert list(one.columns) == list(other.columns)
            for column in one:
                x, y = one[column], other[column]
                if x.dtype.kind != "f":
                    if column not in ("digest", "reason", "reasons"):
                        pd.testing.assert_series_equal(x, y, check_dtype=False, obj=f"{name}.{column}")
                    continue
                x, y = x.to_numpy(), y.to_numpy()
                if exact:
                    np.testing.assert_array_equal(x, y, err_msg=f"{name}.{column}")
                else:
                    # Angles between nearly opposite updates lose digits; the rest agrees to float32 rounding.
                    loose = 2e-3 if column.startswith(("curv_", "kappa_xcorr")) else 2e-5
                    np.testing.assert_allclose(x, y, rtol=loose, atol=loose, err_msg=f"{name}.{column}")

    return check


@pytest.fixture(scope="session")
def trajectory() -> Callable[[Any, str], np.ndarray]:
    """``trajectory(run, sample_id)``: its stored states, float64 [depth, pos, dim]."""

    held: dict[int, tuple[Any, pd.DataFrame, np.ndarray]] = {}

    def read(run: Any, sample: str) -> np.ndarray:
        if id(run) not in held:
            held[id(run)] = (run, *run.states(track="resid"))
        _, keys, states = held[id(run)]
        mine = (keys["sample_id"] == sample).to_numpy()
        depth, pos = keys["depth"].to_numpy()[mine], keys["pos"].to_numpy()[mine]
        out = np.full((depth.max() + 1, pos.max() + 1, states.shape[-1]), np.nan)
        out[depth, pos] = states[mine]
        assert np.isfinite(out).all()
        return out

    return read
