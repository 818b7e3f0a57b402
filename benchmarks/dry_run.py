"""What do the presets take on a GPU, and does a run take what --dry-run predicts?

    python benchmarks/dry_run.py [--regions] [--gpu h100] [--dtype bfloat16] [--presets mini v2_lite] [--lora 2048 4096]

--regions prints the predicted milliseconds per micro-batch of each region, for mini and for LoRA on V2-Lite in bf16 and
NF4: run it before and after a change of kernels.py. Otherwise it prints memory, traffic and FLOPs; the last table takes
the same steps on real tensors of this machine's CPU, each in a process of its own, and compares their peak memory
beyond the libraries'. Freed memory is returned at once: C's allocator would keep a fifth of it.
"""

import os
from dataclasses import dataclass
from typing import Any

os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}  # for child processes

import tyro
from rivals import benchmark_config, in_child, peak_memory  # first: sets the environment

from config import PRESETS, Dtype, GpuName, TrainConfig
from launch.build import plan_model
from launch.dry_run import dry_run, full_rows, report, step
from optimizer import make_optimizers


@dataclass
class Options:
    # Print predicted times by region, and nothing else.
    regions: bool = False
    gpu: GpuName = "h100"
    dtype: Dtype = "bfloat16"
    # Tokens per row.
    lengths: tuple[int, ...] = (512, 1024, 2048)
    presets: tuple[str, ...] = ("mini", "v2_lite")
    # Tokens per micro-batch for LoRA on V2-Lite.
    lora: tuple[int, ...] = (2048, 4096)


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora_rank": 16},
    "LoRA on NF4": {"lora_rank": 16, "quantize": "nf4"},
}


def print_plans(preset: str) -> None:
    """Print the plan for one GPU, a node of eight and eight nodes, in bf16."""
    print(f"\n{preset:14}{'GPUs':>5} {'engine':7}{'state':>10}{'the rest':>10}{'peak':>10}{'sent':>10}{'TFLOP':>9}")
    for kind, changes in KINDS.items():
        for ranks, engine in ((1, "-"), (8, "fsdp"), (64, "fsdp"), (64, "hsdp")):
            if ranks > 1 and "quantize" in changes:  # ddp only, where each rank holds what one does
                continue
            settings = {"dtype": "bfloat16", "parallel": engine.replace("-", "ddp")}
            result = dry_run(PRESETS[preset].changed(**settings | changes), ranks=ranks)
            rest = result.memory["activations"]
            sizes = "".join(f"{size / 1e9:7.1f} GB" for size in (result.peak - rest, rest, result.peak, result.sent))
            print(f"{kind:14}{ranks:5} {engine:7}{sizes}{result.flops / 1e12:9,.0f}", flush=True)


def print_lora(length: int) -> None:
    """Print the plan for V2-Lite on one GPU, with one row of that length per micro-batch."""
    for kind, changes in list(KINDS.items())[1:]:
        memory = dry_run(PRESETS["v2_lite"].changed(dtype="bfloat16", max_seq_len=length, **changes)).memory
        rest, peak = memory["activations"], sum(memory.values())
        print(f"{length:8,} {kind:12}{(peak - rest) / 1e9:7.1f} GB{rest / 1e9:7.1f} GB{peak / 1e9:7.1f} GB", flush=True)


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
    """Return the peak memory of two steps in bytes. Runs in a separate process."""
    import torch

    libraries = peak_memory()
    dtype = getattr(torch, config.compute.dtype)
    model = plan_model(config)
    model.train().model.gradient_checkpointing = config.compute.gradient_checkpointing
    optimizers = make_optimizers(model, config.optimizer, dtype)
    inputs = full_rows(config.batch.batch_size, config.data.max_seq_len)
    for _ in range(2):
        step(model, optimizers, inputs._asdict(), config)
    return int(peak_memory() - libraries)


def print_regions(gpu: GpuName) -> None:
    """Print the dry run's report for one micro-batch and an optimizer step."""
    for preset, kind in (("mini", "full"), ("v2_lite", "LoRA"), ("v2_lite", "LoRA on NF4")):
        changes = {"dtype": "bfloat16", "gradient_accumulation_steps": 1, "dry_run_gpu": gpu} | KINDS[kind]
        print(f"\n{preset}, {kind}\n{report(PRESETS[preset].changed(**changes))}", flush=True)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.regions:
        return print_regions(options.gpu)
    for preset in options.presets:
        print_plans(preset)
    print(f"\n{'tokens':>8} {'v2_lite':12}{'state':>10}{'the rest':>10}{'peak':>10}")
    for length in options.lora:
        print_lora(length)
    print(f"\n{'tokens':>8}{'checkpointing':>15}{'predicted':>12}{'measured':>12}{'more':>8}")
    for length in options.lengths:
        for checkpointing in (False, True):
            config = configuration(options.dtype, length, checkpointing)
            said, taken = dry_run(config).peak, in_child(measure, config)
            name = "yes" if checkpointing else "no"
            print(
                f"{4 * length:8,}{name:>15}{said / 1e6:9,.0f} MB{taken / 1e6:9,.0f} MB{taken / said - 1:8.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
