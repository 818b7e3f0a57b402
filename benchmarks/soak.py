"""Kill training runs at random moments, resume them until they are done, and compare them with undisturbed runs.

    python benchmarks/soak.py [--kills 50] [--seed 0]
    python benchmarks/soak.py --torchrun [--kills 30]
    python benchmarks/soak.py --starts 20

The runs are small, spend about half of their time saving, and are of four kinds in turn: packed, padded, accumulating
gradients under Muon, and LoRA with dropout. Each passes over its data several times. SIGKILL comes at a random moment
of training or saving. Losses (every line of metrics.jsonl), weights and optimizer state must equal those of the
undisturbed run bit for bit; otherwise the exit code is 1.

With --starts, nothing is killed: pairs of runs start in one directory, alternately together and staggered. Each
directory must then hold one run's lines and weights.

With --torchrun, the runs are jobs of two ranks, alternately under DDP and FSDP. A randomly chosen rank is killed, and
torchrun restarts the ranks until the job is done.
"""

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from files import read_json
from small_runs import (
    arguments,
    conversations,
    differing,
    final_tensors,
    kill_after,
    numbers,
    start,
    train_in_child,
    write_jsonl,
)

ARRANGEMENTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "packing": (["--packing"], {}),
    "padding": (["--no-packing"], {}),
    "accumulation, muon": (["--packing"], {"gradient_accumulation_steps": 3, "optimizer": "muon"}),
    "lora": (["--packing"], {"lora_rank": 4, "lora_dropout": 0.1}),
}
JOBS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "ddp": (["--packing"], {"parallel": "ddp", "save_steps": 1}),
    "fsdp": (["--packing"], {"parallel": "fsdp", "save_steps": 1, "optimizer": "muon"}),
}
TRAIN, RESUME = Path(__file__).resolve().parents[1] / "train_sft.py", ("--resume", "auto")
COUNTED = ("runs", "kills", "kills while saving", "resumes", "losses differing", "weights differing")
LENGTH = {"max_steps": 30, "save_steps": 2, "eval_steps": 10}
LONGEST_LIFE, LONGEST_JOB = 0.4, 2.0  # seconds of training before a kill
KILLS_A_JOB = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    parser.add_argument("--starts", type=int, default=0, help="pairs of runs that start in one directory")
    parser.add_argument("--torchrun", action="store_true", help="jobs of two ranks, which torchrun starts again")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_jsonl(folder / "data.jsonl", conversations(40))
        if options.starts:
            totals = soak_starts(folder, data, options.starts, rng)
        else:
            totals = (soak_jobs if options.torchrun else soak_runs)(folder, data, options.kills, rng)
    print(", ".join(f"{number} {what}" for what, number in totals.items()))
    return int(totals["losses differing"] + totals["weights differing"] > 0)


def soak_runs(folder: Path, data: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill and resume a run until it is done or there were that many kills. Return the counts of events."""
    log, base = folder / "log", folder / "base"  # for LoRA
    finish(arguments(data, base, max_steps=5, eval_steps=0), log)

    def disturb(run: Path, flags: list[str], changes: dict[str, Any], totals: dict[str, int]) -> None:
        command = arguments(data, run, *flags, **changes)
        while totals["kills"] < kills and kill_after(rng.uniform(0, LONGEST_LIFE), command, log) == -signal.SIGKILL:
            count_kill(run, totals)
            command = ["--resume", "--output-dir", str(run)]
        finish(command, log)  # no effect on a finished run

    def leave_alone(run: Path, flags: list[str], changes: dict[str, Any]) -> None:
        finish(arguments(data, run, *flags, **changes), log)

    lora = {"init_from": base}
    arrangements = {n: (f, c | (lora if "lora_rank" in c else {})) for n, (f, c) in ARRANGEMENTS.items()}
    return soak(folder, arrangements, kills, leave_alone, disturb)


def soak_jobs(folder: Path, data: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Do the same with a job under torchrun."""

    def begin(run: Path, flags: list[str], changes: dict[str, Any]) -> tuple[subprocess.Popen, Path]:
        log, environment = folder / f"{run.name}.log", os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        line = [*launcher, "--max-restarts=1000", str(TRAIN), *arguments(data, run, *flags, *RESUME, **changes)]
        with log.open("a") as output:
            return subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT), log

    def leave_alone(run: Path, flags: list[str], changes: dict[str, Any]) -> None:
        job, log = begin(run, flags, changes)
        if job.wait() != 0:
            sys.exit(log.read_text())

    def disturb(run: Path, flags: list[str], changes: dict[str, Any], totals: dict[str, int]) -> None:
        job, log = begin(run, flags, changes)
        enough = min(kills, totals["kills"] + KILLS_A_JOB)
        for attempt in itertools.count(1):
            while job.poll() is None and log.read_text().count("parameters, ") < attempt:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, LONGEST_JOB))
            if totals["kills"] >= enough or job.poll() is not None:
                break
            ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            if len(ranks) == 2:  # otherwise they are about to exit
                os.kill(int(rng.choice(ranks)), signal.SIGKILL)
                count_kill(run, totals)
        if job.wait() != 0:
            sys.exit(log.read_text())

    return soak(folder, JOBS, kills, leave_alone, disturb)


