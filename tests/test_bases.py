"""The base of a run is never moved; an adapter records its base and works with no other."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import chat
import export
import train_sft
from checkpoint import load_model_and_tokenizer, newest_checkpoint
from config import UserError
from files import read_json, write_json
from hub import peft
from hub.peft import changed_weights
from hub.weights import write_tensors
from small_models import relative_difference
from small_runs import arguments, conversations, differing, final_tensors, run_main, train_here, write_jsonl

Capture = pytest.CaptureFixture[str]
TOKENS = torch.arange(200, 260).view(2, 30)
SHORT: dict[str, Any] = {"max_steps": 1, "eval_steps": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny, a model, and runs/adapter, a LoRA run on it."""
    folder = tmp_path_factory.mktemp("bases")
    data = write_jsonl(folder / "data.jsonl", conversations(20))
    assert train_here(arguments(data, folder / "runs/tiny", **SHORT), folder) == 0
    changes = SHORT | {"max_steps": 3, "init_from": folder / "runs/tiny", "lora_rank": 2, "learning_rate": 0.1}
    assert train_here(arguments(data, folder / "runs/adapter", **changes), folder) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy at the place of the original, so that the paths in it are right."""
    kept = trained.with_name("kept")
    if not kept.exists():
        shutil.copytree(trained, kept)
    monkeypatch.chdir(trained)
    yield trained
    for entry in trained.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(kept, trained, dirs_exist_ok=True)


def retrain(model: Path) -> None:
    """Other weights in the same file, of the same size."""
    file = model / "model.safetensors"
    write_tensors(file, {name: tensor + 1.0 for name, tensor in load_file(file).items()})


def files(directory: Path) -> dict[str, int]:
    """Map files to the time of their last change, without the locks."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.suffix != ".lock"}


def resuming(run: Path) -> list[str]:
    """Return the arguments that resume a run up to step 4."""
    return ["--resume", "--output-dir", str(run), "--max-steps", "4"]


# ---------------------------------------------------------------- what a run starts from


@pytest.mark.parametrize(("rank", "missing"), [(0, ""), (8, ""), (8, "config.json")])
def test_the_base_of_a_run_is_not_moved(rank: int, missing: str, folder: Path, capsys: Capture) -> None:
    """tiny's default output directory is its own base, of which checkpoints alone may have been kept."""
    if missing:
        (folder / "runs/tiny" / missing).unlink()
    before = files(folder / "runs")
    command = arguments(folder / "data.jsonl", Path("runs/tiny"), init_from="runs/tiny", lora_rank=rank, **SHORT)
    at = command.index("--output-dir")
    del command[at : at + 2]
    assert train_here(command, folder) == 2
    base = "runs/tiny/checkpoints/step-000001"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: output_dir runs/tiny holds ")
    assert f"{folder}/{base}, which this run needs" in error
    assert files(folder / "runs") == before


def test_data_in_the_directory_of_an_earlier_run_is_not_moved(folder: Path, capsys: Capture) -> None:
    data = shutil.copy(folder / "data.jsonl", folder / "runs/tiny/mine.jsonl")
    assert train_here(arguments(Path(data), folder / "runs/tiny", **SHORT), folder) == 2
    assert "mine.jsonl, which this run needs" in capsys.readouterr().err


def no_key(**_: Any) -> None:
    raise RuntimeError("no API key:\n  log in first")


@pytest.mark.parametrize(
    ("tracker", "module", "found", "error"),
    [
        ("wandb", "wandb", None, "is not installed"),
        ("tensorboard", "torch.utils.tensorboard", None, "is not installed"),
        ("wandb", "wandb", SimpleNamespace(init=no_key), "cannot start: no API key: log in first"),
        ("trackio", "trackio", SimpleNamespace(init=no_key), "cannot start: no API key: log in first"),
    ],
)
def test_nothing_is_moved_for_a_run_without_its_tracker(
    tracker: str, module: str, found: Any, error: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, module, found)  # importing None fails
    before = files(folder / "runs")
    assert train_here(arguments(folder / "data.jsonl", folder / "runs/tiny", report_to=tracker, **SHORT), folder) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: report_to {tracker} {error}")
    assert files(folder / "runs") == before


def test_starting_from_an_adapter_is_refused_with_a_remedy(folder: Path, capsys: Capture) -> None:
    command = arguments(folder / "data.jsonl", folder / "new", init_from="runs/adapter", **SHORT)
    assert train_here(command, folder) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "runs/adapter/checkpoints/step-000003 is a LoRA adapter, not a model: python export.py merge" in error


# ---------------------------------------------------------------- an adapter and its base


