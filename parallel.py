"""One process or many: who this process is, and PyTorch's engines (DDP, FSDP2, HSDP) around the model from outside.

Under `torchrun` every process (rank) runs the whole program on its share of each batch. DDP keeps a copy of the model
on each rank and averages the gradients. FSDP2 (`fully_shard`, https://arxiv.org/abs/2304.11277) leaves each rank 1/N of
parameters, gradients and optimizer state, and gathers a block's weights just before they are needed; "hsdp" does so
within each node. model.py knows nothing of them. Without torchrun all of this is a no-op:

    >>> world = join_world("cpu")
    >>> world.rank, world.size, make_mesh("fsdp", world)
    (0, 1, None)
    >>> sum_over_ranks(torch.tensor(3.0)), from_all_ranks("a", world)
    (tensor(3.), ['a'])
"""

import contextlib
import gc
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import Dtype, UserError

Value = TypeVar("Value")

# torchrun notices a rank that has died and stops the others. This is for one that lives and does not answer. What the
# first rank does alone (tokenise the data, write a model) may take longer: see `wait_for_first_rank`.
TIMEOUT = timedelta(minutes=30)
TORCHRUN = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


class World(NamedTuple):
    """Who this process is among how many."""

    rank: int
    size: int
    device: torch.device
    node_size: int = 1  # ranks per node
    store: dist.Store | None = None  # key-value store that all ranks share

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World(0, 1, torch.device("cpu"))


def choose_device(name: str, planned: bool = False) -> str:
    """Resolve "auto" to CUDA if there is one, else the CPU. planned: for a dry run, any device that torch knows will
    do, and "auto" is CUDA. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        if planned or torch.cuda.is_available():
            return "cuda"
        if problem := driver_problem():
            print(f"note: {problem}", file=sys.stderr)
        return "cpu"
    with contextlib.suppress(RuntimeError, AttributeError):  # torch does not know it, or has no module for it
        if torch.get_device_module(name).is_available() or planned:
            return name
    raise UserError(f"there is no device {name!r} here that torch can use; try cpu")


def driver_problem() -> str:
    """Return why torch, built for CUDA, does not see this machine's NVIDIA GPU; "" if it does, or there is none."""
    has_gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    if not has_gpu or not torch.version.cuda or torch.cuda.is_available():
        return ""
    needed = {"12": "525", "13": "580"}.get(torch.version.cuda.split(".")[0], "a newer one")
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and cannot use this machine's NVIDIA GPU: "
        f"it needs driver {needed} or later (nvidia-smi prints the installed one); running on the CPU"
    )


def choose_dtype(name: Dtype, device: torch.device) -> Dtype:
    """Resolve "auto" to bfloat16 if the hardware multiplies in it, else float32: without it torch is up to a hundred
    times slower in bf16 than in fp32, and FlashAttention refuses. A GPU that is not here (a dry run's) is assumed to do
    it, as all have since 2020. Raises UserError for bfloat16 on a GPU that does not."""
    if device.type == "cuda":
        fast = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bfloat16" and not fast:
            raise UserError("this GPU does not multiply in bfloat16; use --dtype float32")
    if name != "auto":
        return name
    if device.type != "cuda":
        abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = any(abilities.get(ability) for ability in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
    return "bfloat16" if fast else "float32"


def join_world(device: str, dry_run: bool = False) -> World:
    """Join the job that torchrun started, or be a world of one. A dry run only needs the device's name. Raises
    UserError for a device that is missing."""
    if not dist.is_torchelastic_launched():
        chosen = torch.device(choose_device(device, planned=dry_run))
        if chosen.type == "cuda" and chosen.index is not None and not dry_run:
            torch.cuda.set_device(chosen)  # what asks for the current device (bf16, memory) means this one
        return World(0, 1, chosen)
    device = choose_device(device)
    try:
        local_rank, node_size, nodes, restarts = (os.environ[name] for name in TORCHRUN)
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except (KeyError, ValueError) as error:
        raise UserError(f"TORCHELASTIC_RUN_ID is set, but {error}: start with torchrun, or unset it") from error
    if nodes == "1":
        # A node keeps its store when it restarts the ranks (pytorch/pytorch#135712); they must not find the keys of the
        # ranks before them. Several nodes count restarts each on their own: docs/jobs.md has what they need.
        store = dist.PrefixStore(f"start {restarts}", store)
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    backend, bound = ("nccl", torch.device(device)) if device.startswith("cuda") else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=bound)
    return World(rank, size, torch.device(device), int(node_size), store)


