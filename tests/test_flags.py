"""Each flag has an effect in the run that it starts, or is refused with the reason."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_sft
from checkpoint import load_config, load_model_and_tokenizer, load_pretrained, newest_checkpoint
from config import MINI, PRESETS, TINY, ModelConfig, RopeScaling, TrainConfig, UserError
from files import write_json
from launch.command_line import given_fields, parse_arguments
from launch.run_directory import read_metrics
from launch.start import find_start
from parallel import ALONE
from small_models import small_model
from small_runs import arguments, conversations, train_here, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("flags") / "data.jsonl", conversations(20))


@pytest.fixture(scope="module")
def base(data: Path) -> Path:
    """A run whose model other runs start from; its context is 1024."""
    assert train_here(arguments(data, data.parent / "base", max_steps=1, eval_steps=0), data.parent) == 0
    return data.parent / "base"


@pytest.fixture
def refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that starts a run and returns the error that refuses it, before anything is written."""

    def train(*flags: str, **changes: Any) -> str:
        command = arguments(data, tmp_path / "run", *flags, **({"max_steps": 1, "eval_steps": 0} | changes))
        assert train_here(command, data.parent) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return train


# ---------------------------------------------------------------- fields of a loaded model


def test_flags_change_a_loaded_model_where_its_weights_allow_it(data: Path, base: Path, tmp_path: Path) -> None:
    flags = ["--model.aux-loss-alpha", "0", "--model.routed-scaling-factor=2", "--model.rope_scaling.factor", "4"]
    command = arguments(
        data, tmp_path / "run", *flags, init_from=base, batch_size=1, max_seq_len=2000, max_steps=1, eval_steps=0
    )
    assert train_here(command, tmp_path) == 0
    before, model = (load_pretrained(newest_checkpoint(run) or run).config for run in (base, tmp_path / "run"))
    yarn = RopeScaling(factor=4.0, original_max_position_embeddings=1024)
    assert (before.aux_loss_alpha, before.routed_scaling_factor, before.rope_scaling) == (0.003, 1.0, None)
    assert (model.aux_loss_alpha, model.routed_scaling_factor, model.rope_scaling) == (0.0, 2.0, yarn)
    assert model.max_position_embeddings == 4 * 1024
    assert read_metrics(tmp_path / "run")[-1]["balance_loss"] == 0
    assert train_here(["--resume", "--output-dir", str(tmp_path / "run"), "--max-steps", "2"], tmp_path) == 0
    assert load_pretrained(newest_checkpoint(tmp_path / "run") or "").config == model


def test_a_switch_is_turned_off_in_a_loaded_model(data: Path, base: Path, tmp_path: Path) -> None:
    """--no-resume and a repeated shape are allowed."""
    shutil.copytree(newest_checkpoint(base) or base, tmp_path / "normed")
    config = json.loads((tmp_path / "normed/config.json").read_text())
    write_json(tmp_path / "normed/config.json", config | {"norm_topk_prob": True})
    changes = {"init_from": tmp_path / "normed", "max_steps": 1, "eval_steps": 0}
    repeated = ["--no-resume", "--model.hidden-size", "32"]
    for flags, expected in ((repeated, True), (["--model.no-norm-topk-prob"], False)):
        run = tmp_path / f"run-{expected}"
        assert train_here(arguments(data, run, *flags, **changes), tmp_path) == 0
        assert load_pretrained(newest_checkpoint(run) or run).config.norm_topk_prob == expected


def test_an_adapter_is_loaded_with_the_model_that_it_was_trained_with(data: Path, base: Path, tmp_path: Path) -> None:
    flags = ["--model.rope-scaling.factor", "4"]
    changes = {"init_from": base, "lora_rank": 2, "max_steps": 1, "eval_steps": 0}
    assert train_here(arguments(data, tmp_path / "run", *flags, **changes), tmp_path) == 0
    model, _ = load_model_and_tokenizer(tmp_path / "run")
    assert model.config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_hidden_size": 64}, "have a shape that cannot change: model.hidden_size is 32, not 64"),
        ({"model_n_routed_experts": 8}, "model.n_routed_experts is 4, not 8"),
        ({"model_vocab_size": 600}, "model.vocab_size is 512, not 600"),
        ({"tokenizer": "cl100k_base"}, "tokenizer has no effect: init_from brings its own tokenizer, that of "),
        ({"model_num_experts_per_tok": 5}, "model.num_experts_per_tok is 5, but a token can reach 4 routed experts"),
    ],
)
def test_a_flag_that_contradicts_the_weights_is_refused_with_both_values(
    changes: dict[str, Any], message: str, base: Path, refused: Callable[..., str]
) -> None:
    assert message in refused(init_from=base, **changes)


