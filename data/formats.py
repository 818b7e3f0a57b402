"""Read a row in any format that people use as a conversation.

A conversation is a list of messages: dicts with a role, a content and, on an assistant's turn that is context only, a
weight of 0. A row may also be a document, which is a str. Which columns play which part is decided by
`choose_columns`, or by the user with `--columns`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from config import UserError

Message = dict[str, Any]

# Names of columns, in any case, by the part that they play.
TURNS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "query", "input", "instruction", "problem")
ANSWERS = ("completion", "response", "answer", "output", "solution")
EXTRAS = {"system": "system", "system_prompt": "system", "tools": "tools", "history": "history"}
# Appended to an `instruction` (Alpaca, Dolly).
CONTEXTS = ("input", "context")
KNOWN_COLUMNS = {*TURNS, *QUESTIONS, *ANSWERS, *EXTRAS, *CONTEXTS, "text", "chosen", "rejected", "mapping"}
# What `--columns` can name.
PARTS = ("messages", "prompt", "completion", "text", "system", "tools", "history")

# A turn's role in other formats, and the chat templates' name for it.
ROLE_NAMES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
}
REASONING = ("reasoning", "thinking", "reasoning_content")
WEIGHTS = ("weight", "loss_weight", "train")
# Fields of a turn that are read; the others are on an assistant's turn only.
FIELDS = {"role", "from", "content", "value", *WEIGHTS}
ASSISTANT_FIELDS = {*REASONING, "tool_calls", "function_call"}


class RowError(Exception):
    """A malformed row: the field, the reason (by which rows are counted) and what was found instead."""

    def __init__(self, field: str, reason: str, detail: str = ""):
        super().__init__(f"{field}: {reason}{detail and f' ({detail})'}")
        self.reason = reason


def read_row(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None
) -> tuple[list[Message] | str, str, list[str]]:
    """Return the content of a row, which is a conversation in which the assistant speaks or a document; the columns
    that it was read from, such as "question + answer"; and the names of the fields that play no part. Raises RowError.

    columns: part to column, from `--columns`; it applies to rows that have one of these columns.
    """
    parts = columns_of(row, columns or {})
    unused = {name for name, value in row.items() if value is not None and name not in parts.values()}
    content = read_parts(row, parts, unused)
    if not isinstance(content, str) and all(message["role"] != "assistant" for message in content):
        raise RowError(main_columns(parts), "no assistant turn")
    return content, main_columns(parts), sorted(unused)


# ---------------------------------------------------------------- columns


def columns_of(row: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str]:
    """Map each part that a row has to its column; a null is as good as an absent column. Raises RowError."""
    present = tuple(name for name, value in row.items() if value is not None)
    if any(column in row for column in named.values()):
        if missing := [column for column in named.values() if column not in row]:
            raise RowError("columns", "not all that --columns names", f"{', '.join(missing)} missing")
        return extra_columns([name for name in present if name not in named.values()]) | dict(named)
    try:
        return choose_columns(present)
    except RowError:
        return choose_columns(tuple(row))  # with the nulls, which the error is then about


@functools.lru_cache(maxsize=1024)
def choose_columns(names: tuple[str, ...]) -> dict[str, str]:
    """Map each part to a row's column for it, by the one rule that the README states. Raises RowError.

    >>> choose_columns(("Instruction", "input", "output", "id"))
    {'prompt': 'Instruction', 'completion': 'output', 'context': 'input'}
    """
    lower = {name.lower(): name for name in names}
    extras = extra_columns(names)
    turns = [lower[name] for name in TURNS if name in lower]
    if turns:
        return {"messages": turns[0], **extras}
    context = [lower[name] for name in CONTEXTS if name in lower and "instruction" in lower][:1]
    questions = [name for name in names if name.lower() in QUESTIONS and name not in context]
    answers = [name for name in names if name.lower() in ANSWERS]
    if len(questions) == len(answers) == 1:
        parts = {"prompt": questions[0], "completion": answers[0], **extras}
        return parts | {"context": context[0]} if context else parts
    if questions and answers:
        found = f"the question may be {', '.join(questions)}, the answer {', '.join(answers)}"
        raise RowError("columns", "ambiguous", f"{found}; {columns_hint([questions[0], answers[0]])}")
    if "text" in lower:
        return {"text": lower["text"]}
    if {"chosen", "rejected"} <= lower.keys():
        raise RowError("columns", "preference data", "SFT learns one answer: keep the chosen ones, with their prompts")
    if "mapping" in lower:
        raise RowError("columns", "a ChatGPT export", "its mapping is a tree of drafts: write out each as messages")
    raise unknown_columns(names)


def extra_columns(names: Sequence[str]) -> dict[str, str]:
    return {EXTRAS[name.lower()]: name for name in names if name.lower() in EXTRAS}


def unknown_columns(names: Sequence[str]) -> RowError:
    return RowError("columns", "of no known format", f"they are {', '.join(names) or 'none'}; {columns_hint(names)}")


def main_columns(parts: Mapping[str, str]) -> str:
    """Return the columns that a row is read from, in words."""
    return " + ".join(parts[part] for part in ("messages", "prompt", "completion", "text") if part in parts)


def columns_hint(names: Sequence[str]) -> str:
    question, answer = names[:2] if len(names) > 1 else ("A", "B")
    return f'name them: --columns "prompt={question}" "completion={answer}"'


def parse_columns(named: Sequence[str]) -> dict[str, str]:
    """Return part to column from `--columns`. Raises UserError.

    >>> parse_columns(["prompt=Frage", "completion=Antwort"])
    {'prompt': 'Frage', 'completion': 'Antwort'}
    """
    pairs = [text.partition("=") for text in named]
    for part, _, column in pairs:
        if part not in PARTS or not column:
            raise UserError(f"columns {part}={column}: write PART=COLUMN, where PART is one of {', '.join(PARTS)}")
    columns = {part: column for part, _, column in pairs}
    if columns and not ({"messages", "text"} & columns.keys() or {"prompt", "completion"} <= columns.keys()):
        raise UserError("columns names neither messages, nor text, nor prompt and completion")
    return columns


# ---------------------------------------------------------------- parts


def read_parts(row: Mapping[str, Any], parts: Mapping[str, str], unused: set[str]) -> list[Message] | str:
    """Return what the columns of a row hold, and add the names of unused fields inside them. Raises RowError."""
    values = {part: row[column] for part, column in parts.items()}
    if "text" in parts:
        return read_text(values["text"], parts["text"])
    if "messages" in parts:
        messages = read_messages(values["messages"], parts["messages"], unused)
    else:
        messages = read_exchange(values, parts, unused)
    first = messages[0]["content"] if messages[0]["role"] == "system" else None
    system = read_text(values["system"], parts["system"]) if values.get("system") else ""
    if system and first and system != first:
        raise RowError(parts["system"], "the conversation has another system message")
    tools = write_tools(values.get("tools"), parts.get("tools", ""))
    content = "\n\n".join(filter(None, (system or first, tools)))
    return [{"role": "system", "content": content}, *messages[first is not None :]] if content else messages


def read_exchange(values: Mapping[str, Any], parts: Mapping[str, str], unused: set[str]) -> list[Message]:
    """Return a prompt and its completion as messages, after the earlier turns in Alpaca's `history`. An assistant's
    message in the prompt is context only."""
    question = values["prompt"]
    if values.get("context"):
        texts = read_text(question, parts["prompt"]), read_text(values["context"], parts["context"])
        question = "\n\n".join(filter(None, texts))
    before = read_side(question, parts["prompt"], "user", unused)
    for message in before:
        if message["role"] == "assistant":
            message["weight"] = 0
    before[:0] = read_history(values.get("history"), parts.get("history", ""))
    answer = read_side(values["completion"], parts["completion"], "assistant", unused)
    return before + answer


def read_side(value: Any, field: str, role: str, unused: set[str]) -> list[Message]:
    """Return the messages of a prompt or a completion: text, or a list of messages."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    return read_messages(messages, field, unused)


