"""The work of each rank of a job in test_parallel.py: several runs, whose memory and traffic it records."""

import gc
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import checkpoint
import parallel
import train_sft
import trainer
from datacollator import MicroBatch, Step
from launch import build
from launch.cost import Traffic
from model import LossOutput
from parallel import World
from small_runs import cheap_process

# ---------------------------------------------------------------- records of training

PATIENCE = 20  # seconds that a save may wait for memory to be released; only a failing test takes them


def local_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors that this rank holds."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors if isinstance(t, Tensor))


def new_bytes() -> int:
    """Return the bytes of tensors created since gc.freeze(), without int64: a thread loads the next batch meanwhile."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type != "meta"]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t.dtype != torch.int64]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def kept_bytes(limit: int, deadline: float) -> int:
    """Return new_bytes() once it is within the limit, or else at the deadline (of time.monotonic()): a thread of Gloo's
    may release a tensor late, and only what never goes away is held by our code."""
    while (found := new_bytes()) > limit and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


class WatchedTrainer(trainer.Trainer):
    """Records the memory of this rank, and what it sends in each micro-batch of the last step, in the run's
    rank-N.json."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: dict[str, Any] = {"targets": [], "evaluated": 0, "held": 0, "saving": 0, "gathered": 0}
        self.traffic = Traffic()
        self.sent: list[Counter[str]] = []

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        targets = len(micro_batch.documents.labels)
        if self.model.training:
            self.seen["targets"].append(targets)
            self.seen["held"] = max(self.seen["held"], local_bytes(p.grad for p in self.model.parameters()))
            self.sent.append(Counter())
            self.traffic.sent = self.sent[-1]
        elif self.step == self.total_steps:
            self.seen["evaluated"] += targets
        return super().forward(micro_batch)

    def train_step(self, step: Step) -> dict[str, float]:
        if self.step + 1 < self.total_steps:  # recording is slow
            return super().train_step(step)
        self.sent.clear()
        with self.traffic:
            metrics = super().train_step(step)
        self.seen["sent"] = list(self.sent)
        return metrics

    def update_weights(self, finite: Tensor, rate: float) -> None:
        self.traffic.sent = Counter()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.seen["parameters"] = local_bytes(self.model.parameters())
        self.seen["gradients"] = local_bytes(p.grad for p in trained)
        super().update_weights(finite, rate)
        self.seen["optimizer"] = local_bytes(
            x for optimizer in self.optimizers for state in optimizer.state.values() for x in state.values()
        )

    def save(self) -> None:
        """Record the peak memory of new tensors while a model is saved, and the largest gathered tensor."""
        gc.collect()
        gc.freeze()
        full_tensor, deadline = parallel.full_tensor, time.monotonic() + PATIENCE

        def watched(tensor: Tensor) -> Tensor:
            whole = full_tensor(tensor)
            self.seen["gathered"] = max(self.seen["gathered"], whole.nbytes)
            self.seen["saving"] = max(self.seen["saving"], kept_bytes(2 * self.seen["gathered"], deadline))
            return whole

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "full_tensor", watched)
            super().save()

    def train(self, *arguments: Any) -> None:
        super().train(*arguments)
        path = self.output_dir / f"rank-{self.world.rank}.json"
        path.write_text(json.dumps(self.seen | building))


# ---------------------------------------------------------------- records of building a model

building: dict[str, int] = {}
load_weights = parallel.load_weights


def watch_loading(model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Record the peak memory of tensors while a model is built, and the largest of its tensors."""
    building.update({"peak": 0, "largest": 0})
    gc.freeze()
    deadline = time.monotonic() + PATIENCE

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            building["largest"] = max(building["largest"], tensor.nbytes)
            new = kept_bytes(2 * building["largest"], deadline)
            building["peak"] = max(building["peak"], new + local_bytes(model.parameters()))
            yield name, tensor

    load_weights(model, watched())


# ---------------------------------------------------------------- the runs


def take_over(run: Path, to: Path, step: int = 2) -> None:
    """Copy a run as it was after it had saved its checkpoint of a step."""
    name = f"checkpoints/step-{step:06d}"
    shutil.copytree(run / name, to / name)
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(run / file, to / file)


def train_runs(runs: list[tuple[list[str], Path, Path | None]], folder: Path, world: World) -> None:
    """Train several runs: train_sft.py's arguments, the run's directory, and the run to take over, if any."""
    with cheap_process(folder) as patch:
        patch.setattr(train_sft, "Trainer", WatchedTrainer)
        patch.setattr(build, "load_weights", watch_loading)
        for arguments, output_dir, continued in runs:
            if continued and world.is_main:
                take_over(continued, output_dir)
            dist.barrier()
            train_sft.dispatch(train_sft.parse_arguments(arguments), world)
    gc.unfreeze()  # otherwise leave_world could not collect what the runs have left
