"""Export a model for other programs.

python export.py merge RUN OUT                           # a LoRA adapter and its base as a plain model directory
python export.py hub RUN OUT [--base-name ORG/MODEL]     # a directory to publish, with a model card
python export.py gguf RUN OUT.gguf                       # a file that llama.cpp, Ollama and LM Studio run
"""

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import Positional, arg

import checkpoint
import lora
from config import UserError
from files import disk_errors, inside, read_json, replacing, write_directory, write_json
from hub import peft
from hub.card import model_card
from launch.command_line import one_line_errors, parse_flags
from launch.run_directory import CONFIG, METRICS, read_metrics
from model import DeepSeekV2
from view.plots import plot_runs

# A checkpoint's files for others; run state and checksums stay here.
PUBLISHED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|adapter_config|base|model\.safetensors\.index)\.json"
    r"|(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors"
)


@dataclass
class Export:
    """Paths that every command takes."""

    # A run, or one of its checkpoints.
    run: Annotated[Positional[str], arg(metavar="RUN")]
    # What to write; it must not exist yet.
    out: Annotated[Positional[str], arg(metavar="OUT")]


class Merge(Export):
    """Add an adapter to the weights that it was trained on, as a model directory."""

    def export(self, out: Path) -> None:
        merge_adapter(Path(self.run), out)


def merge_adapter(adapter: Path, out: Path) -> None:
    """Write an adapter's base model with the adapter merged into its weights.

    Memory: the adapter and one weight. Raises UserError, and leaves nothing, if `adapter` is not an adapter or does not
    fit its base.
    """
    directory = checkpoint.resolve_checkpoint(adapter)
    if not (directory / peft.ADAPTER_CONFIG).is_file():
        raise UserError(f"{directory} is not an adapter (it has no {peft.ADAPTER_CONFIG}): there is nothing to merge")
    base, config = checkpoint.resolve_base(directory)
    tokenizer = checkpoint.load_tokenizer(directory, base, config.vocab_size)
    weights = {name: empty for name, (empty, _) in checkpoint.stored_weights(base, config).items()}
    scaling = peft.read_scaling(directory / peft.ADAPTER_CONFIG)
    with torch.device("meta"):
        model = DeepSeekV2(config)
    peft.attach_like(model, directory)
    adapters = dict(peft.read_adapter(model, directory))
    a_of = {peft.adapted_weight(name): name for name in adapters if name.endswith("A")}

    def merged_weights() -> Iterator[Tensor]:
        for name, weight in checkpoint.iterate_weights(base, config):
            if name in a_of:
                a, b = adapters[a_of[name]], adapters[f"{a_of[name][:-1]}B"]
                weight = lora.merged(weight, a, b, scaling)
            yield weight.detach()

    def write(directory: Path) -> None:
        checkpoint.write_model(directory, config, tokenizer, weights, merged_weights())

    with disk_errors(out):
        write_directory(out, write, checksums=False)


@dataclass
class Hub(Export):
    """Copy a model or an adapter for publication, with a model card and without anything private."""

    # The Hub name of the model that this one was trained from. Required for an adapter, which would otherwise name a
    # local directory.
    base_name: str = ""
    # The card's license; one of the Hub's identifiers, such as mit or apache-2.0.
    license: str = "unknown"

    def export(self, out: Path) -> None:
        source = checkpoint.resolve_checkpoint(self.run)
        is_adapter = (source / peft.ADAPTER_CONFIG).is_file()
        if is_adapter and not self.base_name:
            raise UserError("an adapter needs the name of its base on the Hub: --base-name ORG/MODEL")
        run = source.resolve().parent.parent
        is_run = source.resolve().parent.name == "checkpoints" and (run / METRICS).is_file()
        config, metrics = (read_json(run / CONFIG), read_metrics(run)) if is_run else ({}, [])

        def write(directory: Path) -> None:
            for file in source.iterdir():
                if PUBLISHED.fullmatch(file.name):
                    publish(inside(source, file.name), directory / file.name, self.base_name)
            card = model_card(out.name, self.base_name, self.license, is_adapter, config, metrics)
            (directory / "README.md").write_text(card, encoding="utf-8")
            if metrics:
                plot_runs({out.name: metrics}, directory / "loss.png")

        with disk_errors(out):
            write_directory(out, write, checksums=False)


def publish(file: Path, copy: Path, base_name: str) -> None:
    """Copy a checkpoint's file. What names its base's directory here gives its name on the Hub. Other settings that are
    absolute paths, as some libraries record them, are left out."""
    if file.suffix == ".json" and file.name != "tokenizer.json":
        content = read_json(file)
        content |= {key: base_name for key in peft.BASE_NAMES if key in content}
        write_json(copy, {k: v for k, v in content.items() if not (isinstance(v, str) and Path(v).is_absolute())})
    else:
        shutil.copyfile(file, copy)


class Gguf(Export):
    """Write a GGUF file, with its vocabulary and chat template. An adapter is merged into its base."""

    def export(self, out: Path) -> None:
        if find_spec("gguf") is None:
            raise UserError("GGUF needs a package: pip install -r requirements-gguf.txt")
        from hub.gguf import write_gguf  # the package is optional

        model, tokenizer = checkpoint.load_model_and_tokenizer(self.run)
        lora.merge(model)
        with disk_errors(out), replacing(out) as unfinished:
            write_gguf(unfinished, model, tokenizer, out.stem)


COMMANDS: Any = Merge | Hub | Gguf


def main() -> None:
    with one_line_errors():
        command = parse_flags(COMMANDS, args=sys.argv[1:], prog="export.py", description=__doc__)
        out = Path(command.out)
        if out.exists():
            raise UserError(f"{out} exists already; choose a new name")
        command.export(out)
        print(f"wrote {command.out}")


if __name__ == "__main__":
    main()
