"""How does the cost of a training step grow with length, tokens per step, vocabulary and experts?

    python benchmarks/scaling_cost.py [--dtype float32] [--tables length tokens vocabulary experts]

Each line is a separate process that trains on random conversations, half of whose tokens are targets. Memory is its
peak beyond its libraries. 16 bytes per parameter are weights, gradients and optimizer state in fp32; the last columns
are the rest, which must grow with the tokens per step and with nothing else.
"""

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import tyro
from rivals import benchmark_config, in_child, our_loop, peak_memory  # first: sets the environment

from config import Dtype, ModelConfig
from datacollator import Piece
from launch.cost import parameter_counts
from parallel import choose_dtype

WARM_UP, TIMED = 3, 5  # steps
TOKENS = 4096  # per step, unless a table varies them
Table = Literal["length", "tokens", "vocabulary", "experts"]


@dataclass
class Options:
    dtype: Dtype = "auto"
    # Which tables to print.
    tables: tuple[Table, ...] = ("length", "tokens", "vocabulary", "experts")
    model: ModelConfig = field(default_factory=benchmark_config)


class Work(NamedTuple):
    """One line of a table."""

    label: int
    config: ModelConfig
    length: int = 512  # tokens per conversation
    tokens: int = TOKENS  # tokens per step


def lines(table: Table, config: ModelConfig) -> list[Work]:
    if table == "length":
        return [Work(length, config, length=length) for length in (256, 512, 1024, 2048, 4096)]
    if table == "tokens":
        return [Work(tokens, config, tokens=tokens) for tokens in (1024, 2048, 4096, 8192, 16_384)]
    if table == "vocabulary":
        return [Work(size, replace(config, vocab_size=size)) for size in (8192, 16_384, 32_768, 65_536, 100_280)]
    return [Work(experts, replace(config, n_routed_experts=experts)) for experts in (8, 16, 32, 64)]


def measure(work: Work, dtype: str) -> tuple[float, float]:
    """Return the seconds per step and the peak memory beyond libraries in bytes. Runs in a separate process."""
    libraries = peak_memory()
    step = our_loop(work.config, dtype)
    mask = [0] * (work.length // 2) + [1] * (work.length // 2)
    times = []
    for _ in range(WARM_UP + TIMED):
        ids = torch.randint(work.config.vocab_size, (work.tokens // work.length, work.length)).tolist()
        conversations: list[Piece] = [(row, mask) for row in ids]
        began = time.perf_counter()
        step(conversations)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:]), peak_memory() - libraries


def print_table(table: Table, config: ModelConfig, dtype: str) -> None:
    print(f"\n{table:>12}{'µs per token':>14}{'of the first':>14}{'memory':>12}{'rest':>12}{'per token':>12}")
    first = 0.0
    for work in lines(table, config):
        seconds, memory = in_child(measure, work, dtype)
        per_token = seconds / work.tokens
        first = first or per_token
        state = 16 * sum(total for total, _ in parameter_counts(work.config).values())
        print(
            f"{work.label:12,}{per_token * 1e6:14.0f}{per_token / first:14.2f}{memory / 1e6:9,.0f} MB"
            f"{(memory - state) / 1e6:9,.0f} MB{(memory - state) / work.tokens / 1e3:9,.0f} kB",
            flush=True,
        )


def main() -> None:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.AvoidSubcommands,))
    for table in options.tables:
        print_table(table, options.model, choose_dtype(options.dtype, torch.device("cpu")))


if __name__ == "__main__":
    main()
