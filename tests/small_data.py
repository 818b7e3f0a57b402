"""Small datasets, and what a run sees of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from config import DataConfig
from dataset import DataReport, RunData, load_data
from tokenizer import Tokenizer

TOKENIZER = Tokenizer(vocab_size=512)
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there!"}]
GOOD = {"messages": HELLO}
NUMBERED = [{"messages": [HELLO[0], {"role": "assistant", "content": f"say {i}"}]} for i in range(400)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[None]:
    """An empty cache of `datasets` for each test of a module that imports this fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        yield


def write(path: Path, *rows: Any) -> Path:
    """Write rows to a .jsonl file: each a line of text, or what is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def load(*places: object, seed: int = 0, want_eval: bool = False, **settings: Any) -> RunData:
    fields: dict[str, Any] = {
        "train_split": "train",
        "eval_split": "test",
        "max_seq_len": 512,
        "num_proc": 1,
    } | settings
    data = DataConfig(dataset=tuple(map(str, places)), **fields)
    return load_data(data, TOKENIZER, seed, want_eval)


def texts(dataset: datasets.Dataset | None) -> list[str]:
    """Return what the assistant is trained to say in each piece."""
    assert dataset is not None
    rows = zip(dataset["input_ids"], dataset["mask"], strict=True)
    return [TOKENIZER.decode(i for i, m in zip(*row, strict=True) if m).replace("<|im_end|>", "|") for row in rows]


def said(*numbers: int) -> list[str]:
    """Return `texts` of these rows of NUMBERED."""
    return [f"say {i}|" for i in numbers]


def dropped(report: DataReport) -> dict[str, int]:
    """Map each reason for which rows were dropped to their number."""
    reasons = {name.partition("dropped: ")[2]: count for name, count in report.counts.items()}
    return {reason: count for reason, count in reasons.items() if reason}
