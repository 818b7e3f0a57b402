"""The import order: a module imports only modules that come before it. `python tests/test_imports.py` prints it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = """
config files parallel vocabulary tokenizer
data.formats data.text_files data.sources data.pieces dataset
documents kernels datacollator model optimizer quantization lora generation
hub.weights hub.config_json hub.tokenizer_json hub.peft hub.gguf hub.card checkpoint
launch.command_line launch.run_directory launch.start launch.build launch.cost launch.dry_run trainer
view.terminal view.plots view.trace view.page
train_sft chat show export
"""
ORDER = [name for line in LAYOUT.splitlines() for name in line.split()]
PACKAGES = ("data", "hub", "launch", "view")
COMMANDS = ORDER[ORDER.index("train_sft") :]


def module_files() -> dict[str, Path]:
    """Map the name of each product module to its file."""
    files = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).glob("*.py"))]
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name: file for name, file in named.items() if not name.endswith("__init__")}


def imported_modules(file: Path) -> set[str]:
    """Return the product modules that a file imports anywhere, inside functions and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(ORDER)


def test_the_order_lists_every_module() -> None:
    assert set(ORDER) == module_files().keys()


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_before_it(name: str) -> None:
    allowed = set(ORDER[: ORDER.index(name)]) - set(COMMANDS)
    assert imported_modules(module_files()[name]) <= allowed


@pytest.mark.parametrize("command", ["chat", "export"])
def test_chatting_and_exporting_need_no_trainer(command: str) -> None:
    assert "trainer" not in imported_modules(module_files()[command])


if __name__ == "__main__":
    wrong = {}
    for name in ORDER:
        imported = imported_modules(module_files()[name])
        print(f"{name:22} {' '.join(sorted(imported, key=ORDER.index))}")
        wrong[name] = imported - set(ORDER[: ORDER.index(name)])
    if any(wrong.values()):
        sys.exit(f"imports that run up: { {name: up for name, up in wrong.items() if up} }")
