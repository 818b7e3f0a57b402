"""From one process to many: PyTorch's own engines, put around the model from outside. model.py knows nothing of them.

Under `torchrun` every process (rank) runs the whole program on its share of each batch. DDP keeps a copy of everything
on each rank and averages the gradients. FSDP2 (`fully_shard`) leaves a rank 1/N of parameters, gradients and optimizer
state, and gathers a block's weights just before they are needed. Without torchrun all of this comes down to nothing.
"""

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import Dtype, UserError

Value = TypeVar("Value")
Optimizers = list[torch.optim.Optimizer]

# torchrun notices a rank that has died and stops the others. This is for one that lives and does not answer, and has to
# be longer than what the first rank does alone: tokenise the data, write a checkpoint.
TIMEOUT = timedelta(minutes=30)
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class World(NamedTuple):
    """Who this process is among how many."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str) -> str:
    """ "auto": CUDA where there is one, else the CPU. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError, AttributeError):  # torch doesn't know it, or has nothing for it
        if torch.get_device_module(name).is_available():
            return name
    raise UserError(f"there is no device {name!r} here that torch can use; try cpu")


def choose_dtype(name: Dtype, device: torch.device) -> Dtype:
    """ "auto": bfloat16 where the hardware multiplies in it, else float32. Without it torch is up to a hundred times
    slower in bf16 than in fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = any(abilities.get(ability) for ability in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
    return "bfloat16" if fast else "float32"


def join_world(device: str) -> World:
    """Join the job that torchrun started, or be a world of one. Raises UserError for a device that isn't there."""
    device = choose_device(device)
    if not dist.is_torchelastic_launched():
        return World(0, 1, torch.device(device))
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # A node keeps its store when it starts the ranks again (pytorch/pytorch#135712); they must not find in it where
        # the earlier ones were. Several nodes count restarts each on their own: see the README for what they need.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend, bound = ("nccl", torch.device(device)) if device.startswith("cuda") else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=bound)
    return World(rank, size, torch.device(device))


def leave_world() -> None:
    """For a run that ends in order, on all ranks: after an error NCCL would wait for operations that never come.

    What still refers to the group keeps Gloo's threads alive, and now and then C++ aborts a process that exits with
    them (pytorch/pytorch#190489). So the model has to go first. Under FSDP, torch's own caches hold on to the group.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def recorded(function: Callable[..., None]) -> Callable[..., None]:
    """Under torchrun, keep an error of the function where torchrun finds it: it then names the rank and the error."""
    return record(function) if dist.is_torchelastic_launched() else function


def was_restarted(world: World) -> bool:
    """Whether torchrun (--max-restarts) has started this job again. It counts for each node on its own, so ask all."""
    return largest_over_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), world) > 0


def parallelize(model: nn.Module, blocks: Iterable[nn.Module], engine: str, world: World) -> nn.Module:
    """Give memory to a model that is still on the meta device: to this rank's shard of it (fsdp), or to a copy (ddp).

    Each block is gathered and released as a whole; what is outside of them (embedding, norm, head) is the root's.
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        """Along the first dimension that splits evenly: 6 experts would leave 4 ranks with 2, 2, 2 and 0."""
        return next((Shard(i) for i, size in enumerate(parameter.shape) if size % world.size == 0), None)

    if world.size > 1 and engine == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, shard_placement_fn=place)
    return model.to_empty(device=world.device)


def replicate(model: nn.Module, engine: str, world: World) -> nn.Module:
    """Wrap a model that has its weights for DDP; under FSDP, and alone, it is ready as it is."""
    if world.size == 1 or engine != "ddp":
        return model
    # Gradients lie where they are sent from. A quantised weight is a buffer, the same on all ranks from the start.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors, one at a time, into the model's, of which a rank may hold only a shard."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    targets = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors}  # an adapter's layer, as without
    for name, tensor in weights:
        target = targets[name]
        if isinstance(target, DTensor):
            tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(tensor)


def synchronize_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """A context for one micro-batch. DDP sends gradients with the last of a step only. FSDP scatters each one's within
    the shards' ranks, since until then a rank holds the gradients of all parameters in full (63 GB for V2-Lite): it
    sends more, beside computation, and never needs that memory. Between replicas they travel with the last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place, where there are ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(value: Value, world: World) -> Value:
    """The first rank's value (anything that can be pickled) on all ranks, whatever theirs is."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def largest_over_ranks(value: int, world: World) -> int:
    if world.size == 1:
        return value
    tensor = torch.tensor(value, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_process_first(world: World) -> Iterator[None]:
    """The first process passes the block alone, then all others: it fills the cache that they read."""
    if not world.is_main:
        wait_for_all()
    yield
    if world.is_main:
        wait_for_all()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(model: nn.Module, optimizers: Optimizers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trained parameters and optimizer state, whole and by name, whatever the engine. Empty on all ranks but the first,
    under any engine; every rank has to call it."""
    weights = get_model_state_dict(model, options=FULL_STATE)
    return weights, get_optimizer_state_dict(model, optimizers, options=FULL_STATE)


def scatter_optimizer_state(model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
    """The inverse of gather_state for the optimizers; only the first rank's `state` is used."""
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), ignore_frozen_params=True
    )
    set_optimizer_state_dict(model, optimizers, state, options=options)
