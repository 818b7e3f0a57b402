"""Kill training runs at random moments, resume them until they are done, and compare them with runs left alone.

    python benchmarks/soak.py [--kills 50] [--seed 0]

Small runs, which spend about half of their time saving, in four arrangements by turns: packed, padded, accumulating
gradients under Muon, and LoRA with dropout. Each goes through its data several times. SIGKILL comes at a random moment
of training or saving. Losses (every line of metrics.jsonl), weights and optimizer state have to come out bit for bit as
those of the undisturbed run. Exits with 1 if any does not.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from small_runs import (
    arguments,
    conversations,
    differing,
    final_tensors,
    kill_after,
    numbers,
    train_in_child,
    write_jsonl,
)

ARRANGEMENTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "packing": (["--packing"], {}),
    "padding": (["--no-packing"], {}),
    "accumulation, muon": (["--packing"], {"gradient_accumulation_steps": 3, "optimizer": "muon"}),
    "lora": (["--packing"], {"lora_rank": 4, "lora_dropout": 0.1}),
}
COUNTED = ("runs", "kills", "kills while saving", "resumes", "losses differing", "weights differing")
LENGTH = {"max_steps": 30, "save_steps": 2, "eval_steps": 10}
LONGEST_LIFE = 0.4  # seconds of training before a kill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        totals = soak(Path(folder), options.kills, rng)
    print(", ".join(f"{number} {what}" for what, number in totals.items()))
    return int(totals["losses differing"] + totals["weights differing"] > 0)


def soak(folder: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Counts of what happened, until there were that many kills."""
    data, log = write_jsonl(folder / "data.jsonl", conversations(40)), folder / "log"
    base = folder / "base"  # which LoRA adapts
    finish(arguments(data, base, max_steps=5, eval_steps=0), log)
    totals = dict.fromkeys(COUNTED, 0)
    for number, (name, (flags, changes)) in enumerate(itertools.cycle(ARRANGEMENTS.items())):
        if totals["kills"] >= kills:
            return totals
        changes = LENGTH | changes | ({"init_from": base} if "lora_rank" in changes else {})
        reference, run = folder / f"reference-{name}", folder / f"run-{number}"
        if not reference.exists():
            finish(arguments(data, reference, *flags, **changes), log)
        command = arguments(data, run, "--resume", *flags, **changes)
        before = totals.copy()
        while totals["kills"] < kills and kill_after(rng.uniform(0, LONGEST_LIFE), command, log) == -signal.SIGKILL:
            totals["kills"] += 1
            totals["kills while saving"] += any((run / "checkpoints").glob(".step-*"))
        finish(command, log)  # changes nothing if it is done
        ours, theirs = numbers(run), numbers(reference)
        totals["runs"] += 1
        totals["resumes"] += totals["kills"] - before["kills"]
        totals["losses differing"] += sum(a != b for a, b in itertools.zip_longest(ours, theirs))
        totals["weights differing"] += len(differing(final_tensors(run), final_tensors(reference)))
        change = {what: totals[what] - before[what] for what in totals if what != "runs"}
        print(f"run {totals['runs']}, {name}: " + ", ".join(f"{n} {what}" for what, n in change.items()), flush=True)
    raise AssertionError("a cycle doesn't end")


def finish(command: list[str], log: Path) -> None:
    if train_in_child(command, log) != 0:
        sys.exit(log.read_text())


if __name__ == "__main__":
    sys.exit(main())
