"""A model for elsewhere.

python export.py merge ADAPTER OUT                       # a LoRA adapter and its base as a plain model directory
python export.py hub RUN OUT [--base-name ORG/MODEL]     # a directory to publish, with a model card
python export.py gguf RUN OUT.gguf                       # a file that llama.cpp, Ollama and LM Studio run
"""

import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from config import check
from launch.command_line import one_line_errors, parse_flags

# torch takes a while to import, so each command imports what it needs.


@dataclass
class Merge:
    """Add an adapter to the weights that it was trained on: a model directory like any other."""

    # The adapter's directory, or its run's.
    adapter: Annotated[Positional[str], arg(metavar="ADAPTER")]
    # The directory to write.
    out: Annotated[Positional[str], arg(metavar="OUT")]

    def export(self) -> None:
        from merge import merge_adapter

        merge_adapter(self.adapter, self.out)


@dataclass
class Hub:
    """A model or an adapter with a model card, and nothing that only this machine needs: no run state, no checksums."""

    # A run, or one of its checkpoints.
    run: Annotated[Positional[str], arg(metavar="RUN")]
    # The directory to write.
    out: Annotated[Positional[str], arg(metavar="OUT")]
    # What the model was trained from, by its name on the Hub. An adapter must have it: it would name a local directory.
    base_name: str = ""
    # The card's; one of the Hub's identifiers, as mit or apache-2.0.
    license: str = "unknown"

    def export(self) -> None:
        from checkpoint import resolve_checkpoint
        from files import CHECKSUMS, disk_errors, write_directory
        from hub.adapter_base import ADAPTER_CONFIG, publish_base
        from hub.card import model_card, run_of
        from launch.run_directory import read_metrics
        from view.plots import plot_runs

        out = Path(self.out)
        check(not out.exists(), f"{out} exists already; choose a new directory")
        checkpoint = resolve_checkpoint(self.run)
        is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
        named = self.base_name != "" or not is_adapter
        check(named, "name the adapter's base on the Hub: --base-name ORG/MODEL")

        def write(directory: Path) -> None:
            for file in checkpoint.iterdir():
                if file.suffix in (".json", ".safetensors") and file.name != CHECKSUMS:
                    shutil.copyfile(file, directory / file.name)
            if is_adapter:
                publish_base(directory, self.base_name)
            card = model_card(checkpoint, out.name, self.base_name, self.license)
            (directory / "README.md").write_text(card, encoding="utf-8")
            if run := run_of(checkpoint):
                plot_runs({out.name: read_metrics(run)}, directory / "loss.png")

        with disk_errors(out):
            write_directory(out, write, checksums=False)


@dataclass
class Gguf:
    """A GGUF file, with its vocabulary and chat template. An adapter is merged into its base."""

    # A run, or a checkpoint.
    run: Annotated[Positional[str], arg(metavar="RUN")]
    # The file to write.
    out: Annotated[Positional[str], arg(metavar="OUT.gguf")]

    def export(self) -> None:
        check(not Path(self.out).exists(), f"{self.out} exists already; choose a new name")
        check(find_spec("gguf") is not None, "GGUF needs a package: pip install -r requirements-gguf.txt")
        import lora
        from checkpoint import load_model_and_tokenizer
        from files import disk_errors
        from hub.gguf import write_gguf

        model, tokenizer = load_model_and_tokenizer(self.run)
        lora.merge(model)
        unfinished = Path(f"{self.out}.tmp")
        with disk_errors(Path(self.out)):
            try:
                write_gguf(unfinished, model, tokenizer, Path(self.out).stem)
                unfinished.rename(self.out)
            finally:
                unfinished.unlink(missing_ok=True)


COMMANDS: Any = Merge | Hub | Gguf


def main() -> None:
    with one_line_errors():
        command = parse_flags(COMMANDS, sys.argv[1:], "export.py", __doc__)
        command.export()
        print(f"wrote {command.out}")


if __name__ == "__main__":
    main()
