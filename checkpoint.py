"""Weights and run state on disk: Hugging Face's layout in and out, saves that a crash cannot harm.

A checkpoint is a Hugging Face model directory, whatever engine trained it: `transformers` opens ours, and we open
DeepSeek-V2's published ones (https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite). Names differ for routed experts
only, one matrix each on the Hub and a stack here:

    >>> stack = torch.zeros(2, 6, 4)  # two experts, gate (3, 4) above up (3, 4)
    >>> for name, part in hub_parts("model.layers.1.mlp.experts.gate_up_proj", stack):
    ...     print(name, tuple(part.shape))
    model.layers.1.mlp.experts.0.gate_proj.weight (3, 4)
    model.layers.1.mlp.experts.0.up_proj.weight (3, 4)
    model.layers.1.mlp.experts.1.gate_proj.weight (3, 4)
    model.layers.1.mlp.experts.1.up_proj.weight (3, 4)

Run state is next to it: trainer_state.json, and optimizer/, to which torch.distributed.checkpoint writes each rank's
shard as safetensors, and from which any number of ranks resumes. The model is gathered one tensor at a time. Nothing
here runs what a file contains: there is no pickle.
"""

import functools
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.types import Device

import files
from config import ModelConfig, Quantization, UserError
from files import checksum, disk_errors, inside, printable, read_json, write_json
from hub.config_json import hub_config, parse_config, transformers_differences
from hub.peft import ADAPTER_CONFIG, find_base, load_adapter
from hub.tokenizer_json import save_tokenizer
from hub.weights import StoredTensor, check_fit, stored_tensors, write_tensors
from model import DeepSeekV2
from parallel import ALONE, World, from_all_ranks, from_first_rank, full_tensor, load_weights
from quantization import NF4, plan, quantized_weights
from tokenizer import Tokenizer

WEIGHTS, WEIGHTS_INDEX, OPTIMIZER = "model.safetensors", "model.safetensors.index.json", "optimizer"
SHARD_BYTES = 2**28  # of optimizer state per file, of all ranks together: a rank holds its part once more to write it
# dcp's note on every save and load of a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
Optimizers = Sequence[torch.optim.Optimizer]


def hub_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hub's names for one of our tensors, each with a view of its part of it."""
    module, _, projection = name.rpartition(".")
    if not module.endswith(".experts"):
        yield name, tensor
        return
    projections = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    for expert, matrix in enumerate(tensor):
        for part_name, part in zip(projections, matrix.chunk(len(projections)), strict=True):
            yield f"{module}.{expert}.{part_name}.weight", part


# ---------------------------------------------------------------- writing a model


def save_pretrained(directory: str | Path, model: DeepSeekV2, tokenizer: Tokenizer, is_main: bool = True) -> None:
    """Write a model directory that `load_pretrained` and transformers' `from_pretrained` open.

    Weights are stored in their own dtype. If the model is sharded, every rank has to call this, one of them with
    is_main, which writes. Memory: a tensor. Raises OSError.
    """
    weights = dict(model.named_parameters())
    whole = (full_tensor(parameter.detach()) for parameter in weights.values())
    if is_main:
        write_model(Path(directory), model.config, tokenizer, weights, whole)
    for _ in whole:  # take part in gathering each tensor
        pass


def write_model(
    directory: Path, config: ModelConfig, tokenizer: Tokenizer, weights: Mapping[str, Tensor], values: Iterable[Tensor]
) -> None:
    """Write a model directory of weights that come one by one. weights: our names, each with a tensor of the shape and
    dtype; values: the tensors to write, in that order. Raises OSError."""
    for difference in transformers_differences(config):
        print(f"warning: {directory}: transformers does not follow {difference}", file=sys.stderr)
    bos = tokenizer.template.start
    special_ids = {
        "bos_token_id": tokenizer.control_ids[bos] if bos else None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in weights.items()}
    layout = {part_name: part for name, tensor in empty.items() for part_name, part in hub_parts(name, tensor)}
    parts = (part for name, value in zip(weights, values, strict=False) for _, part in hub_parts(name, value))
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, layout, parts)
    write_json(directory / "generation_config.json", special_ids)
    if tokenizer.pad_token in tokenizer.template.control_tokens:  # transformers would not train its embedding
        del special_ids["pad_token_id"]
    dtype = str(next(iter(empty.values())).dtype).removeprefix("torch.")
    write_json(directory / "config.json", hub_config(config) | special_ids | {"torch_dtype": dtype, "dtype": dtype})
    save_tokenizer(directory, tokenizer, config.max_position_embeddings)


# ---------------------------------------------------------------- reading a model


def load_config(directory: str | Path) -> ModelConfig:
    """Read config.json as DeepSeek or as transformers 5 writes it. Raises UserError, naming the file and the field."""
    path = inside(Path(directory), "config.json")
    return parse_config(path, read_json(path))


