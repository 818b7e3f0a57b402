"""LoRA (https://arxiv.org/abs/2106.09685) from scratch. Its files, in PEFT's format: hub/peft.py.

A weight W stays as it is; beside it a product of two small matrices is learned: y = W x + alpha / r * B A x, with A
(r, in) and B (out, r). B starts at zero, so training starts from the base model exactly.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LoraConfig, check
from kernels import Product
from model import Experts
from quantization import NF4

# ---------------------------------------------------------------- layers with adapters


def new_adapter(weight: Tensor | NF4, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (..., r, in) and B (..., out, r) for a weight (..., out, in): fp32 whatever that is in, without values yet."""
    *stack, out_features, in_features = weight.shape
    shapes = (*stack, rank, in_features), (*stack, out_features, rank)
    a, b = (nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight.device)) for shape in shapes)
    return a, b


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> nn.Parameter:
    """A weight with its adapter added, in fp32: one in bf16 is rounded once."""
    return nn.Parameter((b @ a).mul_(scaling).add_(weight).to(weight.dtype))


class LoRALinear(nn.Module):
    """A linear layer, whatever its weight is kept in, with an adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = new_adapter(base.weight, rank)
        self.scaling, self.dropout, self.training = scaling, dropout, base.training

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        adapted = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return base + (F.linear(adapted, self.lora_B) * self.scaling).to(base.dtype)

    def merge(self) -> nn.Linear:
        """The base layer, which then does the same alone."""
        self.base_layer.weight = merged(self.base_layer.weight, self.lora_A, self.lora_B, self.scaling)
        return self.base_layer


class LoRAExperts(Experts):
    """Stacked routed experts with a pair A (E, r, in), B (E, out, r) for each adapted weight: one adapter an expert."""

    def __init__(self, base: Experts, scaling: float) -> None:
        nn.Module.__init__(self)
        self.base_layer, self.num_experts = base, base.num_experts
        self.scaling, self.training = scaling, base.training
        self.adapted: list[str] = []

    def adapt(self, name: str, rank: int) -> None:
        for suffix, parameter in zip("AB", new_adapter(getattr(self.base_layer, name), rank), strict=True):
            self.register_parameter(f"{name}_lora_{suffix}", parameter)
        self.adapted.append(name)

    def adapter(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")

    def project(self, name: str, x: Tensor, product: Product) -> Tensor:
        output = self.base_layer.project(name, x, product)
        if name not in self.adapted:
            return output
        a, b = self.adapter(name)
        padding = -a.shape[1] % 8  # grouped_mm wants rows of whole 16 bytes, so the rank grows by zeros
        a, b = F.pad(a, (0, 0, 0, padding)).to(x.dtype), F.pad(b, (0, padding)).to(x.dtype)
        return output + product(product(x, a), b) * self.scaling

    def merge(self) -> Experts:
        """The base layer, which then does the same alone."""
        for name in self.adapted:
            weight = merged(getattr(self.base_layer, name), *self.adapter(name), self.scaling)
            setattr(self.base_layer, name, weight)
        return self.base_layer


# ---------------------------------------------------------------- a model with adapters


def adaptable_weights(model: nn.Module) -> dict[str, str]:
    """Name of each weight that can have an adapter, and what it is called as a target: the blocks' linear layers by the
    last part of their names, the routed experts as experts.gate_up_proj and experts.down_proj."""
    targets = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            targets[f"{name}.weight"] = name.rpartition(".")[2]
        if isinstance(module, Experts):
            targets |= {f"{name}.{weight}": f"experts.{weight}" for weight in ("gate_up_proj", "down_proj")}
    return targets


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> None:
    """Give each target an adapter and freeze everything else.

    target_modules: see adaptable_weights. Raises UserError for one that the model doesn't have; only the default ones
    may be missing, since they name both ways of projecting queries.
    """
    targets = adaptable_weights(model)
    ranks = {name: rank for name, target in targets.items() if target in target_modules}
    known = {*targets.values(), *LoraConfig.lora_target_modules}
    unknown = [target for target in target_modules if target not in known or not ranks]
    there = ", ".join(sorted(set(targets.values())))
    check(bool(ranks) and not unknown, f"lora_target_modules: the model has no {', '.join(unknown)}; it has {there}")
    stacked = any(target.startswith("experts.") for target in target_modules)
    check(not (dropout and stacked), "lora_dropout must be 0 where the routed experts are adapted")
    attach(model, ranks, alpha / rank, dropout)
    set_adapters(model, initial_weights(model))


def attach(model: nn.Module, ranks: dict[str, int], scaling: float, dropout: float = 0.0) -> None:
    """Freeze the model and put adapters of the given ranks, without values yet, beside the given weights."""
    model.requires_grad_(False)
    for name, rank in ranks.items():
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            model.set_submodule(path, LoRALinear(module, rank, scaling, dropout))
            continue
        if not isinstance(module, LoRAExperts):
            assert isinstance(module, Experts)
            module = LoRAExperts(module, scaling)
            model.set_submodule(path, module)
        module.adapt(weight, rank)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def initial_weights(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
    """A value for each adapter: A uniform as PEFT has it, B zero."""
    for name, parameter in adapters(model).items():
        value = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[-1])
            value.uniform_(-bound, bound, generator=generator)
        yield name, value


@torch.no_grad()
def set_adapters(model: nn.Module, weights: Iterator[tuple[str, Tensor]]) -> None:
    for name, value in weights:
        model.get_parameter(name).copy_(value)


def merge(model: nn.Module) -> None:
    """Fold every adapter into its weight; the model is then a plain one again, that can be trained as a whole."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | LoRAExperts):
            model.set_submodule(name, module.merge())
    model.requires_grad_(True)
