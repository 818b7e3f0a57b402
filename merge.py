"""An adapter merged into its base, matrix by matrix, so that a model of any size passes through a small memory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import lora
from checkpoint import (
    ADAPTER_CONFIG,
    hub_parts,
    load_config,
    load_tokenizer,
    resolve_checkpoint,
    stored_parts,
    torch_dtype,
    write_model,
)
from config import ModelConfig, check
from files import disk_errors, write_directory
from hub import peft as peft_files
from hub.peft import find_base
from model import DeepSeekV2


def merge_adapter(adapter: str | Path, out: str | Path, max_shard_bytes: int = 10**9) -> None:
    """Write the adapter's base model, with the adapter merged into its weights, as a plain model directory, in files of
    max_shard_bytes. Memory: the adapter, and a few such files. Raises UserError, and leaves no directory, where
    `adapter` is none, does not fit its base, or `out` is there.
    """
    check(not Path(out).exists(), f"{out} exists already; choose a new directory")
    directory = resolve_checkpoint(adapter)
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    check(is_adapter, f"{directory} is no adapter (it has no {ADAPTER_CONFIG}): there is nothing to merge")
    place, recorded = find_base(directory)
    base = resolve_checkpoint(place)
    config, tokenizer = recorded or load_config(base), load_tokenizer(directory, base)
    adapters = dict(adapter_parts(directory, config))
    scaling = peft_files.read_scaling(directory / ADAPTER_CONFIG)

    stored = [part for _, parts in stored_parts(base, config).values() for part in parts]
    layout = {part.name: torch.empty(part.shape, dtype=torch_dtype(part), device="meta") for part in stored}

    def merged_parts() -> Iterator[Tensor]:
        for part in stored:
            weight = part.read()
            yield lora.merged(weight, *adapters[part.name], scaling) if part.name in adapters else weight

    def write(place: Path) -> None:
        write_model(place, config, tokenizer, layout, merged_parts(), max_shard_bytes)

    with disk_errors(Path(out)):
        write_directory(Path(out), write, checksums=False)


def adapter_parts(directory: Path, config: ModelConfig) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """A (r, in) and B (out, r) of each adapted weight on disk, by the Hub's names: each expert has its own, and an
    expert's gate and up share an A."""
    with torch.device("meta"):
        model = DeepSeekV2(config)
    peft_files.attach_like(model, directory)
    values = dict(peft_files.read_adapter(model, directory))
    for name in [name for name in values if name.endswith("lora_A")]:
        a, b = values.pop(name), values.pop(f"{name[:-1]}B")
        parts = list(hub_parts(peft_files.adapted_weight(name), b))
        for i, (part_name, part_b) in enumerate(parts):
            yield part_name, (a if a.dim() == 2 else a[i * len(a) // len(parts)], part_b)
