"""Read files of text as rows of JSON, each with its place in the file; what a row means is up to data/formats.py."""

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

from config import UserError
from data.formats import RowError, choose_columns, kind, parse_json

# A row's place, the row in JSON, not parsed yet, and why it cannot be read, if so.
LINES = datasets.Features(
    {"place": datasets.Value("string"), "json": datasets.Value("large_binary"), "error": datasets.Value("string")}
)
# Longest line of a file, and longest field of a table, in characters.
MAX_LINE = 2**26
# A .gz file may unpack to so many times its size, and 64 MiB more.
MAX_RATIO = 200


class NoRowsError(ValueError):
    """A .json file that holds something else than rows."""


def read_files(files: list[str], names: list[str], changed: list[Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the rows of all files, as LINES. Raises ValueError for a file that cannot be read to its end.

    names: what the rows' places begin with. changed: a key for caches.
    """
    for file, name in zip(files, names, strict=True):
        try:
            with open_file(file) as content:
                for place, row, error in READERS[file_kind(Path(file))](content):
                    yield {"place": f"{name}{place}", "json": row, "error": error}
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{name}{error}") from error


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the row, for each row of a file of text, as training reads it. Raises UserError."""
    if file_kind(path) not in READERS:
        raise UserError(f"{path}: rows are read from {', '.join(READERS)} (or .gz of them)")
    place = ""
    try:
        for row in read_files([str(path)], [""], []):
            place = f", {row['place']}"
            yield row["place"], parse_line(row)
    except (ValueError, RowError) as error:
        raise UserError(f"{path}{place}: {error}") from error


def parse_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row that one of LINES holds. Raises RowError."""
    if row["error"]:
        raise RowError("line", row["error"])
    try:
        text = row["json"].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("line", "invalid UTF-8", f"byte {error.start + 1}: {error.reason}") from error
    values = parse_json(text, "line")
    if not isinstance(values, dict):
        raise RowError("line", "not a JSON object", f"it is {kind(values)}")
    return values


def file_kind(path: Path) -> str:
    """Return the last suffix in lower case, or that of the text that is compressed: ".jsonl" for chats.JSONL.gz."""
    *_, inner, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return inner if last == ".gz" and inner in READERS else last


def has_rows(file: Path) -> bool:
    """Return whether a .json file holds anything but one object that is no row, like a summary or a configuration."""
    try:
        next(read_files([str(file)], [""], []), None)
    except ValueError as error:
        return not isinstance(error.__cause__, NoRowsError)  # other errors are reported where the file is read
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


# ---------------------------------------------------------------- JSON


def read_jsonl(file: File) -> LineRows:
    return ((f"line {number}", line, "") for number, line in enumerate(lines_of(file), start=1) if line.strip())


def read_json(file: File) -> LineRows:
    """Yield the entries of an array, the objects of a file with one per line, or a single row in several lines. Raises
    ValueError for an array that is invalid, NoRowsError for a single object that is no row."""
    if file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from read_array(file.read().decode("utf-8-sig"))
        return
    rows = list(read_jsonl(file))
    text = b"".join(row for _, row, _ in rows)
    try:
        single = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from rows
        return
    try:
        choose_columns(tuple(single))
    except (TypeError, RowError):
        raise NoRowsError("it is one object, neither an array of rows nor one row per line") from None
    yield rows[0][0], text, ""


def read_array(text: str) -> LineRows:
    """Yield the entries of a JSON array, each as it is written."""
    decoder, number, at = json.JSONDecoder(), 0, re.search(r"\[\s*", text).end()  # type: ignore[union-attr]
    closed = text.startswith("]", at)
    while not closed:
        number += 1
        try:
            _, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise ValueError(f"entry {number} is nested too deeply") from None
        yield f"entry {number}", text[at:end].encode(), ""
        separator = re.compile(r"\s*([],])\s*").match(text, end)
        if not separator:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        at, closed = separator.end(), separator[1] == "]"


# ---------------------------------------------------------------- tables of text


def read_csv(file: File, delimiter: str = "") -> LineRows:
    """Yield the rows of a table whose first line names the columns. A field may be quoted; an empty one is empty text.

    Without a delimiter it is a comma, a semicolon (Excel in much of Europe) or a tab: the one that the first line has
    most of. In a .tsv, quotes are text where they cannot be quoting: where the row would be malformed, or would swallow
    lines that are rows of their own.
    """
    csv.field_size_limit(MAX_LINE)
    lines = list(lines_of(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")))
    sniffed = delimiter or max(",;\t", key="".join(lines[:1]).count)
    columns, at, problem = read_fields(lines, 0, sniffed)
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if problem or twice:
        raise ValueError(f"line 1: {problem or f'the column {twice[0]!r} is named twice'}")
    while at < len(lines):
        values, end, problem = read_fields(lines, at, sniffed)
        swallows = end - at > 1 and all(line.count("\t") == len(columns) - 1 for line in lines[at:end])
        if delimiter == "\t" and (problem or swallows or len(values) != len(columns)):
            values, end, problem = read_fields(lines, at, delimiter, plain=True)
        if values and len(values) != len(columns):
            problem = f"{len(values)} fields, where the first line names {len(columns)}"
        place = f"line {at + 1}"
        if end - at > 1:
            place = f"lines {at + 1} to {end}"
            problem = problem and f"{problem} (a quote that is opened here takes {end - at:,} lines)"
        row, source = json.dumps(dict(zip(columns, values, strict=False))), "".join(lines[at:end])
        if values and re.search("[\ud800-\udfff]", source):
            problem = problem or "invalid UTF-8"
        if values or problem:
            yield place, source.encode("utf-8", "surrogateescape") if problem else row.encode(), problem
        at = end


def read_fields(lines: list[str], at: int, delimiter: str, plain: bool = False) -> tuple[list[str], int, str]:
    """Return the fields of the row that begins at a line, where the next row begins, and why it cannot be read.

    plain: quotes are text.
    """
    rest = map(lines.__getitem__, range(at, len(lines)))
    quoting: Literal[0, 3] = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    reader = csv.reader(rest, delimiter=delimiter, strict=True, quoting=quoting)
    try:
        return next(reader, []), at + reader.line_num, ""
    except csv.Error as error:
        return [], at + reader.line_num, f"invalid CSV: {error}"


def read_txt(file: File) -> LineRows:
    """Yield all of a file as one document."""
    text = file.read()
    try:
        yield "all of it", json.dumps({"text": text.decode("utf-8-sig")}).encode(), ""
    except UnicodeDecodeError as error:
        yield f"byte {error.start + 1}", text, f"invalid UTF-8: {error.reason}"


READERS: dict[str, Callable[[File], LineRows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".txt": read_txt,
}
