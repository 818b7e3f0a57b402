"""What each rank of a torchrun job does in test_parallel.py: several runs, one after the other, all of them watched.

Starting a process takes longer than any of these runs.

torchrun ... tests/ranks.py RUNS.json   # a list of {"arguments": train_sft.py's, "continues": RUN or null}
"""

import gc
import json
import shutil
import sys
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
from hub import peft
from launch.cost import Traffic
from model import LossOutput
from small_runs import cheap_process

# ---------------------------------------------------------------- watching


def local_bytes(tensors: Iterable[Any]) -> int:
    """What this rank holds of them."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors if isinstance(t, Tensor))


def new_bytes() -> int:
    """Memory in tensors that have come to be since gc.freeze()."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type != "meta"]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


class WatchedTrainer(trainer.Trainer):
    """Records what this rank holds, and what it sends in each micro-batch of the last step. It ends up in the run's
    directory, as rank-N.json."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: dict[str, Any] = {"targets": [], "evaluated": 0, "held": 0, "saving": 0, "gathered": 0}
        self.traffic = Traffic()
        self.sent: list[Counter[str]] = []

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        targets = micro_batch.documents.num_targets
        if self.model.training:
            self.seen["targets"].append(targets)
            self.seen["held"] = max(self.seen["held"], local_bytes(p.grad for p in self.model.parameters()))
            self.sent.append(Counter())
            self.traffic.sent = self.sent[-1]
        elif self.step == self.total_steps:
            self.seen["evaluated"] += targets
        return super().forward(micro_batch)

    def train_step(self, step: Step) -> dict[str, float]:
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
        """Record the most memory in tensors beyond those that are there before, and the largest gathered tensor."""
        gc.collect()
        gc.freeze()
        full_tensor = parallel.full_tensor

        def watched(tensor: Tensor) -> Tensor:
            whole = full_tensor(tensor)
            self.seen["gathered"] = max(self.seen["gathered"], whole.nbytes)
            self.seen["saving"] = max(self.seen["saving"], new_bytes())
            return whole

        with pytest.MonkeyPatch.context() as patch:
            for module in (checkpoint, peft):
                patch.setattr(module, "full_tensor", watched)
            super().save()

    def train(self, *arguments: Any) -> None:
        super().train(*arguments)
        path = self.output_dir / f"rank-{self.world.rank}.json"
        path.write_text(json.dumps(self.seen | building))


# ---------------------------------------------------------------- building a model

building: dict[str, int] = {}
load_weights = parallel.load_weights


def watch_loading(model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """The most memory in tensors at once while a model is built, and the largest of its tensors."""
    building.update({"peak": 0, "largest": 0})
    gc.freeze()

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            building["largest"] = max(building["largest"], tensor.nbytes)
            building["peak"] = max(building["peak"], new_bytes() + local_bytes(model.parameters()))
            yield name, tensor

    load_weights(model, watched())


# ---------------------------------------------------------------- the runs


def take_over(run: Path, to: Path, step: int = 2) -> None:
    """Copy a run as it was when it had saved its checkpoint of that step."""
    name = f"checkpoints/step-{step:06d}"
    shutil.copytree(run / name, to / name)
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(run / file, to / file)


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world = parallel.join_world("cpu")
    world = world._replace(node_size=min(world.size, 2))
    with cheap_process(Path(sys.argv[1]).parent) as patch:
        patch.setattr(trainer, "Trainer", WatchedTrainer)
        patch.setattr(parallel, "load_weights", watch_loading)
        for run in runs:
            output_dir = run["arguments"][run["arguments"].index("--output-dir") + 1]
            if run["continues"] and world.is_main:
                take_over(Path(run["continues"]), Path(output_dir))
            dist.barrier()
            train_sft.train(train_sft.parse_arguments(run["arguments"]), world)
    gc.unfreeze()  # or leave_world could not collect what the runs have left
    parallel.leave_world()


if __name__ == "__main__":
    main()
