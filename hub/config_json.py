"""A model's config.json, as DeepSeek or transformers 5 writes it, to and from our `ModelConfig`."""

from collections.abc import Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from config import ModelConfig, RopeScaling, UserError, check
from files import inside, read_json

# Settings of DeepSeek-V2's config.json that this model has no choice in; a missing one means the same.
SUPPORTED = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
}
# The shape has to be told: DeepSeek's defaults differ from ours.
SIZES = {field.name for field in fields(ModelConfig) if type(field.default) is int}
REQUIRED = SIZES - {"first_k_dense_replace", "n_group", "topk_group"}

# What weights of one shape can be used with. Everything else is what they were made for.
CHANGEABLE = {
    *("num_experts_per_tok", "topk_method", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"),
    *("aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range"),
}


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """config.json for readers of both kinds: rope_theta and rope_scaling as in DeepSeek's files, rope_parameters as
    transformers 5 has them. What the Hub has no name for (two of the balance factors) keeps ours."""
    ours = asdict(config)
    rope_parameters = {"rope_type": "yarn" if config.rope_scaling else "default", "rope_theta": config.rope_theta}
    return (
        {"architectures": ["DeepseekV2ForCausalLM"]}
        | SUPPORTED
        | ours
        | {"rope_parameters": rope_parameters | (ours["rope_scaling"] or {})}
        | {"num_key_value_heads": config.num_attention_heads, "head_dim": config.qk_rope_head_dim, "seq_aux": True}
    )


def load_config(directory: str | Path) -> ModelConfig:
    """Read config.json as DeepSeek or as transformers 5 writes it. Raises UserError, naming the file and the field."""
    path = inside(Path(directory), "config.json")
    return parse_config(path, read_json(path))


def parse_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    """From the content of a config.json that stands in the file `path`. Raises UserError, naming file and field."""
    for name, supported in SUPPORTED.items():
        value = raw.get(name, supported)
        check(value == supported, f"{path}: {name} is {value!r}; only {supported!r} is supported")
    given = {field.name: raw[field.name] for field in fields(ModelConfig) if raw.get(field.name) is not None}
    given["rope_theta"], given["rope_scaling"] = read_rope(path, raw)
    missing = sorted(REQUIRED - given.keys())
    check(not missing, f"{path} lacks {', '.join(missing)}")
    method = given.get("topk_method", "greedy")
    check(method in ("greedy", "group_limited_greedy"), f"{path}: topk_method {method!r} is not supported")
    check_types(path, given, ModelConfig(q_lora_rank=1, rope_scaling=given["rope_scaling"]))
    config = ModelConfig(**given)
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read_rope(path: Path, raw: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """rope_theta, and YaRN's settings from whichever dict has them; DeepSeek's code has mscale 1, mscale_all_dim 0."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"{path}: rope_scaling is {rope!r}; it must be an object")
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", raw.get("rope_theta", ModelConfig.rope_theta))
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    if kind == "default":
        return theta, None
    check(kind == "yarn", f"{path}: rope_scaling of type {kind!r} is not supported; only 'yarn' is")
    missing = {"factor", "original_max_position_embeddings"} - rope.keys()
    check(not missing, f"{path}: rope_scaling lacks {', '.join(sorted(missing))}")
    unknown = rope.keys() - {field.name for field in fields(RopeScaling)}
    check(not unknown, f"{path}: rope_scaling's {', '.join(sorted(unknown))} is not supported")
    check_types(path, rope, RopeScaling())
    return theta, RopeScaling(**rope)


def changed_config(loaded: ModelConfig, wanted: ModelConfig, given: Collection[str], source: Path) -> ModelConfig:
    """A checkpoint's configuration with what the command line changes: the fields of `wanted` that are in `given`, as
    "model.aux_loss_alpha" or "model.rope_scaling.factor". Raises UserError for another shape than the weights have.

    YaRN stretches the context that the checkpoint had, by its factor, unless told otherwise.
    """
    named = {name for name in vars(loaded) if f"model.{name}" in given}
    changes = {name: getattr(wanted, name) for name in named if getattr(wanted, name) != getattr(loaded, name)}
    fixed = [f"model.{name} is {getattr(loaded, name)}, not {changes[name]}" for name in changes.keys() - CHANGEABLE]
    shape = f"the weights in {source} have a shape that cannot change: {', '.join(sorted(fixed))}"
    check(not fixed, f"{shape}; --init-from none starts from new ones")
    config = replace(loaded, **changes)
    yarn = {name for name in vars(RopeScaling()) if f"model.rope_scaling.{name}" in given}
    if yarn:
        old = config.rope_scaling or RopeScaling(original_max_position_embeddings=loaded.max_position_embeddings)
        config.rope_scaling = replace(old, **{name: getattr(wanted.rope_scaling, name) for name in yarn})
        if "max_position_embeddings" not in named:
            stretched = config.rope_scaling.factor * config.rope_scaling.original_max_position_embeddings
            config.max_position_embeddings = round(stretched)
    return config


def check_types(path: Path, values: dict[str, Any], example: object) -> None:
    """Each value has the type that the field of its name has in `example`; an int passes for a float."""
    for name, value in values.items():
        wanted = type(getattr(example, name))
        right = isinstance(value, (int, float) if wanted is float else wanted)
        check(right, f"{path}: {name} is {value!r}; it must be of type {wanted.__name__}")
