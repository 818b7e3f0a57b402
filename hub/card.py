"""A model card, the README.md that the Hub shows: what a model was trained on, with which result, and how to use it.

Names of private data, places on this machine, and sample prompts are part of a run's configuration, not of its card.
"""

import json
import platform
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from config import PRESETS, TrainConfig

# Settings that stay out of the card: they are published elsewhere, name places here, or do not change the result.
LEFT_OUT = {
    "model", "dataset", "tokenizer", "init_from", "output_dir", "resume", "num_proc", "device", "save_steps",
    "save_total_limit", "report_to", "debug", "sample_prompts",
}  # fmt: skip
BUILT_IN = {source.partition(":")[0] for preset in PRESETS.values() for source in preset.data.dataset}


def model_card(
    name: str,
    base_name: str,
    license_name: str,
    is_adapter: bool,
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
) -> str:
    """Return the text of a model card. name, base_name: on the Hub; base_name "": none. config, metrics: the run's
    config.json and metrics.jsonl, empty for a model that is not a run's."""
    sources = [public_name(source, "private data") for source in config.get("dataset", ())]
    data = ModelCardData(
        license=license_name,
        base_model=base_name or None,
        datasets=[source.partition(":")[0] for source in sources if "/" in source] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["deepseek_v2", "sft", "conversational", *["lora"] * is_adapter],
    )
    download = [["hf", "download", base_name, "--local-dir", base_name]] if is_adapter else []
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        title=escaped(name),
        adapter=is_adapter,
        rows=training_rows(sources, config, metrics),
        path=json.dumps(name, ensure_ascii=False),
        auto_model="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        lines=[shlex.join(words) for words in (*download, ["python", "chat.py", name])],
    )
    return f"{card}\n"


def escaped(text: str) -> str:
    """Return text as Markdown shows it literally."""
    return re.sub(r"([\\`*_$<>\[\]|#])", r"\\\1", text)


def public_name(source: str, placeholder: str) -> str:
    """Return the name of a dataset or model if others can have it: a built-in one, or ORG/NAME of the Hub."""
    name = source.partition(":")[0]
    is_local = Path(name).exists() or Path(name).suffix or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return placeholder if is_local and name not in BUILT_IN else source


def training_rows(sources: list[str], config: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the rows of the card's table: data, losses, and the settings that are not config.py's defaults. None for a
    model without metrics."""
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    rows = [
        ("data", ", ".join(dict.fromkeys(sources))),
        ("steps", f"{last['step']:,}"),
        ("tokens", f"{last['num_tokens']:,}"),
        ("loss, first and last step", f"{rounded(first['loss'])}, {rounded(last['loss'])}"),
        *[(f"held-out loss, step {e['step']:,}", rounded(e["eval_loss"])) for e in metrics if "eval_loss" in e][-1:],
        ("versions", f"Python {platform.python_version()}, torch {version('torch')}"),
    ]
    for name, default in json.loads(json.dumps(TrainConfig().flat())).items():
        if config.get(name, default) != default and name not in LEFT_OUT:
            rows.append((name, json.dumps(config[name], ensure_ascii=False)))
    return [(name, escaped(text)) for name, text in rows]


def rounded(value: float | None) -> str:
    """Return a metric with four digits; metrics.jsonl has null for what is not finite."""
    return "not finite" if value is None else f"{value:.4f}"
