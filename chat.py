"""Talk to a checkpoint: python chat.py CHECKPOINT [--prompt TEXT]

CHECKPOINT is a model directory, a run directory (its newest checkpoint is used) or a LoRA adapter's directory.
--prompts FILE --out FILE answers the prompts in a file, --compare CHECKPOINT gives the same prompts to another one, and
--web opens a page in the browser that shows how one or two checkpoints choose their tokens.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro

from checkpoint import load_model_and_tokenizer
from config import Quantization, UserError
from data import formats
from data.text_files import READERS, file_kind, parse_line, read_files
from files import printable
from generation import Answer, Prompt, check_sampling, encode, fit_into_context, room, write
from launch.command_line import one_line_errors, parse_flags
from model import DeepSeekV2
from parallel import choose_device
from tokenizer import Tokenizer


@dataclass
class ChatConfig:
    """Talk to a checkpoint."""

    # A model directory, a run directory (its newest checkpoint is used) or a LoRA adapter's; with --web one or two.
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    # Answer this and exit; without it, a conversation begins.
    prompt: str | None = None
    # Continue this text and exit, without a chat template: for base models.
    complete: str | None = None
    # Answer the prompts in this file: the lines of a .txt file, or rows as for training, up to their last answer.
    prompts: str | None = None
    # Write the answers to --prompts into this .jsonl file instead of printing them.
    out: str | None = None
    # Give another checkpoint the same prompts and print its answers below.
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
    # Print Python's traceback with an error.
    debug: bool = False

    def validate(self) -> None:
        number, most = len(self.checkpoints), 2 if self.web else 1
        if not 1 <= number <= most:
            raise UserError(f"{number} CHECKPOINTs are given instead of {most} (--web and --compare take another)")
        modes = [name for name in ("prompt", "complete", "prompts", "web") if getattr(self, name) not in (None, False)]
        if len(modes) > 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in modes)} exclude each other")
        if self.compare is not None and modes in ([], ["web"]):
            raise UserError("--compare needs --prompt, --complete or --prompts")
        if self.complete is not None and self.system:
            raise UserError("--system has no effect: --complete uses no chat template")
        for name, mode in NEEDED.items():
            if getattr(self, name) != getattr(ChatConfig, name) and mode not in modes:
                raise UserError(f"--{name.replace('_', '-')} has no effect without --{mode}")
        if self.out is not None and Path(self.out).resolve() == Path(str(self.prompts)).resolve():
            raise UserError(f"--out {self.out} would overwrite the prompts: choose another name")
        if self.host not in LOCAL and not self.auth and not self.no_auth:
            raise UserError(f"--host {self.host} opens the page to others: give --auth USER:PASSWORD, or --no-auth")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise UserError("--auth is not USER:PASSWORD")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be positive")
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)


# Flags that have an effect only with another one.
NEEDED = {"out": "prompts", "host": "web", "port": "web", "auth": "web", "no_auth": "web"}
LOCAL = ("127.0.0.1", "localhost", "::1")


def chat(config: ChatConfig) -> None:
    config.validate()
    if config.web:
        if find_spec("gradio") is None:
            raise UserError("--web needs Gradio: pip install -r requirements-web.txt")
        from view.page import serve

        writers = [load(name, config) for name in config.checkpoints]
        serve([(writer.model, writer.tokenizer) for writer in writers], config.checkpoints, vars(config))
    elif config.prompts is not None or config.compare is not None:
        answer_all(config)
    elif config.prompt is not None:
        print_answer(load(config.checkpoints[0], config), opening(config.system, config.prompt))
    elif config.complete is not None:
        writer = load(config.checkpoints[0], config)
        print(config.complete, end="")
        print_answer(writer, config.complete)
    else:
        converse(load(config.checkpoints[0], config))


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
    """Raises UserError for what is not a checkpoint."""
    device = choose_device(config.device)
    model, tokenizer = load_model_and_tokenizer(checkpoint, device=device, quantize=config.quantize)
    model.eval()
    return Writer(model, tokenizer, config, torch.Generator(device).manual_seed(config.seed))


def print_answer(writer: Writer, prompt: Prompt, interruptible: bool = False) -> str:
    """Print an answer while it is written, and return it. interruptible: Ctrl-C ends the answer, not the program.
    Raises UserError if the prompt does not fit the context."""
    printed, answer = "", None
    try:
        for (answer,) in writer.write([prompt]):
            text = answer.text
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the rest of a character's bytes is yet to come
                print(printable(text[len(printed) :]), end="", flush=True)
                printed = text
    except KeyboardInterrupt:
        if not interruptible:
            raise
        print()
        note("interrupted")
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


def opening(system: str | None, *questions: str) -> list[dict[str, str]]:
    """Return the start of a conversation."""
    messages = [{"role": "user", "content": question} for question in questions]
    return [{"role": "system", "content": system}, *messages] if system else messages


# ---------------------------------------------------------------- a conversation

COMMANDS = "/reset starts over, /system TEXT too, with other instructions, /quit ends it"


def converse(writer: Writer) -> None:
    """Alternate between a question from the terminal or a pipe and its answer, until none is left."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    if at_terminal():
        print(f"An empty line or Ctrl-D ends the conversation; Ctrl-C ends an answer. {COMMANDS}.")
    messages = opening(writer.config.system)
    while text := ask():
        command, _, argument = text.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            messages = opening(argument if command == "/system" else writer.config.system)
        elif command.startswith("/"):
            note(f"unknown command {command}: {COMMANDS}")
        else:
            messages = take_turn(writer, [*messages, {"role": "user", "content": text}])


