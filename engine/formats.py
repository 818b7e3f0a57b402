"""A row in any of the formats that people have, as a conversation: one small reader a format, chosen by its columns.

A conversation is a list of messages, dicts with a role and a content; a row may also be a document, which is a str.
To add a format, write its reader and give it a line in `FORMATS`.
"""

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, str]


class RowError(Exception):
    """A malformed row: the field, the reason (rows are counted by it) and what was found instead."""

    def __init__(self, field: str, reason: str, detail: str = ""):
        super().__init__(f"{field}: {reason}{detail and f' ({detail})'}")
        self.reason = reason


def read_row(row: dict[str, Any]) -> list[Message] | str:
    """A row in one of the `FORMATS`: a conversation in which the assistant speaks, or a document. Raises RowError."""
    for columns, read in FORMATS.items():
        if all(column in row for column in columns):
            content = read(row)
            break
    else:
        known = ", nor ".join(" and ".join(columns) for columns in FORMATS)
        raise RowError("columns", f"neither {known}", f"there are {', '.join(row) or 'none'}")
    if not isinstance(content, str) and all(message["role"] != "assistant" for message in content):
        raise RowError("messages", "no assistant turn")
    return content


def parse_line(line: bytes) -> dict[str, Any]:
    """A line of JSON as a row. Raises RowError."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError("line", "invalid UTF-8", f"byte {error.start + 1}: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise RowError("line", "invalid JSON", str(error)) from error
    if not isinstance(row, dict):
        raise RowError("line", "not a JSON object", f"it is {kind(row)}")
    return row


# ---------------------------------------------------------------- the formats


def read_openai(row: dict[str, Any]) -> list[Message]:
    """{"messages": [{"role": "user", "content": "Hi"}, ...]}"""
    return read_list(row["messages"], "messages", "role", "content")


def read_sharegpt(row: dict[str, Any]) -> list[Message]:
    """{"conversations": [{"from": "human", "value": "Hi"}, ...]}"""
    return read_list(row["conversations"], "conversations", "from", "value")


def read_prompt_completion(row: dict[str, Any]) -> list[Message]:
    """{"prompt": "Hi", "completion": "Hello!"}, or a list of messages on either side."""
    sides = (("prompt", "user"), ("completion", "assistant"))
    return [message for field, role in sides for message in read_side(row[field], field, role)]


def read_document(row: dict[str, Any]) -> str:
    """{"text": "Once upon a time"} to continue: TRL's "language modeling" type."""
    return read_text(row["text"], "text")


# The columns of each format and its reader. Where a row has those of several, the first is taken.
FORMATS: dict[tuple[str, ...], Callable[[dict[str, Any]], list[Message] | str]] = {
    ("messages",): read_openai,
    ("conversations",): read_sharegpt,
    ("prompt", "completion"): read_prompt_completion,
    ("text",): read_document,
}

# What a role may be called, and the chat templates' name for it.
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # ShareGPT's
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}


# ---------------------------------------------------------------- their parts


def read_side(value: Any, field: str, role: str) -> list[Message]:
    """A prompt or a completion: text, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return read_list(value, field, "role", "content")


def read_list(value: Any, field: str, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(field, "not a list of messages", f"it is {kind(value)}")
    if not value:
        raise RowError(field, "an empty list")
    return [read_message(message, f"{field}[{i}]", role_key, content_key) for i, message in enumerate(value)]


def read_message(message: Any, field: str, role_key: str, content_key: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(field, f"not an object with {role_key} and {content_key}", f"it is {kind(message)}")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise RowError(f"{field}.{role_key}", "unknown role", f"{role!r:.60}; known are {', '.join(ROLE_NAMES)}")
    return {"role": ROLE_NAMES[role], "content": read_text(message.get(content_key), f"{field}.{content_key}")}


def read_text(content: Any, field: str) -> str:
    """Text, or a list of text parts, which are joined."""
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
