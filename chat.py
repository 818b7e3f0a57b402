"""Talk to a checkpoint: python chat.py CHECKPOINT [--prompt TEXT]

CHECKPOINT: a model directory, a run directory (meaning its newest checkpoint) or a LoRA adapter's. A file of questions
is answered by --prompts FILE --out FILE, and --compare CHECKPOINT asks another one the same. With --web a page in the
browser shows what goes on inside; it takes two checkpoints as well, to be asked the same.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from config import Quantization, UserError, check
from launch.command_line import one_line_errors, parse_flags

if TYPE_CHECKING:
    import torch

    from model import DeepSeekV2
    from tokenizer import Tokenizer

Messages = list[dict[str, str]]


@dataclass
class ChatConfig:
    """Talk to a checkpoint."""

    # A model directory, a run directory (meaning its newest checkpoint) or a LoRA adapter's; with --web one or two.
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    # Answer this once and exit; without it, a conversation begins.
    prompt: str | None = None
    # Continue this text once and exit, without a chat template: what a base model does.
    complete: str | None = None
    # Answer the questions in this file: a .txt file's lines, or a .jsonl file's rows with `messages`, `conversations`,
    # `prompt`, `question` or `instruction`; rows with `text` are continued.
    prompts: str | None = None
    # The .jsonl file for the answers to --prompts. An interrupted run goes on where it was; without it, they are shown.
    out: str | None = None
    # Another checkpoint, which is asked the same; the answers are shown side by side.
    compare: str | None = None
    # Questions from a file that are answered at a time.
    batch_size: int = 32
    # Told to the model before the conversation.
    system: str | None = None
    # Longest reply, in tokens.
    max_new_tokens: int = 256
    # 0: always the likeliest token; higher: more varied.
    temperature: float = 0.7
    # Draw from the likeliest tokens that together have this probability.
    top_p: float = 0.9
    # Draw from this many likeliest tokens; 0: all.
    top_k: int = 0
    # Seed of the draw; the same seed gives the same reply.
    seed: int = 0
    # nf4: load the blocks' matrices in 4 bits, an eighth to a quarter of the memory.
    quantize: Quantization | None = None
    # cuda, cpu, ...; "auto": CUDA where there is one.
    device: str = "auto"
    # A page in the browser instead: the answer's tokens with their probabilities, alternatives and experts.
    web: bool = False
    # Who may open that page: this machine only, or with 0.0.0.0 whoever reaches it over the network.
    host: str = "127.0.0.1"
    # Show Python's traceback with an error.
    debug: bool = False

    def validate(self) -> None:
        number, most = len(self.checkpoints), 2 if self.web else 1
        check(number > 0, "name a CHECKPOINT: a model directory, a run directory or a LoRA adapter's")
        more = "two are the most" if self.web else "two need --web or --compare"
        check(number <= most, f"{number} checkpoints are named; {more}")
        asked = [name for name in ("prompt", "complete", "prompts") if getattr(self, name) is not None]
        ways = [f"--{name}" for name in (*asked, *["web"] * self.web)]
        check(len(ways) < 2, f"{' and '.join(ways)} exclude each other")
        for name in asked:
            check(getattr(self, name) != "", f"--{name} is empty")
        check(asked != [] or self.compare is None, "--compare needs --prompt, --complete or --prompts")
        check(self.out is None or self.prompts is not None, "--out is for the answers to --prompts")
        check(self.batch_size == ChatConfig.batch_size or self.prompts is not None, "--batch-size is for --prompts")
        check(self.host == ChatConfig.host or self.web, "--host is for the page of --web")
        check(self.complete is None or self.system is None, "--complete has no template that --system could stand in")
        check(self.batch_size > 0, f"batch_size is {self.batch_size}; it must be positive")
        check(self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}; it must be positive")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        check(self.top_k >= 0, f"top_k is {self.top_k}; it must not be negative")
        check(abs(self.seed) < 2**63, f"seed is {self.seed}; it must be below 2**63")


def chat(config: ChatConfig) -> None:
    import torch

    from checkpoint import load_model_and_tokenizer
    from parallel import choose_device

    config.validate()
    if config.web:
        check(find_spec("gradio") is not None, "--web needs Gradio: pip install -r requirements-web.txt")
    device = choose_device(config.device)
    if config.prompts or config.compare:
        return answer_all(config, device)
    models = [load_model_and_tokenizer(path, device=device, quantize=config.quantize) for path in config.checkpoints]
    for model, _ in models:
        model.eval()
    if config.web:
        from view.page import serve

        return serve(models, config.checkpoints, config.host, vars(config))
    ((model, tokenizer),) = models
    writer = Writer(model, tokenizer, config, torch.Generator(device).manual_seed(config.seed))
    if config.prompt is not None:
        print_reply(writer.answer([*first_messages(config.system), {"role": "user", "content": config.prompt}]))
    elif config.complete is not None:
        print(config.complete, end="")
        print_reply(writer.complete(config.complete))
    else:
        converse(writer)


# ---------------------------------------------------------------- one reply


class Reply:
    """What a model writes: iterate over its pieces as they come. Then `text` has all of it, and `cut` why it stopped
    before its end, if it did."""

    def __init__(self, writer: "Writer", prompt: list[int], strip: bool) -> None:
        """Raises UserError if the prompt fills the context."""
        from generation import room_for_answer

        self.writer, self.prompt, self.strip = writer, prompt, strip
        self.room = room_for_answer(writer.model, prompt, writer.config.max_new_tokens)
        self.text = self.cut = ""

    def __iter__(self) -> Iterator[str]:
        from generation import generate

        config = self.writer.config
        sampling = (config.temperature, config.top_k, config.top_p, self.writer.generator)
        tokens: list[int] = []
        stops = self.writer.tokenizer.stop_ids
        for (token,) in generate(self.writer.model, [self.prompt], self.room, stops, *sampling):
            if token in stops:
                break
            tokens.append(token)
            text = self.decode(tokens)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's first bytes; the others will come
                yield self.grow(text)
        else:
            limit = "--max-new-tokens" if self.room == config.max_new_tokens else "the end of the model's context"
            self.cut = f"cut after {self.room} tokens by {limit}"
        yield self.grow(self.decode(tokens))

    def decode(self, tokens: list[int]) -> str:
        text = self.writer.tokenizer.decode(tokens)
        return text.lstrip() if self.strip else text

    def grow(self, text: str) -> str:
        """Take over `text`; what is new in it."""
        new, self.text = text[len(self.text) :], text
        return new


@dataclass
class Writer:
    """A model that answers and continues."""

    model: "DeepSeekV2"
    tokenizer: "Tokenizer"
    config: ChatConfig
    generator: "torch.Generator"

    def answer(self, messages: Messages) -> Reply:
        """The assistant's next turn."""
        prompt, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        return Reply(self, prompt, strip=True)

    def complete(self, text: str) -> Reply:
        """How a text goes on, up to the end of the document."""
        return Reply(self, self.tokenizer.encode(text), strip=False)


