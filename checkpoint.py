"""Weights and run state on disk: Hugging Face's layout in and out, saves that a crash cannot harm.

A checkpoint directory is a Hugging Face model directory: `transformers` opens ours, and we open DeepSeek-V2's published
ones. Nothing here runs what a file says: weights are safetensors, run state is unpickled with `weights_only=True`.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.types import Device

from config import ModelConfig, Quantization, UserError, check
from files import (
    damaged_files,
    disk_errors,
    inside,
    read_json,
    recover,
    write_directory,
    write_json,
    write_tensors,
)
from hub import peft as peft_files
from hub.adapter_base import ADAPTER_CONFIG, find_base
from hub.config_json import hub_config, load_config
from hub.tokenizer_json import save_tokenizer
from model import DeepSeekV2
from quantization import NF4, plan, quantized_weights
from tokenizer import Tokenizer

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

# ---------------------------------------------------------------- names: ours and the Hub's


def hub_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hub's names for one of our tensors, each with a view of its part of it.

    They differ for routed experts only: one matrix each there, a stack of them here, with gate above up.
    """
    module, _, projection = name.rpartition(".")
    if not module.endswith(".experts"):
        yield name, tensor
        return
    projections = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    for expert, matrix in enumerate(tensor):
        for part_name, part in zip(projections, matrix.chunk(len(projections)), strict=True):
            yield f"{module}.{expert}.{part_name}.weight", part


# ---------------------------------------------------------------- writing a model


