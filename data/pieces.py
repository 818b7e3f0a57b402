"""A row of a source as the pieces that are trained on: each at most max_seq_len tokens, with what they say about it.

A conversation that fits is one piece. A longer one is either cut off (`truncate`) or becomes several (`split`):

    system  user 1  assistant 1  user 2  assistant 2  user 3  assistant 3
    ──────  ──────────────────────────────────────                           first piece: all that fits
    ──────                       ───────────────────  ▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔    second: what came before is only read
"""

import hashlib
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.fingerprint import Hasher

from data import formats, text_files
from data.formats import Message, RowError
from tokenizer import ROLES, RenderedTurn, Tokenizer

INTEGER, STRING = datasets.Value("int32"), datasets.Value("string")
# Whose tokens a piece holds. A document's are nobody's.
SPEAKERS = (*ROLES, "text")
PIECE = datasets.Features(
    {
        # Which row of the source it comes from, and the how-manieth piece of that row it is, from 0 on.
        "row": INTEGER,
        "piece": INTEGER,
        "input_ids": datasets.List(INTEGER),
        "mask": datasets.List(datasets.Value("int8")),
        "length": INTEGER,
        # Tokens that are learned: the first of a piece is never a target.
        "targets": INTEGER,
        # Tokens of each speaker; together `length`.
        **dict.fromkeys(SPEAKERS, INTEGER),
        # Of the row as a whole, and 0 in all but its first piece: its turns and tokens before they are cut, the
        # assistant's tokens that no piece learns, and the turns that are cut.
        "turns": INTEGER,
        "tokens": INTEGER,
        "lost": INTEGER,
        "cut": INTEGER,
        # Equal for rows that say the same, whatever their format; 0 for a malformed one.
        "content": datasets.Value("int64"),
        # Names of the row's fields that play no part, a line each; only in its first piece.
        "unused": STRING,
        # Why the row is dropped, or nothing; and for a malformed row, what is wrong with it.
        "reason": STRING,
        "error": STRING,
    }
)


# What is tokenised depends on their code.
CODE = (__name__, "data.formats", "data.text_files", "vocabulary", "tokenizer")


def tokenize(
    rows: datasets.Dataset, tokenizer: Tokenizer, max_seq_len: int, long_conversations: str, num_proc: int
) -> datasets.Dataset:
    """All rows' pieces, as PIECE has them; from the cache if that was done before."""
    settings = {"max_seq_len": max_seq_len, "long_conversations": long_conversations}
    code = [Path(str(sys.modules[name].__file__)).read_bytes() for name in CODE]
    fingerprint = Hasher.hash([rows._fingerprint, tokenizer.fingerprint(), settings, *code])
    cache = Path(datasets.config.HF_DATASETS_CACHE, "sft-from-scratch")
    cache.mkdir(parents=True, exist_ok=True)
    return rows.map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, **settings},
        num_proc=num_proc if len(rows) > 5000 and num_proc > 1 else None,  # processes take a second to start
        features=PIECE,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache / f"{fingerprint}.arrow"),
        desc="Tokenising",
    )


def tokenize_batch(
    batch: dict[str, list], indices: list[int], tokenizer: Tokenizer, max_seq_len: int, long_conversations: str
) -> dict[str, list]:
    """Rows, and their numbers in the source, to the columns of PIECE."""
    out: dict[str, list] = defaultdict(list)
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        for number, piece in enumerate(tokenize_row(row, tokenizer, max_seq_len, long_conversations)):
            out["row"].append(index)
            out["piece"].append(number)
            for column, value in piece.items():
                out[column].append(value)
    return out


def tokenize_row(
    row: dict[str, Any], tokenizer: Tokenizer, max_seq_len: int, long_conversations: str = "split"
) -> list[dict[str, Any]]:
    """The pieces that a row becomes, without `row` and `piece`; or an empty one that says why there are none."""
    try:
        content, unused = formats.read_row(text_files.parse_line(row) if row.keys() == text_files.LINES.keys() else row)
    except RowError as problem:
        return [fill({}, reason=problem.reason, error=str(problem))]
    if isinstance(content, str):
        pieces = list(document_pieces(content, tokenizer, max_seq_len))
    else:
        pieces = conversation_pieces(content, tokenizer, max_seq_len, long_conversations == "split")
    pieces[0]["unused"] = "\n".join(unused)
    number = fingerprint(content)
    return [fill(piece, content=number) for piece in pieces]


TEXTS = ("unused", "reason", "error")
# What PIECE has of a row that is nothing.
EMPTY = {
    **dict.fromkeys((*SPEAKERS, "targets", "turns", "tokens", "lost", "cut", "content"), 0),
    **dict.fromkeys(TEXTS, ""),
}


