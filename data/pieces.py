"""Cut rows into pieces of at most max_seq_len tokens, which are what is trained on.

A conversation that fits is one piece. A longer one is either cut off (`truncate`) or becomes several (`split`):

    system  user 1  assistant 1  user 2  assistant 2  user 3  assistant 3
    ──────  ──────────────────────────────────────                           first piece: all that fits
    ──────                       ───────────────────  ▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔    second: earlier turns are context
"""

import hashlib
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher

from config import DataConfig, UserError
from data.formats import Message, RowError, parse_columns, read_row
from data.sources import Rows
from tokenizer import CHAT_TEMPLATES, Tokenizer

INTEGER, STRING = datasets.Value("int32"), datasets.Value("string")
# The columns that describe a row as a whole hold 0 or nothing in all but its first piece.
PIECE = datasets.Features(
    {
        # Number of the row in the source, and index among the row's pieces.
        "row": INTEGER,
        "piece": INTEGER,
        "input_ids": datasets.List(INTEGER),
        "mask": datasets.List(datasets.Value("int8")),
        "length": INTEGER,
        # Tokens that are trained on: the first of a piece is never a target.
        "targets": INTEGER,
        # Of the row, 0 or 1: whether something is cut, and whether it contains control tokens of a template as text.
        "cut": INTEGER,
        "templated": INTEGER,
        # A hash of what the row says, whatever its format; 0 for a malformed row.
        "content": datasets.Value("int64"),
        # Of the row: the columns it was read from, and the names of its unused fields, one per line.
        "read_as": STRING,
        "unused": STRING,
        # Why the row is dropped, or nothing; and what is wrong with a malformed row.
        "reason": STRING,
        "error": STRING,
    }
)
TEXTS = ("read_as", "unused", "reason", "error")
EMPTY = {**dict.fromkeys(PIECE, 0), **dict.fromkeys(TEXTS, ""), "input_ids": [], "mask": []}
# The modules that determine what is tokenised.
CODE = (__name__, "data.formats", "data.text_files", "vocabulary", "tokenizer")
CONTROL_TOKENS = {token for template in CHAT_TEMPLATES.values() for token in template.control_tokens}
CONTROL_TEXT = re.compile("|".join(map(re.escape, sorted(CONTROL_TOKENS))))


def tokenize(rows: Rows, tokenizer: Tokenizer, data: DataConfig) -> datasets.Dataset:
    """Return the pieces of all rows, with the columns of PIECE; from the cache if they were tokenised before."""
    settings: dict[str, Any] = {name: getattr(data, name) for name in ("max_seq_len", "long_conversations")}
    settings["columns"] = parse_columns(data.columns)
    code = [Path(str(sys.modules[name].__file__)).read_bytes() for name in CODE]
    fingerprint = Hasher.hash([rows.table._fingerprint, tokenizer.fingerprint(), settings, *code])
    return rows.table.map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.table.column_names,
        fn_kwargs={"parse": rows.parser(), "tokenizer": tokenizer, **settings},
        num_proc=data.num_proc if len(rows) > 5000 and data.num_proc > 1 else None,  # they take a second to start
        features=PIECE,
        new_fingerprint=fingerprint,
        cache_file_name=str(Path(datasets.config.HF_DATASETS_CACHE, f"sft-from-scratch-{fingerprint}.arrow")),
        desc="Tokenising",
    )


def tokenize_batch(
    batch: dict[str, list], indices: list[int], parse: Callable[[dict], dict], **settings: Any
) -> pa.Table:
    """Return the pieces of rows, given their numbers in the source."""
    found: list[dict[str, Any]] = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        try:
            pieces = tokenize_row(parse(dict(zip(batch, values, strict=True))), **settings)
        except RowError as problem:
            pieces = [malformed(problem)]
        except UserError as problem:  # raised by the tokenizer
            pieces = [malformed(RowError("text", "not encodable", str(problem)))]
        found += [piece | {"row": index, "piece": number} for number, piece in enumerate(pieces)]
    return pa.Table.from_pylist(found, PIECE.arrow_schema)


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: Tokenizer,
    max_seq_len: int,
    long_conversations: str = "split",
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return the pieces of a row, or an empty one that says why there are none. Raises RowError for a malformed row."""
    content, read_as, unused = read_row(row, columns)
    if isinstance(content, str):
        pieces, texts = document_pieces(content, tokenizer, max_seq_len), [content]
    else:
        pieces = conversation_pieces(content, tokenizer, max_seq_len, long_conversations == "split")
        texts = [message["content"] for message in content]
    pieces[0] |= {"read_as": without_surrogates(read_as), "unused": without_surrogates("\n".join(unused))}
    pieces[0]["templated"] = int(any(map(CONTROL_TEXT.search, texts)))
    digest = content_hash(content)
    return [EMPTY | piece | {"length": len(piece.get("input_ids", ())), "content": digest} for piece in pieces]


def malformed(problem: RowError) -> dict[str, Any]:
    return EMPTY | {"reason": problem.reason, "error": without_surrogates(str(problem))}


def without_surrogates(text: str) -> str:
    """Return a text that a table takes: JSON may name a field with half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def content_hash(content: Sequence[Message] | str) -> int:
    """Return 64 bits that depend on what a row says."""
    digest = hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


