"""Where rows come from: the Hub, directories, files, and sets that pip installs; each row with its place.

What a row says is not looked at here: formats.py reads it.
"""

import importlib.metadata
import importlib.resources
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml
from datasets.fingerprint import Hasher

from config import UserError

# Columns of a file of JSON: its lines with their numbers, not parsed yet.
LINES = {"line": datasets.Value("int32"), "json": datasets.Value("large_binary")}
STRING = datasets.Value("string")
TEXT, MESSAGES = {"text": STRING}, {"messages": datasets.List({"role": STRING, "content": STRING})}


def open_split(name: str, split: str) -> datasets.Dataset:
    """The rows of a split or of a part of one. Raises UserError; of a wrong split, with the valid ones."""
    splits = open_splits(name)
    sizes = {key: len(rows) for key, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{name} has no split {split!r}, only {', '.join(sizes)} (or parts: train[:95%])") from error
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)


def open_splits(name: str) -> dict[str, datasets.Dataset]:
    """All splits of a source, untouched."""
    try:
        if name in BUILT_IN:
            return open_built_in(name)
        if Path(name).suffix in (".jsonl", ".json", ".parquet"):
            return {"train": open_file(name)}
        if Path(name, "dataset_dict.json").exists():
            return datasets.load_from_disk(name)
        if Path(name, "dataset_info.json").exists():
            return {"train": datasets.load_from_disk(name)}
        return datasets.load_dataset(name)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(f"{name} is no local directory, and the Hub cannot be reached: {error}") from error
    except Exception as error:  # whatever the reader of some format or the Hub's client raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{name} cannot be read as a dataset: {' '.join(str(cause).split())}") from error


def place(rows: datasets.Dataset, i: int, split: str) -> str:
    """Where a person finds row i of a split."""
    return f"line {rows[i]['line']}" if rows.column_names == list(LINES) else f"split {split}, row {i}"


# ---------------------------------------------------------------- files


def open_file(name: str) -> datasets.Dataset:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no file {name}")
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=name, split="train")
    stat = path.stat()
    arguments: dict[str, Any] = {"path": str(path.resolve()), "size": stat.st_size, "mtime": stat.st_mtime_ns}
    if next(read_json_file(**arguments), None) is None:
        raise UserError(f"{name} is empty")
    return from_generator(read_json_file, LINES, arguments)


def from_generator(generator: Callable, columns: dict[str, Any], arguments: dict[str, Any]) -> datasets.Dataset:
    """Rows from Python into the cache; `arguments` must change when the data does."""
    fingerprint = Hasher.hash([generator.__name__, arguments, Path(__file__).read_bytes()])
    return datasets.Dataset.from_generator(
        generator, datasets.Features(columns), gen_kwargs=arguments, fingerprint=fingerprint
    )


def read_json_file(path: str, size: int, mtime: int) -> Iterator[dict[str, Any]]:
    """The lines of a file with their numbers, not parsed yet; of a JSON array, its elements."""
    with open(path, "rb") as file:
        is_array = path.endswith(".json") and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        file.seek(0)
        lines: Iterable[bytes] = (json.dumps(row).encode() for row in json.load(file)) if is_array else file
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield {"line": number, "json": line}


# ---------------------------------------------------------------- sets that pip installs


def open_built_in(name: str) -> dict[str, datasets.Dataset]:
    package, columns, read = BUILT_IN[name]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"dataset {name} comes from PyPI: pip install {package}") from error
    return {s: from_generator(read, columns, {"split": s, "version": version}) for s in ("train", "test")}


def read_chitchat(split: str, version: str) -> Iterator[dict[str, Any]]:
    """Chit Chat Challenge: people talking in pairs. Every 20th conversation is held out.

    Whoever writes first is the user; messages that follow each other from one sender are one turn.
    """
    import chitchat_dataset

    conversations = []
    for conversation in chitchat_dataset.Dataset().values():
        utterances = itertools.chain(*conversation["messages"])
        turns = [(sender, list(turn)) for sender, turn in itertools.groupby(utterances, lambda u: u["sender"])]
        if len({sender for sender, _ in turns}) == 2:
            conversations.append([" ".join(u["text"] for u in turn) for _, turn in turns])
    for i, texts in enumerate(conversations):
        if (i % 20 == 19) == (split == "test"):
            yield as_row(texts)


def read_chitchat_text(split: str, version: str) -> Iterator[dict[str, Any]]:
    """The same conversations as text to continue, a turn a line: for pre-training."""
    for row in read_chitchat(split, version):
        yield {"text": "\n".join(message["content"] for message in row["messages"])}


def read_chatterbot(split: str, version: str) -> Iterator[dict[str, Any]]:
    """chatterbot-corpus: an assistant's small talk.

    Held out is every fifth of the conversations whose opening has several answers, so that no opening is lost.
    """
    folder = importlib.resources.files("chatterbot_corpus") / "data" / "english"
    conversations: list[Sequence[str]] = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yml") and file.name not in ("coding.yml", "tech_support.yml"):
            entries = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
            conversations += [e.split(" - ") if isinstance(e, str) else e for e in entries]  # one lacks its line break
    answers = defaultdict(set)
    for texts in conversations:
        answers[texts[0]].add(texts[1])
    several = [i for i, texts in enumerate(conversations) if len(answers[texts[0]]) > 1]
    held_out = set(several[4::5])
    for i, texts in enumerate(conversations):
        if (i in held_out) == (split == "test"):
            yield as_row(texts)


def as_row(texts: Sequence[str]) -> dict[str, Any]:
    """What a user and an assistant say in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


class BuiltIn(NamedTuple):
    """A set that a package on PyPI carries."""

    package: str
    columns: dict[str, Any]
    # Its rows, from a split's name and the package's version.
    read: Callable[[str, str], Iterator[dict[str, Any]]]


BUILT_IN = {
    "chitchat": BuiltIn("chitchat-dataset", MESSAGES, read_chitchat),
    "chitchat_text": BuiltIn("chitchat-dataset", TEXT, read_chitchat_text),
    "chatterbot": BuiltIn("chatterbot-corpus", MESSAGES, read_chatterbot),
}
