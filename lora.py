"""LoRA (https://arxiv.org/abs/2106.09685) from scratch; hub/peft.py reads and writes adapters in PEFT's format.

A weight W is frozen, and the product of two small matrices is learned: y = W x + alpha / r * B A x, with A (r, in) and
B (out, r). B starts at zero, so training starts from the base model exactly:

>>> layer = LoRALinear(nn.Linear(6, 4, bias=False), rank=2, scaling=8.0, dropout=0.0)
>>> x, a = torch.ones(6), nn.init.ones_(layer.lora_A)
>>> b = nn.init.zeros_(layer.lora_B)
>>> torch.equal(layer(x), layer.base_layer(x))
True
>>> b.data[0] = 0.5  # the first output gains 8 * 0.5 * (6 + 6)
>>> (layer(x) - layer.base_layer(x)).round().tolist()
[48.0, 0.0, 0.0, 0.0]
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LoraConfig, UserError
from kernels import Product, compute_dtype
from model import Experts
from parallel import load_weights
from quantization import NF4

STACKS = ("gate_up_proj", "down_proj")  # the routed experts' weights

# ---------------------------------------------------------------- layers with adapters


def new_adapter(weight: Tensor | NF4, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (..., r, in) and B (..., out, r), uninitialised and in fp32, for a weight (..., out, in)."""
    *stack, out_features, in_features = weight.shape
    shapes = (*stack, rank, in_features), (*stack, out_features, rank)
    a, b = (nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight.device)) for shape in shapes)
    return a, b


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> nn.Parameter:
    """Return a weight with its adapter added: in fp32, so that a bf16 weight is rounded once."""
    return nn.Parameter((b @ a).mul_(scaling).add_(weight).to(weight.dtype))


class LoRALinear(nn.Module):
    """A linear layer with an adapter; the weight may be stored in any dtype or in NF4."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = new_adapter(base.weight, rank)
        self.scaling, self.dropout, self.training = scaling, dropout, base.training

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        adapted = F.linear(F.dropout(x, self.dropout, self.training).to(compute_dtype(self.lora_A)), self.lora_A)
        return base + F.linear(adapted * self.scaling, self.lora_B).to(base.dtype)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and B by the name of the base layer's weight."""
        return {"weight": (self.lora_A, self.lora_B)}


class LoRAExperts(Experts):
    """Stacked routed experts with one adapter per expert: A (E, r, in) and B (E, out, r) for each adapted weight."""

    def __init__(self, base: Experts, ranks: dict[str, int], scaling: float) -> None:
        nn.Module.__init__(self)
        self.base_layer, self.num_experts, self.adapted = base, base.num_experts, tuple(ranks)
        self.scaling, self.training = scaling, base.training
        for name, rank in ranks.items():
            a, b = new_adapter(getattr(base, name), rank)
            self.register_parameter(f"{name}_lora_A", a)
            self.register_parameter(f"{name}_lora_B", b)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and B by the name of the base layer's weight."""
        return {name: (getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")) for name in self.adapted}

    def project(self, name: str, x: Tensor, product: Product) -> Tensor:
        output = self.base_layer.project(name, x, product)
        if name not in self.adapted:
            return output
        a, b = self.factors()[name]
        padding = -a.shape[1] % 8  # grouped_mm needs strides of 16 bytes: pad the rank with zeros
        a, b = F.pad(a, (0, 0, 0, padding)).to(x.dtype), F.pad(b, (0, padding)).to(x.dtype)
        return output + product(product(x, a) * self.scaling, b)


# ---------------------------------------------------------------- a model with adapters


def adaptable_weights(model: nn.Module) -> dict[str, str]:
    """Map the name of each weight that can have an adapter to its name as a target: the last part of it for the blocks'
    linear layers, experts.gate_up_proj and experts.down_proj for the routed experts."""
    targets = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            targets[f"{name}.weight"] = name.rpartition(".")[2]
        if isinstance(module, Experts):
            targets |= {f"{name}.{weight}": f"experts.{weight}" for weight in STACKS}
    return targets


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> None:
    """Give each target an adapter and freeze everything else.

    target_modules: see `adaptable_weights`. Raises UserError for one that the model does not have. Default targets may
    be missing, because they name both ways of projecting queries.
    """
    targets = adaptable_weights(model)
    ranks = {name: rank for name, target in targets.items() if target in target_modules}
    known = {*targets.values(), *LoraConfig.lora_target_modules}
    unknown = [target for target in target_modules if target not in known or not ranks]
    if unknown or not ranks:
        present = ", ".join(sorted(set(targets.values())))
        raise UserError(f"lora_target_modules: the model has no {', '.join(unknown)}; it has {present}")
    if dropout and any(target.startswith("experts.") for target in target_modules):
        raise UserError("lora_dropout must be 0 if the routed experts are adapted")
    attach(model, ranks, alpha / rank, dropout)
    load_weights(model, initial_weights(model))


def attach(model: nn.Module, ranks: dict[str, int], scaling: float, dropout: float = 0.0) -> None:
    """Freeze the model and add adapters to the named weights, of the given ranks and uninitialised."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.weight" in ranks:
            model.set_submodule(name, LoRALinear(module, ranks[f"{name}.weight"], scaling, dropout))
        elif isinstance(module, Experts):
            own = {weight: ranks[f"{name}.{weight}"] for weight in STACKS if f"{name}.{weight}" in ranks}
            if own:
                model.set_submodule(name, LoRAExperts(module, own, scaling))


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def initial_weights(model: nn.Module, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield an initial value for each adapter: A uniform as in PEFT, B zero."""
    for name, parameter in adapters(model).items():
        value = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[-1])
            value.uniform_(-bound, bound, generator=generator)
        yield name, value


def merge(model: nn.Module) -> None:
    """Fold every adapter into its weight, and unfreeze the model, which has its original layers again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | LoRAExperts):
            base = module.base_layer
            for weight, (a, b) in module.factors().items():
                setattr(base, weight, merged(getattr(base, weight), a, b, module.scaling))
            model.set_submodule(name, base)
    model.requires_grad_(True)
