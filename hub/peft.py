"""Adapters on disk as PEFT writes and reads them, adapter_config.json and adapter_model.safetensors; and their base.

PEFT's adapter_config.json has one name for the base model and nothing to recognise it by. An adapter on other weights
than it was trained on answers with nonsense, so base.json next to it records the base's checksums and configuration.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import ModelConfig, UserError
from files import checksum, inside, printable, read_json, write_json
from hub.config_json import hub_config, parse_config
from hub.weights import check_fit, stored_tensors, write_tensors
from lora import LoRAExperts, LoRALinear, adaptable_weights, adapters, attach
from parallel import full_tensor, load_weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
# Fields of these files that name the base.
BASE_NAMES = ("base_model_name_or_path", "relative")
# Settings in PEFT's files that are read here, or that change nothing once an adapter is trained.
KNOWN_OPTIONS = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "bias",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Other ways to start (PiSSA, OLoRA ...) change the base weights too.
KNOWN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


# ---------------------------------------------------------------- writing


def save_adapter(directory: str | Path, model: nn.Module, base: str | None, is_main: bool = True) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` opens. base: the base model's directory or name. If the
    model is sharded, every rank has to call this, one of them with is_main, which writes."""
    parameters = adapters(model)
    tensors = {peft: to_peft(full_tensor(parameters[name].detach()), name) for name, peft in peft_names(model).items()}
    if not is_main:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / ADAPTER_CONFIG, peft_config(model, base))
    write_tensors(directory / ADAPTER_WEIGHTS, tensors)


def record_base(adapter: Path, base: Path, record: dict[str, Any]) -> None:
    """Write base.json into an adapter's directory. record: from `describe_base`."""
    write_json(adapter / BASE, {"relative": os.path.relpath(base.resolve(), adapter.resolve())} | record)


def peft_config(model: nn.Module, base: str | None) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    scaling = next(module.scaling for module in model.modules() if isinstance(module, LoRALinear | LoRAExperts))
    # PEFT takes gate_proj, up_proj and down_proj as target modules for the routed experts of transformers 5, wherever
    # they are. So all weights in feed-forward networks are named as parameters, which has the same effect.
    ranks = {}
    for name, parameter in adapters(model).items():
        if name.endswith("lora_A"):
            weight = adapted_weight(name)
            ranks[weight if ".mlp." in weight else weight.removesuffix(".weight")] = parameter.shape[-2]
    rank = next(iter(ranks.values()))
    others = {target: other for target, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scaling * rank,
        "rank_pattern": others,
        "alpha_pattern": {target: scaling * other for target, other in others.items()},
        "lora_dropout": 0.0,  # has no effect once trained, and PEFT refuses it for parameters
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({target.rpartition(".")[2] for target in ranks if ".mlp." not in target}),
        "target_parameters": [target for target in ranks if ".mlp." in target],
    }


# ---------------------------------------------------------------- reading


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Attach the adapters in a directory to the model. Raises UserError if they are not LoRA as computed here."""
    attach_like(model, directory)
    load_weights(model, read_adapter(model, directory))


def attach_like(model: nn.Module, directory: str | Path) -> None:
    """Attach adapters of the ranks and at the places that the directory has, without values. Raises UserError."""
    directory = Path(directory)
    scaling = read_scaling(inside(directory, ADAPTER_CONFIG))
    tensors = stored_tensors(inside(directory, ADAPTER_WEIGHTS))
    ranks = {}
    for name in adaptable_weights(model):
        path_in_model, _, attribute = name.rpartition(".")
        weight = getattr(model.get_submodule(path_in_model), attribute)
        module = f"base_model.model.{path_in_model}"
        for wrapper in (module, f"{module}.base_layer"):
            a, b = (tensors.get(f"{wrapper}.lora_{suffix}.weight") for suffix in "AB")
            # the widths show which of the experts' two weights it is: no two have both in common
            if a and b and weight.shape[-2:] == b.shape[:1] + a.shape[1:]:
                ranks[name] = a.shape[0] // math.prod(weight.shape[:-2])
    if not ranks:
        raise UserError(f"{directory / ADAPTER_WEIGHTS}: no adapter in it fits the model")
    attach(model, ranks, scaling)


def read_adapter(model: nn.Module, directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield values for the model's adapters from a directory. Raises UserError if they do not fit."""
    path = inside(Path(directory), ADAPTER_WEIGHTS)
    tensors, names = stored_tensors(path), peft_names(model)
    empty = {name: torch.empty(parameter.shape, device="meta") for name, parameter in adapters(model).items()}
    check_fit(path, tensors, {names[name]: to_peft(tensor, name).shape for name, tensor in empty.items()})
    for name, tensor in empty.items():
        yield name, from_peft(tensors[names[name]].read(), tensor.shape, name)


