"""A row in any of the formats that people have, as a conversation: one small reader a format, chosen by its columns.

A conversation is a list of messages, dicts with a role and a content; a row may also be a document, which is a str.
To add a format, write its reader and give it a line in `FORMATS`.
"""

import json
from collections.abc import Callable
from typing import Any

# role, content, and where an assistant's turn is only to be read, a weight of 0.
Message = dict[str, Any]


class RowError(Exception):
    """A malformed row: the field, the reason (rows are counted by it) and what was found instead."""

    def __init__(self, field: str, reason: str, detail: str = ""):
        super().__init__(f"{field}: {reason}{detail and f' ({detail})'}")
        self.reason = reason


class Fields:
    """An object of a row, which notes what is asked for, so that the rest can be named. null is as good as absent."""

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self.values, self.place, self.used = values, place, set[str]()

    def get(self, name: str) -> Any:
        self.used.add(name)
        return self.values.get(name)

    def text(self, name: str) -> str:
        """Text, which may be absent. Raises RowError."""
        value = self.get(name)
        return "" if value is None else read_text(value, self.place + name)

    def unused(self) -> list[str]:
        return [self.place + name for name, value in self.values.items() if value is not None and name not in self.used]


def read_row(row: dict[str, Any]) -> tuple[list[Message] | str, list[str]]:
    """A row in one of the `FORMATS`: a conversation in which the assistant speaks, or a document; and the names of its
    fields that play no part. Raises RowError."""
    fields = Fields(row)
    for columns, read in FORMATS.items():
        if all(column in row for column in columns):
            content, unused = read(fields, *columns)
            break
    else:
        known = ", ".join(" and ".join(columns) for columns in FORMATS)
        there = ", ".join(map(str, row)) or "none"
        raise RowError("columns", "of no known format", f"there are {there}; known are {known}")
    if not isinstance(content, str):
        content = add_system(content, fields)
        if all(message["role"] != "assistant" for message in content):
            raise RowError(columns[0], "no assistant turn")
    return content, sorted({*fields.unused(), *unused})


# ---------------------------------------------------------------- the formats

# What a reader gives: a conversation or a document, and what it found and did not use.
Content = tuple[list[Message] | str, list[str]]


def read_conversation(row: Fields, column: str) -> Content:
    """{"messages": [{"role": "user", "content": "Hi"}, ...]}, or ShareGPT's
    {"conversations": [{"from": "human", "value": "Hi"}, ...]}"""
    return read_messages(row.get(column), column)


def read_prompt_completion(row: Fields, prompt: str, completion: str) -> Content:
    """{"prompt": "Hi", "completion": "Hello!"}, or lists of messages. Only the completion is learned."""
    question, unused = read_prompt(row, prompt)
    answer, also_unused = read_side(row.get(completion), completion, "assistant")
    for message in question:
        if message["role"] == "assistant":
            message["weight"] = 0
    return question + answer, unused + also_unused


def read_alpaca(row: Fields, instruction: str, output: str) -> Content:
    """{"instruction": "Translate to French.", "input": "Hi", "output": "Salut"}; the input may be absent or empty."""
    question, _ = read_instruction(row, instruction)
    answer, _ = read_side(row.get(output), output, "assistant")
    return question + answer, []


def read_document(row: Fields, column: str) -> Content:
    """{"text": "Once upon a time"} to continue: TRL's "language modeling" type."""
    return read_text(row.get(column), column), []


# The columns of each format and its reader. Where a row has those of several, the first is taken.
FORMATS: dict[tuple[str, ...], Callable[..., Content]] = {
    ("messages",): read_conversation,
    ("conversations",): read_conversation,
    ("prompt", "completion"): read_prompt_completion,
    ("prompt", "response"): read_prompt_completion,
    ("question", "answer"): read_prompt_completion,
    ("instruction", "output"): read_alpaca,
    ("instruction", "response"): read_alpaca,
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


def read_prompt(row: Fields, column: str) -> tuple[list[Message], list[str]]:
    return read_side(row.get(column), column, "user")


def read_instruction(row: Fields, column: str) -> tuple[list[Message], list[str]]:
    """Alpaca's question: what is to be done, and with what."""
    parts = [read_text(row.get(column), column), row.text("input") or row.text("context")]
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}], []


def read_side(value: Any, field: str, role: str) -> tuple[list[Message], list[str]]:
    """A prompt or a completion: text, or a list of messages."""
    if not isinstance(value, str):
        return read_messages(value, field)
    message = {"role": role, "content": value}
    check_answer(message, field)
    return [message], []