def take_turn(writer: Writer, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Answer the last message and return the conversation, without the turns that no longer fit the context. A question
    that does not fit by itself is reported and dropped."""
    kept, forgotten = fit_into_context(writer.model, writer.tokenizer, messages, writer.config.max_new_tokens)
    try:
        answer = print_answer(writer, kept, interruptible=True)
    except UserError as error:
        note(str(error))
        return messages[:-1]
    if forgotten:
        note(forgotten)
    return [*kept, {"role": "assistant", "content": answer}]


def ask() -> str:
    """Return what is typed, or the next line of a pipe that is not blank; "" at the end."""
    try:
        text = input("> " if at_terminal() else "").strip()
        while not (text or at_terminal()):
            text = input().strip()
        return text
    except (EOFError, KeyboardInterrupt):
        if at_terminal():
            print()
        return ""


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


# ---------------------------------------------------------------- many prompts, two checkpoints

BATCH = 32  # prompts that are answered at a time


class Asked(NamedTuple):
    """A prompt, and where it comes from."""

    place: str
    row: dict[str, Any]
    prompt: Prompt


def answer_all(config: ChatConfig) -> None:
    """Let one checkpoint after another answer the prompts of a file, or the one on the command line. Raises UserError
    for a prompt that does not fit the context."""
    if config.prompts is not None:
        everything = read_prompts(Path(config.prompts), config.system)
    else:
        prompt = opening(config.system, config.prompt) if config.prompt is not None else str(config.complete)
        everything = [Asked("the prompt", {}, prompt)]
    lines: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        # Lines are written as they come. backslashreplace writes a lone surrogate as JSON does.
        file = config.out and stack.enter_context(open(config.out, "w", 1, "utf-8", "backslashreplace"))
        for name in filter(None, (*config.checkpoints, config.compare)):
            writer = load(name, config)
            for place, _, prompt in everything:
                room(writer.model, encode(writer.tokenizer, prompt), 1, place)
            for batch in (everything[start : start + BATCH] for start in range(0, len(everything), BATCH)):
                *_, answers = writer.write([asked.prompt for asked in batch])
                for asked, answer in zip(batch, answers, strict=True):
                    line = {"place": asked.place, "row": asked.row, "checkpoint": name}
                    lines.append(line | {"answer": answer.text, "cut": not answer.stopped})
                    if file:
                        file.write(json.dumps(lines[-1], ensure_ascii=False, default=str) + "\n")
    if config.out:
        print(f"wrote {len(lines)} answers to {config.out}")
        return
    for i, (_, _, prompt) in enumerate(everything):
        print(printable(f"> {prompt if isinstance(prompt, str) else prompt[-1]['content']}"))
        for line in lines[i :: len(everything)]:  # one checkpoint after another
            name, cut = f"{line['checkpoint']}: " if config.compare else "", " (cut)" if line["cut"] else ""
            print(printable(f"{name}{line['answer']}{cut}"))
        print()


def read_prompts(path: Path, system: str | None) -> list[Asked]:
    """Read the lines of a .txt file, or the rows of any other as training does. Raises UserError with the place."""
    if file_kind(path) not in READERS:
        raise UserError(f"{path}: prompts are read from {', '.join(READERS)} (or .gz of them)")
    found, place = [], str(path)
    try:
        for line in read_files([str(path)], [""], []):
            place = f"{path}, {line['place']}"
            row = parse_line(line)
            if path.suffix == ".txt":  # a single row
                lines = enumerate(row["text"].splitlines(), start=1)
                return [Asked(f"{path}, line {i}", {}, opening(system, text)) for i, text in lines if text.strip()]
            found.append(Asked(place, row, as_prompt(row, system)))
    except (ValueError, formats.RowError) as error:
        raise UserError(f"{place}: {error}") from error
    if not found:
        raise UserError(f"{path} has no prompts")
    return found


def as_prompt(row: dict[str, Any], system: str | None) -> Prompt:
    """Return a row's conversation up to its last answer, or its text. Raises RowError.

    It is read as for training, which wants an answer at the end: one is added, and all trailing ones are removed.
    """
    names = {name.lower(): name for name in row}
    turns = next((names[name] for name in formats.TURNS if name in names), "")
    if isinstance(row.get(turns), list):
        row = row | {turns: [*row[turns], {"role": "assistant", "content": "-"}]}
    elif names.keys() & {*formats.QUESTIONS} and not names.keys() & {*formats.ANSWERS}:
        row = row | {"completion": "-"}
    content = formats.read_row(row).content
    if isinstance(content, str):
        return content
    while content and content[-1]["role"] == "assistant":
        content = content[:-1]
    if not any(message["role"] == "user" for message in content):
        raise formats.RowError(turns, "no question")
    return content if content[0]["role"] == "system" else [*opening(system), *content]


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        chat(parse_flags(ChatConfig, sys.argv[1:], "chat.py", __doc__))


if __name__ == "__main__":
    main()
