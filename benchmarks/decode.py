"""How fast is generation? Our latent cache against transformers' `generate` with its cache.

    python benchmarks/decode.py [--prompts 64 2048] [--new-tokens 64] [--rounds 3] [--model.FIELD VALUE]

Both have the same random weights in fp32, decode greedily, one prompt at a time, and take turns. Tokens per second are
counted from the first new token on; the time to the first token is the prompt's.
"""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import tyro
from rivals import benchmark_config, transformers_model  # first: sets the environment

from config import ModelConfig
from generation import generate
from model import DeepSeekV2


@dataclass
class Options:
    # Lengths of the prompts in tokens.
    prompts: tuple[int, ...] = (64, 2048)
    # Tokens to generate after each.
    new_tokens: int = 64
    # Number of prompts per length; the table shows medians.
    rounds: int = 3
    model: ModelConfig = field(default_factory=benchmark_config)


class Answer(NamedTuple):
    tokens: list[int]
    tokens_per_second: float
    first_token: float  # seconds


class Clock:
    """Record the time of each token. transformers accepts it as a streamer."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def answer(self, tokens: Iterable[int]) -> Answer:
        """Return the tokens with their speed. The last len(tokens) times are theirs; the start and, with transformers,
        the prompt come before."""
        ids = list(tokens)
        times = self.times[-len(ids) :]
        return Answer(ids, (len(ids) - 1) / (times[-1] - times[0]), times[0] - self.times[0])


def answer_ours(model: DeepSeekV2, prompt: list[int], count: int) -> Answer:
    clock, tokens = Clock(), []
    for (token,) in generate(model, [prompt], count):
        clock.put(token)
        tokens.append(token)
    return clock.answer(tokens)


def answer_theirs(model: Any, prompt: list[int], count: int) -> Answer:
    clock, ids = Clock(), torch.tensor([prompt])
    everything = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True, streamer=clock
    )
    return clock.answer(everything[0, len(prompt) :].tolist())


def main() -> None:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.AvoidSubcommands,))
    torch.manual_seed(0)
    ours = DeepSeekV2(options.model).eval()
    theirs = transformers_model(options.model, ours.state_dict()).eval()
    theirs.generation_config.eos_token_id = None  # never stop early
    answer_ours(ours, [0] * 16, 8), answer_theirs(theirs, [0] * 16, 8)  # warm up
    print(f"{'prompt':>8}{'ours':>14}{'transformers':>16}{'ratio':>8}{'first token: ours':>20}{'transformers':>14}")
    for length in options.prompts:
        our, their = [], []
        for _ in range(options.rounds):
            prompt = torch.randint(options.model.vocab_size, (length,)).tolist()
            our.append(answer_ours(ours, prompt, options.new_tokens))
            their.append(answer_theirs(theirs, prompt, options.new_tokens))
        our_rate, their_rate = (statistics.median(a.tokens_per_second for a in answers) for answers in (our, their))
        our_first, their_first = (statistics.median(a.first_token for a in answers) for answers in (our, their))
        equal = sum(a.tokens == b.tokens for a, b in zip(our, their, strict=True))
        print(
            f"{length:8,}{our_rate:10.0f} tok/s{their_rate:10.0f} tok/s{our_rate / their_rate:8.1f}"
            f"{our_first:18.2f} s{their_first:12.2f} s   {equal} of {len(our)} answers equal"
        )


if __name__ == "__main__":
    main()