def test_an_adapter_names_its_base_and_peft_opens_it(folder: Path) -> None:
    adapter = newest_checkpoint(folder / "runs/adapter")
    assert adapter is not None
    base = folder / "runs/tiny/checkpoints/step-000001"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == str(base)
    record = read_json(adapter / "base.json")
    assert (adapter / record["relative"]).resolve() == base
    ours, _ = load_model_and_tokenizer(adapter)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter)  # a warning of an unknown key would be an error
    with torch.no_grad():
        assert relative_difference(ours(TOKENS), theirs(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("command", ["chat", "merge", "resume"])
def test_an_adapter_whose_base_was_retrained_is_refused(command: str, folder: Path, capsys: Capture) -> None:
    retrain(folder / "runs/tiny/checkpoints/step-000001")
    main, words = {
        "chat": (chat.main, ["runs/adapter", "--prompt", "Hi"]),
        "merge": (export.main, ["merge", "runs/adapter", "merged"]),
        "resume": (train_sft.main, ["--resume", "--output-dir", str(folder / "runs/adapter"), "--max-steps", "5"]),
    }[command]
    assert run_main(main, words, folder) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step-000003: its base model" in error
    assert "has changed (model.safetensors)" in error
    assert not (folder / "merged").exists()


def test_an_adapter_whose_base_is_gone_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "runs/tiny")
    with pytest.raises(UserError, match=r"its base model is missing: there is no directory .*runs/tiny/checkpoints"):
        load_model_and_tokenizer(folder / "runs/adapter")


def test_a_base_is_found_from_anywhere_and_after_both_have_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        before = load_model_and_tokenizer(folder / "runs/adapter")[0](TOKENS)
        monkeypatch.chdir(tmp_path)
        assert load_model_and_tokenizer(folder / "runs/adapter")[0](TOKENS).equal(before)
        (folder / "runs").rename(tmp_path / "elsewhere")
        assert load_model_and_tokenizer(tmp_path / "elsewhere/adapter")[0](TOKENS).equal(before)
        weights = tmp_path / "elsewhere/tiny/checkpoints/step-000001/model.safetensors"
        weights.write_bytes(weights.read_bytes())  # with a new time
        assert load_model_and_tokenizer(tmp_path / "elsewhere/adapter")[0](TOKENS).equal(before)


def test_the_run_of_an_adapter_is_resumed_after_both_have_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly as at the old place; the new checkpoint names the new place of the base."""
    shutil.copytree(folder / "runs/adapter", folder / "runs/reference")
    assert train_here(resuming(folder / "runs/reference"), folder) == 0
    expected = final_tensors(folder / "runs/reference")
    (folder / "runs").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert train_here(resuming(Path("elsewhere/adapter")), folder) == 0
    assert differing(final_tensors(tmp_path / "elsewhere/adapter"), expected) == []
    before, after = (tmp_path / f"elsewhere/adapter/checkpoints/step-00000{step}" for step in (3, 4))
    assert read_json(after / "base.json")["weights"] == read_json(before / "base.json")["weights"]
    name = read_json(after / "adapter_config.json")["base_model_name_or_path"]
    assert name == str(tmp_path / "elsewhere/tiny/checkpoints/step-000001")


def test_a_full_run_is_resumed_without_its_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has weights, shape and tokenizer, here one with tokens that the base's lacks."""
    flags = ("--add-control-tokens", "--chat-template", "llama3")
    command = arguments(folder / "data.jsonl", Path("runs/full"), *flags, init_from="runs/tiny", **SHORT)
    assert train_here(command, folder) == 0
    shutil.copytree(folder / "runs/full", folder / "runs/reference")
    assert train_here(resuming(folder / "runs/reference"), folder) == 0
    shutil.rmtree(folder / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    assert train_here(resuming(folder / "runs/full"), folder) == 0
    assert differing(final_tensors(folder / "runs/full"), final_tensors(folder / "runs/reference")) == []


# ---------------------------------------------------------------- a record from someone else


def test_a_record_is_followed_inside_the_base_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files elsewhere may be endless. One of another size is not read."""
    (tmp_path / "outside").write_bytes(bytes(8))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/link").symlink_to(tmp_path / "outside")
    for name in ("/dev/zero", "../outside", "link"):
        with pytest.raises(UserError, match="lies outside of the directory"):
            changed_weights(tmp_path / "base", {name: {"size": 8, "sha256": "0"}})
    monkeypatch.setattr(peft, "checksum", None)
    assert changed_weights(tmp_path, {"outside": {"size": 9, "sha256": "0"}}) == ["outside"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 10**5}, "describes a model of 2 layers with 100000 routed experts"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ({"hidden_size": None}, "base.json lacks hidden_size"),
    ],
)
def test_a_record_of_an_absurd_model_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    adapter = newest_checkpoint(folder / "runs/adapter")
    assert adapter is not None
    record = read_json(adapter / "base.json")
    write_json(adapter / "base.json", record | {"config": record["config"] | changes})
    with pytest.raises(UserError, match=message):
        load_model_and_tokenizer(adapter)