# ---------------------------------------------------------------- config.py


def model_of(monkeypatch: pytest.MonkeyPatch, preset: TrainConfig, *flags: str) -> ModelConfig:
    """Return the model of a run of a new preset in config.py."""
    monkeypatch.setitem(PRESETS, "mine", preset)
    arguments = parse_arguments(["mine", "--dry-run", "--device", "cpu", *flags])
    return find_start(arguments, ALONE).config.model


def test_a_model_field_in_config_py_counts_like_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_config(TINY.checkpoint.init_from or "")
    assert (base.hidden_size, base.aux_loss_alpha, base.num_experts_per_tok) == (256, 0.003, 2)
    assert model_of(monkeypatch, TINY) == base
    changed = replace(base, aux_loss_alpha=0.5)
    assert model_of(monkeypatch, TINY.changed(aux_loss_alpha=0.5)) == changed
    assert model_of(monkeypatch, replace(TINY, model=ModelConfig(aux_loss_alpha=0.5))) == changed
    assert model_of(monkeypatch, TINY, "--model.aux-loss-alpha", "0.5") == changed
    # a default counts too, if it is set
    assert model_of(monkeypatch, TINY.changed(num_experts_per_tok=6)).num_experts_per_tok == 6
    # a flag comes last
    preset = TINY.changed(aux_loss_alpha=0.5)
    assert model_of(monkeypatch, preset, "--model.aux-loss-alpha", "0.003") == base


@pytest.mark.parametrize("width", [384, ModelConfig().hidden_size])
def test_a_shape_in_config_py_that_contradicts_the_weights_is_refused(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"model.hidden_size is 256, not {width}"):
        model_of(monkeypatch, TINY.changed(hidden_size=width))


