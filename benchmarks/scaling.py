"""What do several ranks send and gain? Bytes and tokens per second per engine, and a calculation for more GPUs.

    python benchmarks/scaling.py [--ranks 1 2] [--steps 20] [--preset tiny]

Runs the real trainer on chitchat with one thread and the same batch size per rank. Bytes are counted twice: from a
rank's collectives, as ring algorithms send them, and on the loopback interface, which all ranks use and nothing else
should use meanwhile. The calculation at the end measures nothing.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

from config import PRESETS, DataConfig
from launch.cost import Traffic, parameter_counts
from launch.dry_run import dry_run
from launch.start import model_shape

WARM_UP = COUNTED = 3  # steps
WORKER = "RANK" in os.environ


@dataclass
class Options:
    # Numbers of ranks.
    ranks: tuple[int, ...] = (1, 2)
    # Timed steps, after those for warm-up and those whose bytes are counted.
    steps: int = 20
    # Runs of each, taking turns; the fastest counts, because other work can only slow a run down.
    rounds: int = 3
    preset: str = "tiny"


# ---------------------------------------------------------------- counting


def loopback_bytes() -> int:
    """Return the bytes sent so far; 0 if the system does not report them."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[9]) for line in lines if line.split()[0] == "lo:"), 0)


def theory(engine: str, ranks: int, preset: str) -> float:
    """Return the bytes per rank and step: DDP reduces gradients, FSDP also gathers parameters twice."""
    shape = model_shape(PRESETS[preset], preset, None)
    parameters = sum(total for total, _ in parameter_counts(shape).values())
    return {"ddp": 2, "fsdp": 3}[engine] * (ranks - 1) / ranks * 4 * parameters


# ---------------------------------------------------------------- a rank


def train(engine: str, steps: int, preset: str) -> dict[str, float]:
    """Return the bytes that this rank sends per step, and the tokens per second of all ranks."""
    import train_sft
    from datacollator import DataCollator, RowStream
    from dataset import load_data
    from launch.build import build_model
    from launch.start import find_start
    from parallel import join_world, leave_world, replicate
    from trainer import Trainer

    total = str(WARM_UP + COUNTED + steps)
    flags = [preset, "--dataset", "chitchat", "--parallel", engine, "--max-steps", total, "--device", "cpu"]
    flags += ["--optimizer", "adamw"]  # under FSDP, Muon also gathers matrices, which theory does not count
    arguments = train_sft.parse_arguments(flags)
    world = join_world(arguments.config.compute.device)
    config, tokenizer, *_ = find_start(arguments, world)
    width = config.data.max_seq_len
    options = DataConfig(("chitchat",), train_split="train", max_seq_len=width, long_conversations="truncate")
    data = load_data(options, tokenizer, seed=0, want_eval=False).train
    rows = RowStream(data, DataCollator(width, tokenizer.pad_token_id), config.compute.seed)
    model = build_model(config, None, world)
    trainer = Trainer(config, replicate(model, engine, world), tokenizer, rows, None, world)
    traffic = Traffic()
    with contextlib.closing(trainer.batches.steps(0, trainer.total_steps)) as batches:
        for batch in itertools.islice(batches, WARM_UP):
            trainer.train_step(batch)
        dist.barrier()
        wire = loopback_bytes()
        for batch in itertools.islice(batches, COUNTED):
            with traffic:
                trainer.train_step(batch)
        dist.barrier()
        wire = loopback_bytes() - wire
        tokens, began = trainer.num_tokens, time.perf_counter()
        for batch in batches:
            trainer.train_step(batch)
        dist.barrier()
        rate = (trainer.num_tokens - tokens) / (time.perf_counter() - began)
    leave_world()
    return {"sent": sum(traffic.sent.values()) / COUNTED, "wire": wire / COUNTED / world.size, "rate": rate}


