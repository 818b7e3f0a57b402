"""What a run will take, known without a GPU: it is built, and two steps of it are taken, on tensors without numbers.

Memory is that of all tensors alive at a time, and what is sent that of the collectives that the engines call, in a
process group that sends nothing. (FSDPMemTracker of torch.distributed._tools does as much, but not for modules that are
gathered together.) Left out is what no tensor shows: CUDA's context (half a GB), the allocator's gaps, NCCL's buffers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from config import TrainConfig
from datacollator import MicroBatch
from documents import find_documents
from kernels import tuned_as
from launch.build import gathered_modules, plan_model
from launch.cost import Traffic, attention_flops, training_cost
from model import DeepSeekV2
from optimizer import make_optimizers
from parallel import World, make_mesh, parallelize, synchronize_gradients

NODE_SIZE = 8  # GPUs
PEAK = 989e12  # FLOP/s of an H100 in bf16


class DryRun(NamedTuple):
    """Of one rank."""

    memory: dict[str, int]  # bytes by kind at the moment when all of them together are most
    sent: float  # bytes in a step
    flops: int  # in a step, those of recomputation not counted

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def report(config: TrainConfig) -> str:
    """A table for people."""
    ranks, share = config.watch.dry_run_ranks, config.watch.dry_run_share
    result = dry_run(config, ranks)
    batch, compute = config.batch, config.compute
    engine = f"{ranks} ranks, {compute.parallel}" if ranks > 1 else "1 rank"
    rows, device = batch.batch_size * batch.gradient_accumulation_steps, kind_of(compute.device)
    lines = [f"{engine}; {rows} rows of {config.data.max_seq_len:,} tokens a rank and step, all of them targets"]
    lines[0] += f"; {compute.dtype} on {device}"
    lines += [f"  {name:24}{size / 1e9:9.2f} GB" for name, size in result.memory.items() if size]
    lines += [f"  {'at the peak':24}{result.peak / 1e9:9.2f} GB"]
    lines += [f"  {'sent in a step':24}{result.sent / 1e9:9.2f} GB"] if ranks > 1 else []
    seconds = result.flops / PEAK / share
    lines += [f"  {'computed in a step':24}{result.flops / 1e12:9.2f} TFLOP"]
    lines += [f"  {'which takes':24}{seconds:9.2f} s at {share:.0%} of {PEAK / 1e12:,.0f} TFLOP/s"]
    return "\n".join(lines)


def dry_run(config: TrainConfig, ranks: int = 1) -> DryRun:
    """Whatever the configuration says of LoRA, checkpointing, sharding, on the device that it names; "auto" is CUDA."""
    world = World(0, ranks, torch.device("cpu"), min(ranks, NODE_SIZE))
    dtype = torch.float32 if config.compute.dtype == "float32" else torch.bfloat16
    with fake_group(ranks), tuned_as(kind_of(config.compute.device)):
        mesh = make_mesh(config.compute.parallel, world)
        batch = full_rows(config.batch.batch_size, config.data.max_seq_len)
        with FakeTensorMode() as fake:
            model, _ = plan_model(config)
            parallelize(model, gathered_modules(model, str(dtype).removeprefix("torch.")), mesh)
            model.train().model.gradient_checkpointing = config.compute.gradient_checkpointing
            optimizers = make_optimizers(model, config.optimizer, dtype)
            moved = batch.map(fake.from_tensor)._asdict()
            live = LiveMemory(model, optimizers)
            step(model, optimizers, moved, config, dtype)  # in which optimizer state, and DTensor's plans, come to be
            with live:
                sent = step(model, optimizers, moved, config, dtype)
    if ranks > 1 and mesh is None:  # DDP reduces every gradient once
        sent = 2 * (ranks - 1) / ranks * sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    length, rows = config.data.max_seq_len, config.batch.batch_size * config.batch.gradient_accumulation_steps
    flops = training_cost(model).flops(rows * length, rows * length) + rows * attention_flops(config.model, length)
    return DryRun(live.at_peak, sent, flops)


def kind_of(device: str) -> str:
    """Of a device by its name; "auto" is CUDA."""
    return "cuda" if device == "auto" else torch.device(device).type


@contextlib.contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of so many ranks, of which this is the first and the only one."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def full_rows(rows: int, length: int) -> MicroBatch:
    """Rows of one conversation each, all of whose tokens are targets."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return MicroBatch(ids, ids, find_documents(ids + 1, ids))


def step(
    model: DeepSeekV2,
    optimizers: list[torch.optim.Optimizer],
    inputs: dict[str, Any],
    config: TrainConfig,
    dtype: torch.dtype,
) -> float:
    """As Trainer.train_step does it; bytes sent. Micro-batches between the first and the last are as the first."""
    number, sent = config.batch.gradient_accumulation_steps, 0.0
    for last in (False, True)[-number:]:
        with Traffic() as traffic, synchronize_gradients(model, last):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = model(**inputs)
            (output.loss_sum + output.balance_loss).backward()
        sent += traffic.bytes * (1 if last else number - 1)
    with Traffic() as traffic:
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return sent + traffic.bytes


class LiveMemory(TorchDispatchMode):
    """Watches the memory of all tensors that come to be, and notes what kinds it was of when it was most."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.weights = [*model.parameters(), *model.buffers()]  # shards: before any is gathered; NF4's are buffers
        self.optimizers = optimizers
        self.storages = WeakIdKeyDictionary()  # of live tensors; FSDP empties and refills some
        self.peak, self.at_peak = 0, dict[str, int]()

    def __enter__(self) -> "LiveMemory":
        for tensor in (*self.weights, *self.states()):
            self.storages[local(tensor).untyped_storage()] = None
        return super().__enter__()

    def states(self) -> list[Tensor]:
        return [x for optimizer in self.optimizers for state in optimizer.state.values() for x in state.values()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it comes again with the local tensors
        result = func(*args, **(kwargs or {}))
        made = {x.untyped_storage() for x in tree_leaves(result) if isinstance(x, FakeTensor)}
        if any(storage not in self.storages for storage in made):
            self.storages.update(dict.fromkeys(made))
            total = sum(storage.nbytes() for storage in self.storages)
            if total > self.peak:
                self.peak, self.at_peak = total, self.by_kind(total)
        return result

    def by_kind(self, total: int) -> dict[str, int]:
        kinds = {
            "weights": sum(local(p).nbytes for p in self.weights),
            "gradients": sum(local(p.grad).nbytes for p in self.weights if p.grad is not None),
            "optimizer": sum(local(x).nbytes for x in self.states()),
        }
        return kinds | {"activations": total - sum(kinds.values())}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
