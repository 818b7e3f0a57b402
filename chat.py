"""Talk to a checkpoint: python chat.py CHECKPOINT [--prompt TEXT]

CHECKPOINT: a model directory, a run directory (meaning its newest checkpoint) or a LoRA adapter's. With --web a page in
the browser shows what goes on inside; it takes two checkpoints as well, to be asked the same.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import tyro

from config import Quantization, UserError, check
from engine.cli import one_line_errors, parse_flags

if TYPE_CHECKING:
    import torch

    from model import DeepSeekV2
    from tokenizer import Tokenizer


@dataclass
class ChatConfig:
    """Talk to a checkpoint."""

    # A model directory, a run directory (meaning its newest checkpoint) or a LoRA adapter's; with --web one or two.
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    # Answer this once and exit; without it, a conversation begins.
    prompt: str | None = None
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
        check(number <= most, f"{number} checkpoints are named; {'two are the most' if self.web else 'two need --web'}")
        check(self.prompt is None or not self.web, "--prompt and --web exclude each other: type into the page")
        check(self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}; it must be positive")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        check(self.top_k >= 0, f"top_k is {self.top_k}; it must not be negative")
        check(abs(self.seed) < 2**63, f"seed is {self.seed}; it must be below 2**63")


def reply(
    model: "DeepSeekV2",
    tokenizer: "Tokenizer",
    messages: list[dict[str, str]],
    config: ChatConfig,
    generator: "torch.Generator",
) -> Iterator[str]:
    """The assistant's answer to a conversation, piece by piece as it comes. Raises UserError if it doesn't fit."""
    from generation import generate, room_for_answer

    prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
    tokens: list[int] = []
    printed = ""
    for (token,) in generate(
        model,
        [prompt],
        room_for_answer(model, prompt, config.max_new_tokens),
        (tokenizer.eos_token_id,),
        config.temperature,
        config.top_k,
        config.top_p,
        generator,
    ):
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        text = tokenizer.decode(tokens).lstrip()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # the first bytes of a character whose others are still to come
        yield text[len(printed) :]
        printed = text
    yield tokenizer.decode(tokens).lstrip()[len(printed) :]


def chat(config: ChatConfig) -> None:
    import torch

    from checkpoint import load_model_and_tokenizer
    from parallel import choose_device

    config.validate()
    if config.web:
        check(find_spec("gradio") is not None, "--web needs Gradio: pip install -r requirements-web.txt")
    device = choose_device(config.device)
    models = [load_model_and_tokenizer(checkpoint, None, device, config.quantize) for checkpoint in config.checkpoints]
    for model, _ in models:
        model.eval()
    if config.web:
        from engine.web import serve

        return serve(models, config.checkpoints, config.host, vars(config))
    ((model, tokenizer),) = models
    generator = torch.Generator(device).manual_seed(config.seed)
    messages = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt is None:
        print("An empty line or Ctrl-D ends the conversation.")
    while text := config.prompt if config.prompt is not None else ask():
        messages.append({"role": "user", "content": text})
        answer = ""
        for piece in reply(model, tokenizer, messages, config, generator):
            print(piece, end="", flush=True)
            answer += piece
        print()
        if config.prompt is not None:
            return
        messages.append({"role": "assistant", "content": answer})
    if config.prompt is not None:
        raise UserError("--prompt is empty")


def ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        chat(parse_flags(ChatConfig, sys.argv[1:], "chat.py", __doc__))


if __name__ == "__main__":
    main()
