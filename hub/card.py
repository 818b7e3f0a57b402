"""A model card, the README.md that the Hub shows: what a model was trained on, how it went, how to talk to it.

Paths of this machine are in a run's configuration, and never in its card.
"""

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from config import PRESETS
from data.sources import KINDS
from data.text_files import file_kind
from launch.run_directory import CONFIG, METRICS, flatten, read_configuration, read_metrics

# Settings that name a place: of this machine, or on the Hub.
PLACES = {"dataset", "tokenizer", "init_from"}
# Settings that say where things lie, or that change nothing about the result.
LOCAL = {"output_dir", "resume", "num_proc", "device", "save_steps", "save_total_limit", "report_to", "debug"}


def model_card(checkpoint: Path, name: str, base_name: str, license_name: str) -> str:
    """checkpoint: a directory; where it is a run's, the run is told of. name, base_name: on the Hub; "": no base."""
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    run = run_of(checkpoint)
    config = read_configuration(run / CONFIG) if run else {}
    sources = [public(source) for source in config.get("dataset", ())]
    front = {
        "license": license_name,
        "base_model": base_name,
        "datasets": [source for source in sources if "/" in source],  # the Hub wants names that it knows
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v2", "sft", "conversational", *["lora"] * is_adapter],
    }
    filled = {key: value for key, value in front.items() if value}
    sections = [
        f"---\n{yaml.safe_dump(filled, sort_keys=False)}---",
        f"# {name}",
        f"A {'LoRA adapter for' if is_adapter else 'small chat model:'} DeepSeek-V2, fine-tuned with SFT from scratch.",
        *([how_it_was_trained(config, read_metrics(run), sources, base_name)] if run else []),
        how_to_use(name, base_name, is_adapter),
    ]
    return "\n\n".join(sections) + "\n"


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that the checkpoint lies in."""
    run = checkpoint.resolve().parent.parent
    return run if checkpoint.resolve().parent.name == "checkpoints" and (run / METRICS).is_file() else None


def public(source: str) -> str:
    """A dataset or a model as others may know it: of a local path, which may lead nowhere by now, the last part."""
    path = Path(re.sub(r":\d+$", "", source))
    local = path.is_absolute() or path.exists() or len(path.parts) > 2 or file_kind(path) in KINDS
    return Path(source).name if local else source


def how_it_was_trained(
    config: dict[str, Any], metrics: list[dict[str, Any]], sources: list[str], base_name: str
) -> str:
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "eval_loss" in line]
    rows = [
        ("data", ", ".join(sources)),
        ("steps", f"{steps[-1]['step']:,}"),
        ("tokens", f"{steps[-1]['num_tokens']:,}"),
        ("loss, first and last step", f"{steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f}"),
        *[(f"held-out loss, step {line['step']:,}", f"{line['eval_loss']:.4f}") for line in evaluations[-1:]],
        ("versions", f"Python {platform.python_version()}, torch {version('torch')}"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in [("", ""), ("---", "---"), *rows])
    return f"## Training\n\n{table}\n\n![loss](loss.png)\n\n    {command(config, base_name)}"


def command(config: dict[str, Any], base_name: str) -> str:
    """The command line with the same settings, from the preset that needs fewest flags."""
    ours = {key: value for key, value in flatten(config).items() if key not in LOCAL}
    if config.get("init_from"):  # it brings its own
        ours = {key: value for key, value in ours.items() if key not in ("tokenizer", "chat_template")}
        ours["init_from"] = base_name or config["init_from"]

    def changes(preset: str) -> dict[str, Any]:
        default = flatten(json.loads(json.dumps(PRESETS[preset].flat())))
        return {key: value for key, value in ours.items() if default.get(key, value) != value}

    preset = min(PRESETS, key=lambda name: len(changes(name)))
    words = ["python train_sft.py", preset]
    for key, value in changes(preset).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = map(str, value if isinstance(value, list) else [value])
            shown = map(public, values) if key in PLACES else values
            words += [f"--{flag}", *(json.dumps(text) if " " in text else text for text in shown)]
    return " ".join(words)


def how_to_use(name: str, base_name: str, is_adapter: bool) -> str:
    """In transformers and here."""
    library, opened = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    download = f"    hf download {base_name} --local-dir {base_name}\n" * is_adapter
    return f"""## Use

```python
from {library} import {opened}
from transformers import AutoTokenizer

path = "{name}"  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = {opened}.from_pretrained(path)
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With the code that trained it, where control tokens that a user types stay text (above they do not):

{download}    python chat.py {name}"""
