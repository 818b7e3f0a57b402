"""Where rows come from: the Hub, directories, files, and sets that pip installs; each row with its place.

What a row says is not looked at here: formats.py reads it.
"""

import contextlib
import importlib.metadata
import importlib.resources
import itertools
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml
from datasets.fingerprint import Hasher
from pyarrow import parquet

from config import UserError, check
from data import text_files
from data.text_files import LINES, READERS, file_kind, read_files

KINDS = (*READERS, ".parquet")
STRING = datasets.Value("string")
TEXT, MESSAGES = {"text": STRING}, {"messages": datasets.List({"role": STRING, "content": STRING})}


def open_split(name: str, split: str) -> datasets.Dataset:
    """The rows of a split or of a part of one. Raises UserError; of a wrong split, with the valid ones."""
    splits = open_splits(name)
    rows = [splits[part].select(places) for part, places in parts_of(name, splits, split)]
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)


def parts_of(name: str, splits: dict[str, datasets.Dataset], split: str) -> list[tuple[str, range]]:
    """What "train[5:]+test" means: names of splits and rows of each. Raises UserError for what there is not."""
    sizes = {key: len(rows) for key, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{name} has no split {split!r}, only {', '.join(sizes)} (or parts: train[:95%])") from error
    return [(part.splitname, range(part.from_, part.to)) for part in parts]


def open_splits(name: str) -> dict[str, datasets.Dataset]:
    """All splits of a source, untouched. Raises UserError for what cannot be read."""
    path = Path(name)
    try:
        if name in BUILT_IN:
            return open_built_in(name)
        if Path(name, "dataset_dict.json").exists():
            return datasets.load_from_disk(name)
        if Path(name, "dataset_info.json").exists():
            return {"train": datasets.load_from_disk(name)}
        if path.is_file():
            check(file_kind(path) in KINDS, f"{name} is no file that can be read: {', '.join(KINDS)} (or .gz of them)")
        if has_plain_files(name):
            return {split: open_files(name, files) for split, files in files_of(path).items()}
        check(path.exists() or file_kind(path) not in KINDS, f"there is no file {name}")
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


def places(name: str, split: str, rows: datasets.Dataset, numbers: list[int]) -> list[str]:
    """Where a person finds these rows of a split, which are numbered from 0 on: a line, or a row counted from 1."""
    if rows.column_names == list(LINES):
        return rows.select(numbers)["place"][:]
    tables = list(rows_of_tables(name, split)) or [(f"split {split}, ", range(len(rows)))]
    ends = list(itertools.accumulate(len(own) for _, own in tables))
    found = [(number, bisect_right(ends, number)) for number in numbers]
    return [f"{tables[i][0]}row {tables[i][1][number - ends[i]] + 1}" for number, i in found]


# ---------------------------------------------------------------- files


def has_plain_files(name: str) -> bool:
    """Whether it is a file, or a directory whose files' names say which splits they are."""
    return name not in BUILT_IN and Path(name).exists() and not describes_itself(Path(name))


def describes_itself(directory: Path) -> bool:
    """Whether it says which of its files are which splits: as `datasets` saves them, or as on the Hub."""
    readme, saved = directory / "README.md", ("dataset_dict.json", "dataset_info.json")
    listed = readme.is_file() and "\ndata_files:" in readme.read_text("utf-8", "replace").replace("  ", "")
    return listed or any((directory / mark).exists() for mark in saved)


def files_of(path: Path) -> dict[str, list[Path]]:
    """The files of each split: a file itself, or those below a directory. Raises UserError where there are none that
    can be read."""
    if path.is_file():
        return {"train": [path]}
    splits = defaultdict(list)
    for file in files_below(path):
        if file_kind(file) in KINDS:
            splits[split_of(file.relative_to(path))].append(file)
    check(splits != {}, f"{path} cannot be read as a dataset: it has none of {', '.join(KINDS)}")
    return dict(splits)


def files_below(directory: Path) -> list[Path]:
    """Without hidden ones: those are copies of editors and notebooks."""
    files = [path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file()]
    return [directory / file for file in files if not any(part.startswith(".") for part in file.parts)]


def unread_files(name: str) -> list[str]:
    """Of a directory, the files of a kind that is not read."""
    below = files_below(Path(name)) if has_plain_files(name) else []
    return [str(file.relative_to(name)) for file in below if file_kind(file) not in KINDS]


def label(file: Path, name: str) -> str:
    """What tells a file of a source from the others."""
    return "" if file == Path(name) else f"{file.relative_to(name)}, "


def rows_of_tables(name: str, split: str) -> Iterator[tuple[str, range]]:
    """The files of tables that a split has, and the rows of each that belong to it."""
    files = files_of(Path(name)) if has_plain_files(name) else {}
    for part, span in parts_of(name, open_splits(name), split) if files else ():
        start = 0
        for file in files[part]:
            count = parquet.read_metadata(file).num_rows
            yield label(file, name), range(max(span.start - start, 0), min(span.stop - start, count))
            start += count


SPLIT_WORDS = {
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}


def split_of(path: Path) -> str:
    """A file's split, by its name or its directory's: "test" of test.jsonl and test/a.csv, "train" where none is said;
    and that of a shard, like train_sft-00000-of-00004.parquet."""
    shard = re.match(r"(\w+)-\d{5}-of-\d{5}", path.name)
    words = re.split(r"[^a-z]+", str(path).lower())
    return shard[1] if shard else next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def open_files(name: str, files: list[Path]) -> datasets.Dataset:
    """The rows of all files, one after another."""
    tables = [str(path) for path in files if file_kind(path) == ".parquet"]
    check(len(tables) in (0, len(files)), f"{name} has .parquet and other files; take one kind")
    if tables:
        return datasets.load_dataset("parquet", data_files=tables, split="train")
    stats = [path.stat() for path in files]
    arguments: dict[str, Any] = {
        "files": [str(path.resolve()) for path in files],
        "names": [label(path, name) for path in files],
        "changed": [(stat.st_size, stat.st_mtime_ns) for stat in stats],
    }
    with contextlib.closing(read_files(**arguments)) as rows:
        check(next(rows, None) is not None, f"{name} is empty")
    return from_generator(read_files, LINES, arguments)


def from_generator(generator: Callable, columns: dict[str, Any], arguments: dict[str, Any]) -> datasets.Dataset:
    """Rows from Python into the cache; `arguments` must change when the data does."""
    code = [Path(file).read_bytes() for file in (__file__, text_files.__file__)]
    fingerprint = Hasher.hash([generator.__name__, arguments, *code])
    return datasets.Dataset.from_generator(
        generator, datasets.Features(columns), gen_kwargs=arguments, fingerprint=fingerprint
    )


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

    Whoever writes first is the user; messages that follow each other from one sender are one turn. Four
    conversations in which the assistant has an empty turn are left out.
    """
    import chitchat_dataset

    conversations = []
    for conversation in chitchat_dataset.Dataset().values():
        utterances = itertools.chain(*conversation["messages"])
        turns = [(sender, list(turn)) for sender, turn in itertools.groupby(utterances, lambda u: u["sender"])]
        if len({sender for sender, _ in turns}) == 2:
            conversations.append([" ".join(u["text"] for u in turn) for _, turn in turns])
    for i, texts in enumerate(conversations):
        if (i % 20 == 19) == (split == "test") and all(text.strip() for text in texts[1::2]):
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
