"""Speed and memory of a training step: ours, a loop around transformers' model, and TRL.

    python benchmarks/train_step.py [--dtype float32] [--rounds 12] [--trl-rounds 3] [--plot PATH] [--model.FIELD VALUE]
    python benchmarks/train_step.py --settings [--device cuda] [--batch-sizes 1 4 16] [--rounds 12]

All train on the same batches of 8 chitchat conversations; only real tokens count, not padding. Each runs in a separate
process, whose peak memory is measured; ours and the loop take turns on each batch, TRL runs afterwards. The limit is
the speed of the machine's fastest matrix products, with the head at target positions only.

On other devices than a CPU, or with --settings, the table shows our own settings instead: compilation, checkpointing
and rows per batch, in tokens per second, share of the machine's peak (MFU) and memory.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import tyro
from rivals import (  # first: sets the environment
    Batches,
    Child,
    Step,
    autocast,
    benchmark_config,
    count_tokens,
    gemm_peak,
    in_child,
    load_conversations,
    our_loop,
    pack,
    pad,
    peak_memory,
    transformers_loop,
    transformers_loss,
    transformers_model,
    trl_sft,
)
from settings import settings_table

from config import Dtype, ModelConfig
from datacollator import IGNORE, Piece
from launch.cost import attention_flops, training_cost
from model import DeepSeekV2
from parallel import choose_device, choose_dtype

US, LOOP, TRL = "this repository", "loop around transformers", "TRL's SFTTrainer"
WARM_UP = 3  # batches


@dataclass
class Options:
    dtype: Dtype = "auto"
    # "auto": CUDA if available, else the CPU.
    device: str = "auto"
    # Print the table of our own settings; always on other devices than a CPU.
    settings: bool = False
    # Rows of 2,048 tokens per batch, for that table.
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    # Timed batches of ours and of the loop.
    rounds: int = 12
    # Timed batches of TRL, which takes half a minute per batch. 0: leave it out.
    trl_rounds: int = 3
    # Bar chart to write.
    plot: str | None = None
    model: ModelConfig = field(default_factory=benchmark_config)


class Result(NamedTuple):
    tokens_per_second: float
    peak_memory: float  # bytes


def flops_per_token(config: ModelConfig, batches: Batches) -> float:
    """Return the forward and backward FLOPs per real token: 2 and 4 per parameter of each matrix that the token is
    multiplied with (the head at target positions only), and causal attention, half of each conversation's square."""
    with torch.device("meta"):
        cost = training_cost(DeepSeekV2(config))
    conversations = [conversation for batch in batches for conversation in batch]
    tokens, targets = count_tokens(conversations)
    attention = sum(attention_flops(config, len(ids)) for ids, _ in conversations)
    return (cost.flops(tokens, targets) + attention) / tokens


def rate(batches: Batches, times: Sequence[float]) -> float:
    """Return real tokens per second without the first batches, in which memory is touched for the first time."""
    return sum(count_tokens(batch)[0] for batch in batches[WARM_UP:]) / sum(times[WARM_UP:])


in_this_process: list[Step] = []  # a child's step, kept from batch to batch


def start(build: Callable[[ModelConfig, str], Step], config: ModelConfig, dtype: str) -> None:
    in_this_process.append(build(config, dtype))


def seconds(conversations: Sequence[Piece]) -> float:
    began = time.perf_counter()
    in_this_process[0](conversations)
    return time.perf_counter() - began


def take_turns(config: ModelConfig, dtype: str, batches: Batches) -> dict[str, Result]:
    """Measure ours and the loop in two processes that take turns on each batch."""
    with Child() as ours, Child() as loops:
        ours.run(start, our_loop, config, dtype)
        loops.run(start, transformers_loop, config, dtype)
        times = [(ours.run(seconds, batch), loops.run(seconds, batch)) for batch in batches]
        our_times, loop_times = zip(*times, strict=True)
        return {
            US: Result(rate(batches, our_times), ours.run(peak_memory)),
            LOOP: Result(rate(batches, loop_times), loops.run(peak_memory)),
        }


