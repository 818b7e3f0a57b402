"""What a run needs, predicted without a GPU: it is built, and two steps of it are taken, on tensors without values.

Memory is that of all tensors that are alive at the same time. Time is a roofline over all operations (cost.Roofline).
What is sent is what the engines' collectives send, in a process group that sends nothing. (FSDPMemTracker of
torch.distributed._tools does not cover modules that are gathered together.) Unknown: CUDA's context (half a GB), the
allocator's gaps, NCCL's buffers, and how well operations overlap. With --compile, elementwise operations that follow
one another count as one kernel.
"""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from config import TrainConfig, UserError
from datacollator import MicroBatch
from documents import find_documents
from kernels import tuned_as
from launch.build import gathered_modules, plan_model
from launch.cost import FUSED, GPUS, Roofline, as_one_kernel, attention_flops, training_cost
from model import DeepSeekV2
from optimizer import make_optimizers
from parallel import World, make_mesh, parallelize, synchronize_gradients

NODE_SIZE = 8  # GPUs
NETWORK = 40e9  # bytes/s between nodes, per GPU
CONTEXT = 0.7e9  # bytes that CUDA and its libraries take
GAPS = 1.05  # memory that the allocator holds per byte in use


class DryRun(NamedTuple):
    """Predictions for one rank."""

    memory: dict[str, int]  # bytes by kind at the moment of the peak
    sent: float  # bytes per step
    flops: int  # per step, without recomputation
    seconds: dict[str, float]  # per step, by region

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


# ---------------------------------------------------------------- the prediction


def report(config: TrainConfig) -> str:
    """Return the prediction as a table."""
    ranks, name, batch = config.watch.dry_run_ranks, config.watch.dry_run_gpu, config.batch
    result, gpu, device = dry_run(config, ranks), GPUS[name], kind_of(config.compute.device)
    engine = f"{ranks} ranks, {config.compute.parallel}" if ranks > 1 else "1 rank"
    micro_batches, tokens = batch.gradient_accumulation_steps, batch.batch_size * config.data.max_seq_len
    title = (
        f"{engine}; per rank and step {micro_batches} micro-batches of {tokens:,} tokens, all of them targets; "
        f"{config.compute.dtype} on {device}"
    )
    rows = [(kind, size / 1e9, "GB") for kind, size in result.memory.items() if size]
    too_much = device == "cuda" and needed(result.peak) > gpu.memory
    fits = f": more than the {gpu.memory / 1e9:.0f} GB of one {name}" if too_much else ""
    rows.append(("at the peak", result.peak / 1e9, f"GB{fits}"))
    if ranks > 1:
        rows.append(("sent per step", result.sent / 1e9, "GB"))
    rows.append(("computed per step", result.flops / 1e12, "TFLOP"))
    if device == "cuda":
        seconds = sum(result.seconds.values())
        speed, mfu = micro_batches * tokens / seconds, result.flops / seconds / gpu.bf16
        units = dict.fromkeys(result.seconds, "ms")
        if (exposed := result.seconds.get("communication", 0.0)) and config.compute.parallel != "ddp":
            # a micro-batch's traffic does not depend on its size; its computation grows by this much
            twice = dry_run(config.changed(batch_size=2 * batch.batch_size), ranks).seconds
            growth = sum(twice.values()) - twice["communication"] - (seconds - exposed)
            if growth > 0.1 * (seconds - exposed):  # otherwise launching takes the time, and no batch is foreseen
                size = math.ceil(batch.batch_size * (1 + exposed / growth))
                units["communication"] = f"ms, hidden with --batch-size {size}"
        rows += [(region, part * 1e3, units[region]) for region, part in result.seconds.items()]
        rows.append(("step", seconds * 1e3, f"ms: {speed:,.0f} tokens/s and {mfu:.0%} MFU per {name}, predicted"))
    return "\n".join([title, *(f"  {label:24}{number:9,.2f} {unit}" for label, number, unit in rows)])


