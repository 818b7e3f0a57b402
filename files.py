"""Files and directories, read and written so that nothing is lost: errors that name the place, all or nothing."""

import contextlib
import hashlib
import json
import os
import select
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from config import UserError, check

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUMS = "checksums.json"


def printable(text: str) -> str:
    """Return text from a file or a model with its control characters, except newline and tab, as U+FFFD: a terminal
    would obey them (title, clipboard, clear screen)."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


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


def replace_file(path: Path, text: str) -> None:
    """Killed at any moment, there is the old file or the new one. Raises UserError where the disk refuses."""
    temporary = path.with_suffix(".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> None:
    """A .safetensors file that may be read by whoever may read other files made here: safetensors makes it private.
    Raises OSError or SafetensorError where the disk refuses."""
    from safetensors.torch import save_file  # the command line needs no torch

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, {"format": "pt"})
    path.chmod(mode)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """What the disk refuses, as a UserError that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{place} cannot be written ({error}); what was saved before is untouched") from error


def reader_has_left(descriptor: int) -> bool:
    """Whether it is a pipe that was closed at its other end, as by `| head`: a pipe of our own may break, too."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def printing_to_nobody() -> Iterator[None]:
    """Where nobody reads what is printed any more, it is lost, and nothing else is."""
    try:
        yield
    except BrokenPipeError:
        for descriptor in filter(reader_has_left, (1, 2)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


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

    Killed at any moment, `place` has all of it or what was there before; between the two, for as long as two renames
    take, that lies beside it, and `recover` brings it back. Raises OSError or SafetensorError where the disk refuses,
    and leaves everything as it was.
    """
    temporary, old = (place.with_name(f".{place.name}.{kind}") for kind in ("tmp", "old"))
    place.parent.mkdir(parents=True, exist_ok=True)
    recover(place)
    try:
        temporary.mkdir()
        write(temporary)
        if checksums:
            write_json(temporary / CHECKSUMS, {file.name: checksum(file) for file in sorted(temporary.iterdir())})
        for written in (*temporary.iterdir(), temporary):
            flush_to_disk(written)
        if place.exists():
            place.rename(old)
        temporary.rename(place)
        flush_to_disk(place.parent)
    finally:
        recover(place)


def recover(place: Path) -> None:
    """Clear away what `write_directory` has left where it failed or was killed. What was there before comes back."""
    temporary, old = (place.with_name(f".{place.name}.{kind}") for kind in ("tmp", "old"))
    if old.exists() and not place.exists():
        old.rename(place)
    for left in (temporary, old):
        if left.exists():
            shutil.rmtree(left)


def damaged_files(directory: Path) -> list[str]:
    """Names of the files of a directory by `write_directory` that are not as they were written."""
    try:
        recorded = read_json(directory / CHECKSUMS)
    except UserError:
        return [CHECKSUMS]
    present = {file.name for file in directory.iterdir()}
    return [name for name in recorded if name not in present or checksum(directory / name) != recorded[name]]