def read_history(value: Any, field: str) -> list[Message]:
    """Return the earlier turns of Alpaca's [[question, answer], ...], which are trained on like all others."""
    messages: list[Message] = []
    for i, pair in enumerate(json_list(value, field)):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError(f"{field}[{i}]", "not a question and its answer", f"it is {kind(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages += read_side(text, f"{field}[{i}]", role, set())
    return messages


def read_messages(value: Any, field: str, unused: set[str]) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(field, "not a list of messages", f"it is {kind(value)}")
    if not value:
        raise RowError(field, "an empty list")
    return [read_message(message, f"{field}[{i}]", field, unused) for i, message in enumerate(value)]


def read_message(value: Any, place: str, column: str, unused: set[str]) -> Message:
    """Return {"role": ..., "content": ...} or ShareGPT's {"from": ..., "value": ...} as a message. An assistant's
    reasoning and calls of tools are written into its content."""
    if not isinstance(value, dict):
        raise RowError(place, "not an object with role and content", f"it is {kind(value)}")
    role_key = "from" if value.get("from") is not None else "role"
    content_key = "value" if value.get("value") is not None else "content"
    role, content = value.get(role_key), value.get(content_key)
    if not isinstance(role, str) or role not in ROLE_NAMES:
        known = ", ".join(ROLE_NAMES)
        raise RowError(f"{place}.{role_key}", "unknown role", f"{role!r:.60}; known are {known}")
    message: Message = {"role": ROLE_NAMES[role]}
    used = FIELDS | ASSISTANT_FIELDS if message["role"] == "assistant" else FIELDS
    unused.update(f"{column}[].{name}" for name, found in value.items() if found not in (None, []) and name not in used)
    place_of_content = f"{place}.{content_key}"
    if message["role"] != "assistant":
        return message | {"content": read_text(content, place_of_content)}
    for name in WEIGHTS:
        if value.get(name) not in (None, 0, 1):
            raise RowError(f"{place}.{name}", "neither 0 nor 1", f"it is {value[name]!r:.60}")
        if value.get(name) == 0:
            message["weight"] = 0
    message["content"] = read_answer(value, content, place_of_content, place)
    if "weight" not in message and not message["content"].strip():
        raise RowError(place_of_content, "an empty assistant turn")
    return message


def read_answer(turn: dict[str, Any], content: Any, field: str, place: str) -> str:
    """Return an assistant's reasoning, text and calls of tools as one text."""
    thoughts = [read_text(turn[name], f"{place}.{name}") for name in REASONING if turn.get(name)]
    calls = write_tool_calls(turn.get("tool_calls"), f"{place}.tool_calls")
    if turn.get("function_call"):
        calls += write_tool_calls([turn["function_call"]], f"{place}.function_call")
    answer = "" if content is None and calls else read_text(content, field, thoughts)
    thought = f"<think>\n{''.join(thoughts)}\n</think>\n\n" if any(thoughts) else ""
    return thought + "\n".join([answer, *calls] if answer else calls)


def read_text(content: Any, field: str, thoughts: list[str] | None = None) -> str:
    """Return text, or the text parts of a list, joined. Parts with reasoning are appended to `thoughts`, if given."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(field, "not text", f"it is {kind(content)}")
    texts: list[str] = []
    for i, part in enumerate(content):
        sort = part.get("type") if isinstance(part, dict) else None
        into = texts if sort == "text" else thoughts if sort in REASONING else None
        found = (
            [part[key] for key in ("text", "value", sort) if isinstance(part.get(key), str)] if into is not None else []
        )
        if into is None or not found:
            raise RowError(f"{field}[{i}]", "not a text part", f"it is {part!r:.60}")
        into.append(found[0])
    return "".join(texts)


# ---------------------------------------------------------------- tools, in the format of Hermes and Qwen


def write_tools(tools: Any, field: str) -> str:
    """Return the tools' descriptions, one line of JSON per tool. Raises RowError."""
    lines = "\n".join(to_json(tool, field) for tool in json_list(tools, field))
    return f"# Tools\n\n<tools>\n{lines}\n</tools>" if lines else ""


def write_tool_calls(calls: Any, field: str) -> list[str]:
    """Return a block of text per call of [{"function": {"name": ..., "arguments": {...}}}, ...]; the arguments may be
    JSON in a string. Raises RowError."""
    blocks = []
    for i, call in enumerate(json_list(calls, field)):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{field}[{i}]", "not a call with a function's name", f"it is {call!r:.60}")
        arguments = from_json(function.get("arguments"), f"{field}[{i}].arguments")
        written = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        blocks.append(f"<tool_call>\n{to_json(written, f'{field}[{i}]')}\n</tool_call>")
    return blocks


def from_json(value: Any, field: str) -> Any:
    """Return the value of JSON in a string, and any other value unchanged; an empty string is null. Raises RowError."""
    return (parse_json(value, field) if value.strip() else None) if isinstance(value, str) else value


def json_list(value: Any, field: str) -> list[Any]:
    """Return a list, which may be written as JSON in a string; null is empty. Raises RowError."""
    found = from_json(value, field)
    if found and not isinstance(found, list):
        raise RowError(field, "not a list", f"it is {kind(found)}")
    return found or []


def parse_json(text: str | bytes, field: str) -> Any:
    """Return the value that a JSON text holds. Raises RowError, also for a key that occurs twice in an object."""
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        raise RowError(field, "invalid JSON", str(error)) from error


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def to_json(value: Any, field: str) -> str:
    """Return a value as JSON text. Raises RowError for values that JSON does not have, such as dates and NaN."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(field, "cannot be written as JSON", str(error)) from error


def without_nulls(value: Any) -> Any:
    """Return a row of a table without the nulls inside its values: a table gives every object the fields of all."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
