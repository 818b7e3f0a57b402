"""Files and directories, read and written so that nothing is lost: errors that name the place, all or nothing."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from config import UserError, check

CHECKSUMS = "checksums.json"


# ---------------------------------------------------------------- one file


def inside(directory: Path, name: str) -> Path:
    """A file of the directory, by its plain name. Links may lead to the blobs of a Hub cache and nowhere else.
    Raises UserError."""
    root = directory.resolve()
    path = directory / name
    check(Path(name).name == name, f"{directory}: {name!r} lies outside of the directory")
    check(path.is_file(), f"{path} does not exist")
    safe = path.resolve().parent in (root, root.parent.parent / "blobs")
    check(safe, f"{path} lies outside of the directory, at {path.resolve()}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError, with the place, for what is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    check(isinstance(content, dict), f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_readable(path: Path) -> None:
    """For whoever may read its neighbours: safetensors makes files that nobody else may read."""
    path.chmod(0o644)


def replace_file(path: Path, text: str) -> None:
    """Killed at any moment, there is the old file or the new one. Raises UserError where the disk refuses."""
    temporary = path.with_suffix(".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """What the disk refuses, as a UserError that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{place} cannot be written ({error}); what was saved before is untouched") from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- a directory, all or nothing


def write_directory(place: Path, write: Callable[[Path], None], checksums: bool = True) -> None:
    """Let `write` fill a new directory, add its files' checksums, and put it at `place` once all of it is on the disk.

    Killed at any moment, `place` has all of it or what was there before. Raises OSError or SafetensorError where the
    disk refuses, and leaves everything as it was.
    """
    temporary, old = (place.with_name(f".{place.name}.{kind}") for kind in ("tmp", "old"))
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(place.parent)
    try:
        temporary.mkdir()
        write(temporary)
        if checksums:
            write_json(temporary / CHECKSUMS, {file.name: checksum(file) for file in sorted(temporary.iterdir())})
        for written in (*temporary.iterdir(), temporary):
            flush_to_disk(written)
        if place.exists():
            place.rename(old)
        try:
            temporary.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
        flush_to_disk(place.parent)
    finally:
        remove_unfinished(place.parent)


def remove_unfinished(parent: Path) -> None:
    """What a kill in the middle of `write_directory` has left."""
    for directory in (*parent.glob(".*.tmp"), *parent.glob(".*.old")):
        shutil.rmtree(directory)


def damaged_files(directory: Path) -> list[str]:
    """Names of the files of a directory by `write_directory` that are not as they were written."""
    try:
        recorded = read_json(directory / CHECKSUMS)
    except UserError:
        return [CHECKSUMS]
    present = {file.name for file in directory.iterdir()}
    return [name for name in recorded if name not in present or checksum(directory / name) != recorded[name]]
