"""Talk to a checkpoint: python chat.py CHECKPOINT [--prompt TEXT]

CHECKPOINT is a model directory, a run directory (its newest checkpoint is used) or a LoRA adapter's directory.
--prompts FILE --out FILE answers the prompts in a file. --web opens a page in the browser that shows how a checkpoint
chooses its tokens. --compare CHECKPOINT gives the same prompts to another one, on the page too.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import tyro

from checkpoint import load_model_and_tokenizer
from config import Quantization, UserError
from data import formats
from data.sources import open_split
from files import printable
from generation import Answer, Prompt, check_sampling, encode, fit_into_context, room, write
from launch.command_line import one_line_errors, parse_flags
from model import DeepSeekV2
from parallel import choose_device
from tokenizer import Tokenizer


@dataclass
class ChatConfig:
    """Talk to a checkpoint."""

    # A model directory, a run directory (its newest checkpoint is used) or a LoRA adapter's.
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    # Answer this and exit; without it, a conversation begins.
    prompt: str | None = None
    # Answer these prompts: the lines of a .txt file, or rows of a dataset as for training, up to their last answer; a
    # row with a text is continued without a chat template, for base models.
    prompts: str | None = None
    # Write the answers to this .jsonl file instead of printing them.
    out: str | None = None
    # Give another checkpoint the same prompts, and show its answers below, or next to them with --web.
    compare: str | None = None
    # System message at the start of the conversation.
    system: str | None = None
    # Longest answer, in tokens.
    max_new_tokens: int = 256
    # 0: always the likeliest token; higher: more varied.
    temperature: float = 0.7
    # Draw from the likeliest tokens that together have this probability.
    top_p: float = 0.9
    # Draw from this many of the likeliest tokens; 0: all.
    top_k: int = 0
    # Seed of the draw; the same seed gives the same answer.
    seed: int = 0
    # nf4: load the blocks' matrices in 4 bits, an eighth to a quarter of the memory.
    quantize: Quantization | None = None
    # cuda, cpu, ...; "auto": CUDA where available.
    device: str = "auto"
    # Open a page in the browser: an answer's tokens with their probabilities, alternatives and experts.
    web: bool = False
    # Address of the page: 127.0.0.1 is this machine only, 0.0.0.0 anyone on the network.
    host: str = "127.0.0.1"
    # Port of the page; none: the first free one from 7860.
    port: int | None = None
    # USER:PASSWORD that the page asks for; a host that other machines can reach needs it, or --no-auth.
    auth: str | None = None
    # Let anyone who reaches the page use it.
    no_auth: bool = False

    def validate(self) -> None:
        if self.out is not None and Path(self.out).resolve() == Path(str(self.prompts)).resolve():
            raise UserError(f"--out {self.out} would overwrite the prompts: choose another name")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.auth and not self.no_auth:
            raise UserError(f"--host {self.host} opens the page to others: give --auth USER:PASSWORD, or --no-auth")
        if not self.web and (self.port or self.auth or self.host != "127.0.0.1"):
            raise UserError("--host, --port and --auth need --web")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise UserError("--auth is not USER:PASSWORD")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be positive")
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)


def chat(config: ChatConfig) -> None:
    config.validate()
    asked = given_prompts(config)
    if config.web and asked:
        raise UserError("--web answers what is typed on the page: leave out --prompt and --prompts")
    if not asked and (config.out or (config.compare and not config.web)):
        raise UserError("--out and --compare need --prompt or --prompts")
    if config.web:
        if find_spec("gradio") is None:
            raise UserError("--web needs Gradio: pip install -r requirements-web.txt")
        from view.page import serve

        names = [name for name in (config.checkpoint, config.compare) if name]
        writers = [load(name, config) for name in names]
        serve([(writer.model, writer.tokenizer) for writer in writers], names, vars(config))
    elif config.prompts or config.compare or config.out:
        answer_all(config, asked)
    else:
        writer = load(config.checkpoint, config)
        if asked:
            print_answer(writer, asked[0][2])
        else:
            converse(writer)


# ---------------------------------------------------------------- one answer


@dataclass
class Writer:
    """A checkpoint that answers as the flags ask."""

    model: DeepSeekV2
    tokenizer: Tokenizer
    config: ChatConfig
    generator: torch.Generator

    def write(self, prompts: list[Prompt]) -> Iterator[list[Answer]]:
        config = self.config
        sampling: dict[str, Any] = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
        return write(self.model, self.tokenizer, prompts, config.max_new_tokens, generator=self.generator, **sampling)


def load(checkpoint: str, config: ChatConfig) -> Writer:
    """Load a checkpoint that answers as the flags ask. Raises UserError if it is not one."""
    device = choose_device(config.device)
    model, tokenizer = load_model_and_tokenizer(checkpoint, device=device, quantize=config.quantize)
    model.eval()
    return Writer(model, tokenizer, config, torch.Generator(device).manual_seed(config.seed))


def print_answer(writer: Writer, prompt: Prompt) -> str:
    """Print an answer while it is written, and return it. Ctrl-C ends it, in a conversation only the answer. Raises
    UserError if the prompt does not fit the context."""
    printed, answer = "", None
    try:
        for (answer,) in writer.write([prompt]):
            text = answer.text
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the rest of a character's bytes is yet to come
                print(printable(text[len(printed) :]), end="", flush=True)
                printed = text
    except KeyboardInterrupt:
        print()
        note("interrupted")
        if writer.config.prompt is not None:
            raise
        return printed
    assert answer
    print(printable(answer.text[len(printed) :]))
    if not answer.stopped:
        by = "--max-new-tokens" if answer.room == writer.config.max_new_tokens else "the end of the model's context"
        note(f"cut after {answer.room} tokens by {by}")
    return answer.text


def note(text: str) -> None:
    """Print a remark to standard error, so that a redirected standard output has the answers only."""
    print(f"({text})", file=sys.stderr, flush=True)


def opening(system: str | None) -> list[dict[str, str]]:
    """Return the start of a conversation."""
    return [{"role": "system", "content": system}] if system else []


# ---------------------------------------------------------------- a conversation


def converse(writer: Writer) -> None:
    """Alternate between a question from the terminal or a pipe and its answer, until none is left."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    if at_terminal():
        print("Ctrl-C ends an answer, Ctrl-D the conversation; /reset starts over.")
    messages = opening(writer.config.system)
    for text in questions():
        if text == "/reset":
            messages = opening(writer.config.system)
        else:
            messages = take_turn(writer, [*messages, {"role": "user", "content": text}])


