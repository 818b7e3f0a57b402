"""Models of a few thousand parameters, and the same model in transformers."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from config import ModelConfig
from model import DeepSeekV2

# Widths of the small model for NF4, which takes rows of 64 numbers; the heads' are free.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "v_head_dim": 32,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
}


def small_config(**changes: Any) -> ModelConfig:
    """One dense layer and two with experts; every width differs, so that a mix-up cannot go unseen."""
    defaults: dict[str, Any] = {
        "vocab_size": 112,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 14,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "intermediate_size": 80,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "initializer_range": 0.2,
        "max_position_embeddings": 4096,
    }
    return ModelConfig(**(defaults | changes))


def small_model(seed: int = 0, **changes: Any) -> DeepSeekV2:
    """Random weights, the norms' too."""
    torch.manual_seed(seed)
    model = DeepSeekV2(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model


def make_batch(rows: list[list[int]], seed: int = 0, vocab_size: int = 112, width: int = 0) -> dict[str, Tensor]:
    """Rows given by the lengths of their conversations, padded to `width` or the longest; a third of the tokens are no
    target."""
    generator = torch.Generator().manual_seed(seed)
    width = max(width, *(sum(row) for row in rows))
    batch = {
        name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "position_ids", "sequence_ids")
    }
    batch["labels"] = torch.full((len(rows), width), -100)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start + length)
            tokens = torch.randint(1, vocab_size, (length + 1,), generator=generator)
            batch["input_ids"][row, part] = tokens[:-1]
            batch["labels"][row, part] = torch.where(torch.rand(length, generator=generator) < 2 / 3, tokens[1:], -100)
            batch["position_ids"][row, part] = torch.arange(length)
            batch["sequence_ids"][row, part] = number + 1
            start += length
    return batch


def transformers_model(model: DeepSeekV2) -> DeepseekV2ForCausalLM:
    """The same weights in transformers."""
    settings = asdict(model.config)
    theta, scaling = settings.pop("rope_theta"), settings.pop("rope_scaling")
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": scaling.pop("type"), **scaling}
    config = DeepseekV2Config(**settings, rope_parameters={"rope_theta": theta, **rope}, attn_implementation="eager")
    reference = DeepseekV2ForCausalLM(config).to(model.output_weight.dtype)
    reference.load_state_dict(model.state_dict() | {"lm_head.weight": model.output_weight})
    return reference


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