def read_messages(value: Any, field: str) -> tuple[list[Message], list[str]]:
    if not isinstance(value, list):
        raise RowError(field, "not a list of messages", f"it is {kind(value)}")
    if not value:
        raise RowError(field, "an empty list")
    unused: set[str] = set()
    messages = [read_message(message, f"{field}[{i}]", unused) for i, message in enumerate(value)]
    return messages, [f"{field}[].{name}" for name in unused]


def read_message(value: Any, field: str, unused: set[str]) -> Message:
    """{"role": ..., "content": ...}, or ShareGPT's {"from": ..., "value": ...}; the assistant's may have `tool_calls`,
    which are written into its content, and a `weight`."""
    if not isinstance(value, dict):
        raise RowError(field, "not an object with role and content", f"it is {kind(value)}")
    message = Fields(value, f"{field}.")
    role_key, content_key = ("from" if "from" in value else "role"), ("value" if "value" in value else "content")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise RowError(f"{field}.{role_key}", "unknown role", f"{role!r:.60}; known are {', '.join(ROLE_NAMES)}")
    read: Message = {"role": ROLE_NAMES[role]}
    content = message.get(content_key)
    calls = message.get("tool_calls") if read["role"] == "assistant" else None
    if calls:
        blocks = write_tool_calls(calls, f"{field}.tool_calls")
        read["content"] = "\n".join([*([message.text(content_key)] if content else []), *blocks])
    else:
        read["content"] = read_text(content, f"{field}.{content_key}")
    weight = message.get("weight") if read["role"] == "assistant" else None
    if weight is not None and weight not in (0, 1):
        raise RowError(f"{field}.weight", "neither 0 nor 1", f"it is {weight!r:.60}")
    if weight == 0:
        read["weight"] = 0
    check_answer(read, f"{field}.{content_key}")
    unused.update(name for name in message.values if message.values[name] is not None and name not in message.used)
    return read


def check_answer(message: Message, field: str) -> None:
    """Raises RowError for an answer that would teach to say nothing."""
    if message["role"] == "assistant" and message.get("weight", 1) and not message["content"].strip():
        raise RowError(field, "an empty assistant turn")


def add_system(messages: list[Message], row: Fields) -> list[Message]:
    """The conversation with the row's `system` and `tools`, if it has them, in the system's message."""
    first = messages[0]["content"] if messages[0]["role"] == "system" else None
    system, tools = row.text("system"), row.get("tools")
    if system and first and system != first:
        raise RowError("system", "the conversation has another system message, too")
    parts = [system or first or "", write_tools(tools) if tools else ""]
    content = "\n\n".join(part for part in parts if part)
    return [{"role": "system", "content": content}, *messages[first is not None :]] if content else messages


# ---------------------------------------------------------------- tools: written as Hermes and Qwen do


def write_tools(tools: Any) -> str:
    """What may be called, a description in JSON a line. Raises RowError."""
    described = from_json(tools, "tools")
    if not isinstance(described, list):
        raise RowError("tools", "not a list of tools", f"it is {kind(described)}")
    lines = "\n".join(to_json(tool, "tools") for tool in described)
    return f"# Tools\n\n<tools>\n{lines}\n</tools>" if described else ""


def write_tool_calls(calls: Any, field: str) -> list[str]:
    """[{"function": {"name": ..., "arguments": {...}}}, ...], where arguments may be JSON in a string."""
    calls = from_json(calls, field)
    if not isinstance(calls, list):
        raise RowError(field, "not a list of calls", f"it is {kind(calls)}")
    blocks = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{field}[{i}]", "not a call with a function's name", f"it is {call!r:.60}")
        arguments = from_json(function.get("arguments"), f"{field}[{i}].arguments")
        written = to_json({"name": function["name"], "arguments": arguments or {}}, f"{field}[{i}]")
        blocks.append(f"<tool_call>\n{written}\n</tool_call>")
    return blocks


def from_json(value: Any, field: str) -> Any:
    """What a string of JSON says; anything else as it is. Raises RowError."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(field, "invalid JSON", str(error)) from error


def to_json(value: Any, field: str) -> str:
    """Raises RowError for what a table may hold and JSON does not know."""
    try:
        return json.dumps(without_nulls(value), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(field, "cannot be written as JSON", str(error)) from error


def without_nulls(value: Any) -> Any:
    """A table gives every object the fields of all others, as null."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


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