def test_a_preset_takes_its_checkpoints_shape(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(newest_checkpoint(base))
    for preset in (MINI.changed(init_from=place), TINY.changed(init_from=place)):
        assert model_of(monkeypatch, preset, "--max-seq-len", "64").hidden_size == 32
    assert model_of(monkeypatch, TINY, "--init-from", place).hidden_size == 32


def test_a_preset_from_scratch_keeps_its_checkpoints_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_config(TINY.checkpoint.init_from or "")
    assert model_of(monkeypatch, TINY, "--init-from", "none") == base
    deeper = model_of(monkeypatch, TINY, "--init-from", "none", "--model.num-hidden-layers", "3")
    assert deeper == replace(base, num_hidden_layers=3)


# ---------------------------------------------------------------- others


def test_a_given_dataset_is_trained_on_for_epochs() -> None:
    """A preset's number of steps is for its own dataset."""

    def batch(*flags: str) -> tuple[int, float]:
        config = parse_arguments(["tiny", *flags]).config
        return config.batch.max_steps, config.batch.num_train_epochs

    assert batch() == (1000, 3.0)
    assert batch("--dataset", "mine.jsonl") == (0, 3.0)
    assert batch("--dataset", "mine.jsonl", "--num-train-epochs", "5") == (0, 5.0)
    assert batch("--dataset", "mine.jsonl", "--max-steps", "7")[0] == 7


@pytest.mark.parametrize(("steps", "warns"), [(20, False), (21, True)])
def test_more_than_ten_epochs_are_warned_about(steps: int, warns: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rows = SimpleNamespace(rows_per_epoch=8)
    trainer: Any = SimpleNamespace(
        config=TrainConfig(), world=ALONE, rows_per_step=4, total_steps=steps, step=0, rows_seen=0, train_rows=rows,
        plain_model=small_model(),
    )  # fmt: skip
    train_sft.announce(trainer)
    assert ("--save-best" in capsys.readouterr().out) == warns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 8}, "lora_alpha has no effect: lora_rank is 0"),
        ({"lora_dropout": 0.1}, "lora_dropout has no effect: lora_rank is 0"),
        ({"num_train_epochs": 2}, "num_train_epochs has no effect: max_steps is 1"),
        ({"model_topk_group": 1}, "model.topk_group has no effect: it needs group_limited_greedy or a loss over"),
        ({"model_device_aux_loss_alpha": 0.1}, "model.device_aux_loss_alpha has no effect: it needs n_group > 1"),
        ({"model_n_group": 2}, "model.n_group has no effect: it needs group_limited_greedy or a loss over groups"),
        ({"eval_fraction": 0.1}, "eval_fraction has no effect: eval_steps is 0"),
        ({"warmup_steps": 4, "max_steps": 3}, "warmup_steps is 4, but the run has 3 steps"),
    ],
)
def test_a_flag_without_effect_is_refused(changes: dict[str, Any], message: str, refused: Callable[..., str]) -> None:
    assert f"error: {message}" in refused(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_n_group": 2, "model_device_aux_loss_alpha": 0.1},
        {"model_n_group": 2, "model_topk_method": "group_limited_greedy"},
        {"model_n_group": 2, "model_communication_aux_loss_alpha": 0.1, "model_device_aux_loss_alpha": 0},
        {"eval_fraction": 0.3, "eval_split": "test", "eval_steps": 1},
    ],
)
def test_a_flag_with_an_effect_is_accepted(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    command = arguments(data, tmp_path / "run", "--dry-run", **({"max_steps": 1, "eval_steps": 0} | changes))
    assert find_start(parse_arguments(command), ALONE).given >= {name.replace("model_", "model.") for name in changes}


def test_flags_that_contradict_a_loaded_model_are_refused(base: Path, refused: Callable[..., str]) -> None:
    """The size of its vocabulary, and any change to a model that is only evaluated."""
    error = refused("--evaluate-only", init_from=base, model_aux_loss_alpha=0.5)
    assert "model.aux_loss_alpha has no effect: evaluate_only takes the model as it is" in error
    error = refused("--add-control-tokens", init_from=base)
    assert "add_control_tokens has no effect" in error and "has all that the chat template needs" in error
    place = newest_checkpoint(base)
    error = f"model.vocab_size has no effect: {place} brings its own vocabulary"
    assert error in refused(tokenizer=place, model_vocab_size=600)


def without(flag: str, command: list[str]) -> list[str]:
    """Remove a flag and its value."""
    at = command.index(flag)
    return command[:at] + command[at + 2 :]


def test_a_presets_warmup_is_at_most_a_tenth_of_the_run(data: Path, tmp_path: Path) -> None:
    """A resumed run keeps its warm-up if its length changes."""
    command = without("--warmup-steps", arguments(data, tmp_path / "run", max_steps=20, eval_steps=0))
    assert train_here(command, tmp_path) == 0
    assert [line["learning_rate"] for line in read_metrics(tmp_path / "run")[:3]] == [1.5e-3, 3e-3, 3e-3]
    assert saved_field(tmp_path / "run", "warmup_steps") == 2
    assert train_here(["--resume", "--output-dir", str(tmp_path / "run"), "--max-steps", "30"], tmp_path) == 0
    assert saved_field(tmp_path / "run", "warmup_steps") == 2


def saved_field(run: Path, name: str) -> Any:
    return json.loads((run / "config.json").read_text())[name]


def test_epochs_replace_the_presets_number_of_steps(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data, tmp_path / "run", "--no-packing", "--num-train-epochs", "1.5", eval_steps=0)
    assert train_here(without("--max-steps", command), tmp_path) == 0
    assert "step 0 to 12, 2 rows each (1.6 epochs)" in capsys.readouterr().out  # 15 conversations
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12


def test_the_command_line_records_which_fields_are_given() -> None:
    flags = ["--no-packing", "--model.hidden-size", "3", "--seed=4", "--lora_rank", "2", "--sample-prompts", "--no!"]
    flags = ["--model.no-norm-topk-prob", *flags]
    named = {"model.norm_topk_prob", "packing", "model.hidden_size", "seed", "lora_rank", "sample_prompts"}
    assert given_fields(flags[:-1]) == named


# ---------------------------------------------------------------- a resumed run


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    """Return a run that has finished its three steps."""
    command = arguments(data, tmp_path / "run", max_steps=3, eval_steps=0, weight_decay=0.25, adam_beta2=0.9)
    assert train_here(command, tmp_path) == 0
    return tmp_path / "run"


def test_resuming_needs_only_the_directory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All fields keep their values without a preset or flags; a flag changes its field."""
    before = json.loads((run / "config.json").read_text())
    assert train_here(["--resume", "--output-dir", str(run), "--max-steps", "2"], run.parent) == 2
    assert f"error: {run} is at step 3, past the last one, 2" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text()) == before
    assert train_here(["--resume", "--output-dir", str(run), "--max-steps", "5"], run.parent) == 0
    printed = capsys.readouterr().out
    assert f"resuming {run} with changes: max_steps 3 -> 5\n" in printed
    assert "step 3 to 5" in printed
    after = json.loads((run / "config.json").read_text())
    assert after == before | {"max_steps": 5, "resume": True}
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5]


def test_a_directory_without_a_run_is_not_resumed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(["--resume", "--output-dir", str(tmp_path / "rum")], tmp_path) == 2
    assert f"error: {tmp_path}/rum holds no run to resume: there is no" in capsys.readouterr().err
    assert not (tmp_path / "rum").exists()
    assert train_here(["--resume", "--output-dir", str(newest_checkpoint(base))], tmp_path) == 2
    assert "is not the configuration of a run of this version: " in capsys.readouterr().err