def dry_run(config: TrainConfig, ranks: int = 1) -> DryRun:
    """Predict for the configured LoRA, checkpointing, sharding and device; "auto" is CUDA."""
    world = World(0, ranks, torch.device("cpu"), min(ranks, NODE_SIZE))
    dtype = getattr(torch, config.compute.dtype)
    with fake_group(ranks), tuned_as(kind_of(config.compute.device), as_one_kernel):
        mesh = make_mesh(config.compute.parallel, world)
        batch = full_rows(config.batch.batch_size, config.data.max_seq_len)
        with FakeTensorMode() as fake:
            model = plan_model(config)
            parallelize(model, gathered_modules(model, config.compute.dtype), mesh)
            model.train().model.gradient_checkpointing = config.compute.gradient_checkpointing
            optimizers = make_optimizers(model, config.optimizer, dtype)
            inputs = tree_map_only(Tensor, fake.from_tensor, batch)._asdict()
            step(model, optimizers, inputs, config)  # creates optimizer state, and DTensor's plans
            with LiveMemory(model, optimizers) as live:
                recorded = step(model, optimizers, inputs, config)
    seconds, sent = recorded.seconds, recorded.sent
    if ranks > 1 and mesh is None:  # DDP reduces every gradient once
        trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        sent["allreduce_"] += 2 * (ranks - 1) * trained // ranks
    length, rows = config.data.max_seq_len, config.batch.batch_size * config.batch.gradient_accumulation_steps
    flops = training_cost(model).flops(rows * length, rows * length) + rows * attention_flops(config.model, length)
    if ranks > 1:
        seconds["communication"] = waiting(sent, sum(seconds.values()), config, ranks)  # type: ignore[assignment]
    return DryRun(live.at_peak, sent.total(), flops, dict(seconds.most_common()))


def waiting(sent: Counter[str], computing: float, config: TrainConfig, ranks: int) -> float:
    """Return the seconds of communication per step that no computation hides.

    FSDP gathers weights and scatters gradients during all of it; gradients that are reduced once per step (DDP's, and
    HSDP's between nodes) travel during the last backward pass, two thirds of a micro-batch.
    """
    inside, between = GPUS[config.watch.dry_run_gpu].link, NETWORK
    everywhere = inside if ranks <= NODE_SIZE else between
    sharding = sent.total() - sent["allreduce_"]
    last = computing / config.batch.gradient_accumulation_steps * 2 / 3
    shards = sharding / (inside if config.compute.parallel == "hsdp" else everywhere) - computing
    return max(shards, 0.0) + max(sent["allreduce_"] / everywhere - last, 0.0)


def kind_of(device: str) -> str:
    """Return the type of a device by its name; "auto" is CUDA."""
    return "cuda" if device == "auto" else torch.device(device).type


