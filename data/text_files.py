"""Read files of text as rows of JSON, each with its place in the file; what a row means is up to data/formats.py."""

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal

import datasets

from data.formats import RowError, choose_columns, kind, parse_json

# A row's place, the row in JSON, not parsed yet, and why it cannot be read, if so.
LINES = datasets.Features(
    {"place": datasets.Value("string"), "json": datasets.Value("large_binary"), "error": datasets.Value("string")}
)
# Longest line of a file, and longest field of a table, in characters.
MAX_LINE = 2**26
# A .gz file may unpack to at most this many times its size, and 64 MiB more.
MAX_RATIO = 200


def read_files(files: list[str], names: list[str], changed: list[Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the rows of all files, as LINES. Raises ValueError for a file that cannot be read to its end.

    names: what the rows' places begin with. changed: a key for caches.
    """
    for file, name in zip(files, names, strict=True):
        try:
            with open_file(file) as content:
                for place, row, error in READERS[file_kind(Path(file))](content):
                    yield {"place": f"{name}{place}", "json": row, "error": error}
        except (ValueError, EOFError, OSError, RecursionError) as error:
            raise ValueError(f"{name}{error}") from None


def parse_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row that one of LINES holds. Raises RowError."""
    if row["error"]:
        raise RowError("line", row["error"])
    values = parse_json(row["json"], "line")
    if not isinstance(values, dict):
        raise RowError("line", "not a JSON object", f"it is {kind(values)}")
    return values


def file_kind(path: Path) -> str:
    """Return the last suffix in lower case, or that of the text that is compressed: ".jsonl" for chats.JSONL.gz."""
    *_, inner, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return inner if last == ".gz" and inner in READERS else last


def has_rows(file: Path) -> bool:
    """Return whether a file has rows. One that cannot be read counts: the error is reported where its rows are."""
    try:
        return next(read_files([str(file)], [""], []), None) is not None
    except ValueError:
        return True


# ---------------------------------------------------------------- opening files

File = io.BufferedReader
# A row's place in a file, the row in JSON, and ""; or the row as it is in the file, and why it cannot be read.
LineRows = Iterator[tuple[str, bytes, str]]


class Unpacked(gzip.GzipFile):
    """The content of a .gz file. Raises ValueError where that is far more than text would be."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > MAX_RATIO * os.path.getsize(self.name) + MAX_LINE:
            raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size (MAX_RATIO in data/text_files.py)")
        return super().read(size if size and size > 0 else io.DEFAULT_BUFFER_SIZE)


def open_file(file: str) -> File:
    return io.BufferedReader(Unpacked(file)) if file.lower().endswith(".gz") else open(file, "rb")


def lines_of(file: Any) -> Iterator[Any]:
    """Yield the lines of a file. Raises ValueError for a line above MAX_LINE."""
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} is longer than {MAX_LINE:,} characters (MAX_LINE in data/text_files.py)")
        if not line:
            return
        yield line


# ---------------------------------------------------------------- the formats


def read_jsonl(file: Any) -> LineRows:
    return ((f"line {number}", line, "") for number, line in enumerate(lines_of(file), start=1) if line.strip())


def read_json(file: File) -> LineRows:
    """Yield the entries of an array, the objects of a file with one per line, or a single row in several lines; nothing
    for a single object that is not a row. Raises ValueError for an invalid array."""
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text)
    except (ValueError, RecursionError):
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise
        yield from read_jsonl(io.BytesIO(content))
        return
    if isinstance(found, list):
        yield from array_entries(text)
    elif isinstance(found, dict):
        with contextlib.suppress(RowError):
            choose_columns(tuple(found))
            yield "line 1", content, ""


def array_entries(text: str) -> LineRows:
    """Yield the entries of a valid JSON array, each as it is written."""
    separator, decoder, end = re.compile(r"[\s,]*"), json.JSONDecoder(), text.index("[") + 1
    for number in itertools.count(1):
        start = separator.match(text, end).end()  # type: ignore[union-attr]
        if text[start] == "]":
            return
        _, end = decoder.raw_decode(text, start)
        yield f"entry {number}", text[start:end].encode(), ""


def read_csv(file: File, delimiter: str = "") -> LineRows:
    """Yield the rows of a table whose first line names the columns. A field may be quoted; an empty one is empty text.

    Without a delimiter it is a comma, a semicolon (Excel in much of Europe) or a tab: the one that the first line has
    most of. In a .tsv, quotes are text where they cannot be quoting: where the row would be malformed, or would swallow
    lines that are rows of their own.
    """
    csv.field_size_limit(MAX_LINE)
    lines = list(lines_of(io.StringIO(file.read().decode("utf-8-sig", "surrogateescape"), newline="")))
    sniffed = delimiter or max(",;\t", key="".join(lines[:1]).count)
    columns, at, problem = read_fields(lines, 0, sniffed)
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if problem or twice:
        raise ValueError(f"line 1: {problem or f'the column {twice[0]!r} is named twice'}")
    while at < len(lines):
        values, end, problem = read_fields(lines, at, sniffed)
        swallows = end - at > 1 and all(line.count("\t") == len(columns) - 1 for line in lines[at:end])
        if delimiter == "\t" and (problem or swallows or len(values) != len(columns)):
            values, end, problem = read_fields(lines, at, delimiter, csv.QUOTE_NONE)
        if values and len(values) != len(columns):
            problem = f"{len(values)} fields, where the first line names {len(columns)}"
        place = f"line {at + 1}"
        if end - at > 1:
            place = f"lines {at + 1} to {end}"
            problem = problem and f"{problem} (a quote that is opened here takes {end - at:,} lines)"
        source = "".join(lines[at:end]).encode("utf-8", "surrogateescape")
        if re.search("[\udc80-\udcff]", "".join(values)):
            problem = problem or "invalid UTF-8"
        if problem:
            yield place, source, problem
        elif values:
            yield place, json.dumps(dict(zip(columns, values, strict=True))).encode(), ""
        at = end


def read_fields(
    lines: list[str], at: int, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> tuple[list[str], int, str]:
    """Return the fields of the row that begins at a line, where the next row begins, and why it cannot be read."""
    reader = csv.reader(
        map(lines.__getitem__, range(at, len(lines))), delimiter=delimiter, strict=True, quoting=quoting
    )
    try:
        return next(reader, []), at + reader.line_num, ""
    except csv.Error as error:
        return [], at + reader.line_num, f"invalid CSV: {error}"


def read_txt(file: File) -> LineRows:
    """Yield all of a file as one document."""
    yield "all of it", json.dumps({"text": file.read().decode("utf-8-sig")}).encode(), ""


READERS: dict[str, Callable[[File], LineRows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".txt": read_txt,
}