def read_scaling(path: Path) -> float:
    """Return alpha / r from adapter_config.json. Raises UserError for adapters that compute anything else than ours."""
    config = read_json(path)
    try:
        root = math.sqrt if config.get("use_rslora") else float
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        patterns = (None, *ranks, *alphas)
        scalings = [alphas.get(p, config["lora_alpha"]) / root(ranks.get(p, config["r"])) for p in patterns]
        same = math.isclose(min(scalings), max(scalings))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not an adapter's configuration: {error!r}") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: only adapters of type LORA are supported")
    if unknown := [option for option, value in config.items() if value and option not in KNOWN_OPTIONS]:
        raise UserError(f"{path}: {printable(', '.join(unknown))} is not supported")
    start = config.get("init_lora_weights")
    if start not in KNOWN_STARTS:
        raise UserError(f"{path}: init_lora_weights {start!r} is not supported: it changes the base model")
    if not same:
        raise UserError(f"{path}: rank_pattern and alpha_pattern with different alpha / r are not supported")
    return scalings[0]


# ---------------------------------------------------------------- the base


def describe_base(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Return what the weights that adapters are trained on are recognised by, and the configuration that they are
    trained with. Reads all of the weights."""
    files = sorted(directory.glob("*.safetensors"))
    weights = {file.name: {"sha256": checksum(file), **size_and_time(file)} for file in files}
    return {"weights": weights, "config": hub_config(config)}


def size_and_time(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}


def find_base(adapter: Path) -> tuple[Path, ModelConfig | None]:
    """Return the directory of the model that an adapter was trained on, and the configuration it was trained with; None
    without a base.json. Raises UserError if the model is missing, or is no longer the same."""
    name = str(read_json(inside(adapter, ADAPTER_CONFIG)).get("base_model_name_or_path"))
    places, weights, config = [Path(name)], dict[str, Any](), None
    if (adapter / BASE).is_file():
        path = inside(adapter, BASE)
        record, kinds = read_json(path), {"relative": str, "weights": dict, "config": dict}
        if any(type(record.get(name)) is not kind for name, kind in kinds.items()):
            raise UserError(f"{path} does not name an adapter's base: it needs {', '.join(kinds)}")
        places.append(Path(os.path.abspath(adapter / record["relative"])))
        weights, config = record["weights"], parse_config(path, record["config"])
    there = [place for place in places if place.is_dir()]
    if not there:
        looked = printable(", ".join(map(str, dict.fromkeys(places))))
        raise UserError(f"{adapter}: its base model is missing: there is no directory {looked}")
    for place in there:
        changed = changed_weights(place, weights)
        if not changed:
            return place, config
    raise UserError(
        f"{adapter}: its base model {place} has changed ({printable(', '.join(changed))}); the adapter only fits the "
        "weights that it was trained on: restore them, or train it again"
    )


def changed_weights(directory: Path, recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of the files that are not as recorded. A file of another size, or of the same size and time, is
    not read. Raises UserError for a name that is not one of the directory's files."""

    def same(name: str, known: dict[str, Any]) -> bool:
        if not (directory / name).exists() or not isinstance(known, dict):
            return False
        file = inside(directory, name)
        now = size_and_time(file)
        same_size = now["size"] == known.get("size")
        return same_size and (now.items() <= known.items() or checksum(file) == known.get("sha256"))

    return [name for name, known in recorded.items() if not same(name, known)]


# ---------------------------------------------------------------- names and layout: ours and PEFT's


def adapted_weight(name: str) -> str:
    """q_proj.lora_A -> q_proj.weight; experts.down_proj_lora_A -> experts.down_proj"""
    stem = name[: -len("lora_A")]
    return f"{stem}weight" if stem.endswith(".") else stem[:-1]


def peft_names(model: nn.Module) -> dict[str, str]:
    """Return PEFT's name of each adapter. PEFT wraps the stacked experts once per adapted weight, the second around the
    first, which is then its `base_layer`."""
    ours, names = adapters(model), {}
    for name in ours:
        module, _, weight = adapted_weight(name).rpartition(".")
        inner = ".base_layer" if weight == "gate_up_proj" and f"{module}.down_proj_lora_A" in ours else ""
        names[name] = f"base_model.model.{module}{inner}.{name[-6:]}.weight"
    return names


def to_peft(tensor: Tensor, name: str) -> Tensor:
    """Flatten stacked A (E, r, in) to (E r, in) and stacked B (E, out, r) to (out, r E), experts running fastest."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, 1) if name.endswith("lora_A") else tensor.permute(1, 2, 0).flatten(1)


def from_peft(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Invert `to_peft`, for a parameter of that shape."""
    if len(shape) == 2:
        return tensor
    if name.endswith("lora_A"):
        return tensor.unflatten(0, shape[:2])
    return tensor.unflatten(1, (shape[2], shape[0])).permute(2, 0, 1)
