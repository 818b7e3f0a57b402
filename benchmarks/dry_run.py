"""Does a run take the memory that --dry-run says? The same steps on real tensors, on this machine's CPU.

    python benchmarks/dry_run.py [--dtype float32] [--lengths 512 1024 2048]

Each line is a process of its own, whose most resident memory beyond its libraries' is counted.
"""

import functools
from dataclasses import dataclass

import tyro
from rivals import benchmark_config, in_child, peak_memory  # first: sets the environment

import train_sft
from config import Dtype, TrainConfig
from engine.dry_run import dry_run, full_rows, step
from optimizer import make_optimizers


@dataclass
class Options:
    dtype: Dtype = "float32"
    # Tokens of a row.
    lengths: tuple[int, ...] = (512, 1024, 2048)


def configuration(dtype: Dtype, length: int, checkpointing: bool) -> TrainConfig:
    return TrainConfig().changed(
        model=benchmark_config(),
        device="cpu",
        dtype=dtype,
        max_seq_len=length,
        batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
    )


def measure(config: TrainConfig) -> int:
    """Bytes that two steps hold at most. Runs in a process of its own."""
    import torch

    libraries = peak_memory()
    dtype = getattr(torch, config.compute.dtype)
    model, _ = train_sft.plan_model(config)
    model.train().model.gradient_checkpointing = config.compute.gradient_checkpointing
    optimizers = make_optimizers(model, config.optimizer, dtype)
    inputs = full_rows(config.batch.batch_size, config.data.max_seq_len)
    for _ in range(2):
        step(model, optimizers, inputs, config, dtype)
    return int(peak_memory() - libraries)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    plan = functools.partial(dry_run, plan=train_sft.plan_model, parts=train_sft.gathered_parts)
    print(f"\n{'tokens':>8}{'checkpointing':>15}{'said':>12}{'taken':>12}{'more':>8}")
    for length in options.lengths:
        for checkpointing in (False, True):
            config = configuration(options.dtype, length, checkpointing)
            said, taken = plan(config).peak, in_child(measure, config)
            name = "yes" if checkpointing else "no"
            print(
                f"{4 * length:8,}{name:>15}{said / 1e6:9,.0f} MB{taken / 1e6:9,.0f} MB{taken / said - 1:8.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