def leave_world() -> None:
    """Leave the job, at the regular end of a run on all ranks: after an error NCCL would wait for operations that never
    come.

    References to the group keep Gloo's threads alive, and now and then C++ aborts a process that exits with them
    (pytorch/pytorch#190489), so the model has to go first. Under FSDP, torch's own caches hold on to the group.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


# ---------------------------------------------------------------- engines


# Modules whose weights FSDP gathers together just before they are needed, and releases after; and the dtype that they
# are gathered in, None: their own.
GatheredModules = tuple[list[nn.Module], torch.dtype | None]


def make_mesh(engine: str, world: World) -> DeviceMesh | None:
    """Return the mesh of ranks that shard together: all (fsdp), or those of a node, with a replica per node (hsdp), so
    that only gradients travel between nodes. None: nothing is sharded. Raises UserError if nodes have unequal numbers
    of ranks under hsdp."""
    if world.size == 1 or engine == "ddp":
        return None
    shape: tuple[int, ...] = (world.size,)
    if engine == "hsdp" and world.node_size < world.size:
        if world.size % world.node_size:
            raise UserError(f"parallel hsdp: {world.size} ranks do not fill nodes of {world.node_size}; use fsdp")
        shape = (world.size // world.node_size, world.node_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard")[-len(shape) :])


def parallelize(model: nn.Module, groups: Iterable[GatheredModules], mesh: DeviceMesh | None) -> None:
    """Leave this rank its shard of a model on the meta device. What is in none of the groups is the root's: embedding,
    head and last norm stay fp32, since their gradients come in it and would be rounded. A group may lie within a later
    one. Gradients are summed in fp32, whatever they were computed in."""
    if mesh is None:
        return

    def place(parameter: nn.Parameter) -> Shard | None:
        """Shard the first dimension that splits evenly: 6 experts would leave 4 ranks with 2, 2, 2 and 0."""
        return next((Shard(i) for i, size in enumerate(parameter.shape) if size % mesh.shape[-1] == 0), None)

    for modules, dtype in (*groups, ([model], None)):
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, shard_placement_fn=place, mp_policy=policy)


def replicate(model: nn.Module, engine: str, world: World) -> nn.Module:
    """Wrap a model that has its weights for DDP. Under FSDP, or in one process, return it as it is."""
    if world.size == 1 or engine != "ddp":
        return model
    # Gradients are views of the buckets that are sent. Buffers (quantised weights) never change: no need to sync them.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)


def synchronize_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context for one micro-batch. DDP sends gradients with the last micro-batch of a step only. FSDP scatters
    each one's among the ranks of a shard group: to wait, a rank would have to hold the gradients of all parameters (63
    GB for V2-Lite). Between replicas they travel with the last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


# ---------------------------------------------------------------- shards and whole tensors


def reshard(model: nn.Module) -> None:
    """Make FSDP release the weights that it has kept gathered, so that the model's parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors, one at a time, into the model's, of which a rank may hold only a shard."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    targets = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors}  # names without an adapter
    for name, tensor in weights:
        target = targets[name]
        if isinstance(target, DTensor):
            tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(tensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. If it is sharded, every rank has to take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------- messages


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(value: Value, world: World) -> Value:
    """Return the first rank's value (anything that can be pickled) on all ranks."""
    return from_all_ranks(value, world)[0]


def from_all_ranks(value: Value, world: World) -> list[Value]:
    """Return every rank's value on all ranks."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def require_same(value: object, problem: str, world: World) -> None:
    """Raise UserError on all ranks unless all have the same value. It names the ranks that differ from the first."""
    first, *others = from_all_ranks(value, world)
    if ranks := [str(rank) for rank, other in enumerate(others, start=1) if other != first]:
        raise UserError(f"rank {', '.join(ranks)} {problem}")


WAITS = itertools.count()  # all ranks wait in the same order, so that these numbers agree


def wait_for_first_rank(world: World) -> None:
    """Return once rank 0 has called this, however long that takes: a collective would run into TIMEOUT."""
    if world.store:
        name = f"wait {next(WAITS)}"
        if world.is_main:
            world.store.set(name, "")
        while not world.store.check([name]):
            time.sleep(0.01)


@contextlib.contextmanager
def first_process_first(world: World) -> Iterator[None]:
    """Let rank 0 run the block first, e.g. to fill a cache that the others then read."""
    if not world.is_main:
        wait_for_first_rank(world)
    yield
    if world.is_main:
        wait_for_first_rank(world)
