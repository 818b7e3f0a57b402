"""What a run costs: parameters, FLOPs, and the most FLOP/s that the machine could do."""

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import ModelConfig
from model import DeepSeekV2
from quantization import quantized_weights


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

    model: a DeepSeekV2, with adapters or without, on any device, sharded or not; what is in 4 bits is frozen.
    """
    config = model.config
    assert isinstance(config, ModelConfig)
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    token = target = 0
    sizes = [(name, p.numel(), 6 if p.requires_grad else 4) for name, p in model.named_parameters()]
    sizes += [(name, weight.numel(), 4) for name, weight in quantized_weights(model).items()]
    for name, size, flops in sizes:
        active = config.num_experts_per_tok / config.n_routed_experts if "mlp.experts" in name else 1
        cost = int(size * active) * flops
        if head in name:
            target += cost
        elif "embed_tokens" not in name:
            token += cost
    return TrainingCost(token, target)


def attention_flops(config: ModelConfig, length: int) -> int:
    """Products of activations with activations, forward and backward, for a conversation of that many tokens, of which
    each meets itself and all before it."""
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 6 * config.num_hidden_layers * config.num_attention_heads * widths * (length * (length + 1) // 2)


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


# Bytes that a rank of N sends in a collective on a ring, over (N - 1) / N of the whole tensor.
ON_A_RING = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}


class Traffic(TorchDispatchMode):
    """Adds up in `sent` the bytes that this rank sends, by kind of collective: DDP's and FSDP's pass here too."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    @property
    def bytes(self) -> float:
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func._schema.name.removeprefix("c10d::")
        if kind in ON_A_RING:
            leaves = tree_leaves(args)
            whole = max(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            (group,) = (leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf))
            ranks = dist.ProcessGroup.unbox(group).size()
            self.sent[kind] = self.sent.get(kind, 0) + ON_A_RING[kind] * (ranks - 1) / ranks * whole
        return func(*args, **(kwargs or {}))