def measure_trl(config: ModelConfig, dtype: str, batches: Batches) -> Result:
    times = trl_sft(config, dtype, batches)
    return Result(rate(batches, times), peak_memory())


@torch.no_grad()
def compare_losses(config: ModelConfig, dtype: str, conversations: Sequence[Piece]) -> dict[str, float]:
    """Return the mean loss of one batch with the same weights, as each computes it."""
    ours, packed, padded = DeepSeekV2(config), pack(conversations), pad(conversations)
    theirs = transformers_model(config, ours.state_dict())
    targets = packed["labels"].flatten()
    with autocast(dtype):
        output = ours(**packed)
        without_labels = {name: tensor for name, tensor in packed.items() if name != "labels"}
        logits = ours(**without_labels).flatten(0, 1)[targets != IGNORE].float()
        plain = torch.nn.functional.cross_entropy(logits, targets[targets != IGNORE])
        loop = transformers_loss(theirs, padded) / (padded["labels"] != IGNORE).sum()
    return {US: (output.loss_sum / output.num_targets).item(), "all logits": plain.item(), LOOP: loop.item()}


def print_table(results: dict[str, Result], limit: float) -> None:
    rivals = [name for name in results if name != US]
    ratios = "".join(f"{f'times {name.split()[0]}':>14}" for name in rivals)
    print(f"\n{'':26}{'tokens/s':>10}{ratios}{'of the limit':>14}{'peak memory':>14}")
    for name, result in results.items():
        speeds = [result.tokens_per_second / results[rival].tokens_per_second for rival in rivals]
        ratios = "".join(f"{ratio:14.2f}" for ratio in speeds)
        memory = f"{result.peak_memory / 1e9:.2f} GB"
        print(f"{name:26}{result.tokens_per_second:10,.0f}{ratios}{result.tokens_per_second / limit:14.0%}{memory:>14}")
    print(f"{'limit':26}{limit:10,.0f}")


def draw(results: dict[str, Result], limit: float, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.2), layout="constrained", sharey=True)
    names = list(results)[::-1]
    colours = ["C0" if name == US else "lightgrey" for name in names]
    speed = left.barh(names, [results[name].tokens_per_second for name in names], color=colours)
    left.axvline(limit, color="grey", linestyle=":", label="the machine's limit")
    left.set(title="training: tokens per second", xlim=(0, limit * 1.05))
    left.legend(loc="lower right")
    memory = right.barh(names, [results[name].peak_memory / 1e9 for name in names], color=colours)
    right.set(title="peak memory (GB)")
    right.margins(x=0.15)
    left.bar_label(speed, fmt="{:,.0f}", padding=3)
    right.bar_label(memory, fmt="{:.1f}", padding=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.AvoidSubcommands,))
    device = torch.device(choose_device(options.device))
    config, dtype = options.model, choose_dtype(options.dtype, device)
    if options.settings or device.type != "cpu":
        settings_table(config, device, dtype, options.batch_sizes, options.rounds)
        return
    batches = load_conversations(WARM_UP + options.rounds, config.vocab_size)
    peak = gemm_peak(dtype)
    results = take_turns(config, dtype, batches)
    if options.trl_rounds:
        results[TRL] = in_child(measure_trl, config, dtype, batches[: WARM_UP + options.trl_rounds])
    peak = max(peak, gemm_peak(dtype))

    flops = flops_per_token(config, batches)
    tokens, targets = count_tokens([conversation for batch in batches for conversation in batch])
    print(f"\n{dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}: {peak / 1e9:,.0f} GFLOP/s at most")
    print(f"{tokens:,} tokens, {targets / tokens:.0%} of them targets; {flops / 1e6:,.0f} MFLOP per token")
    print_table(results, peak / flops)
    losses = compare_losses(config, dtype, batches[0])
    print("\nloss with the same weights: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    if options.plot:
        draw(results, peak / flops, options.plot)


if __name__ == "__main__":
    main()