def soak_starts(folder: Path, data: Path, pairs: int, rng: random.Random) -> dict[str, int]:
    """Start pairs of runs in one directory, and count directories that do not hold exactly one run."""

    def command(run: Path, seed: int) -> list[str]:
        return arguments(data, run, eval_steps=0, save_steps=2, max_steps=30, seed=seed)

    for seed in (1, 2):
        finish(command(folder / f"reference-{seed}", seed), folder / "log")
    totals = dict.fromkeys(("pairs", "refused starts", "losses differing", "weights differing"), 0)
    for number in range(pairs):
        run, children = folder / f"run-{number}", []
        for seed in (1, 2):
            children.append(start(command(run, seed), folder / f"log-{number}-{seed}"))
            time.sleep(rng.uniform(0, 0.5) * (number % 2))
        for child in children:
            child.join()
        totals["pairs"] += 1
        totals["refused starts"] += sum(child.exitcode == 2 for child in children)
        for directory in folder.glob(f"run-{number}*"):
            reference = folder / f"reference-{read_json(directory / 'config.json')['seed']}"
            ours, theirs = numbers(directory), numbers(reference)
            totals["losses differing"] += sum(a != b for a, b in itertools.zip_longest(ours, theirs))
            totals["weights differing"] += len(differing(final_tensors(directory), final_tensors(reference)))
    return totals


def count_kill(run: Path, totals: dict[str, int]) -> None:
    totals["kills"] += 1
    totals["kills while saving"] += any((run / "checkpoints").glob(".step-*"))


def soak(
    folder: Path,
    arrangements: dict[str, tuple[list[str], dict[str, Any]]],
    kills: int,
    leave_alone: Callable[..., None],
    disturb: Callable[..., None],
) -> dict[str, int]:
    """Compare disturbed runs of all kinds in turn with undisturbed ones, until there were that many kills. Return the
    counts of events."""
    totals = dict.fromkeys(COUNTED, 0)
    for number, (name, (flags, changes)) in enumerate(itertools.cycle(arrangements.items())):
        if totals["kills"] >= kills:
            break
        reference, run, before = folder / f"reference-{name}", folder / f"run-{number}", totals.copy()
        if not reference.exists():
            leave_alone(reference, flags, LENGTH | changes)
        disturb(run, flags, LENGTH | changes, totals)
        ours, theirs = numbers(run), numbers(reference)
        totals["runs"] += 1
        totals["resumes"] += totals["kills"] - before["kills"]
        totals["losses differing"] += sum(a != b for a, b in itertools.zip_longest(ours, theirs))
        totals["weights differing"] += len(differing(final_tensors(run), final_tensors(reference)))
        change = {what: totals[what] - before[what] for what in totals if what != "runs"}
        print(f"run {totals['runs']}, {name}: " + ", ".join(f"{n} {what}" for what, n in change.items()), flush=True)
    return totals


def finish(command: list[str], log: Path) -> None:
    if train_in_child(command, log) != 0:
        sys.exit(log.read_text())


if __name__ == "__main__":
    sys.exit(main())