def fill(piece: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A piece with all that PIECE has, but its row."""
    filled = {"input_ids": [], "mask": [], **EMPTY, **piece, **values}
    filled["length"] = len(filled["input_ids"])
    # JSON may name a field with half of a pair of surrogates, which no table takes.
    return filled | {name: filled[name].encode("utf-8", "backslashreplace").decode() for name in TEXTS}


def fingerprint(content: Sequence[Message] | str) -> int:
    """64 bits of what a row says."""
    digest = hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


# ---------------------------------------------------------------- documents


def document_pieces(text: str, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[dict[str, Any]]:
    """All of it, ended by a control token, one piece after another; every token is trained on."""
    ids = [*tokenizer.encode(text), tokenizer.pad_token_id]
    whole = {"turns": 0, "tokens": len(ids)}
    for start in range(0, max(len(ids) - 1, 1), max_seq_len):  # no piece of a single token, unless there is no other
        part = ids[start : start + max_seq_len]
        piece: dict[str, Any] = {"input_ids": part, "mask": [1] * len(part), "text": len(part), **whole}
        piece["targets"] = len(part) - 1
        yield piece if len(part) > 1 else {"reason": "a single token"}
        whole = {}


# ---------------------------------------------------------------- conversations


class Conversation(NamedTuple):
    """All its turns as one sequence of tokens."""

    ids: list[int]
    mask: list[int]
    # Where each turn begins, and where the last one ends.
    borders: list[int]
    turns: list[RenderedTurn]
    # Whose turns they are.
    roles: list[str]
    # How many tokens every piece begins with: what opens a conversation, and the system's message.
    opening: int

    def turn_at(self, place: int) -> int:
        """The turn that a token is in."""
        return min(max(bisect_right(self.borders, place) - 1, 0), len(self.turns) - 1)

    def count_speakers(self, start: int, end: int, counts: dict[str, int]) -> None:
        """Add the tokens from start to end to their speakers' counts. What opens it counts as the system's."""
        counts["system"] += max(0, min(end, self.borders[0]) - start)
        for turn in range(self.turn_at(start), self.turn_at(end - 1) + 1):
            counts[self.roles[turn]] += max(0, min(end, self.borders[turn + 1]) - max(start, self.borders[turn]))


class Exchange(NamedTuple):
    """An answer that is trained on with all that leads to it since the one before, as places in the tokens."""

    start: int
    answer: int
    end: int


class Window(NamedTuple):
    """A piece's share of a conversation: the tokens from `start` to `new` are only read, those up to `end` learned."""

    start: int
    new: int
    end: int


# A piece that goes on with a conversation keeps one part in so many free for what came before.
CONTEXT = 4


def conversation_pieces(
    messages: list[Message], tokenizer: Tokenizer, max_seq_len: int, split: bool
) -> list[dict[str, Any]]:
    """The pieces of a conversation, each with something to learn; or an empty one that says why there are none."""
    whole = flatten(messages, tokenizer)
    opening: list[int] = []
    if len(whole.ids) <= max_seq_len or not split:
        windows = [Window(0, 0, min(len(whole.ids), max_seq_len))]
        cut = sum(end > max_seq_len for end in whole.borders[1:])
    else:
        opening = whole.ids[: min(whole.opening, max_seq_len // 2)]
        windows = list(split_at_turns(exchanges(whole), max_seq_len - len(opening), not opening))
        inside = {place for start, _, end in windows for place in (start, end)} - set(whole.borders)
        cut = len({whole.turn_at(place) for place in inside}) + (len(opening) < whole.opening)
    pieces = [piece for window in windows if (piece := make_piece(whole, opening, window))["targets"]]
    if not pieces:
        pieces = [{"reason": "nothing to learn" if split else "nothing to learn within max_seq_len tokens"}]
    lost = whole.mask.count(1) - sum(piece.get("targets", 0) for piece in pieces)
    pieces[0] |= {"turns": len(messages), "tokens": len(whole.ids), "lost": lost, "cut": cut}
    return pieces


def flatten(messages: list[Message], tokenizer: Tokenizer) -> Conversation:
    turns = [tokenizer.render_turn(message) for message in messages]
    ids, mask, borders = tokenizer.join(turns)
    roles = [message["role"] for message in messages]
    leading = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    return Conversation(ids, mask, borders, turns, roles, borders[leading])


def exchanges(whole: Conversation) -> list[Exchange]:
    """What follows the opening; without the turns after the last answer, which nothing can be learned from."""
    found, start = [], whole.opening
    for turn, answer, end in zip(whole.turns, whole.borders, whole.borders[1:], strict=False):
        if 1 in turn.mask:
            found.append(Exchange(start, answer, end))
            start = end
    return found


def split_at_turns(exchanges: list[Exchange], room: int, bare: bool) -> Iterator[Window]:
    """Windows of at most `room` tokens that end with an answer, in which every answer is new exactly once.

    Each has as many new exchanges as fit, if it isn't the first beside a quarter of it that is kept for what came
    before; and as many earlier exchanges as there is room for then. bare: nothing will stand before it.
    """
    at = 0
    while at < len(exchanges):
        start, _, end = exchanges[at]
        if end - start > room:
            yield from split_exchange(exchanges[at], room, bare)
            at += 1
            continue
        goal = room - room // CONTEXT if at else room
        until, context = at + 1, at
        while until < len(exchanges) and exchanges[until].end - start <= goal:
            until += 1
        end = exchanges[until - 1].end
        while context and end - exchanges[context - 1].start <= room:
            context -= 1
        yield Window(exchanges[context].start, start, end)
        at = until


def split_exchange(exchange: Exchange, room: int, bare: bool) -> Iterator[Window]:
    """One that is longer than a piece: of the question its end, and of the answer as much as fits, and so on, each
    time after a quarter of what was there before."""
    read = max(room // CONTEXT, int(bare))  # a piece's first token is never a target
    start, new, end = exchange
    start = max(start, min(new - read, end - room))
    while new < end:
        yield Window(start, new, min(start + room, end))
        new = min(start + room, end)
        start = new - read


def make_piece(whole: Conversation, opening: list[int], window: Window) -> dict[str, Any]:
    """The opening and a window. One that begins inside a turn begins with its header, so that it has a speaker."""
    start, new, end = window
    ids = whole.ids[start:end]
    turn = whole.turn_at(start)
    header = whole.turns[turn].header
    if start > whole.borders[turn] and len(header) < new - start:
        ids[: len(header)] = header
    mask = [0] * (len(opening) + new - start) + whole.mask[new:end]
    speakers = dict.fromkeys(ROLES, 0)
    whole.count_speakers(0, len(opening), speakers)
    whole.count_speakers(start, end, speakers)
    return {"input_ids": opening + ids, "mask": mask, "targets": mask.count(1) - mask[0], **speakers}
