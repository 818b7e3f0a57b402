"""Adapters on disk, as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from config import UserError, check
from files import read_json, write_json, write_tensors
from lora import LoRAExperts, LoRALinear, adaptable_weights, adapters, attach, set_adapters

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