def save_pretrained(
    directory: str | Path,
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model directory that `load_pretrained` and transformers' `from_pretrained` open.

    state_dict: the weights, where the model does not hold them whole (FSDP). They are stored in their own dtype, in
    several files with an index where they exceed max_shard_bytes. Raises OSError or SafetensorError for a full disk.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    parts = (part for name, tensor in weights.items() for part in hub_parts(name, tensor))
    write_model(Path(directory), model.config, tokenizer, parts, max_shard_bytes)


def write_model(
    directory: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    parts: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
) -> None:
    """`save_pretrained` of weights that come one by one, by the Hub's names."""
    if config.norm_topk_prob:
        print(f"warning: {directory} has norm_topk_prob=true, which transformers ignores", file=sys.stderr)
    bos = tokenizer.template.start
    special_ids = {
        "bos_token_id": tokenizer.control_ids[bos] if bos else None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(write_weights(directory, parts, max_shard_bytes)).removeprefix("torch.")
    on_hub = hub_config(config) | special_ids | {"torch_dtype": dtype, "dtype": dtype}
    write_json(directory / "config.json", on_hub)
    write_json(directory / "generation_config.json", special_ids)
    save_tokenizer(directory, tokenizer, config.max_position_embeddings)


def write_weights(directory: Path, parts: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Fill one file after the other, in the order in which parts come. Memory: one file's. Returns the dtype of the
    first part, the embedding."""
    for old in directory.glob(f"{Path(WEIGHTS).stem}*.safetensors*"):
        old.unlink()  # what an earlier save left must not be mixed up with these
    shard: dict[str, Tensor] = {}
    files: dict[Path, list[str]] = {}
    dtypes: list[torch.dtype] = []
    total_size = 0

    def write_shard() -> None:
        path = directory / f"model-{len(files) + 1:05d}.safetensors"
        write_tensors(path, shard)
        files[path] = list(shard)
        shard.clear()

    for name, part in parts:
        if shard and num_bytes(shard) + part.nbytes > max_shard_bytes:
            write_shard()
        shard[name] = part.contiguous()
        dtypes, total_size = dtypes or [part.dtype], total_size + part.nbytes
    write_shard()
    if len(files) == 1:
        next(iter(files)).rename(directory / WEIGHTS)
        return dtypes[0]
    weight_map: dict[str, str] = {}
    for path, names in files.items():  # only now their number is known, which is part of their names
        numbered = f"{path.stem}-of-{len(files):05d}.safetensors"
        path.rename(directory / numbered)
        weight_map |= dict.fromkeys(names, numbered)
    write_json(directory / WEIGHTS_INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return dtypes[0]


def num_bytes(weights: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


# ---------------------------------------------------------------- reading a model


def iterate_weights(
    directory: str | Path, config: ModelConfig, quantized: dict[str, NF4] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our names with their tensors, in their stored dtype, one at a time and in the order of the model. In place of
    those that `quantized` has come their codes and scales.

    Memory: the tensor at hand, twice while it is put together; a quantised one is never whole. Raises UserError, before
    anything is read, where tensors are missing, extra or of another shape.
    """
    for name, shape, parts in stored_parts(Path(directory), config):
        tensors = (part for _, part in parts)
        if quantized and name in quantized:
            for buffer, value in quantized[name].quantized(tensors).items():
                yield f"{name}.{buffer}", value
        else:
            yield name, torch.cat([tensor.flatten() for tensor in tensors]).view(shape)


def stored_parts(
    directory: Path, config: ModelConfig
) -> Iterator[tuple[str, torch.Size, Iterator[tuple[str, Tensor]]]]:
    """Our names and shapes, each with what the Hub stores for it: names and tensors, read one by one."""
    with torch.device("meta"):
        expected = dict(DeepSeekV2(config).named_parameters())
    files = find_tensors(directory, expected)
    for name, parameter in expected.items():
        part_names = [part_name for part_name, _ in hub_parts(name, parameter)]
        yield name, parameter.shape, ((part_name, read_tensor(files[part_name], part_name)) for part_name in part_names)


def read_tensor(path: Path, name: str) -> Tensor:
    """Closes the file again each time: what has been read of an open one counts as memory."""
    with safe_open(path, "pt") as opened:
        return opened.get_tensor(name)


def find_tensors(directory: Path, expected: dict[str, nn.Parameter]) -> dict[str, Path]:
    """The file of each tensor on disk, from the files' headers. Raises one UserError for all that is wrong."""
    wanted = {part_name: tuple(part.shape) for name in expected for part_name, part in hub_parts(name, expected[name])}
    files, wrong = {}, []
    for path in weight_files(directory):
        try:
            with safe_open(path, "pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        for name, shape in shapes.items():
            files[name] = path
            if name not in wanted:
                wrong.append(f"{name} is not part of the model")
            elif shape != wanted[name]:
                wrong.append(f"{name} has shape {shape}, not {wanted[name]}")
    wrong += [f"{name} is missing" for name in wanted if name not in files]
    more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
    check(not wrong, f"{directory}: the weights don't fit config.json: {'; '.join(wrong[:10])}{more}")
    return files


def weight_files(directory: Path) -> list[Path]:
    """The one file, or those that the index names."""
    if (directory / WEIGHTS).exists():
        return [inside(directory, WEIGHTS)]
    check((directory / WEIGHTS_INDEX).exists(), f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    path = inside(directory, WEIGHTS_INDEX)
    weight_map = read_json(path).get("weight_map", {})
    check(isinstance(weight_map, dict) and weight_map != {}, f"{path} has no weight_map")
    return [inside(directory, name) for name in sorted({str(name) for name in weight_map.values()})]


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: Device = None,
    config: ModelConfig | None = None,
    quantize: Quantization | None = None,
) -> DeepSeekV2:
    """The model of a directory in Hugging Face layout, tensor by tensor; dtype None: as stored; config None: the
    directory's. Raises UserError."""
    config = config or load_config(directory)
    with torch.device("meta"):
        model = DeepSeekV2(config)
    if quantize:
        plan(model)
    for name, tensor in iterate_weights(directory, config, quantized_weights(model)):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        quantized = isinstance(module, NF4)
        setattr(module, attribute, tensor.to(device) if quantized else nn.Parameter(tensor.to(device, dtype)))
    return model


def load_model_and_tokenizer(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: Device = None,
    quantize: Quantization | None = None,
) -> tuple[DeepSeekV2, Tokenizer]:
    """From a model directory, a run directory (its newest checkpoint), or an adapter's, whose base is then loaded too.
    An adapter's model comes with the adapter in place, not merged. Raises UserError."""
    base = directory = resolve_checkpoint(path)
    config = None
    if (directory / ADAPTER_CONFIG).is_file():
        base, config = find_base(directory)
        base = resolve_checkpoint(base)
    model = load_pretrained(base, dtype, device, config, quantize)
    if base != directory:
        peft_files.load_adapter(model, directory)
    return model, load_tokenizer(directory, base)


def load_tokenizer(directory: Path, base: Path) -> Tokenizer:
    """The directory's own, else its base's."""
    has_tokenizer = (directory / "tokenizer.json").is_file()
    return Tokenizer(str(directory if has_tokenizer else base))


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory as it is; of a run directory, its newest good checkpoint. Raises UserError otherwise."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path} is a run without a readable checkpoint")
        return newest
    known = (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()
    check(known, f"{path} is no checkpoint: a directory with config.json or {ADAPTER_CONFIG}, or that of a run")
    return path


def resolve_model(path: str | Path) -> Path:
    """As resolve_checkpoint, of a whole model to train on. Raises UserError for an adapter."""
    directory = resolve_checkpoint(path)
    merge = f"python export.py merge {path} OUT, then start from OUT (to go on with its run: --resume --output-dir RUN)"
    check(not (directory / ADAPTER_CONFIG).is_file(), f"{directory} is a LoRA adapter, not a model: {merge}")
    return directory


# ---------------------------------------------------------------- run state: all or nothing


def save_checkpoint(
    output_dir: str | Path, step: int, write: Callable[[Path], None], limit: int, best: int = 0
) -> Path:
    """Let `write` fill a new directory and put it at output_dir/checkpoints/step-NNNNNN once all of it is on the disk.

    Killed at any moment, what stood before still stands. Only then go checkpoints beyond the newest `limit`, though not
    that of step `best`; and later steps' (a damaged one, from which the run was not continued). Raises UserError where
    the disk refuses.
    """
    place = Path(output_dir, "checkpoints", f"step-{step:06d}")
    with disk_errors(place):
        for left in place.parent.glob(".step-*.*"):  # by a save of another step that was killed
            recover(place.with_name(left.stem[1:]))
        write_directory(place, write)
        present = checkpoints(output_dir)
        now = present.index(place)
        for old in present[:now] + present[now + limit :]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)
    return place


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """A run's newest checkpoint whose files are as they were written; damaged ones are reported and passed over."""
    for directory in checkpoints(output_dir):
        damaged = damaged_files(directory)
        if not damaged:
            return directory
        print(f"warning: {directory} is damaged ({', '.join(damaged)}); trying the one before", file=sys.stderr)
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Newest first."""
    steps = [path for path in Path(output_dir, "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values. Raises OSError where the disk refuses."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's zip writer trips over the file's own error and hides it
            raise error.__context__ or error from None


def load_state(path: str | Path) -> dict[str, Any]:
    """What save_state wrote, on the CPU. Raises UserError for anything else; a pickle's code is never run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers of broken files raise anything
        raise UserError(f"{path} is damaged, or no run state; nothing in it was run") from error
