"""Imports run one way: from commands down to config.py. `python tests/test_imports.py` prints who imports whom."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train_sft", "chat", "show", "export"}
# What a module may import of ours; commands, of all that is below them. A module that is not here needs a reason.
MAY_IMPORT = {
    # The machine room
    "engine.files": {"config"},
    "engine.cli": {"config", "engine.files", "engine.run_directory"},
    "engine.vocabulary": {"config", "engine.files"},
    "engine.formats": set(),
    "engine.new_tokens": {"engine.vocabulary"},
    "engine.text_files": {"engine.formats"},
    "engine.sources": {"config", "engine.text_files"},
    "engine.pieces": {"tokenizer", "engine.formats", "engine.text_files"},
    "engine.data_report": {"config", "engine.files"},
    "engine.data_view": {"config", "tokenizer", "dataset", "datacollator", "engine.data_report"},
    "engine.hub_config": {"config", "engine.files"},
    "engine.hub_tokenizer": {"tokenizer", "engine.files"},
    "engine.adapter_base": {"config", "engine.files", "engine.hub_config"},
    "engine.documents": set(),
    "engine.kernels": {"engine.documents"},
    "engine.plots": set(),
    "engine.cost": {"config", "model", "quantization"},
    "engine.peft_files": {"config", "lora", "engine.files"},
    "engine.build": {
        *("config", "model", "lora", "quantization", "checkpoint", "parallel"),
        *("engine.hub_config", "engine.new_tokens", "engine.peft_files"),
    },
    "engine.start": {
        *("config", "tokenizer", "checkpoint", "parallel"),
        *("engine.adapter_base", "engine.cli", "engine.hub_config", "engine.job", "engine.run_directory"),
    },
    "engine.dry_run": {
        *("config", "model", "optimizer", "parallel"),
        *("engine.build", "engine.cost", "engine.documents", "engine.kernels"),
    },
    "engine.job": {"config", "parallel", "engine.run_directory"},
    "engine.prefetch": {"config", "datacollator", "parallel", "engine.documents"},
    "engine.questions": {
        "config",
        "model",
        "tokenizer",
        "generation",
        "engine.files",
        "engine.formats",
        "engine.text_files",
    },
    "engine.run_directory": {"config", "engine.files", "engine.plots"},
    # Chapters
    "config": set(),
    "tokenizer": {"config", "engine.files", "engine.vocabulary", "engine.new_tokens"},
    "dataset": {"config", "tokenizer", "engine.text_files", "engine.sources", "engine.pieces", "engine.data_report"},
    "datacollator": set(),
    "model": {"config", "engine.documents", "engine.kernels"},
    "quantization": {"config", "model", "engine.kernels"},
    "lora": {"config", "model", "quantization", "engine.kernels"},
    "generation": {"config", "model", "tokenizer", "engine.kernels"},
    "engine.merge": {
        "config",
        "engine.adapter_base",
        "model",
        "lora",
        "checkpoint",
        "engine.files",
        "engine.hub_config",
        "engine.peft_files",
    },
    "engine.diagrams": {"config", "datacollator", "tokenizer", "engine.kernels", "engine.plots"},
    "engine.gguf_file": {"config", "model", "tokenizer", "engine.hub_tokenizer", "engine.vocabulary"},
    "engine.model_card": {"config", "engine.run_directory", "engine.sources", "engine.text_files"},
    "engine.trace": {"generation", "model", "tokenizer"},
    "engine.web": {"config", "model", "tokenizer", "generation", "engine.cost", "engine.kernels", "engine.trace"},
    "optimizer": {"config"},
    "parallel": {"config"},
    "checkpoint": {
        *("config", "model", "quantization", "tokenizer"),
        *("engine.adapter_base", "engine.files", "engine.hub_config", "engine.hub_tokenizer", "engine.peft_files"),
    },
    "trainer": {
        *("config", "tokenizer", "datacollator", "model", "generation", "checkpoint", "optimizer", "parallel"),
        *(
            "engine.adapter_base",
            "engine.cli",
            "engine.cost",
            "engine.data_report",
            "engine.documents",
            "engine.hub_tokenizer",
            "engine.peft_files",
            "engine.prefetch",
        ),
        "engine.run_directory",
    },
}


def modules() -> dict[str, Path]:
    """Name to file: the top level and engine/."""
    files = [*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py")]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name: file for name, file in named.items() if not name.endswith("__init__")}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Our modules that a file imports, wherever in it: inside functions and for types only, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known.keys()


def import_graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file, known) for name, file in known.items()}


def test_no_import_runs_in_a_circle() -> None:
    graphlib.TopologicalSorter(import_graph()).prepare()  # raises CycleError


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_lies_below_it(name: str) -> None:
    imported = import_graph()[name]
    assert not imported & COMMANDS
    assert name in COMMANDS or imported <= MAY_IMPORT[name]


def test_chatting_and_exporting_need_no_trainer() -> None:
    graph = import_graph()
    assert "trainer" not in graph["chat"] | graph["export"]


if __name__ == "__main__":
    graph = import_graph()
    for name in graphlib.TopologicalSorter(graph).static_order():
        print(f"{name:22} {', '.join(sorted(graph[name]))}")
