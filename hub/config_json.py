"""A model's config.json, as DeepSeek or transformers 5 writes it, to and from `ModelConfig`."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from config import ModelConfig, RopeScaling, UserError
from files import printable, read_value
from model import rope_frequencies, yarn_mscale

# Settings of DeepSeek-V2's config.json that this model has no choice in. A missing one means the same.
SUPPORTED = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
}
# The shape has to be given: DeepSeek's defaults differ from ours.
SIZES = {field.name for field in fields(ModelConfig) if type(field.default) is int}
REQUIRED = SIZES - {"first_k_dense_replace", "n_group", "topk_group"}

# What may change for weights of one shape. Everything else is what they were made for.
CHANGEABLE = {
    "num_experts_per_tok", "topk_method", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob",
    "aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha",
    "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range",
}  # fmt: skip


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json for both kinds of reader: rope_theta and rope_scaling as in DeepSeek's files,
    rope_parameters as in transformers 5. What the Hub has no name for (two of the balance factors) keeps ours."""
    ours = asdict(config)
    rope_parameters = {"rope_type": "yarn" if config.rope_scaling else "default", "rope_theta": config.rope_theta}
    return (
        {"architectures": ["DeepseekV2ForCausalLM"]}
        | SUPPORTED
        | ours
        | {"rope_parameters": rope_parameters | (ours["rope_scaling"] or {})}
        | {"num_key_value_heads": config.num_attention_heads, "head_dim": config.qk_rope_head_dim, "seq_aux": True}
    )


def transformers_differences(config: ModelConfig) -> list[str]:
    """Return the settings that transformers does not follow when it opens a model of this configuration."""
    differences = []
    if config.norm_topk_prob:
        differences.append("norm_topk_prob=true")
    yarn = config.rope_scaling
    # It scales cos and sin as with mscale 1 and mscale_all_dim 0 unless both are set.
    if yarn and not yarn.mscale * yarn.mscale_all_dim and rope_frequencies(config)[1] != yarn_mscale(yarn.factor, 1.0):
        differences.append(f"mscale={yarn.mscale}, mscale_all_dim={yarn.mscale_all_dim}")
    return differences


def parse_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    """Return the configuration that the file `path` contains. Raises UserError, naming file and field."""
    for name, supported in SUPPORTED.items():
        if raw.get(name, supported) != supported:
            raise UserError(f"{path}: {name} is {raw[name]!r}; only {supported!r} is supported")
    theta, scaling = read_rope(path, raw)
    raw = raw | {"rope_theta": theta, "rope_scaling": scaling}
    given = {field.name: raw[field.name] for field in fields(ModelConfig) if raw.get(field.name) is not None}
    if missing := sorted(REQUIRED - given.keys()):
        raise UserError(f"{path} lacks {', '.join(missing)}")
    try:
        config: ModelConfig = read_value(ModelConfig, given, "model")
        config.validate()
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {printable(str(error))}") from None
    return config


def read_rope(path: Path, raw: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Return rope_theta and YaRN's settings, from rope_scaling or rope_parameters. A missing mscale is 1 and a missing
    mscale_all_dim 0, as in DeepSeek's code."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling is {rope!r}; it must be an object")
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise UserError(f"{path}: rope_scaling of type {kind!r} is not supported; only 'yarn' is")
    known, required = vars(RopeScaling()).keys(), {"factor", "original_max_position_embeddings"}
    if not required <= rope.keys() <= known:
        needs = f"it needs {', '.join(sorted(required))}, and may have only {', '.join(known)}"
        raise UserError(f"{path}: rope_scaling has {printable(', '.join(rope))}; {needs}")
    return theta, rope


def changed_config(loaded: ModelConfig, wanted: ModelConfig, given: set[str], source: Path) -> ModelConfig:
    """Return a checkpoint's configuration with the changes of preset and flags: the fields of `wanted` that are in
    `given`, e.g. aux_loss_alpha or rope_scaling.factor. Raises UserError for a shape that the weights do not have.

    YaRN stretches the checkpoint's context by its factor, unless max_position_embeddings is given.
    """
    named = given & vars(loaded).keys()
    changes = {name: getattr(wanted, name) for name in named if getattr(wanted, name) != getattr(loaded, name)}
    fixed = [f"model.{name} is {getattr(loaded, name)}, not {changes[name]}" for name in changes.keys() - CHANGEABLE]
    if fixed:
        shape = f"the weights in {source} have a shape that cannot change: {', '.join(sorted(fixed))}"
        raise UserError(f"{shape}; --init-from none starts from new ones")
    config = replace(loaded, **changes)
    yarn = {name for name in vars(RopeScaling()) if f"rope_scaling.{name}" in given}
    if yarn:
        old = config.rope_scaling or RopeScaling(original_max_position_embeddings=loaded.max_position_embeddings)
        config.rope_scaling = replace(old, **{name: getattr(wanted.rope_scaling, name) for name in yarn})
        if "max_position_embeddings" not in named:
            stretched = config.rope_scaling.factor * config.rope_scaling.original_max_position_embeddings
            config.max_position_embeddings = round(stretched)
    return config
