"""What a run costs: parameters, FLOPs, and the most FLOP/s that the machine could do."""

import time
from typing import NamedTuple

import torch

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


class Multiplied(NamedTuple):
    """Active parameters that something is multiplied by. The embedding is looked up, unless it is the head too."""

    body: int  # every token passes them
    head: int  # only target tokens do

    def training_flops(self, num_tokens: int, num_targets: int) -> int:
        """Forward and backward, 2 and 4 for each parameter; without attention's products of two activations."""
        return 6 * (self.body * num_tokens + self.head * num_targets)


def multiplied_parameters(config: ModelConfig) -> Multiplied:
    counts = {part: active for part, (_, active) in parameter_counts(config).items()}
    body = sum(counts.values()) - counts["head"] - counts["embedding"]
    return Multiplied(body, head=counts["head"] or counts["embedding"])


def measure_peak(device: torch.device, dtype: torch.dtype, largest: int = 2048) -> float:
    """FLOP/s of large matrix products: the most that this machine could do. Larger ones are tried while it's quick."""
    best, seconds, size = 0.0, 0.0, 256
    while size <= largest and seconds < 0.1:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            (a @ b).sum().item()  # waits for the device
            seconds = time.perf_counter() - began
            best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best
