"""Looking at the files of a run: those the manifest lists, and those it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dynprobe.errors import RunFolderError
from dynprobe.runs._atomic import TEMPORARY
from dynprobe.runs._damage_report import Damage
from dynprobe.runs._manifest import Manifest, Part
from dynprobe.runs._schema import TABLES
from dynprobe.runs._tables import check_footer, hash_file

__all__ = ["ASIDE", "check_parts", "check_strangers", "strangers"]

#: Folder into which a repair moves what it takes out of a run.
ASIDE = "damaged"


def check_parts(folder: Path, manifest: Manifest, busy: bool = False) -> Iterator[Damage]:
    """Yield what is wrong with the listed files.

    Args:
        folder: The run folder.
        manifest: Its manifest.
        busy: Whether a writer is at work; the hashes, which take long, are left out then.
    """
    layouts: dict[str, tuple[pa.Schema, str]] = {}
    for part in manifest.parts:
        kind, what = _fault(folder, part, busy)
        if not kind:
            kind, what = _layout(folder, part, layouts)
        if kind:
            what = f"{what}; import it again" if manifest.imported else what
            remedy = "" if manifest.imported else _again(part)
            yield Damage(kind, part.path, what, remedy, part.table, part.batch, part.rows)


def _fault(folder: Path, part: Part, busy: bool) -> tuple[str, str]:
    path = folder / part.path
    lost = f"{part.rows:,} rows of {part.table}" + ("" if part.batch is None else f", batch {part.batch}")
    try:
        size = path.stat().st_size
        if size != part.bytes:
            word = "cut short" if size < part.bytes else "longer than it was"
            return "cut", f"it is {word}: {size:,} of {part.bytes:,} bytes ({lost})"
        if not busy and hash_file(path) != part.sha256:
            return "changed", f"its content is not what was written, {_readable(path)} ({lost})"
    except FileNotFoundError:
        return "missing", f"the manifest lists it and it is not there ({lost})"
    except OSError as error:
        return "changed", f"it cannot be read: {error} ({lost})"
    return "", ""


def _readable(path: Path) -> str:
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        return f"and it cannot be read any more: {str(error).splitlines()[0]}"
    return "though it can still be read"


def _layout(folder: Path, part: Part, layouts: dict[str, tuple[pa.Schema, str]]) -> tuple[str, str]:
    """Whether the file is of its table, of this layout, and fits the parts before it."""
    path = folder / part.path
    try:
        schema = pq.read_schema(path)
        check_footer(schema, part.table, path)
        if pq.read_metadata(path).num_rows != part.rows:
            return "layout", f"it holds another number of rows than the {part.rows:,} that the manifest lists"
        before, _ = layouts.get(part.table, (None, ""))
        if before is not None:
            schema = pa.unify_schemas([before, schema], promote_options="permissive")
    except RunFolderError as error:
        return "layout", str(error).removeprefix(f"{path} is damaged: ").split(". Type:")[0]
    except (pa.ArrowException, OSError) as error:
        return "layout", f"its columns do not fit the other parts of {part.table}: {str(error).splitlines()[0]}"
    layouts[part.table] = (schema, part.path)
    return "", ""


def _again(part: Part) -> str:
    if part.batch is None:
        return "take it out; the same command writes the table again"
    return f"take batch {part.batch} out; the same command makes it again"


def check_strangers(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    """Yield files in places of the run's own that the manifest does not list."""
    for path, kind in strangers(folder, {part.path for part in manifest.parts}):
        aside = f"move it to {ASIDE}/"
        if kind == "temporary":
            yield Damage("temporary", path, "a writer that was killed left it unfinished", aside)
            continue
        table = path.split("/")[0].removesuffix(".parquet")
        number = Path(path).stem.split("-")[1:2]
        batch = int(number[0]) if number and number[0].isdigit() else None
        why = "of a batch that was never finished, or copied in"
        if batch is not None and batch in manifest.finished:
            why = f"beside batch {batch}, which is finished without it: copied in, or taken out of the manifest"
        yield Damage(
            "orphan", path, f"the manifest does not list it ({why}); readers do not see it", aside, table, batch
        )


def strangers(folder: Path, listed: set[str]) -> list[tuple[str, str]]:
    """Return temporary files, and unlisted Parquet files where tables lie; with any other name a file is the user's."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top = name.split("/")[0]
        if top == ASIDE or not path.is_file():
            continue
        if path.name.startswith(TEMPORARY):
            found.append((name, "temporary"))
        elif path.suffix == ".parquet" and name not in listed and top.removesuffix(".parquet") in TABLES:
            found.append((name, "orphan"))
    return found
