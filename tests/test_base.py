"""The model in base/: small, as described in its card, and not trained on evaluation data."""

import hashlib
import json
import re
from pathlib import Path

import datasets
from safetensors import safe_open

from checkpoint import load_pretrained
from config import BASE
from data.sources import read_chatterbot
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BASE_MODEL = ROOT / "base"
PRETRAINING = ROOT.parent / "shared/data/pretraining/dialogues.parquet"


def test_its_files_are_small_and_contain_no_code() -> None:
    files = {file.name: file.stat().st_size for file in BASE_MODEL.iterdir()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert sum(files.values()) < 16e6
    with safe_open(BASE_MODEL / "model.safetensors", "pt") as weights:
        assert all(weights.get_slice(name).get_dtype() == "BF16" for name in weights.keys())  # noqa: SIM118


def test_its_card_names_the_sha256_of_the_weights() -> None:
    (named,) = re.findall(r"`([0-9a-f]{64})`", (BASE_MODEL / "README.md").read_text())
    assert hashlib.sha256((BASE_MODEL / "model.safetensors").read_bytes()).hexdigest() == named


def test_it_has_tinys_shape_and_vocabulary() -> None:
    assert load_pretrained(BASE_MODEL).config == BASE.model
    ours, theirs = Tokenizer(str(BASE_MODEL)), Tokenizer(vocab_size=8192)
    assert (ours.tokens, ours.control_ids) == (theirs.tokens, theirs.control_ids)


def as_text(messages: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def test_no_held_out_conversation_is_in_its_training_data(chitchat: dict[str, list]) -> None:
    texts = list(map(as_text, chitchat["train"]))
    if PRETRAINING.is_file():
        texts += datasets.load_dataset("parquet", data_files=str(PRETRAINING), split="train")["text"][:]
    everything = "\n".join(texts)
    held_out = [*chitchat["test"], *(row["messages"] for row in read_chatterbot("test", ""))]
    long = [text for text in map(as_text, held_out) if len(text) > 20]  # short ones ("Hello", "Hi") occur anywhere
    assert len(long) > 230
    assert [text for text in long if text in everything] == []


def test_no_paraphrase_is_in_the_training_data() -> None:
    paraphrases = json.loads((ROOT / "tests/data/paraphrases.json").read_text())
    rows = [*read_chatterbot("train", ""), *read_chatterbot("test", "")]
    openings = {row["messages"][0]["content"].lower() for row in rows}
    assert len(paraphrases) == 30
    assert openings >= {opening.lower() for opening in paraphrases.values()}
    assert not openings & {paraphrase.lower() for paraphrase in paraphrases}
