"""From one process to many: PyTorch's own engines, put around the model from outside. model.py knows nothing of them.

Under `torchrun` every process (rank) runs the whole program on its share of each batch. DDP keeps a copy of everything
on each rank and averages the gradients. FSDP2 (`fully_shard`) leaves a rank 1/N of parameters, gradients and optimizer
state, and gathers a block's weights just before they are needed; "hsdp" does so within each node. Without torchrun all
of this comes down to nothing.
"""

import contextlib
import gc
import itertools
import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import Dtype, UserError, check

Value = TypeVar("Value")
Optimizers = list[torch.optim.Optimizer]

# torchrun notices a rank that has died and stops the others. This is for one that lives and does not answer. What the
# first rank does alone (tokenise the data, write a checkpoint) may take longer: see `first_process_first`.
TIMEOUT = timedelta(minutes=30)
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class World(NamedTuple):
    """Who this process is among how many."""

    rank: int
    size: int
    device: torch.device
    node_size: int = 1  # ranks of a node
    store: dist.Store | None = None  # where ranks can leave each other a note

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str, planned: bool = False) -> str:
    """ "auto": CUDA where there is one, else the CPU. Raises UserError for a device that this machine does not have.
    planned: for a dry run, whose device is elsewhere: one that torch knows will do, and "auto" is CUDA."""
    if name == "auto":
        return "cuda" if planned or torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError, AttributeError):  # torch doesn't know it, or has nothing for it
        if torch.get_device_module(name).is_available() or planned:
            return name
    raise UserError(f"there is no device {name!r} here that torch can use; try cpu")


def choose_dtype(name: Dtype, device: torch.device) -> Dtype:
    """ "auto": bfloat16 where the hardware multiplies in it, else float32. Without it torch is up to a hundred times
    slower in bf16 than in fp32, and FlashAttention refuses. Raises UserError for bfloat16 on such a GPU. One that isn't
    here (a dry run's) is taken to do it, as all have since 2020."""
    if device.type == "cuda":
        fast = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        check(fast or name != "bfloat16", "this GPU does not multiply in bfloat16; take float32")
    if name != "auto":
        return name
    if device.type != "cuda":
        abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = any(abilities.get(ability) for ability in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
    return "bfloat16" if fast else "float32"


def join_world(device: str, dry_run: bool = False) -> World:
    """Join the job that torchrun started, or be a world of one, which a dry run takes no part in: it only has its
    device's name. Raises UserError for a device that isn't there."""
    if not dist.is_torchelastic_launched():
        return World(0, 1, torch.device(choose_device(device, planned=dry_run)))
    device = choose_device(device)
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
    return World(rank, size, torch.device(device), int(os.environ["LOCAL_WORLD_SIZE"]), store)


def leave_world() -> None:
    """For a run that ends in order, on all ranks: after an error NCCL would wait for operations that never come.

    What still refers to the group keeps Gloo's threads alive, and now and then C++ aborts a process that exits with
    them (pytorch/pytorch#190489). So the model has to go first. Under FSDP, torch's own caches hold on to the group.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def recorded(function: Callable[..., None]) -> Callable[..., None]:
    """Under torchrun, keep an error of the function where torchrun finds it: it then names the rank and the error. What
    the user can mend takes one line there; that another rank has failed, too, since that one's error says why."""
    if not dist.is_torchelastic_launched():
        return function

    def in_one_line(*arguments: Any) -> None:
        try:
            record(function)(*arguments)
        except (UserError, OSError) as error:
            note_failure(f"error: {error}")
            raise
        except RuntimeError as error:
            if "Connection closed by peer" not in str(error):  # Gloo's words
                raise
            note_failure("another rank has failed")
            sys.exit(1)

    return in_one_line


def note_failure(text: str) -> None:
    """For torchrun, in place of a traceback."""
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    note = {"message": {"message": text, "extraInfo": details}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(note))


class Part(NamedTuple):
    """Modules whose weights are gathered together just before they are needed, and released after."""

    modules: list[nn.Module]
    dtype: torch.dtype | None = None  # that they are gathered in; None: their own


def make_mesh(engine: str, world: World) -> DeviceMesh | None:
    """Who shards with whom: all ranks (fsdp), or those of a node, with a replica in each (hsdp), so that only gradients
    travel between nodes. None: nobody. Raises UserError where hsdp's nodes don't have the same number of ranks."""
    if world.size == 1 or engine == "ddp":
        return None
    shape: tuple[int, ...] = (world.size,)
    if engine == "hsdp" and world.node_size < world.size:
        unequal = f"parallel hsdp: {world.size} ranks don't fill nodes of {world.node_size}; change that, or take fsdp"
        check(world.size % world.node_size == 0, unequal)
        shape = (world.size // world.node_size, world.node_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard")[-len(shape) :])


def parallelize(model: nn.Module, parts: Iterable[Part], mesh: DeviceMesh | None) -> None:
    """Leave this rank its shard of a model that has no memory yet. What is in none of the parts is the root's:
    embedding, head and last norm stay fp32, since their gradients come in it and would be rounded. A part may lie
    within one that comes later. Gradients are summed in fp32, whatever they were computed in."""
    if mesh is None:
        return

    def place(parameter: nn.Parameter) -> Shard | None:
        """Along the first dimension that splits evenly: 6 experts would leave 4 ranks with 2, 2, 2 and 0."""
        return next((Shard(i) for i, size in enumerate(parameter.shape) if size % mesh.shape[-1] == 0), None)

    for modules, dtype in (*parts, Part([model])):
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, shard_placement_fn=place, mp_policy=policy)


def replicate(model: nn.Module, engine: str, world: World) -> nn.Module:
    """Wrap a model that has its weights for DDP; under FSDP, and alone, it is ready as it is."""
    if world.size == 1 or engine != "ddp":
        return model
    # Gradients lie where they are sent from. A quantised weight is a buffer, the same on all ranks from the start: what
    # is to replace broadcast_buffers would send them all at the start.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
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


def from_all_ranks(value: Value, world: World) -> list[Value]:
    """Every rank's value, on all ranks."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_process_first(world: World) -> Iterator[None]:
    """The first process passes the block alone, then all others: it fills the cache that they read, say.

    They wait for a note in the store, however long it takes: in a collective they would run into its timeout.
    """
    note = from_first_rank(str(uuid.uuid4()), world)
    while world.store and not world.is_main and not world.store.check([note]):
        time.sleep(0.01)
    yield
    if world.store and world.is_main:
        world.store.set(note, "done")


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
    """The inverse of gather_state for the optimizers; only the first rank's `state` is used. Of it they take what they
    have learned (moments, steps). What they are told (decay, betas) stays as it is."""
    told = [[group.copy() for group in optimizer.param_groups] for optimizer in optimizers]
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), ignore_frozen_params=True
    )
    set_optimizer_state_dict(model, optimizers, state, options=options)
    for optimizer, groups in zip(optimizers, told, strict=True):
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in before.items() if name != "params"})
