"""Adapters: loaded with their base, and merged into it by export.py."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import export
import lora
from checkpoint import load_model_and_tokenizer, save_checkpoint, save_pretrained
from config import UserError
from model import DeepSeekV2
from small_models import relative_difference, small_model
from small_runs import run_main
from tokenizer import Tokenizer

TOKENS = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapted(tmp_path: Path) -> DeepSeekV2:
    """The model of a run whose checkpoint holds an adapter only; the run and its base lie in tmp_path."""
    model = small_model(vocab_size=512)
    save_pretrained(tmp_path / "base", model, Tokenizer(vocab_size=512))
    lora.add_lora(model, 4, 8.0, 0.0, ["q_proj", "down_proj", "experts.gate_up_proj"])
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.normal_(std=0.2)
    base = str(tmp_path / "base")
    save_checkpoint(tmp_path / "run", 5, lambda place: lora.save_adapter(place, model, base), limit=1)
    return model


@torch.no_grad()
def test_an_adapter_is_loaded_with_its_base(adapted: DeepSeekV2, tmp_path: Path) -> None:
    loaded, tokenizer = load_model_and_tokenizer(tmp_path / "run")
    torch.testing.assert_close(loaded(TOKENS), adapted(TOKENS))
    assert tokenizer.vocab_size == 512


def test_an_adapter_without_its_base_is_refused(adapted: DeepSeekV2, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"its base model is missing: there is no directory .*base"):
        load_model_and_tokenizer(tmp_path / "run")


@torch.no_grad()
def test_merging_writes_a_plain_model_with_the_same_logits(
    adapted: DeepSeekV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", str(tmp_path / "run"), str(tmp_path / "merged")]
    assert run_main(export.main, command, tmp_path) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits
    assert relative_difference(adapted(TOKENS), theirs) < 1e-5
    assert run_main(export.main, command, tmp_path) == 2
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}/merged exists already; choose a new directory\n")


def test_merging_what_is_no_adapter_is_refused(
    adapted: DeepSeekV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(export.main, ["merge", str(tmp_path / "base"), str(tmp_path / "merged")], tmp_path) == 2
    error = f"{tmp_path}/base is no adapter (it has no adapter_config.json): there is nothing to merge"
    assert capsys.readouterr().err == f"error: {error}\n"
    assert not (tmp_path / "merged").exists()
