"""From one process to many: PyTorch's own engines, put around the model from outside. model.py knows nothing of them.

Under `torchrun` every process (rank) runs the whole program on its share of each batch. DDP keeps a copy of everything
on each rank and sums the gradients; FSDP2 (`fully_shard`) also shards parameters, gradients and optimizer state, and
gathers a block's weights just before they are needed. Without torchrun all of this comes down to nothing.
"""

import contextlib
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import UserError

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


def join_world(device: str) -> World:
    """Join the job that torchrun started, or be a world of one. Raises UserError for a device that isn't there."""
    device = choose_device(device)
    if not dist.is_torchelastic_launched():
        return World(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device))


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def parallelize(model: nn.Module, blocks: Iterable[nn.Module], engine: str, world: World) -> nn.Module:
    """Shard a model that is still on the meta device (fsdp), or prepare its copy (ddp), and give it memory."""
    if world.size > 1 and engine == "fsdp":
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    return model.to_empty(device=world.device)


def replicate(model: nn.Module, engine: str, world: World) -> nn.Module:
    """Wrap a model that has its weights for DDP; under FSDP, and alone, it is ready as it is."""
    return DistributedDataParallel(model) if world.size > 1 and engine == "ddp" else model


@torch.no_grad()
def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors, one at a time, into the model's parameters, of which a rank may hold only a shard."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        target = parameters[name]
        if isinstance(target, DTensor):
            whole = tensor.to(target.device, target.dtype)
            shard = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(shard)
        else:
            target.copy_(tensor)


def synchronize_gradients(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """A context for one micro-batch: gradients travel only with the last of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place, where there are ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_over_ranks(value: int, world: World) -> int:
    if world.size == 1:
        return value
    tensor = torch.tensor(value, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trained parameters and optimizer state, whole and by name, whatever the engine. Empty on all ranks but the first,
    under any engine; every rank has to call it."""
    return get_model_state_dict(model, options=FULL_STATE), get_optimizer_state_dict(
        model, optimizer, options=FULL_STATE
    )


def scatter_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of gather_state for the optimizer; only the first rank's `state` is used."""
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), ignore_frozen_params=True
    )
    set_optimizer_state_dict(model, optimizer, state, options=options)
