"""LoRA (https://arxiv.org/abs/2106.09685) from scratch, in PEFT's file format.

A weight W stays as it is; beside it a product of two small matrices is learned: y = W x + alpha / r * B A x, with A
(r, in) and B (out, r). B starts at zero, so training starts from the base model exactly.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import UserError, check
from model import Experts

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The routed experts' stacked weights, in the order in which PEFT wraps them.
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A linear layer with its adapter. The base weight keeps its name and may be in bf16; A and B are fp32."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", None)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device, dtype=torch.float32))
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight)
        adapted = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return base + (F.linear(adapted, self.lora_B) * self.scaling).to(base.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The plain layer that does the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = self.weight
        plain.weight += (self.lora_B @ self.lora_A * self.scaling).to(plain.weight.dtype)
        return plain


class LoRAExperts(Experts):
    """Stacked routed experts with a pair A (E, r, in), B (E, out, r) for each adapted weight: one adapter an expert."""

    def __init__(self, base: Experts, scaling: float) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.scaling = scaling
        self.adapted: set[str] = set()

    def adapt(self, name: str, rank: int) -> None:
        weight = getattr(self, name)
        experts, out_features, in_features = weight.shape
        for suffix, shape in (("A", (experts, rank, in_features)), ("B", (experts, out_features, rank))):
            adapter = nn.Parameter(torch.empty(shape, device=weight.device, dtype=torch.float32))
            setattr(self, f"{name}_lora_{suffix}", adapter)
        self.adapted.add(name)

    def project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        output = super().project(name, x, ends)
        if name not in self.adapted:
            return output
        adapted = super().project(f"{name}_lora_A", x, ends)
        return output + super().project(f"{name}_lora_B", adapted, ends) * self.scaling

    @torch.no_grad()
    def merge(self) -> Experts:
        """The plain experts that do the same."""
        plain = Experts.__new__(Experts)
        nn.Module.__init__(plain)
        plain.gate_up_proj, plain.down_proj = self.gate_up_proj, self.down_proj
        for name in self.adapted:
            delta = getattr(self, f"{name}_lora_B") @ getattr(self, f"{name}_lora_A") * self.scaling
            getattr(plain, name).add_(delta.to(self.down_proj.dtype))
        return plain


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> None:
    """Give each target an adapter, without values yet, and freeze everything else.

    target_modules: last parts of names, as "q_proj", or "experts.gate_up_proj" and "experts.down_proj" for the routed
    experts. Raises UserError where the model has nothing of these names.
    """
    weights = adaptable_weights(model)
    chosen = {path: rank for path in weights if any(path.endswith(f".{target}") for target in target_modules)}
    check(bool(chosen), f"lora_target_modules: the model has none of {', '.join(target_modules)}")
    stacked = any(path.endswith(f"experts.{name}") for path in chosen for name in EXPERT_WEIGHTS)
    check(not (dropout and stacked), "lora_dropout must be 0 where the routed experts are adapted")
    attach(model, chosen, alpha / rank, dropout)


def adaptable_weights(model: nn.Module) -> list[str]:
    """Paths of all linear layers in the blocks, and of the stacked experts' weights."""
    paths = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            paths.append(name)
        if isinstance(module, Experts):
            paths += [f"{name}.{weight}" for weight in EXPERT_WEIGHTS]
    return paths


def attach(model: nn.Module, ranks: dict[str, int], scaling: float, dropout: float = 0.0) -> None:
    """Freeze the model and put adapters of the given ranks at the given paths."""
    model.requires_grad_(False)
    for path, rank in ranks.items():
        parent, _, last = path.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(module, Experts):
            if not isinstance(module, LoRAExperts):
                module = LoRAExperts(module, scaling)
                replace_module(model, parent, module)
            module.adapt(last, rank)
        else:
            replace_module(model, path, LoRALinear(getattr(module, last), rank, scaling, dropout))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


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


