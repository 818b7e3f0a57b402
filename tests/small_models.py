"""Models of a few thousand parameters, and the same model in transformers."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from config import ModelConfig
from datacollator import DataCollator
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
    """Return a shape of one dense layer and two with experts. All widths differ, so no two can be confused."""
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
    """A model with random weights, including the norms'."""
    torch.manual_seed(seed)
    model = DeepSeekV2(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model


def make_batch(rows: list[list[int]], seed: int = 0, width: int = 0) -> dict[str, Tensor]:
    """Return rows given by the lengths of their conversations, padded to `width` or the longest; a third of the tokens
    are no targets."""
    rng, collator = np.random.default_rng(seed), DataCollator(max(width, *map(sum, rows)), pad_token_id=0)
    return collator([[(rng.integers(1, 112, n), rng.random(n) < 2 / 3) for n in row] for row in rows])


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
    """Return the largest difference over the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
