"""Conversations from anywhere, checked row by row and tokenised once.

    Hub, directory, file or built-in ──open_splits──▶ rows ──read_messages──▶ messages ──Tokenizer.render──▶ ids, mask

Everything goes through `datasets`, so the result lies on disk, is read by memory map, and is found again by its
fingerprint: what was read, the tokenizer, `max_seq_len` and this code.
"""

import importlib.metadata
import importlib.resources
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets.fingerprint import Hasher

import tokenizer as tokenizer_module
from config import UserError
from engine import vocabulary
from tokenizer import ROLES, Tokenizer


@dataclass
class DataReport:
    """What a split holds, after truncation and without the rows that were dropped."""

    name: str
    split: str
    conversations: int
    tokens: int
    trained_tokens: int
    truncated: int
    # Reason to number of rows.
    dropped: dict[str, int]

    def __str__(self) -> str:
        dropped = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items())
        return (
            f"{self.name}, {self.split}: {self.conversations:,} conversations, {self.tokens:,} tokens, "
            f"{self.trained_tokens / self.tokens:.0%} of them trained on; {self.truncated:,} conversations truncated; "
            + (dropped or "none dropped")
        )


def load_dataset_split(
    name: str, split: str, tokenizer: Tokenizer, max_seq_len: int, num_proc: int = 1, skip_bad_rows: bool = False
) -> tuple[datasets.Dataset, DataReport]:
    """One split, tokenised: columns input_ids (int32 list, at most max_seq_len) and mask (int8 list), and a report.

    name: a Hub name, a local directory, a .jsonl, .json or .parquet file, or a key of `BUILT_IN`.
    split: one of its splits, or a part of one, like "train[:95%]". A file's only split is "train".
    skip_bad_rows: drop and count malformed rows; otherwise the first raises UserError with its place and what is wrong.
    Every row kept has something to learn. Raises UserError if there is no such data, or none is left.
    """
    rows = open_split(name, split)
    if len(rows) == 0:
        raise UserError(f"{name}, split {split}, is empty")
    tokenized = tokenize(rows, tokenizer, max_seq_len, num_proc)

    for i, error in zip(tokenized["row"], tokenized["error"], strict=True):
        if error and not skip_bad_rows:
            place = f"line {rows[i]['line']}" if "json" in rows.column_names else f"split {split}, row {i}"
            raise UserError(f"{name}, {place}: {error} (--skip-bad-rows drops such rows)")
    reasons = tokenized["reason"][:]
    dropped = dict(Counter(reason for reason in reasons if reason))
    if sum(dropped.values()) == len(rows):
        causes = ", ".join(f"{count} for {reason}" for reason, count in dropped.items())
        raise UserError(f"{name}, split {split}: all {len(rows)} rows were dropped: {causes}")
    if dropped:
        tokenized = tokenized.select([i for i, reason in enumerate(reasons) if not reason]).flatten_indices()

    report = DataReport(
        name=name,
        split=split,
        conversations=len(tokenized),
        tokens=sum(tokenized["length"]),
        trained_tokens=sum(tokenized["targets"]),
        truncated=sum(tokenized["truncated"]),
        dropped=dropped,
    )
    return tokenized.select_columns(["input_ids", "mask"]), report


# --- Tokenising ---

STRING, INTEGER = datasets.Value("string"), datasets.Value("int32")
TOKENIZED = datasets.Features(
    {
        # Which row it comes from; a text that is longer than max_seq_len becomes several.
        "row": INTEGER,
        "input_ids": datasets.List(INTEGER),
        "mask": datasets.List(datasets.Value("int8")),
        "length": INTEGER,
        "targets": INTEGER,
        "truncated": datasets.Value("bool"),
        # Why the row is dropped, or nothing; and for a malformed row, what is wrong with it.
        "reason": STRING,
        "error": STRING,
    }
)


def tokenize(rows: datasets.Dataset, tokenizer: Tokenizer, max_seq_len: int, num_proc: int) -> datasets.Dataset:
    """Render every row, or say what is wrong with it; from the cache if that was done before."""
    modules = [Path(module).read_bytes() for module in (__file__, tokenizer_module.__file__, vocabulary.__file__)]
    fingerprint = Hasher.hash([rows._fingerprint, tokenizer.fingerprint(), max_seq_len, *modules])
    cache = Path(datasets.config.HF_DATASETS_CACHE, "sft-from-scratch")
    cache.mkdir(parents=True, exist_ok=True)
    return rows.map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_seq_len": max_seq_len},
        num_proc=num_proc if len(rows) > 5000 and num_proc > 1 else None,  # processes take a second to start
        features=TOKENIZED,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache / f"{fingerprint}.arrow"),
        desc="Tokenising",
    )


def tokenize_batch(
    batch: dict[str, list], indices: list[int], tokenizer: Tokenizer, max_seq_len: int
) -> dict[str, list]:
    """Rows to the columns that `tokenize` names."""
    out: dict[str, list] = defaultdict(list)
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        pieces = tokenize_text if is_text(row) else tokenize_row
        for piece in pieces(row, tokenizer, max_seq_len):
            out["row"].append(index)
            for column, value in piece.items():
                out[column].append(value)
    return out


def is_text(row: dict[str, Any]) -> bool:
    """Whether it is a document to continue, not a conversation (TRL's "language modeling" type)."""
    return isinstance(row.get("text"), str) and row.keys().isdisjoint(("messages", "conversations", "completion"))


