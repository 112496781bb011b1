"""YAML of users: plain data, or an error with its line."""

from __future__ import annotations

import pytest

from dynprobe._yaml import read_yaml
from dynprobe.errors import UsageError


def read(tmp_path, text, **options):
    (tmp_path / "file.yaml").write_text(text)
    return read_yaml(tmp_path / "file.yaml", "config file", **options)


def test_content_and_lines(tmp_path):
    content, root = read(tmp_path, "a: 1\nb: [x, 6:9]\n")
    assert content == {"a": 1, "b": ["x", 369]}
    assert root.value[1][0].start_mark.line == 1
    assert read(tmp_path, "b: [x, 6:9]\n", as_text=True)[0] == {"b": ["x", "6:9"]}
    assert read(tmp_path, "") == (None, None)


def test_an_alias_stands_for_what_it_names(tmp_path):
    assert read(tmp_path, "a: &a [1, 2]\nb: *a\n")[0] == {"a": [1, 2], "b": [1, 2]}
    assert read(tmp_path, "a: &a {x: 1}\nb: {<<: *a, y: 2}\n")[0]["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", r"line 3: a stands there twice \(line 1 too\)"),
        ("x:\n  b-c: 2\n  b_c: 3\n", "line 3: b_c stands there twice"),
        ("a: &a [*a]\n", "line 1: an alias contains itself"),
        ("a: &a [" + "1," * 400 + "]\nb: &b [" + "*a," * 400 + "]\n", "more than 100,000 items"),
        ("[" * 3000, "nested too deeply"),
        ("a: [", "is not YAML"),
        ("a: 2026-13-45\n", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("? [a, {b: c}]\n: 1\n", "is not YAML"),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path, text, same=lambda key: key.replace("-", "_"))
    assert "file.yaml" in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "file.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UsageError, match="is not YAML"):
        read_yaml(tmp_path / "file.yaml", "config file")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path / "no.yaml", "config file")


def test_aliases_inside_a_key_are_counted_and_not_written_out(tmp_path):
    levels = ["&a0 [x]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 40))]
    with pytest.raises(UsageError, match="line 1: more than 100,000 items"):
        read(tmp_path, f"? [{', '.join(levels)}]\n: 1\n")


def test_a_path_that_is_there_is_no_near_miss_of_itself(tmp_path):
    (tmp_path / "settings.yaml").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory") as found:
        read_yaml(tmp_path / "settings.yaml", "settings")
    assert "Did you mean" not in str(found.value)
