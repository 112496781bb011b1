"""``manifest.json``: what a run is, how far it is, and which files belong to it.

The manifest is the only entrance to a run folder. A file that it does not list does not exist for a reader; a batch
that it does not call finished is done again. It is replaced as a whole, after the files it lists are safely on the
device. Keys that this version does not know are kept when it is read and written again, so that an older library does
not strip what a newer one recorded. A newer major version of the schema is refused, because its files may mean
something else; so is a manifest that was edited: every field is sealed with a hash of its content when it is written.
The manifest before the last is kept beside it, as what a damaged one can be restored from.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dynprobe.errors import RunFolderError
from dynprobe.runs._advice import ask_doctor
from dynprobe.runs._json import dumps, loads, plain
from dynprobe.runs._schema import SCHEMA_VERSION
from dynprobe.runs._secrets import scrub, scrub_command

__all__ = [
    "MANIFEST_NAME",
    "PREVIOUS_NAME",
    "Manifest",
    "Part",
    "PluginFact",
    "check_version",
    "encode_manifest",
    "parse_manifest",
    "peek_id",
    "read_manifest",
    "unsealed",
]

MANIFEST_NAME = "manifest.json"

#: The manifest that the present one replaced; nothing reads it but a repair.
PREVIOUS_NAME = "manifest.previous.json"

Status = Literal["running", "complete", "interrupted"]


def _plugin_fact(value: dict[str, str]) -> dict[str, str]:
    for key in ("group", "name", "package", "version"):
        if key not in value:
            raise ValueError(f"the {key} of a plug-in is missing")
    # They stand in messages: the file may be anybody's, and what is printed may be typed.
    for key in ("package", "version"):
        if not re.fullmatch(r"[A-Za-z0-9._!+-]+|\?", value[key]):
            raise ValueError(f"the {key} of a plug-in is no {key}: {value[key]!r}")
    return value


#: What :meth:`dynprobe._plugins.Plugin.fact` wrote, read again.
PluginFact = Annotated[dict[str, str], AfterValidator(_plugin_fact)]


class Part(BaseModel):
    """One Parquet file of a run."""

    model_config = ConfigDict(extra="allow", frozen=True)

    path: str
    table: str
    batch: int | None = Field(default=None, ge=0)
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _inside(self) -> Part:
        pure = PurePosixPath(self.path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in self.path or ":" in self.path or "\0" in self.path:
            raise ValueError(f"path {self.path!r} leads out of the run folder")
        if pure.suffix != ".parquet" or (pure.parts[0] != self.table and self.path != f"{self.table}.parquet"):
            raise ValueError(f"path {self.path!r} is no part of table {self.table!r}")
        return self


class Manifest(BaseModel):
    """Everything a run says about itself.

    Attributes:
        schema_version: Layout of the folder, ``major.minor``.
        id8: Identity of the run, see :func:`dynprobe.runs.identity`.
        status: ``running`` until the writer says otherwise; a reader calls a running run without a living writer
            interrupted.
        created: Time of the first start, ISO 8601 with offset.
        updated: Time of the last change.
        model_name: Name the user gave the model.
        command: Command line that made the run, as one string or its words.
        config: The resolved configuration.
        model: Facts of the model: hub id, commit, sizes, sites.
        weights: Hashes of the weight files.
        prompts_hash: SHA-256 of the prompts.
        versions: Versions of the libraries.
        plugins: What other packages brought to the run: group, name, package, version; None where there was nothing.
        scales: What α means under each noise scale that was written, in words, and its unit.
        device: The device.
        dtypes: Dtypes of weights, capture and metrics.
        seeds: Seeds by what they seed.
        calibration_hash: Hash of the calibration that was used.
        self_tests: Self-tests with their numbers.
        noise_floor: Largest difference that means nothing.
        batch_plan: The units of work, planned once.
        finished: Numbers of the finished batches.
        batch_facts: What a batch recorded about itself, by number.
        continuations: Later starts: time, versions, device, whether forced.
        interruptions: Times and reasons.
        parts: The files.
        repairs: What a repair has done to the folder, and when.
        seal: Hash of the content of every other field, made when the manifest is written; None in older runs.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    schema_version: str = Field(default=SCHEMA_VERSION, pattern=r"^\d+\.\d+$")
    id8: str = Field(pattern=r"^[0-9a-f]{8}$")
    status: Status = "running"
    created: str
    updated: str
    model_name: str
    command: str | list[str] | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] | str | None = None
    weights: dict[str, Any] | list[Any] | str | None = None
    prompts_hash: str | None = None
    versions: dict[str, Any] = Field(default_factory=dict)
    plugins: list[PluginFact] | None = None
    scales: dict[str, dict[str, str]] | None = None
    device: dict[str, Any] | str | None = None
    dtypes: dict[str, Any] | str | None = None
    seeds: dict[str, Any] | list[int] | int | None = None
    calibration_hash: dict[str, Any] | str | None = None
    self_tests: dict[str, Any] | list[Any] | None = None
    noise_floor: dict[str, Any] | float | None = None
    batch_plan: list[Any] | dict[str, Any] | None = None
    finished: list[int] = Field(default_factory=list)
    batch_facts: dict[str, Any] = Field(default_factory=dict)
    continuations: list[dict[str, Any]] = Field(default_factory=list)
    interruptions: list[dict[str, Any]] = Field(default_factory=list)
    parts: list[Part] = Field(default_factory=list)
    repairs: list[dict[str, Any]] = Field(default_factory=list)
    seal: dict[str, str] | None = None

    @field_validator("finished")
    @classmethod
    def _counted_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or any(number < 0 for number in value):
            raise ValueError("batch numbers must be 0 or more and stand once")
        return sorted(value)

    @field_validator("parts")
    @classmethod
    def _listed_once(cls, value: list[Part]) -> list[Part]:
        if len({part.path for part in value}) < len(value):
            raise ValueError("a file is listed twice")
        return value

    @property
    def imported(self) -> bool:
        """Whether the folder was made of an export: its files are of no batch, and no command makes them again."""
        return bool((self.model_extra or {}).get("imported_from"))

    @property
    def partial(self) -> bool:
        """Whether it is what a filtered or redacted export kept of another run, under an id of its own."""
        return bool((self.model_extra or {}).get("exported_from"))

    def parts_of(self, table: str) -> list[Part]:
        """Return the listed parts of one table, in the order of their names."""
        return sorted((part for part in self.parts if part.table == table), key=lambda part: part.path)

    def rows(self) -> dict[str, int]:
        """Return the number of rows of every table that has any."""
        counts: dict[str, int] = {}
        for part in self.parts:
            counts[part.table] = counts.get(part.table, 0) + part.rows
        return counts


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        RunFolderError: It is missing, damaged (the message names the field), or of a newer major version.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} is no run folder: it has no {MANIFEST_NAME}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"Cannot read {path}: {error}. {ask_doctor(folder)}") from error
    manifest = parse_manifest(text, path)
    changed = unsealed(loads(text))
    if changed:
        raise RunFolderError(
            f"{path} is not what was written: {_several('field', changed)} changed afterwards, so the run may not be "
            f"what it says. {ask_doctor(folder)}"
        )
    return manifest