def merge(model: nn.Module) -> None:
    """Fold every adapter into its weight; the model is then a plain one again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | LoRAExperts):
            replace_module(model, name, module.merge())


# ---------------------------------------------------------------- PEFT's files


def save_adapter(
    directory: str | Path, model: nn.Module, base: str | None, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` opens.

    base: where the base model is. state_dict: the adapters, where the model does not hold them whole (FSDP).
    """
    weights: dict[str, Any] = adapters(model) if state_dict is None else state_dict
    first = next(module for module in model.modules() if isinstance(module, LoRALinear | LoRAExperts))
    rank = next(parameter.shape[-2] for name, parameter in adapters(model).items() if name.endswith("lora_A"))
    linear = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    stacked = [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, LoRAExperts)
        for weight in sorted(module.adapted)
    ]
    # PEFT takes gate_proj, up_proj and down_proj as target modules for the routed experts of transformers 5, wherever
    # they stand. So the dense and shared ones are named as parameters, which comes to the same.
    in_mlp = [f"{name}.weight" for name in linear if ".mlp." in name]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scaling * rank,
        "lora_dropout": 0.0,  # plays no part once trained, and PEFT refuses it for parameters
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in linear if ".mlp." not in name}),
        "target_parameters": in_mlp + stacked,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    names = peft_names(model)
    tensors = {names[name]: to_peft(tensor, name).contiguous() for name, tensor in weights.items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS, {"format": "pt"})


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Attach the adapters that a directory in PEFT's format holds. Raises UserError for what is not LoRA as here."""
    path = Path(directory, ADAPTER_WEIGHTS)
    config = read_adapter_config(Path(directory, ADAPTER_CONFIG))
    tensors = read_tensors(path)
    with_experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        module = target.removesuffix(".base_layer")
        if module not in with_experts:
            ranks[target] = tensor.shape[0]
            continue
        experts = with_experts[module]
        fits = [w for w in EXPERT_WEIGHTS if getattr(experts, w).shape[2] == tensor.shape[1]]
        both = any(other.startswith(f"base_model.model.{module}.base_layer.") for other in tensors)
        weight = EXPERT_WEIGHTS[target == module] if both else next((w for w in fits if names_weight(config, w)), "")
        check(weight in fits, f"{path}: {name} fits no weight of the routed experts")
        ranks[f"{module}.{weight}"] = tensor.shape[0] // len(getattr(experts, weight))
    unknown = sorted(set(ranks) - set(adaptable_weights(model)))
    check(bool(ranks) and not unknown, f"{path}: the model has no {', '.join(unknown[:5]) or 'part with an adapter'}")
    attach(model, ranks, config["lora_alpha"] / config["r"])
    with torch.no_grad():
        for name, value in read_adapter(model, directory):
            model.get_parameter(name).copy_(value)


def names_weight(config: dict[str, Any], weight: str) -> bool:
    return any(target.endswith(weight) for target in config.get("target_parameters") or ())


def read_adapter(model: nn.Module, directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Values for the model's adapters from a directory in PEFT's format. Raises UserError where they don't fit."""
    path = Path(directory, ADAPTER_WEIGHTS)
    tensors = read_tensors(path)
    names, parameters = peft_names(model), adapters(model)
    wrong = sorted(names.values() ^ tensors.keys())
    check(not wrong, f"{path}: {len(wrong)} tensors are missing or too many: {', '.join(wrong[:5])}")
    for name, parameter in parameters.items():
        value = from_peft(tensors[names[name]], parameter, name)
        check(value.shape == parameter.shape, f"{path}: {names[name]} has shape {tuple(tensors[names[name]].shape)}")
        yield name, value


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Raises UserError for kinds of adapters whose result would be another one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        ratio = config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no adapter's configuration: {error!r}") from error
    check(config.get("peft_type") == "LORA", f"{path}: only adapters of type LORA are supported")
    for option in ("use_dora", "use_rslora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication"):
        check(not config.get(option), f"{path}: {option} is not supported")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for pattern in ranks.keys() | alphas.keys():
        scaling = alphas.get(pattern, config["lora_alpha"]) / ranks.get(pattern, config["r"])
        check(scaling == ratio, f"{path}: another alpha / rank for {pattern} is not supported")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def peft_names(model: nn.Module) -> dict[str, str]:
    """PEFT's name of each adapter. It wraps the stacked experts once for each adapted weight, the second around the
    first, which is then its `base_layer`."""
    names = {}
    for name in adapters(model):
        module, _, last = name.rpartition(".")
        if not last.startswith("lora"):
            weight, last = last[:-7], last[-6:]
            experts = model.get_submodule(module)
            assert isinstance(experts, LoRAExperts)
            if weight == "gate_up_proj" and len(experts.adapted) == 2:
                module += ".base_layer"
        names[name] = f"base_model.model.{module}.{last}.weight"
    return names


def to_peft(tensor: Tensor, name: str) -> Tensor:
    """Stacked A (E, r, in) is (E r, in) there; stacked B (E, out, r) is (out, r E), experts running fastest."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, 1) if name.endswith("lora_A") else tensor.permute(1, 2, 0).flatten(1)


def from_peft(tensor: Tensor, parameter: Tensor, name: str) -> Tensor:
    """The inverse, for a parameter of that shape."""
    if parameter.dim() == 2:
        return tensor
    if name.endswith("lora_A"):
        return tensor.unflatten(0, parameter.shape[:2])
    return tensor.unflatten(1, (parameter.shape[2], parameter.shape[0])).permute(2, 0, 1)
