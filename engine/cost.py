"""What a run costs: parameters, FLOPs, and the most FLOP/s that the machine could do."""

import time
from typing import NamedTuple

import torch
from torch import nn

from config import ModelConfig
from model import DeepSeekV2


def parameter_counts(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Parameters of each part: in total, and those that take part in one token (active)."""
    with torch.device("meta"):
        model = DeepSeekV2(config)
    parts = {
        "embed_tokens": "embedding",
        "self_attn": "attention",
        "mlp.experts": "routed experts",
        "mlp.shared_experts": "shared experts",
        "mlp.gate.": "router",
        "mlp": "dense feed-forward",
        "lm_head": "head",
        "norm": "norms",
    }
    counts = dict.fromkeys(parts.values(), (0, 0))
    for name, parameter in model.named_parameters():
        part = next(part for key, part in parts.items() if key in name)
        share = config.num_experts_per_tok / config.n_routed_experts if part == "routed experts" else 1
        total, active = counts[part]
        counts[part] = total + parameter.numel(), active + int(parameter.numel() * share)
    return counts


def cache_entries(config: ModelConfig) -> tuple[int, int]:
    """Numbers that a token of context takes in all layers: as latent and rotary key, and as keys and values of all
    heads (table 1 of the paper)."""
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    heads = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return latent * config.num_hidden_layers, heads * config.num_hidden_layers


class TrainingCost(NamedTuple):
    """FLOPs of forward and backward pass, without attention's products of two activations."""

    token: int  # of what every token passes
    target: int  # of the head, which only target tokens pass

    def flops(self, num_tokens: int, num_targets: int) -> int:
        return self.token * num_tokens + self.target * num_targets


def training_cost(model: nn.Module) -> TrainingCost:
    """2 FLOPs for each parameter that takes part in a token, 2 for the gradient of what it is multiplied by, and 2 for
    its own gradient, unless it is frozen. The embedding is looked up, unless it is the head too.

    model: a DeepSeekV2, with adapters or without, on any device, sharded or not.
    """
    config = model.config
    assert isinstance(config, ModelConfig)
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    token = target = 0
    for name, parameter in model.named_parameters():
        active = config.num_experts_per_tok / config.n_routed_experts if "mlp.experts" in name else 1
        cost = int(parameter.numel() * active) * (6 if parameter.requires_grad else 4)
        if head in name:
            target += cost
        elif "embed_tokens" not in name:
            token += cost
    return TrainingCost(token, target)


def measure_peak(device: torch.device, dtype: torch.dtype, largest: int | None = None) -> float:
    """FLOP/s of large matrix products: the most that this machine is seen to do. Larger ones are tried while it's
    quick, up to `largest` rows; None: 8192, on a CPU 2048. Elsewhere than on a CPU several are sent off before one is
    waited for, since what it takes to start one would count as well."""
    on_cpu = device.type == "cpu"
    best, seconds, size, together = 0.0, 0.0, 256, 1 if on_cpu else 8
    while size <= (largest or (2048 if on_cpu else 8192)) and seconds < 0.1:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            for _ in range(together):
                product = a @ b
            product[0, 0].item()  # waits for the device
            seconds = (time.perf_counter() - began) / together
            best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best