def tokenize_text(row: dict[str, Any], tokenizer: Tokenizer, max_seq_len: int) -> Iterator[dict[str, Any]]:
    """A document, ended by a control token, in pieces of at most max_seq_len tokens; every token is trained on."""
    ids = [*tokenizer.encode(row["text"]), tokenizer.pad_token_id]
    for start in range(0, len(ids) - 1, max_seq_len):
        piece = ids[start : start + max_seq_len]
        yield {
            "input_ids": piece,
            "mask": [1] * len(piece),
            "length": len(piece),
            "targets": len(piece) - 1,
            "truncated": False,
            "reason": "" if len(piece) > 1 else "a single token",
            "error": "",
        }


def tokenize_row(row: dict[str, Any], tokenizer: Tokenizer, max_seq_len: int) -> Iterator[dict[str, Any]]:
    ids: list[int] = []
    mask: list[int] = []
    truncated, reason, error = False, "", ""
    try:
        messages = read_messages(read_json(row["json"]) if "json" in row else row)
        ids, mask = tokenizer.render(shorten(messages, (max_seq_len + 1) * tokenizer.max_token_bytes))
        truncated = len(ids) > max_seq_len
        ids, mask = ids[:max_seq_len], mask[:max_seq_len]
        if not any(mask[1:]):  # the first token of a row is never a target
            ids, mask, reason = [], [], "nothing to learn within max_seq_len tokens"
    except RowError as problem:
        reason, error = problem.reason, str(problem)
    targets = sum(mask[1:])
    yield {
        "input_ids": ids,
        "mask": mask,
        "length": len(ids),
        "targets": targets,
        "truncated": truncated,
        "reason": reason,
        "error": error,
    }


def shorten(messages: list[dict[str, str]], room: int) -> list[dict[str, str]]:
    """The beginning of a conversation that has at most `room` characters, so that a row of 50 MB costs no more."""
    if sum(len(message["content"]) for message in messages) <= room:
        return messages
    kept = []
    for message in messages:
        kept.append({"role": message["role"], "content": message["content"][: max(room, 0)]})
        room -= len(message["content"])
        if room <= 0:
            break
    return kept


# --- Rows ---


class RowError(Exception):
    """A malformed row: the field, the reason (rows are counted by it) and what was found instead."""

    def __init__(self, field: str, reason: str, detail: str = ""):
        super().__init__(f"{field}: {reason}{detail and f' ({detail})'}")
        self.reason = reason


# ShareGPT's names of roles.
ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}


def read_json(line: bytes) -> dict[str, Any]:
    """A line of a .jsonl file."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError("line", "invalid UTF-8", f"byte {error.start + 1}: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("line", "invalid JSON", str(error)) from error
    if not isinstance(row, dict):
        raise RowError("line", "not a JSON object", f"it is {kind(row)}")
    return row


def read_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row in any of the three formats to messages with a role and a content. Raises RowError."""
    if "messages" in row:
        messages = read_list(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        messages = read_list(row["conversations"], "conversations", "from", "value")
    elif "prompt" in row and "completion" in row:
        messages = read_side(row["prompt"], "prompt", "user") + read_side(row["completion"], "completion", "assistant")
    else:
        present = f"there are {', '.join(row) or 'none'}"
        raise RowError("columns", "neither messages, nor conversations, nor prompt and completion", present)
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("messages", "no assistant turn")
    return messages


def read_side(value: Any, field: str, role: str) -> list[dict[str, str]]:
    """A prompt or a completion: text, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return read_list(value, field, "role", "content")


def read_list(value: Any, field: str, role_key: str, content_key: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise RowError(field, "not a list of messages", f"it is {kind(value)}")
    if not value:
        raise RowError(field, "an empty list")
    return [read_message(message, f"{field}[{i}]", role_key, content_key) for i, message in enumerate(value)]


def read_message(message: Any, field: str, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError(field, f"not an object with {role_key} and {content_key}", f"it is {kind(message)}")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise RowError(f"{field}.{role_key}", "unknown role", f"{role!r:.60}; known are {', '.join(ROLE_NAMES)}")
    return {"role": ROLE_NAMES[role], "content": read_text(message.get(content_key), f"{field}.{content_key}")}


def read_text(content: Any, field: str) -> str:
    """Content: text, or a list of text parts, which are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(field, "not text", f"it is {kind(content)}")
    for i, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RowError(f"{field}[{i}]", "not a text part", f"it is {part!r:.60}")
    return "".join(part["text"] for part in content)


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# --- Sources ---


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
    return from_generator(read_json_file, {"line": INTEGER, "json": datasets.Value("large_binary")}, arguments)


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


def open_built_in(name: str) -> dict[str, datasets.Dataset]:
    package, generator = BUILT_IN[name]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"dataset {name} comes from PyPI: pip install {package}") from error
    messages = {"messages": datasets.List({"role": STRING, "content": STRING})}
    columns = {"text": STRING} if name == "chitchat_text" else messages
    return {s: from_generator(generator, columns, {"split": s, "version": version}) for s in ("train", "test")}


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


BUILT_IN = {
    "chitchat": ("chitchat-dataset", read_chitchat),
    "chitchat_text": ("chitchat-dataset", read_chitchat_text),
    "chatterbot": ("chatterbot-corpus", read_chatterbot),
}