def print_reply(reply: Reply) -> None:
    for piece in reply:
        print(piece, end="", flush=True)
    print()
    if reply.cut:
        note(reply.cut)


def note(text: str) -> None:
    """For the person at the terminal; a file that standard output goes to has the answers only."""
    print(f"({text})", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- a conversation

COMMANDS = "/reset begins anew, /system TEXT too, with other instructions, /quit ends it"


def converse(writer: Writer) -> None:
    """Question and answer in turn, until there is no question."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has line editing and a history)
    if at_terminal():
        print(f"An empty line or Ctrl-D ends the conversation; Ctrl-C ends an answer. {COMMANDS}.")
    messages = first_messages(writer.config.system)
    while text := ask():
        if text.startswith("/"):
            command, _, argument = text.partition(" ")
            if command == "/quit":
                return
            if command in ("/reset", "/system"):
                messages = first_messages(writer.config.system if command == "/reset" else argument)
            else:
                note(f"{command} is no command: {COMMANDS}")
            continue
        messages = take_turn(writer, [*messages, {"role": "user", "content": text}])


def take_turn(writer: Writer, messages: Messages) -> Messages:
    """Answer the last message; the conversation with the answer, as far as the model still knows it. A question that
    is too long for the context is taken back."""
    from generation import fit_into_context

    kept, forgotten = fit_into_context(writer.model, writer.tokenizer, messages, writer.config.max_new_tokens)
    try:
        reply = writer.answer(kept)
    except UserError as error:
        note(str(error))
        return messages[:-1]
    if forgotten:
        note(forgotten)
    try:
        print_reply(reply)
    except KeyboardInterrupt:
        print()
        note("interrupted")
    return [*kept, {"role": "assistant", "content": reply.text}]


def first_messages(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def ask() -> str:
    """What a person types, or the next line of what is piped in that is not blank; "" at its end."""
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


# ---------------------------------------------------------------- many questions, two checkpoints


def answer_all(config: ChatConfig, device: str) -> None:
    """Questions from a file, or a single one, by one checkpoint or two, one after the other."""
    from checkpoint import load_model_and_tokenizer, resolve_checkpoint
    from questions import AnswerFile, answer_questions, read_question, read_questions

    if config.prompts:
        questions = read_questions(Path(config.prompts), config.system)
    else:
        row = {"prompt": config.prompt} if config.prompt else {"text": config.complete}
        questions = [read_question(1, row, config.system)]
    names = ("system", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size")
    answers = AnswerFile(Path(config.out) if config.out else None, questions, {n: getattr(config, n) for n in names})
    checkpoints = [str(resolve_checkpoint(name)) for name in (*config.checkpoints, config.compare) if name]
    try:
        for checkpoint in checkpoints:
            model, tokenizer = load_model_and_tokenizer(checkpoint, device=device, quantize=config.quantize)
            model.eval()
            answer_questions(answers, model, tokenizer, checkpoint, config.batch_size)
    except KeyboardInterrupt:
        if config.out:
            note(f"{len(answers.records)} answers are in {config.out}; the same command goes on")
        raise
    if config.out:
        print(f"wrote {len(answers.records)} answers to {config.out}")
    else:
        print(answers.side_by_side(checkpoints, shutil.get_terminal_size((100, 24)).columns))


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        chat(parse_flags(ChatConfig, sys.argv[1:], "chat.py", __doc__))


if __name__ == "__main__":
    main()
