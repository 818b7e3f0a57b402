"""LoRA (https://arxiv.org/abs/2106.09685) from scratch, in PEFT's file format.

A weight W stays as it is; beside it a product of two small matrices is learned: y = W x + alpha / r * B A x, with A
(r, in) and B (out, r). B starts at zero, so training starts from the base model exactly.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from config import LoraConfig, UserError, check
from engine.files import read_json, write_json, write_tensors
from engine.kernels import Product
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


# ---------------------------------------------------------------- PEFT's files

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings in PEFT's files that are read here, or that change nothing once an adapter is trained.
KNOWN_OPTIONS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "bias"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# Other ways to start (PiSSA, OLoRA ...) change the base weights too.
KNOWN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    directory: str | Path, model: nn.Module, base: str | None, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` opens.

    base: where the base model is. state_dict: the adapters, where the model does not hold them whole (FSDP).
    """
    parameters = adapters(model)
    scaling = next(module.scaling for module in model.modules() if isinstance(module, LoRALinear | LoRAExperts))
    # PEFT takes gate_proj, up_proj and down_proj as target modules for the routed experts of transformers 5, wherever
    # they stand. So all weights in feed-forward networks are named as parameters, which comes to the same.
    ranks = {}
    for name, parameter in parameters.items():
        if name.endswith("lora_A"):
            weight = adapted_weight(name)
            ranks[weight if ".mlp." in weight else weight.removesuffix(".weight")] = parameter.shape[-2]
    rank = next(iter(ranks.values()))
    others = {target: other for target, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scaling * rank,
        "rank_pattern": others,
        "alpha_pattern": {target: scaling * other for target, other in others.items()},
        "lora_dropout": 0.0,  # plays no part once trained, and PEFT refuses it for parameters
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({target.rpartition(".")[2] for target in ranks if ".mlp." not in target}),
        "target_parameters": [target for target in ranks if ".mlp." in target],
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / ADAPTER_CONFIG, config)
    values = model.state_dict() if state_dict is None else state_dict
    tensors = {peft: to_peft(values[name], name).contiguous() for name, peft in peft_names(model).items()}
    write_tensors(directory / ADAPTER_WEIGHTS, tensors)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Attach the adapters that a directory in PEFT's format holds. Raises UserError for what is not LoRA as here."""
    attach_like(model, directory)
    set_adapters(model, read_adapter(model, directory))


def attach_like(model: nn.Module, directory: str | Path) -> None:
    """Adapters of the ranks and at the places that the directory has, without values yet. Raises UserError."""
    path = Path(directory, ADAPTER_WEIGHTS)
    scaling = read_scaling(Path(directory, ADAPTER_CONFIG))
    tensors = read_tensors(path)
    ranks = {}
    for name in adaptable_weights(model):
        path_in_model, _, attribute = name.rpartition(".")
        weight = getattr(model.get_submodule(path_in_model), attribute)
        module = f"base_model.model.{path_in_model}"
        for wrapper in (module, f"{module}.base_layer"):
            a, b = (tensors.get(f"{wrapper}.lora_{suffix}.weight") for suffix in "AB")
            # the widths tell which of the experts' two weights it is: no two have both in common
            if a is not None and b is not None and weight.shape[-2:] == (len(b), a.shape[1]):
                ranks[name] = len(a) // math.prod(weight.shape[:-2])
    check(bool(ranks), f"{path}: no adapter in it fits the model")
    attach(model, ranks, scaling)


def read_adapter(model: nn.Module, directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Values for the model's adapters from a directory in PEFT's format. Raises UserError where they don't fit."""
    path = Path(directory, ADAPTER_WEIGHTS)
    tensors = read_tensors(path)
    names = peft_names(model)
    wrong = sorted(names.values() ^ tensors.keys())
    check(not wrong, f"{path}: {len(wrong)} tensors are missing or fit no weight: {', '.join(wrong[:5])}")
    for name, parameter in adapters(model).items():
        tensor = tensors[names[name]]
        wanted = to_peft(torch.empty(parameter.shape, device="meta"), name).shape
        check(tensor.shape == wanted, f"{path}: {names[name]} has shape {tuple(tensor.shape)}, not {tuple(wanted)}")
        yield name, from_peft(tensor, parameter.shape, name)


def read_scaling(path: Path) -> float:
    """alpha / r, from adapter_config.json. Raises UserError for adapters that compute anything else than ours."""
    config = read_json(path)
    try:
        root = math.sqrt if config.get("use_rslora") else float
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        patterns = (None, *ranks, *alphas)
        scalings = [alphas.get(p, config["lora_alpha"]) / root(ranks.get(p, config["r"])) for p in patterns]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is no adapter's configuration: {error!r}") from error
    check(config.get("peft_type") == "LORA", f"{path}: only adapters of type LORA are supported")
    unknown = [option for option, value in config.items() if value and option not in KNOWN_OPTIONS]
    check(not unknown, f"{path}: {', '.join(unknown)} is not supported")
    start = config.get("init_lora_weights")
    check(start in KNOWN_STARTS, f"{path}: init_lora_weights {start!r} is not supported: it changes the base model")
    same = math.isclose(min(scalings), max(scalings))
    check(same, f"{path}: rank_pattern and alpha_pattern with different alpha / r are not supported")
    return scalings[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    check(all(tensor.dim() == 2 for tensor in tensors.values()), f"{path}: not all tensors are matrices")
    return tensors


def adapted_weight(name: str) -> str:
    """q_proj.lora_A -> q_proj.weight; experts.down_proj_lora_A -> experts.down_proj"""
    stem = name[: -len("lora_A")]
    return f"{stem}weight" if stem.endswith(".") else stem[:-1]


def peft_names(model: nn.Module) -> dict[str, str]:
    """PEFT's name of each adapter. It wraps the stacked experts once for each adapted weight, the second around the
    first, which is then its `base_layer`."""
    ours, names = adapters(model), {}
    for name in ours:
        module, _, weight = adapted_weight(name).rpartition(".")
        inner = ".base_layer" if weight == "gate_up_proj" and f"{module}.down_proj_lora_A" in ours else ""
        names[name] = f"base_model.model.{module}{inner}.{name[-6:]}.weight"
    return names


def to_peft(tensor: Tensor, name: str) -> Tensor:
    """Stacked A (E, r, in) is (E r, in) there; stacked B (E, out, r) is (out, r E), experts running fastest."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, 1) if name.endswith("lora_A") else tensor.permute(1, 2, 0).flatten(1)


def from_peft(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """The inverse, for a parameter of that shape."""
    if len(shape) == 2:
        return tensor
    if name.endswith("lora_A"):
        return tensor.unflatten(0, shape[:2])
    return tensor.unflatten(1, (shape[2], shape[0])).permute(2, 0, 1)