def take_turn(writer: Writer, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Answer the last message and return the conversation, without the turns that no longer fit the context. A question
    that does not fit by itself is reported and dropped."""
    kept, forgotten = fit_into_context(writer.model, writer.tokenizer, messages, writer.config.max_new_tokens)
    try:
        answer = print_answer(writer, kept)
    except UserError as error:
        note(str(error))
        return messages[:-1]
    if forgotten:
        note(forgotten)
    return [*kept, {"role": "assistant", "content": answer}]


def questions() -> Iterator[str]:
    """Yield what is typed, or the lines of a pipe, without blank ones, until Ctrl-D, Ctrl-C or the pipe's end."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if text := input("> " if at_terminal() else "").strip():
                yield text
    if at_terminal():
        print()


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


# ---------------------------------------------------------------- many prompts, two checkpoints

BATCH = 32  # prompts that are answered at a time


# Where a prompt comes from, its row, and the prompt.
Asked = tuple[str, dict[str, Any], Prompt]


def given_prompts(config: ChatConfig) -> list[Asked]:
    """Return the prompts on the command line and in --prompts. Raises UserError with the place."""
    rows = [] if config.prompt is None else [("--prompt", dict[str, Any](prompt=config.prompt))]
    if config.prompts is not None:
        rows += read_rows(config.prompts)
    asked: list[Asked] = []
    for place, row in rows:
        try:
            asked.append((place, row, as_prompt(row, config.system)))
        except formats.RowError as error:
            raise UserError(f"{place}: {error}") from error
    return asked


def read_rows(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the place and the row of each line of a .txt file, or of each row of any other dataset, which is read as
    training reads it. Raises UserError with the place."""
    datasets.disable_progress_bars()  # prompts are few
    found: list[tuple[str, dict[str, Any]]] = []
    rows, _ = open_split(name, "train").known_columns({})
    try:
        for row in rows:
            found.append((f"{name}, {rows.place(len(found))}", row))
    except formats.RowError as error:
        raise UserError(f"{name}, {rows.place(len(found))}: {error}") from error
    if name.endswith(".txt"):  # a single row
        lines = enumerate(found[0][1]["text"].splitlines(), start=1)
        found = [(f"{name}, line {i}", {"prompt": line}) for i, line in lines if line.strip()]
    if not found:
        raise UserError(f"{name} has no prompts")
    return found


def answer_all(config: ChatConfig, asked: list[Asked]) -> None:
    """Let one checkpoint after another answer the prompts. Raises UserError for one that does not fit the context."""
    lines: list[dict[str, Any]] = []
    # Lines are written as they come. backslashreplace writes a lone surrogate as JSON does.
    with open(config.out or os.devnull, "w", 1, "utf-8", "backslashreplace") as file:
        for name in filter(None, (config.checkpoint, config.compare)):
            writer = load(name, config)
            for place, _, prompt in asked:
                room(writer.model, encode(writer.tokenizer, prompt), 1, place)
            for batch in (asked[start : start + BATCH] for start in range(0, len(asked), BATCH)):
                *_, answers = writer.write([prompt for _, _, prompt in batch])
                for (place, row, _), answer in zip(batch, answers, strict=True):
                    line = {"place": place, "row": row, "checkpoint": name}
                    lines.append(line | {"answer": answer.text, "cut": not answer.stopped})
                    file.write(json.dumps(lines[-1], ensure_ascii=False, default=str) + "\n")
    if config.out:
        print(f"wrote {len(lines)} answers to {config.out}")
        return
    for i, (_, _, prompt) in enumerate(asked):
        print(printable(f"> {prompt if isinstance(prompt, str) else prompt[-1]['content']}"))
        for line in lines[i :: len(asked)]:  # one checkpoint after another
            name, cut = f"{line['checkpoint']}: " if config.compare else "", " (cut)" if line["cut"] else ""
            print(printable(f"{name}{line['answer']}{cut}"))
        print()


def as_prompt(row: dict[str, Any], system: str | None) -> Prompt:
    """Return a row's conversation up to its last answer, or its text. Raises RowError.

    It is read as for training, which wants an answer at the end: one is added, and all trailing ones are removed.
    """
    for name, value in row.items():
        if name.lower() in formats.TURNS and isinstance(value, list):
            row = row | {name: [*value, {"role": "assistant", "content": "-"}]}
    if not any(name.lower() in formats.ANSWERS for name in row):
        row = row | {"completion": "-"}
    content, columns, _ = formats.read_row(row)
    if isinstance(content, str):
        return content
    while content and content[-1]["role"] == "assistant":
        content = content[:-1]
    if not any(message["role"] == "user" for message in content):
        raise formats.RowError(columns, "no question")
    return content if content[0]["role"] == "system" else [*opening(system), *content]


def main() -> None:
    with one_line_errors():
        chat(parse_flags(ChatConfig, args=sys.argv[1:], prog="chat.py", description=__doc__))


if __name__ == "__main__":
    main()