def parse_manifest(text: str, path: Path) -> Manifest:
    """Return the manifest that a text holds; its seal is not looked at.

    Raises:
        RunFolderError: The text is damaged (the message names the field), or of a newer major version.
    """
    try:
        content = loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: {error}. {ask_doctor(path.parent)}") from error
    if not isinstance(content, dict):
        raise RunFolderError(
            f"{path} is damaged: an object is needed, found {type(content).__name__}. {ask_doctor(path.parent)}"
        )
    check_version(content.get("schema_version"), path)
    return validated(content, str(path), f"Undo the edit, or restore the file. {ask_doctor(path.parent)}")


def unsealed(content: dict[str, Any]) -> list[str]:
    """Return the fields whose content is not what the manifest was sealed with; none where it has no seal.

    Args:
        content: The parsed ``manifest.json``.
    """
    seal = content.get("seal")
    if seal is None:
        return []
    if not isinstance(seal, dict):
        return ["seal"]
    now = _seal({key: value for key, value in content.items() if key != "seal"})
    return sorted(name for name in {*seal, *now} if seal.get(name) != now.get(name))


def validated(content: dict[str, Any], where: str, advice: str) -> Manifest:
    """Return a checked manifest; ``where`` names it in messages, ``advice`` ends them."""
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Where a field may have several types, the place ends in the name of one of them.
        steps = [str(step) for step in first["loc"]]
        while len(steps) > 1 and (steps[-1] in {"str", "int", "float"} or "[" in steps[-1]):
            steps.pop()
        name = ".".join(steps) or "the whole"
        found = repr(first.get("input"))
        found = found if len(found) <= 80 else f"{found[:77]}..."
        raise RunFolderError(
            f"{where}: field {name!r} cannot be read: {first['msg']} (found {found}). {advice}"
        ) from error


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``: secrets scrubbed, strict JSON, one line per part."""
    content = plain(manifest.model_dump(exclude={"parts", "command", "seal"}), "manifest")
    content = {**scrub(content), "command": scrub_command(manifest.command)}
    parts = [part.model_dump() for part in manifest.parts]
    content["seal"] = _seal({**content, "parts": parts})
    # The id stands near the top, where a search over many folders finds it without reading the whole file.
    head = ("schema_version", "id8", "status", "created", "updated", "model_name", "command")
    ordered = {key: content.pop(key) for key in head} | content
    text = dumps(ordered, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(dumps(part) for part in parts)
    listed = f"[\n  {lines}\n ]" if lines else "[]"
    # A lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    return f'{text},\n "parts": {listed}\n}}\n'.encode("utf-8", "backslashreplace")


def peek_id(folder: Path) -> str | None:
    """Return the id in a folder's manifest, or None where there is no readable manifest; reads little."""
    try:
        with (folder / MANIFEST_NAME).open(encoding="utf-8", errors="replace") as file:
            top = file.read(4096)
        marker = '"id8":'
        start = top.find(marker)
        if start >= 0:
            return str(top[start + len(marker) :].split('"', 2)[1])
        return str(loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["id8"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _seal(content: dict[str, Any]) -> dict[str, str]:
    """Sixteen hexadecimal digits of the SHA-256 of every field, in a form that reading and writing leave as it is."""
    return {
        name: hashlib.sha256(dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for name, value in content.items()
    }


def _several(word: str, names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{word} {shown} was" if len(names) == 1 else f"{word}s {shown} were"


def check_version(version: Any, path: Path) -> None:
    try:
        major = int(str(version).split(".")[0])
    except ValueError as error:
        raise RunFolderError(f"{path}: field 'schema_version' cannot be read: found {version!r}.") from error
    if major > int(SCHEMA_VERSION.split(".")[0]):
        raise RunFolderError(
            f"{path.parent} was written with schema {version}; this dynprobe reads up to {SCHEMA_VERSION}. "
            "Type: pip install --upgrade dynprobe"
        )
