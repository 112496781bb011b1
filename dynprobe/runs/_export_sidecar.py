"""``dynprobe.json``, what an export says about itself, checked before a word of it is believed.

An export may come from anybody. Its description names tables, files and folders, and the importer writes under those
names: every one of them must stay inside, and every file that is read must be among those whose checksums are given.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dynprobe.errors import RunFolderError
from dynprobe.runs._export import LAYOUT, SIDECAR
from dynprobe.runs._export_formats import FORMATS
from dynprobe.runs._json import loads
from dynprobe.runs._manifest import PluginFact, check_version
from dynprobe.runs._states import DTYPES
from dynprobe.runs._tables import hash_file

__all__ = ["Sidecar", "TableFacts", "read_sidecar", "verify_files"]

_ADVICE = "Restore the export from a copy."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())


class _File(_Strict):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Column(_Strict):
    name: str
    type: str
    dtype: str | None = None
    shape: list[int] | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Column:
        if (self.dtype is None) != (self.shape is None):
            raise ValueError("dtype and shape stand together or not at all")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"the dtype {self.dtype!r} is not known")
        if any(n < 0 for n in self.shape or ()):
            raise ValueError(f"the shape {self.shape} has a negative size")
        return self


class TableFacts(_Strict):
    """One table of an export: its name there, the table of a run it is, its rows, files and columns."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    table: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    rows: int = Field(ge=0)
    files: list[str]
    columns: list[_Column]

    @field_validator("columns")
    @classmethod
    def _once(cls, value: list[_Column]) -> list[_Column]:
        names = [column.name for column in value]
        if len(set(names)) < len(names):
            raise ValueError(f"a column stands twice: {next(n for n in names if names.count(n) > 1)!r}")
        return value

    def plain(self) -> list[dict[str, Any]]:
        """The columns as :func:`dynprobe.runs._export_tables.schema_of` takes them."""
        return [column.model_dump(exclude_none=True) for column in self.columns]


class Sidecar(_Strict):
    """The description of an export."""

    format: str = Field(pattern=r"^dynprobe-export/[0-9]{1,6}$")
    to: str
    plugin: PluginFact | None = None
    folder: str = ""
    tables: list[TableFacts]
    files: dict[str, _File]
    manifest: dict[str, Any]
    summary: dict[str, Any] | None = None

    @property
    def layout(self) -> int:
        """Number of the layout."""
        return int(self.format.removeprefix("dynprobe-export/"))

    @model_validator(mode="after")
    def _inside(self) -> Sidecar:
        for name in self.files:
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
                raise ValueError(f"the file {name!r} leads out of the export")
        for table in self.tables:
            for name in table.files:
                # A file, or a group of a Zarr store, of which every file is listed.
                if name not in self.files and not any(file.startswith(f"{name}/") for file in self.files):
                    raise ValueError(f"table {table.name} is read from {name!r}, which is not among the files")
        return self


def read_sidecar(folder: Path) -> Sidecar:
    """Read and check the description of an export.

    Raises:
        RunFolderError: It is missing or damaged, leads out of its folder, or is of a newer version.
    """
    path = folder / SIDECAR
    try:
        side = Sidecar.model_validate(loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} is no export: it has no {SIDECAR}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the whole"
        said = str(first["msg"]).removeprefix("Value error, ")
        raise RunFolderError(f"{path} is damaged: {place}: {said}. {_ADVICE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: {error!r}. {_ADVICE}") from error
    if side.to not in FORMATS and side.plugin:
        raise RunFolderError(
            f"{path} says it is in the format {side.to!r} of the package {side.plugin['package']} "
            f"{side.plugin['version']}, which is not installed. Install it if you trust it; without it the export "
            "cannot be read."
        )
    if side.layout > LAYOUT or side.to not in FORMATS:
        raise RunFolderError(
            f"{path} is an export of layout {side.layout} in the format {side.to!r}; this dynprobe reads up to "
            f"{LAYOUT} ({', '.join(FORMATS)}). Type: pip install --upgrade dynprobe"
        )
    check_version(side.manifest.get("schema_version"), path)
    return side


def verify_files(folder: Path, side: Sidecar) -> None:
    """Compare every file with its checksum; in a Zarr store there may be no other, for it would be read too.

    Raises:
        RunFolderError: A file is missing, changed, or one too many.
    """
    for name, said in side.files.items():
        path = folder / name
        if not path.is_file():
            raise RunFolderError(f"{path} is listed in {SIDECAR} but missing. {_ADVICE}")
        if path.stat().st_size != said.bytes or hash_file(path) != said.sha256:
            raise RunFolderError(f"{path} is not what was exported ({said.bytes} bytes). {_ADVICE}")
    for table in side.tables:
        for name in table.files:
            for path in sorted((folder / name).rglob("*")) if (folder / name).is_dir() else ():
                if path.is_file() and path.relative_to(folder).as_posix() not in side.files:
                    raise RunFolderError(f"{path} is not listed in {SIDECAR}. {_ADVICE}")