# ---------------------------------------------------------------- documents


def document_pieces(text: str, tokenizer: Tokenizer, max_seq_len: int) -> list[dict[str, Any]]:
    """Return all of a text, ended by a control token, in pieces. Each begins with the last token of the one before, so
    that every token but the first is a target once."""
    ids = [*tokenizer.encode(text), tokenizer.pad_token_id]
    pieces = []
    for start in range(0, len(ids) - 1, max_seq_len - 1):
        part = ids[start : start + max_seq_len]
        mask = [int(start == 0), *[1] * (len(part) - 1)]
        pieces.append({"input_ids": part, "mask": mask, "targets": len(part) - 1})
    return pieces or [{"reason": "a single token"}]


# ---------------------------------------------------------------- conversations


# A piece's share of a conversation (start, new, end): context from start to new, new tokens from new to end.
Window = tuple[int, int, int]
# A piece that continues a conversation keeps one part in this many free for the turns before.
CONTEXT = 4


def conversation_pieces(
    messages: list[Message], tokenizer: Tokenizer, max_seq_len: int, split: bool
) -> list[dict[str, Any]]:
    """Return the pieces of a conversation that have targets, or an empty one that says why there are none.

    Each piece of a split conversation repeats the opening: the template's start and the system message.
    """
    turns = [tokenizer.render_turn(message) for message in messages]
    ids, mask, offsets = tokenizer.join(turns)
    opening: list[int] = []
    windows, cut = [(0, 0, max_seq_len)], len(ids) > max_seq_len
    if split and cut:
        leading = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
        opening = ids[: min(offsets[leading], max_seq_len // 2)]
        trained = [i for i, turn in enumerate(turns) if 1 in turn.mask]
        windows = list(split_at_turns(offsets, leading, trained, max_seq_len - len(opening)))
        inside = {position for start, _, end in windows for position in (start, end)} - set(offsets)
        cut = bool(inside) or len(opening) < offsets[leading]
    pieces = []
    for start, new, end in windows:
        tokens, turn = ids[start:end], bisect_right(offsets, start) - 1
        header = turns[turn].header
        if start > offsets[turn] and len(header) < new - start:  # inside a turn: give it a speaker
            tokens[: len(header)] = header
        marked = [0] * (len(opening) + new - start) + mask[new:end]
        if targets := marked.count(1) - marked[0]:
            pieces.append({"input_ids": opening + tokens, "mask": marked, "targets": targets})
    if not pieces:
        pieces = [{"reason": "nothing to learn" if split else "nothing to learn within max_seq_len tokens"}]
    pieces[0]["cut"] = int(cut)
    return pieces


def split_at_turns(offsets: list[int], leading: int, answers: list[int], room: int) -> Iterator[Window]:
    """Yield windows of at most `room` tokens that end with an answer, in which every answer is new exactly once.

    An exchange is an answer that is trained on, with all that leads to it since the one before. A window has as many
    new exchanges as fit into it or, after the first, into three quarters of it, and before them as many earlier ones as
    there is room for. One that is longer than a window is cut: the end of its question with as much of the answer as
    fits, then the rest of the answer, each time after a quarter of context.

    offsets: where each turn begins, and where the last one ends. leading: number of turns in the opening. answers:
    indices of the turns that are trained on.
    """
    ends = [offsets[turn + 1] for turn in answers]
    starts = [offsets[leading], *ends[:-1]]
    read = min(max(room // CONTEXT, 1), room - 1)  # a piece's first token is never a target
    at = 0
    while at < len(answers):
        goal = room - room // CONTEXT if at else room
        until = max(bisect_right(ends, starts[at] + goal), at + 1)
        start, new, end = starts[at], offsets[answers[at]], ends[until - 1]
        if end - start <= room:
            yield starts[bisect_left(starts, end - room)], start, end
        else:
            start = max(start, min(new - read, end - room))
            while new < end:
                yield start, new, min(start + room, end)
                new = min(start + room, end)
                start = new - read
        at = until