def iterate_weights(
    directory: str | Path, config: ModelConfig, quantized: dict[str, NF4] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names with their tensors, in their stored dtype, one at a time and in the order of the model. A weight
    in `quantized` comes as its codes and scales instead.

    Memory: the tensor at hand, twice while it is put together; a quantised one is never whole. Raises UserError, before
    anything is read, if tensors are missing, extra or of another shape.
    """
    weights = stored_weights(Path(directory), config)

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, (empty, parts) in weights.items():
            tensors = (part.read() for part in parts)
            if quantized and name in quantized:
                for buffer, value in quantized[name].quantized(tensors).items():
                    yield f"{name}.{buffer}", value
            else:
                yield name, torch.cat([tensor.flatten() for tensor in tensors]).view(empty.shape)

    return read()


def stored_weights(directory: Path, config: ModelConfig) -> dict[str, tuple[Tensor, list[StoredTensor]]]:
    """Map our names to an empty tensor of the shape and dtype (the widest, if its parts have several), and to what the
    directory stores for it. Raises one UserError that lists what does not fit. The configuration is compared with the
    files' headers before a model is built, since a small file can describe a model that does not fit any memory."""
    stored = {name: tensor for path in weight_files(directory) for name, tensor in stored_tensors(path).items()}
    layers, experts = config.num_hidden_layers, config.n_routed_experts
    if max(layers, 3 * experts * (layers - config.first_k_dense_replace)) > len(stored):
        described = f"config.json describes a model of {layers} layers with {experts} routed experts"
        raise UserError(f"{directory}: {described}, but the weight files hold only {len(stored)} tensors")
    with torch.device("meta"):
        expected = dict(DeepSeekV2(config).named_parameters())
    parts = {name: dict(hub_parts(name, parameter)) for name, parameter in expected.items()}
    check_fit(directory, stored, {name: part.shape for several in parts.values() for name, part in several.items()})
    found = {name: [stored[part_name] for part_name in several] for name, several in parts.items()}
    return {name: (parameter.detach().to(widest(found[name])), found[name]) for name, parameter in expected.items()}


def widest(tensors: Iterable[StoredTensor | Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def weight_files(directory: Path) -> list[Path]:
    """Return the one weight file, or those that the index names. Raises UserError."""
    if (directory / WEIGHTS).exists():
        return [inside(directory, WEIGHTS)]
    if not (directory / WEIGHTS_INDEX).exists():
        raise UserError(f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    path = inside(directory, WEIGHTS_INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map")
    return [inside(directory, name) for name in sorted({str(name) for name in weight_map.values()})]


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: Device = None,
    config: ModelConfig | None = None,
    quantize: Quantization | None = None,
) -> DeepSeekV2:
    """Load the model of a directory in Hugging Face layout, tensor by tensor. dtype None: as stored (the widest, if
    there are several); config None: the directory's. Raises UserError."""
    directory = Path(directory)
    config = config or load_config(directory)
    dtype = dtype or widest(empty for empty, _ in stored_weights(directory, config).values())
    with torch.device("meta"):
        model = DeepSeekV2(config)
    if quantize:
        plan(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device or torch.get_default_device())
    load_weights(model, iterate_weights(directory, config, quantized_weights(model)))
    return model


def load_model_and_tokenizer(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: Device = None,
    quantize: Quantization | None = None,
) -> tuple[DeepSeekV2, Tokenizer]:
    """Load from a model directory, a run directory (its newest checkpoint), or an adapter's, together with its base. An
    adapter is attached, not merged. Raises UserError."""
    directory = resolve_checkpoint(path)
    base, config = resolve_base(directory)
    model = load_pretrained(base, dtype, device, config, quantize)
    if base != directory:
        load_adapter(model, directory)
    return model, load_tokenizer(directory, base, config.vocab_size)


def resolve_base(checkpoint: Path) -> tuple[Path, ModelConfig]:
    """Return the directory of a checkpoint's weights, which for an adapter is its base, and their configuration. Raises
    UserError if the base is missing or is no longer the same."""
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        return checkpoint, load_config(checkpoint)
    place, config = find_base(checkpoint)
    base = resolve_checkpoint(place)
    return base, config or load_config(base)


def load_tokenizer(directory: Path, base: Path, vocab_size: int) -> Tokenizer:
    """Load a checkpoint's own tokenizer, else its base's. Raises UserError for ids beyond the model's vocab_size."""
    has_tokenizer = (directory / "tokenizer.json").is_file()
    return Tokenizer(str(directory if has_tokenizer else base), vocab_size)


def resolve_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint directory as it is, or the newest good one of a run directory. Raises UserError if there is
    none."""
    path = Path(path)
    config = path / "config.json"
    if (path / "checkpoints").is_dir() or (config.is_file() and "output_dir" in read_json(config)):
        if newest := newest_checkpoint(path):
            return newest
        damaged = "no checkpoint that is whole" if checkpoints(path) else "no checkpoint yet"
        raise UserError(f"{path} is a run with {damaged}")
    if not config.is_file() and not (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} is not a checkpoint (it has no config.json or {ADAPTER_CONFIG}), and not a run")
    return path


def resolve_model(path: str | Path) -> Path:
    """Resolve a whole model to train on, like `resolve_checkpoint`. Raises UserError for an adapter."""
    directory = resolve_checkpoint(path)
    if (directory / ADAPTER_CONFIG).is_file():
        merge = f"python export.py merge {path} OUT, then start from OUT (to resume its run: --resume --output-dir RUN)"
        raise UserError(f"{directory} is a LoRA adapter, not a model: {merge}")
    return directory


# ---------------------------------------------------------------- optimizer state, sharded


def optimizer_state(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return the optimizers' tensors (moments, step counts), not copied, by name: "model.norm.weight.exp_avg"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def save_optimizer(directory: Path, model: nn.Module, optimizers: Optimizers, world: World) -> dict[str, str]:
    """Write this rank's shard of the optimizer state, while all other ranks write theirs. Returns checksums of its
    files, which are flushed. Memory: about SHARD_BYTES. Raises OSError."""
    state = optimizer_state(model, optimizers)
    ends = itertools.accumulate(tensor.nbytes for tensor in state.values())
    files_of = {name: 1 + end // SHARD_BYTES for name, end in zip(state, ends, strict=True)}
    place = directory / OPTIMIZER
    writer = dcp.HuggingFaceStorageWriter(str(place), files_of, save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=world.size == 1)
    except dcp.CheckpointException as error:
        raise OSError("; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())) from error
    own = place.glob(f"shard-{world.rank + 1:05d}-*")
    return {f"{OPTIMIZER}/{file.name}": checksum(file) for file in own}


def load_optimizer(directory: Path, model: nn.Module, optimizers: Optimizers, world: World) -> None:
    """Read this rank's shard of the optimizer state, whatever the number of ranks that wrote it. Hyperparameters
    (decay, betas) keep their configured values. Raises UserError if the files do not fit the model."""
    for optimizer in optimizers:  # create its state, by a step that changes nothing
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
    reader = dcp.HuggingFaceStorageReader(str(directory / OPTIMIZER))
    try:
        dcp.load(optimizer_state(model, optimizers), storage_reader=reader, no_dist=world.size == 1)
    except dcp.CheckpointException as error:
        reason = printable(repr(next(iter(error.failures.values()))[0])[:300])
        raise UserError(f"{directory / OPTIMIZER} is not this run's optimizer state: {reason}") from error


# ---------------------------------------------------------------- run state: all or nothing


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], dict[str, str] | None],
    limit: int,
    best: int = 0,
    world: World = ALONE,
) -> Path:
    """Let `write` fill a new directory, on all ranks, and put it at output_dir/checkpoints/step-NNNNNN once all of it
    is on the disk.

    A kill at any moment leaves the earlier checkpoints. Only then are those beyond the newest `limit` deleted, except
    that of step `best`; and those of later steps (damaged ones, from which the run was not resumed). write: may return
    checksums, see `write_directory`. Raises UserError if the disk refuses.
    """
    place = Path(output_dir, "checkpoints", f"step-{step:06d}")

    def write_together(directory: Path) -> dict[str, str]:
        written = write(Path(from_first_rank(str(directory), world))) or {}
        return {name: value for part in from_all_ranks(written, world) for name, value in part.items()}

    with disk_errors(place):
        if not world.is_main:
            write_together(place)
            return place
        for left in place.parent.glob(".step-*.tmp"):  # by a save that was killed
            files.delete_directory(left)
        files.write_directory(place, write_together)
    present = checkpoints(output_dir)
    now = present.index(place)
    for old in present[:now] + present[now + limit :]:
        if old.name != f"step-{best:06d}":
            files.delete_directory(old)
    return place


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return a run's newest checkpoint whose files are as they were written. Report damaged ones and pass over them."""
    for directory in checkpoints(output_dir):
        damaged = files.damaged_files(directory)
        if not damaged:
            return directory
        names = printable(", ".join(damaged))
        print(f"warning: {directory} is damaged ({names}); trying the one before", file=sys.stderr)
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    paths = Path(output_dir, "checkpoints").glob("step-*")
    steps = {path: int(path.name[5:]) for path in paths if re.fullmatch("step-[0-9]+", path.name)}
    return sorted(steps, key=steps.__getitem__, reverse=True)
