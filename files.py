"""Reading and writing files safely: JSON with the place in every error, atomic replacement, checksums.

What is written first goes to a new file or directory with a random name next to its place, and is renamed at the end.
So a kill leaves the old content or the new one, and nothing is written through a link.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from config import UserError

CHECKSUMS = "checksums.json"


def printable(text: str) -> str:
    """Return text from a file or a model with its control characters, except newline and tab, as U+FFFD: a terminal
    would obey them (title, clipboard, clear screen)."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


# ---------------------------------------------------------------- one file


def inside(directory: Path, name: str) -> Path:
    """Return the path of a file in a directory, given its plain name. Raises UserError, and as `check_inside`."""
    path = directory / name
    if Path(name).name != name:
        raise UserError(f"{directory}: {name!r} lies outside of the directory")
    if not path.is_file():
        raise UserError(f"{printable(str(path))} does not exist")
    check_inside(directory, path)
    return path


def check_inside(directory: Path, path: Path) -> None:
    """Raise UserError for a path that leads out of the directory. The Hub's cache links snapshots/REVISION to blobs."""
    root, place = directory.resolve(), path.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(place.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise UserError(f"{printable(str(path))} lies outside of the directory, at {place}; copy it into {directory}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError, naming the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {printable(str(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object")
    return content


def read_value(kind: Any, value: Any, name: str) -> Any:
    """Return a value from JSON as the declared type of its field. Raises TypeError."""
    options = get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        kinds = get_type_hints(kind)
        return kind(**{key: read_value(kinds.get(key), entry, f"{name}.{key}") for key, entry in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(read_value(options[0], entry, name) for entry in value)
    if get_origin(kind) in (Union, UnionType):
        problems = []
        for option in options:
            try:
                return read_value(option, value, name)
            except TypeError as problem:
                problems.append(problem)
        raise problems[0]  # a field of the first option may be what is wrong
    allowed = value in options if get_origin(kind) is Literal else type(value) is kind
    if allowed or (kind is float and type(value) is int):
        return value
    raise TypeError(f"{name} is {value!r}, which is not of type {kind.__name__ if isinstance(kind, type) else kind}")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON like `replace_file`."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new empty file next to `path`, which replaces it at the end of the block unless there is an error."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file atomically, making its directory if needed. Raises UserError if the disk refuses."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Raise an error of the disk as a UserError that names the place."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error}); what was saved before is untouched") from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows does not open directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- a directory, all or nothing


def write_directory(place: Path, write: Callable[[Path], dict[str, str] | None], checksums: bool = True) -> None:
    """Let `write` fill a new directory, add its files' checksums, and put it at `place` once all of it is on the disk.

    A directory that is at `place` already, such as a damaged checkpoint, is deleted just before. A kill at any moment
    leaves either all of the new directory there or none. write: may return checksums that it has computed, by relative
    path, of files that it has flushed. Raises OSError if the disk refuses.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (place.with_name(f".{place.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        temporary.mkdir()
        known = write(temporary) or {}
        names = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
        if checksums:
            write_json(temporary / CHECKSUMS, {name: known.get(name) or checksum(temporary / name) for name in names})
        for path in (*temporary.rglob("*"), temporary):
            if path.relative_to(temporary).as_posix() not in known:
                flush_to_disk(path)
        if place.exists():
            place.rename(replaced)
        temporary.rename(place)
    finally:
        for left in (temporary, replaced):
            if left.exists():
                delete_directory(left)
    with contextlib.suppress(OSError):  # it is in place; only a power cut could still undo the rename
        flush_to_disk(place.parent)


def delete_directory(path: Path) -> None:
    """Delete a directory. Warn if that fails: it costs space, and nothing else. A link is never followed."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: {path} cannot be deleted ({error})", file=sys.stderr)


def damaged_files(directory: Path) -> list[str]:
    """Names of the files of a directory by `write_directory` that are not as they were written."""
    try:
        recorded = read_json(directory / CHECKSUMS)
    except UserError:
        return [CHECKSUMS]
    present = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return [name for name, known in recorded.items() if name not in present or checksum(present[name]) != known]
