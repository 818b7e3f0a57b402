"""Building a run's model: planned without memory, sharded over the ranks, filled one tensor at a time."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import lora
import quantization
from checkpoint import iterate_weights, load_config
from config import TrainConfig
from hub import peft as peft_files
from model import DeepSeekV2, RMSNorm, Router
from parallel import GatheredModules, World, load_weights, make_mesh, parallelize
from quantization import quantized_weights


def build_model(
    config: TrainConfig, source: Path | None, world: World, adapter: Path | None = None, new_ids: Sequence[int] = ()
) -> DeepSeekV2:
    """Return the model on its device, with the weights of `source` and rows for new_ids, or with new weights. With LoRA
    those are the base's, and the adapters' are read from `adapter`, a checkpoint, or new.

    Memory: the rank's share and the tensor at hand. Raises UserError, before that, if stored weights do not fit.
    """
    adapters, compute = config.lora, config.compute
    with torch.device("meta"):
        model = plan_model(config)
    if source and new_ids:
        stored = with_new_rows(iterate_weights(source, load_config(source)), config.model.vocab_size, new_ids)
    elif source:
        stored = iterate_weights(source, config.model, quantized_weights(model))
    parallelize(model, gathered_modules(model, compute.dtype), make_mesh(compute.parallel, world))
    model.to_empty(device=world.device)
    generator = torch.Generator().manual_seed(compute.seed)
    load_weights(model, stored if source else model.initial_weights(generator))
    if adapters.lora_rank:
        start = peft_files.read_adapter(model, adapter) if adapter else lora.initial_weights(model, generator)
        load_weights(model, start)
    model.model.gradient_checkpointing = compute.gradient_checkpointing
    if compute.compile:
        for block in model.model.layers:
            block.compile()
    return model


def plan_model(config: TrainConfig) -> DeepSeekV2:
    """Return the model with its adapters, on torch's default device and without meaningful weights."""
    model, adapters = DeepSeekV2(config.model), config.lora
    if adapters.lora_rank:
        for parameter in model.requires_grad_(False).parameters():
            if config.compute.dtype == "bfloat16":  # `model.to` cannot do that to a dry run's tensors
                parameter.data = parameter.data.to(torch.bfloat16)
        if adapters.quantize:
            quantization.plan(model)
        settings = (adapters.lora_rank, adapters.lora_alpha, adapters.lora_dropout, adapters.lora_target_modules)
        lora.add_lora(model, *settings)
    return model


def gathered_modules(model: DeepSeekV2, dtype: str) -> list[GatheredModules]:
    """Return what FSDP gathers together: a block's weights, in the dtype that they are multiplied in. Norms and routers
    compute in fp32, so in bf16 they form groups of their own."""
    if dtype != "bfloat16":
        return [([block], None) for block in model.model.layers]
    groups: list[GatheredModules] = []
    for block in model.model.layers:
        groups += [([module for module in block.modules() if isinstance(module, RMSNorm | Router)], None)]
        groups += [([block], torch.bfloat16)]
    return groups


def parameter_summary(model: DeepSeekV2) -> str:
    """Return the numbers of parameters: all, in 4 bits, trained."""
    quantized = sum(weight.shape.numel() for weight in quantized_weights(model).values())
    parameters = sum(p.numel() for p in model.parameters()) + quantized
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_4_bits = f", {quantized / 1e6:,.1f} M of them in 4 bits" if quantized else ""
    return f"{parameters / 1e6:,.1f} M parameters{in_4_bits}, {trained / 1e6:,.1f} M of them trained"


def with_new_rows(
    weights: Iterable[tuple[str, Tensor]], vocab_size: int, new_ids: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with embedding and head enlarged to `vocab_size` rows. The rows of new_ids start at the mean of
    all existing rows, so that a new token is no more and no less likely than the others on average."""
    for name, tensor in weights:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = tensor.new_empty(vocab_size, tensor.shape[1])
            rows[: len(tensor)] = tensor
            rows[list(new_ids)] = tensor[: min(new_ids)].float().mean(dim=0).to(tensor.dtype)
            tensor = rows
        yield name, tensor