@contextlib.contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of `ranks` ranks, of which this is the first and the only one."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def full_rows(rows: int, length: int) -> MicroBatch:
    """Return rows of one document each, all of whose tokens are targets."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return MicroBatch(ids, ids, find_documents(ids + 1, ids))


def step(
    model: DeepSeekV2, optimizers: list[torch.optim.Optimizer], inputs: dict[str, Any], config: TrainConfig
) -> Roofline:
    """Take a step like Trainer.train_step's, and return its recorded operations. Micro-batches between the first and
    the last count like the first."""
    number, bf16 = config.batch.gradient_accumulation_steps, config.compute.dtype == "bfloat16"
    with Roofline(GPUS[config.watch.dry_run_gpu], merge=config.compute.compile) as recorded:
        for last in (False, True)[-number:]:
            recorded.times = 1 if last else number - 1
            with synchronize_gradients(model, last):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    output = model(**inputs)
                (output.loss_sum + output.balance_loss).backward()
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    return recorded


class LiveMemory(TorchDispatchMode):
    """Watches the memory of all tensors, and records its kinds when it is largest. The optimizers must have state.
    Within a FUSED region nothing is recorded: what is no longer alive after it was never in memory."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.weights = [*model.parameters(), *model.buffers()]  # of this rank's shard; NF4's are buffers
        self.states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
        self.storages = WeakIdKeyDictionary()  # of live tensors; FSDP empties and refills some
        for tensor in (*self.weights, *self.states):
            self.storages[local(tensor).untyped_storage()] = None
        self.bound = self.peak = 0  # bytes: no more than bound are in use
        self.fused = False
        self.at_peak = dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # comes again with the local tensors
        result = func(*args, **(kwargs or {}))
        made = {x.untyped_storage() for x in tree_leaves(result) if isinstance(x, FakeTensor)}
        new = [storage for storage in made if storage not in self.storages]
        self.storages.update(dict.fromkeys(new))
        self.bound += sum(storage.nbytes() for storage in new)
        if func.namespace == "profiler":
            self.fused = type(args[0]) is str and args[0] == FUSED  # at a region's end it is no name
        if func.namespace == "c10d":
            self.bound = sys.maxsize  # FSDP refills storages around its collectives
        if new and not self.fused and self.bound > self.peak:  # only then it pays to add up what is still alive
            self.bound = sum(storage.nbytes() for storage in self.storages)
            if self.bound > self.peak:
                self.peak, self.at_peak = self.bound, self.by_kind(self.bound)
        return result

    def by_kind(self, total: int) -> dict[str, int]:
        gradients = [p.grad for p in self.weights if p.grad is not None]
        kinds = {"weights": self.weights, "gradients": gradients, "optimizer": self.states}
        sizes = {kind: sum(local(x).nbytes for x in tensors) for kind, tensors in kinds.items()}
        return sizes | {"activations": total - sum(sizes.values())}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------- before training


def needed(peak: int) -> float:
    """Return the bytes of a GPU that a run with this peak takes."""
    return peak * GAPS + CONTEXT


def fit_to_memory(config: TrainConfig, memory: float, given: Collection[str] = ()) -> tuple[TrainConfig, str]:
    """Return the fastest of these configurations whose predicted peak fits into `memory` bytes, and a text that says
    what has changed, "" if nothing has: without checkpointing (unless that flag was given), as it is, with smaller
    micro-batches and more of them per step. Losses stay the same. Raises UserError if not even one row fits. Under
    FSDP, whose shards need less, a rank is not predicted.
    """
    if config.compute.parallel != "ddp":
        return config, ""
    rows, number = config.batch.batch_size, config.batch.gradient_accumulation_steps
    trials = [
        config.changed(batch_size=size, gradient_accumulation_steps=number * (rows // size))
        for size in range(rows, 0, -1)
        if rows % size == 0
    ]
    if config.compute.gradient_checkpointing and "gradient_checkpointing" not in given:
        trials.insert(0, config.changed(gradient_checkpointing=False))
    sizes = dict[int, float]()  # predicted, by rows
    for trial in trials:
        size, number = trial.batch.batch_size, trial.batch.gradient_accumulation_steps
        # one micro-batch more than the first is enough for the peak
        sizes[size] = needed(dry_run(trial.changed(gradient_accumulation_steps=min(number, 2))).peak)
        if sizes[size] <= memory:
            break
    else:
        raise UserError(
            f"the GPU has {memory / 1e9:.1f} GB free, and batch_size 1 needs {sizes[1] / 1e9:.1f} GB (predicted): "
            "lower --max-seq-len, or use --gradient-checkpointing, --lora-rank with --init-from, or --quantize nf4"
        )
    space = f"needs {sizes[rows] / 1e9:.1f} GB (predicted), the GPU has {memory / 1e9:.1f} GB free"
    if trial.compute.gradient_checkpointing != config.compute.gradient_checkpointing:
        return trial, f"note: training without gradient_checkpointing, which is faster, {space}"
    if size == rows:
        return config, ""
    using = f"using batch_size {size} and gradient_accumulation_steps {number} (same global batch)"
    return trial, f"note: batch_size {rows} {space}: {using}"
