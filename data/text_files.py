"""Files of text as rows in JSON, each with its place in the file; formats.py reads what they say."""

import csv
import functools
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from data.formats import RowError, kind

# A row's place, itself in JSON and not parsed yet, or else why it can't be read.
LINES = {"place": datasets.Value("string"), "json": datasets.Value("large_binary"), "error": datasets.Value("string")}


def as_text(row: dict[str, Any]) -> str:
    """A row as a person knows it."""
    if row.keys() == LINES.keys():
        return row["json"].decode("utf-8", "replace").rstrip("\r\n")
    return json.dumps(row, ensure_ascii=False, default=str)


def parse_line(row: dict[str, Any]) -> dict[str, Any]:
    """One of LINES as the row that it holds. Raises RowError."""
    if row["error"]:
        raise RowError("line", row["error"])
    try:
        values = json.loads(row["json"].decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError("line", "invalid UTF-8", f"byte {error.start + 1}: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("line", "invalid JSON", str(error)) from error
    if not isinstance(values, dict):
        raise RowError("line", "not a JSON object", f"it is {kind(values)}")
    return values


def read_files(files: list[str], names: list[str], changed: list[Any]) -> Generator[dict[str, Any], None, None]:
    """The rows of all files, as LINES has them. Raises ValueError for one that cannot be read on."""
    for file, name in zip(files, names, strict=True):
        read = READERS[file_kind(Path(file))]
        try:
            with gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb") as content:
                for line, row, error in read(content):
                    yield {"place": f"{name}{line}", "json": row, "error": error}
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{name}{error}") from error


File = io.BufferedReader | gzip.GzipFile
# A row's place in a file, the row in JSON, and ""; or as it stands there, and why it can't be read.
Rows = Iterator[tuple[str, bytes, str]]


def read_jsonl(file: File) -> Rows:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"line {number}", line, ""


def read_json(file: File) -> Rows:
    """An array, or one object a line. Raises ValueError for one object in several lines."""
    if not file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        first = next(read_jsonl(file), ("", b"{}", ""))[1]
        rest = file.read() if not is_json(first) else b""
        if rest and is_json(first + rest):
            raise ValueError("it is neither an array nor one object a line, but one object")
        file.seek(0)
        yield from read_jsonl(file)
        return
    for number, row in enumerate(json.load(io.TextIOWrapper(file, "utf-8-sig")), start=1):
        yield f"entry {number}", json.dumps(row).encode(), ""


def is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def read_csv(file: File, delimiter: str) -> Rows:
    """The first line names the columns. An empty field is an empty text."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    lines: list[str] = []  # of the row that is being read
    rows = csv.reader(noted(text, lines), delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
    except csv.Error as error:
        raise ValueError(f"line 1: invalid CSV: {error}") from error
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise ValueError(f"line 1 names the column {twice[0]!r} twice")
    while True:
        lines.clear()
        first = rows.line_num + 1
        try:
            row, problem = next_row(rows, columns), ""
        except ValueError as error:
            row, problem = "".join(lines).encode("utf-8", "surrogateescape"), str(error)
        if not lines:
            return
        place = f"line {first}"
        if len(lines) > 1:
            place = f"lines {first} to {rows.line_num}"
            problem = problem and f"{problem} (a quote that is opened here takes {len(lines):,} lines)"
        if row:
            yield place, row, problem


def noted(text: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The text's lines, each put down in `lines` before it is read."""
    for line in text:
        lines.append(line)
        yield line


def next_row(rows: Iterator[list[str]], columns: list[str]) -> bytes:
    """In JSON; nothing for an empty line. Raises ValueError for what cannot be read."""
    try:
        values = next(rows, [])
    except csv.Error as error:
        raise ValueError(f"invalid CSV: {error}") from error
    if values and len(values) != len(columns):
        raise ValueError(f"{len(values)} fields, where the first line names {len(columns)}")
    try:
        return json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False).encode() if values else b""
    except UnicodeEncodeError as error:
        raise ValueError("invalid UTF-8") from error


def read_txt(file: File) -> Rows:
    """All of it is one document."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield f"byte {error.start + 1}", error.object, f"invalid UTF-8: {error.reason}"
    else:
        yield "all of it", json.dumps({"text": text}).encode(), ""


READERS: dict[str, Callable[[File], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": functools.partial(read_csv, delimiter=","),
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".txt": read_txt,
}


def file_kind(path: Path) -> str:
    """Its last suffix in small letters, or that of the text that is compressed: ".jsonl" of chats.JSONL.gz."""
    *_, inner, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return inner if last == ".gz" and inner in READERS else last