def start(engine: str, ranks: int, options: Options) -> dict[str, float]:
    """Run the ranks under torchrun and return the first one's result."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "result.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        worker = [__file__, engine, str(options.steps), options.preset, str(result)]
        subprocess.run(launcher + worker, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        return json.loads(result.read_text())


# ---------------------------------------------------------------- a calculation, not a measurement

FLOPS = 0.4 * 989e12  # 40% of an H100's in bf16, a good share
INSIDE, BETWEEN = 350e9, 40e9  # bytes per second and GPU: NVLink within a node of 8; a 400 Gb/s network between nodes


def calculate(preset: str) -> None:
    """Print a step's compute and send times and its share of perfect scaling. FLOPs are the dry run's;
    benchmarks/dry_run.py counts the same bytes in the engines' own calls.

    Per micro-batch, FSDP gathers bf16 weights twice and scatters fp32 gradients, overlapping all of the computation;
    HSDP does so within a node. The reduction once per step, all gradients (DDP) or a shard's between nodes (HSDP),
    overlaps the last micro-batch's backward pass, two thirds of its work.
    """
    config = PRESETS[preset].changed(dtype="bfloat16")
    size = 4 * sum(total for total, _ in parameter_counts(config.model).values())
    micro_batches, tokens = config.batch.gradient_accumulation_steps, config.batch.batch_size * config.data.max_seq_len
    computing = dry_run(config).flops / FLOPS
    print(f"\nCalculated, not measured: {preset}, {micro_batches} micro-batches of {tokens:,} tokens per GPU and step")
    print(f"{'GPUs':>4} {'engine':6}{'sent per GPU':>14}{'compute':>10}{'send':>10}{'hidden':>11}{'efficiency':>12}")
    last = 2 / 3 * computing / micro_batches
    for ranks, engine in ((8, "ddp"), (8, "fsdp"), (64, "ddp"), (64, "fsdp"), (64, "hsdp")):
        shards = {"ddp": 1, "fsdp": ranks, "hsdp": 8}[engine]
        replicas = ranks // shards
        sharding = 2 * micro_batches * (shards - 1) / shards * size
        reducing = 2 * (replicas - 1) / replicas * size / shards
        parts = [
            (sharding / (INSIDE if shards <= 8 else BETWEEN), computing),
            (reducing / (INSIDE if ranks <= 8 else BETWEEN), last),
        ]
        sending, waiting = sum(time for time, _ in parts), sum(max(0.0, time - beside) for time, beside in parts)
        sent = (sharding + reducing) / 1e9
        print(
            f"{ranks:4} {engine:6}{sent:11.2f} GB{computing * 1e3:7.0f} ms{sending * 1e3:7.0f} ms"
            f"{(sending - waiting) * 1e3:8.0f} ms{computing / (computing + waiting):12.0%}"
        )


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    runs = [(engine, ranks) for ranks in options.ranks for engine in ("ddp", "fsdp") if ranks > 1 or engine == "ddp"]
    rounds = [{run: start(*run, options) for run in runs} for _ in range(options.rounds)]
    results = {run: max((round_[run] for round_ in rounds), key=lambda result: result["rate"]) for run in runs}
    one = results[runs[0]]["rate"] / runs[0][1]
    print(f"\n{options.preset} on chitchat, one thread per rank; megabytes per rank and step")
    print(f"{'ranks':>5} {'engine':6}{'counted':>10}{'theory':>10}{'on loopback':>14}{'tokens/s':>11}{'of linear':>12}")
    for (engine, ranks), result in results.items():
        print(
            f"{ranks:5} {engine if ranks > 1 else '-':6}{result['sent'] / 1e6:10.2f}"
            f"{theory(engine, ranks, options.preset) / 1e6:10.2f}{result['wire'] / 1e6:14.2f}"
            f"{result['rate']:11,.0f}{result['rate'] / (ranks * one):12.0%}"
        )
    calculate("mini")


if __name__ == "__main__" and WORKER:
    engine, steps, preset, path = sys.argv[1:]
    result = train(engine, int(steps), preset)
    if os.environ["RANK"] == "0":
        Path(path).write_text(json.dumps(result))
elif __name__ == "__main__":
    main()
