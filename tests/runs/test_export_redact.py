"""Texts taken out of an export: nothing that gives them back is left, and runs still pair."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dynprobe as dp
from dynprobe.errors import RunFolderError, UsageError
from dynprobe.runs import RunWriter, import_export, open_run
from dynprobe.runs._export_redact import Redaction
from dynprobe.runs._text_hash import hashed_text, text_hash

SECRETS = ["My neighbour keeps a tiger in the cellar", "The answer is swordfish and nobody knows it"]
WRITTEN = "and it roars every single night at three"


def private(out, texts=SECRETS):
    command = ["dynprobe", "run", "--model", "tiny", "--prompt", texts[0], f"--prompt={texts[1]}", "--limit", "2"]
    config = {
        "protocol": "run", "model": "tiny", "prompt": list(texts), "contrast": ["I love cellars", "I hate cellars"],
        "where": "layers=all", "limit": 2, "note": f"asked: {texts[0]}!", "nested": {"text": texts[1], "seed": 0},
    }  # fmt: skip
    writer = RunWriter.begin(out, model_name="org/tiny", config=config, ident="89abcdef",
                             columns={"nll": {"id": "output.nll/1", "unit": "nats", "digest": "0165"}},
                             manifest_fields={"command": command, "batch_plan": [[0]]})  # fmt: skip
    ids = [f"p{i}|clean|0" for i in range(2)]
    keys = pd.DataFrame([(s, p, "resid", d) for s in ids for p in range(3) for d in range(2)],
                        columns=["sample_id", "pos", "track", "depth"])  # fmt: skip
    with writer:
        writer.write_table("prompts", pd.DataFrame({
            "prompt_id": ["p0", "p1"], "text": texts, "token_ids": [[11, 12, 13], [21, 22, 23]],
            "token_texts": [["My", " neighbour", " keeps"], ["The", " ans", "wer"]], "category": ["a", "b"],
        }))  # fmt: skip
        writer.write_table("conditions", pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"], "alpha": [0.0]}))
        writer.write_states(0, keys, np.ones((len(keys), 2), np.float32), "float32")
        tokens = keys[keys["depth"] == 0].drop(columns=["track", "depth"])
        writer.write_batch(0, {
            "samples": pd.DataFrame({"sample_id": ids, "prompt_id": ["p0", "p1"], "condition_id": "clean",
                                     "nll": [1.0, 2.0], "text": [WRITTEN, None], "n_new": 3}),
            "tokens": tokens.assign(token_id=[11, 12, 13, 21, 22, 23], target_id=7, nll=1.5,
                                    token_text=["My", " neighbour", " keeps", "The", " ans", "swordfish"]),
            "depths": keys.assign(norm=2.5, layer=keys["depth"] - 1),
            "items": pd.DataFrame({"task": "t", "doc_id": ["0", f"about: {texts[0]}"], "condition_id": "clean",
                                   "target": ["yes", "no"], "text": [WRITTEN, ""], "cluster": ["c0", WRITTEN],
                                   "responses": [[1.0], [2.0]], "acc": 1.0}),
        })  # fmt: skip
        writer.finish({"conditions": {"clean": {"samples": 2, "example": WRITTEN}}, "worst": {texts[1]: 3}})
    return open_run(writer.folder)


def everything(folder):
    """Every byte and every cell of an export, as text."""
    out = [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
    for path in folder.rglob("*.parquet"):
        out += [str(cell) for column in pq.read_table(path).to_pydict().values() for cell in column]
    return "\n".join(out)


@pytest.mark.parametrize("tables", [None, ["prompts", "samples", "tokens", "depths", "items", "conditions"]])
@pytest.mark.parametrize("to", ["hf", "csv"])
def test_nothing_of_a_text_is_left(tmp_path, tables, to):
    run = private(tmp_path / "runs")
    whole = everything(run.export(to, tmp_path / "plain").path)
    done = run.export(to, tmp_path / "out", redact_text=True, tables=tables)
    text = everything(done.path)
    for secret in (*SECRETS, WRITTEN, "swordfish", "I love cellars", "neighbour", "tiger in the"):
        assert secret in whole  # so that the next line could fail
        assert secret not in text
    assert "states" not in done.rows
    assert ("tokens" in done.rows) == (tables is not None)
    for line in ("prompts.text: replaced by a hash", "prompts.token_ids: emptied", "table states: left out"):
        assert line in done.removed
    back = import_export(done.path, tmp_path / "back")
    assert back.prompts["text"].tolist() == [hashed_text(t) for t in SECRETS]
    assert back.prompts["token_ids"].isna().all()
    assert back.samples["nll"].tolist() == [1.0, 2.0]
    if tables is not None:
        assert "tokens.token_text: emptied" in done.removed
        assert back.tokens[["token_id", "target_id", "token_text"]].isna().all().all()
        assert (back.tokens["nll"] == 1.5).all()
        depths = back.depths.set_index("depth")["norm"]
        assert depths.loc[0].isna().all()  # the norm of an embedding is the token
        assert (depths.loc[1] == 2.5).all()
        assert back.table("items")["target"].isna().all()
        assert (back.table("items")["acc"] == 1.0).all()
    assert back.manifest.config["where"] == "layers=all"
    assert back.manifest.config["limit"] == 2
    assert "--limit" in back.manifest.command
    page = (done.path / "README.md").read_text()
    assert "What was removed" in page


def test_runs_without_texts_still_pair(tmp_path):
    a = private(tmp_path / "a")
    a.export("hf", tmp_path / "out", redact_text=True)
    without = import_export(tmp_path / "out", tmp_path / "b")
    found = dp.compare([a, without], metric=["nll"])
    assert found.pairs["n"].tolist() == [2]
    assert found.pairs["difference"].tolist() == [0.0]
    other = private(tmp_path / "c", texts=["Another text of quite some length here", "And a second one, long enough"])
    other.export("hf", tmp_path / "out2", redact_text=True)
    stranger = import_export(tmp_path / "out2", tmp_path / "d")
    with pytest.raises(dp.DynprobeError, match="no prompt in common"):
        dp.compare([without, stranger])


def test_states_are_refused(tmp_path):
    run = private(tmp_path / "runs")
    with pytest.raises(UsageError, match="hidden states"):
        run.export("hf", tmp_path / "out", redact_text=True, tables=["samples", "states"])
    assert not (tmp_path / "out").exists()


def test_hashes_are_those_of_the_text():
    assert text_hash("a b") == text_hash(hashed_text("a b"))
    assert text_hash("a b") != text_hash("a c")
    assert text_hash(None, [1, 2]) == text_hash(hashed_text(None, [1, 2]))
    assert hashed_text(None) is None
    assert hashed_text("") == ""
    assert text_hash("sha256:zz") not in (None, "zz")  # a prompt that only looks like one


def test_pieces_are_found_and_numbers_stay():
    gone = Redaction([SECRETS[0], "short one"])
    assert gone.holds(f"x{SECRETS[0][3:39]}y")
    assert not gone.holds("the tiger")
    assert gone.holds("with short one inside")
    value = {"a": [1, 2.5, None], "b": {"c": f"say {SECRETS[0]}"}, "d": True, "prompt": None, "text": "hello"}
    clean = gone.json(value, "x")
    assert clean["a"] == [1, 2.5, None]
    assert clean["d"] is True
    assert clean["prompt"] is None
    assert clean["text"] == hashed_text("hello")
    assert "tiger" not in json.dumps(clean)
    assert gone.command('dynprobe run --prompt "unbalanced') == "[text removed]"
    assert gone.command(None) is None
    assert not Redaction(["auto", "clean"]).holds("auto")  # a word is no secret where it is a setting
    words = gone.command('dynprobe run --contrast "a b" "c d" --seed 3')
    assert words == ["dynprobe", "run", "--contrast", "[text removed]", "[text removed]", "--seed", "3"]


def test_token_ids_are_emptied_wherever_they_stand():
    gone = Redaction([])
    value = {
        "prompts": [[101, 102], [103]], "contrast": [[104], [105]], "nested": {"target_ids": [106], "target_id": 107},
        "prompt": {"token_ids": [[108]], "limit": 3}, "seeds": [1, 2], "eos_token_id": 2, "layers": [4, 5], "ids": None,
    }  # fmt: skip
    assert gone.json(value, "config") == {
        "prompts": [[], []], "contrast": [[], []], "nested": {"target_ids": [], "target_id": None},
        "prompt": {"token_ids": [[]], "limit": 3}, "seeds": [1, 2], "eos_token_id": 2, "layers": [4, 5], "ids": None,
    }  # fmt: skip
    assert "config.prompts: token ids emptied" in gone.done


AWKWARD = 'He said "tell\nno one, Ольга" and went\taway \\ for good'


def test_texts_within_json_are_found():
    gone = Redaction([AWKWARD])
    cell = json.dumps({"seed": 3, "contrast": ["x"], "about": AWKWARD})
    assert AWKWARD not in cell
    assert gone.holds(cell)
    assert gone.holds(cell[30:-20])  # a piece of JSON that cannot be parsed
    clean = gone.json({"params": cell}, "x")["params"]
    assert json.loads(clean) == {"seed": 3, "contrast": [hashed_text("x")], "about": hashed_text(AWKWARD)}
    assert gone.json({"params": '{"a": 1}'}, "x") == {"params": '{"a": 1}'}  # untouched, to the space
    assert gone.json({"params": json.dumps([cell])}, "x") == {"params": json.dumps([clean], separators=(",", ":"))}
    assert gone.command([f"--note={AWKWARD}", "--limit=2"]) == ["--note=[text removed]", "--limit=2"]


@pytest.mark.parametrize("to", ["hf", "csv", "npz"])
def test_token_ids_and_json_cells_of_a_whole_export(tmp_path, to):
    ident = "89abcdef"
    config = {"prompts": [[40961, 40962], [40963]], "note": json.dumps({"asked": AWKWARD})}
    writer = RunWriter.begin(tmp_path / "runs", model_name="tiny", config=config, ident=ident)
    with writer:
        writer.write_table("prompts", pd.DataFrame({"prompt_id": ["p0"], "text": [AWKWARD], "token_ids": [[40961]]}))
        params = json.dumps({"alpha": 0.1, "about": AWKWARD})
        writer.write_table("conditions", pd.DataFrame({"condition_id": ["c"], "arm": ["clean"], "params": [params]}))
        writer.write_batch(0, {"samples": pd.DataFrame({"sample_id": ["s"], "prompt_id": "p0", "condition_id": "c"})})
        writer.finish({"worst": {"target_ids": [40963]}})
    done = open_run(writer.folder).export(to, tmp_path / "out", redact_text=True)
    side = (done.path / "dynprobe.json").read_text()
    assert "4096" not in side
    assert "Ольга" not in everything(done.path) + side
    back = import_export(done.path, tmp_path / "back")
    assert json.loads(back.conditions["params"][0]) == {"alpha": 0.1, "about": hashed_text(AWKWARD)}
    assert back.manifest.config["prompts"] == [[], []]


@pytest.mark.parametrize("word", ["perturbed", "category", "protocol", "output.nll/1", "conditions", "schema_version"])
def test_a_prompt_that_is_a_word_of_dynprobe_leaves_too(tmp_path, word):
    """Such a word stands in every page and in the names of columns; what is removed is the prompt."""
    run = private(tmp_path / "runs", [word, SECRETS[1]])
    done = run.export("hf", tmp_path / "out", redact_text=True)
    back = import_export(done.path, tmp_path / "back")
    assert next(iter(back.table("prompts")["text"])) == hashed_text(word, [11, 12, 13])
    assert word not in (back.manifest.command or [word])
    assert SECRETS[1] not in everything(done.path)


@pytest.mark.parametrize("where", ["dynprobe.json", "README.md", "table conditions"])
def test_every_file_is_read_for_what_is_left(tmp_path, monkeypatch, where):
    """Whichever of the removals were to fail, nothing leaves."""
    run = private(tmp_path / "runs")
    if where == "dynprobe.json":
        monkeypatch.setattr(Redaction, "json", lambda self, value, place: value)
    elif where == "README.md":
        monkeypatch.setattr("dynprobe.runs._export.export_card", lambda *_: f"# A page\n\nabout {SECRETS[0]}\n")
    else:

        def spoiled(self, table, chunk):
            if table != "conditions":
                return clean(self, table, chunk)
            at = chunk.column_names.index("arm")
            return chunk.set_column(at, chunk.field(at), pa.array([SECRETS[1]]).cast(chunk.field(at).type))

        clean = Redaction._clean
        monkeypatch.setattr(Redaction, "_clean", spoiled)
    with pytest.raises(RunFolderError, match=rf"^{where} of this export would show a text"):
        run.export("hf", tmp_path / "out", redact_text=True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))
