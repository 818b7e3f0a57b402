"""Errors that users can fix are one line that names the place, with exit code 2."""

import io
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest

import train_sft
from checkpoint import save_pretrained
from config import PRESETS, ModelConfig, RopeScaling, TrainConfig, UserError
from launch.command_line import lasting_output, one_line_errors
from launch.start import find_start
from parallel import ALONE
from small_models import small_model
from small_runs import arguments, cheap_process, conversations, train_here, write_jsonl
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("errors") / "data.jsonl", conversations(20))


@pytest.fixture
def refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that starts a run and returns its error, after checking how it was printed."""

    def train(*flags: str, **changes: Any) -> str:
        places = [changes.pop("dataset", data), changes.pop("output_dir", tmp_path / "run")]
        command = arguments(*places, *flags, **changes)
        return error_of(train_here(command, data.parent), capsys)

    return train


def error_of(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in printed.err + printed.out
    lines = [line for line in printed.err.splitlines() if line.strip() and "Tokenising" not in line]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    return errors[0].removeprefix("error: ")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "many"], "--batch-size: invalid literal for int() with base 10: 'many'"),
        (["--batch-size"], "Missing value for argument '--batch-size'"),
        (["--dtype", "float16"], "invalid choice 'float16' for argument '--dtype'"),
        (["--model.rope-scaling.type", "linear"], "invalid choice 'linear' for argument '--model.rope-scaling.type'"),
        (["--learning-rate", "1e-3x"], "--learning-rate"),
    ],
)
def test_values_of_the_wrong_type_are_refused(
    flags: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """tyro explains them in a box."""
    assert train_here(arguments(data, tmp_path / "run", *flags), tmp_path) == 2
    printed = capsys.readouterr().err
    assert message in " ".join(printed.replace("│", " ").split())
    assert "Traceback" not in printed


def test_hyphens_and_underscores_both_work() -> None:
    for flags in (["--max_seq_len", "90", "--model.hidden_size=16"], ["--max-seq-len=90", "--model.hidden-size", "16"]):
        config = train_sft.parse_arguments(["tiny", *flags]).config
        assert (config.data.max_seq_len, config.model.hidden_size) == (90, 16)


def test_an_unknown_and_a_second_preset_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(train_here(["huge", "--max-steps", "1"], tmp_path), capsys)
    assert error == "unknown preset 'huge'; choose one of tiny, base, mini, v2_lite"
    assert train_here(["tiny", "mini"], tmp_path) == 2
    assert "Unrecognized options: mini" in capsys.readouterr().err


def test_debug_shows_the_traceback(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps is -1"):
        train_here(arguments(data, tmp_path / "run", "--debug", max_steps=-1), tmp_path)


def test_a_stream_that_the_shell_has_closed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&-` leaves no sys.stderr."""
    monkeypatch.setattr(sys, "stderr", None)
    with one_line_errors():
        pass


def test_ctrl_c_before_training_exits_with_130() -> None:
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        raise KeyboardInterrupt
    assert leaving.value.code == 130


@pytest.mark.parametrize("preset", [[], ["mini"]])
def test_help_lists_every_field_with_its_default_and_needs_no_torch(preset: list[str]) -> None:
    script = """
import runpy, sys
try:
    runpy.run_path("train_sft.py", run_name="__main__")
finally:
    assert not {"torch", "datasets", "transformers"} & sys.modules.keys()
"""
    command = [sys.executable, "-c", script, *preset, "--help"]
    output = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env={"COLUMNS": "300"}
    ).stdout
    config = PRESETS[preset[0] if preset else "tiny"]
    words = " ".join(output.replace("│", " ").split())
    for group, owner in config.groups.items():
        prefix = "--model." if group == "model" else "--"
        for field in fields(owner):
            flag = prefix + field.name.replace("_", "-")
            if field.name != "rope_scaling":
                assert f"{flag} " in words or f"{flag}," in words, flag
    defaults = (config.data.max_seq_len, config.optimizer.learning_rate, " ".join(config.data.dataset))
    for default in (f"(default: {value})" for value in defaults):
        assert default in words
    assert "forgets a spike sooner" in words  # reasons are printed, too
    assert words.index("data options") < words.rindex("--dataset") < words.index("model options")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "max_steps is -1; it must not be negative"),
        ({"batch_size": 0}, "batch_size is 0; it must be positive"),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps is -2"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"learning_rate": "inf"}, "learning_rate is inf"),
        ({"weight_decay": "nan"}, "weight_decay is nan"),
        ({"warmup_steps": -5}, "warmup_steps is -5"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be below 9223372036854775808"),
        ({"logging_steps": 0}, "logging_steps is 0"),
        ({"save_total_limit": 0}, "save_total_limit is 0"),
        ({"max_seq_len": 0}, "max_seq_len is 0; it must be positive"),
        ({"max_seq_len": 1}, "max_seq_len is 1"),
        ({"max_seq_len": 5000}, "max_seq_len (5000) is above model.max_position_embeddings (1024)"),
        ({"model_hidden_size": -32}, "model.hidden_size is -32"),
        ({"model_vocab_size": 200}, "vocab_size is 200; 256 bytes and 3 control tokens need 259"),
        ({"model_num_experts_per_tok": 5}, "model.num_experts_per_tok is 5, but a token can reach 4 routed experts"),
        ({"model_n_group": 3}, "model.n_group (3) must divide model.n_routed_experts (4)"),
        ({"model_topk_group": 2}, "model.topk_group (2) is above model.n_group (1)"),
        ({"model_qk_rope_head_dim": 7}, "model.qk_rope_head_dim must be even"),
        ({"model_num_attention_heads": 3}, "model.num_attention_heads (3) must divide model.hidden_size (32)"),
        ({"min_learning_rate_ratio": 1.5}, "min_learning_rate_ratio must be at most 1"),
        ({"save_best": None, "eval_steps": 0}, "save_best and early_stopping_patience need evaluations"),
        ({"early_stopping_patience": 3, "eval_steps": 0}, "save_best and early_stopping_patience need evaluations"),
        ({"compile": None, "dtype": "float32"}, "compile needs dtype bfloat16"),
        ({"dtype": "bfloat16", "model_moe_intermediate_size": 12}, "must be multiples of 8 in bfloat16"),
        ({"dtype": "float32", "model_moe_intermediate_size": 10}, "must be multiples of 4 in float32"),
        ({"device": "abacus"}, "there is no device 'abacus' here"),
        ({"device": "mps:7"}, "there is no device 'mps:7' here"),
        ({"chat_template": "mine"}, "chat template 'mine' is unknown; pass --chat-template chatml|llama3|deepseek"),
        ({"tokenizer": "nowhere"}, "there is no nowhere/tokenizer.json"),
        ({"init_from": "nowhere"}, "nowhere is not a checkpoint"),
        ({"lora_rank": 2}, "lora_rank needs init_from"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str, refused: Callable[..., str]) -> None:
    switches = [f"--{name.replace('_', '-')}" for name, value in changes.items() if value is None]
    assert message in refused(*switches, **{name: value for name, value in changes.items() if value is not None})


def test_every_field_has_a_unique_name_and_is_changed_by_it() -> None:
    """The command line and config.json have no names of groups."""
    names = [field.name for group in PRESETS["mini"].groups.values() for field in fields(group)]
    assert len(set(names)) == len(names)
    changes = {"max_seq_len": 7, "optimizer": "muon", "init_from": "there", "sample_prompts": (), "vocab_size": 300}
    mini, changed = PRESETS["mini"].flat(), PRESETS["mini"].changed(**changes).flat()
    assert PRESETS["mini"].flat() == mini  # a copy was changed
    flat = mini.pop("model") | mini
    assert changed.pop("model") | changed == flat | changes
    with pytest.raises(TypeError, match="max_seq_length"):
        PRESETS["mini"].changed(max_seq_length=7)


def test_presets_are_valid() -> None:
    for config in PRESETS.values():
        config.validate()
    with pytest.raises(UserError, match="must divide"):
        TrainConfig(model=ModelConfig(n_group=7)).validate()


def test_a_checkpoint_may_have_a_longer_context_than_the_preset(data: Path, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "long", small_model(vocab_size=512), Tokenizer(vocab_size=512))
    command = arguments(data, tmp_path / "run", "--dry-run", init_from=tmp_path / "long", max_seq_len=2048)
    assert find_start(train_sft.parse_arguments(command), ALONE).config.data.max_seq_len == 2048


# ---------------------------------------------------------------- data (what is wrong in a row: tests/test_dataset.py)


def test_only_a_dry_run_continues_without_the_hub(
    tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    unreachable = "someone/something is not a local file or directory, and the Hub cannot be reached"
    assert unreachable in refused(dataset="someone/something")
    assert train_here([*arguments(Path("someone/something"), tmp_path / "run"), "--dry-run"], tmp_path) == 0
    note, _, plan = capsys.readouterr().out.partition("\n1 rank; ")
    assert f"note: {unreachable}" in note
    assert "at the peak" in plan
    assert "there is no file" in refused("--dry-run", dataset=tmp_path / "no.jsonl")


def test_a_bad_row_in_the_held_out_split_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*conversations(9), [{"role": "wizard", "content": "abracadabra"}]])
    error = refused(dataset=tmp_path / "rows.jsonl", train_split="train[:9]", eval_split="train[9:]")
    assert "rows.jsonl, line 10: " in error
    assert "wizard" in error


# ---------------------------------------------------------------- around the run


def test_an_output_directory_that_cannot_be_made_is_named(
    data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/.run.lock cannot be written" in refused(output_dir=tmp_path / "file/run")


def test_a_full_disk_under_the_cache_is_one_line(data: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    with cheap_process(tmp_path) as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device", "cache.arrow")

        patch.setattr(datasets.Dataset, "map", full)
        assert refused() == "[Errno 28] No space left on device: 'cache.arrow'"


def test_yarn_is_turned_on_by_any_of_its_flags() -> None:
    def parse(words: list[str]) -> TrainConfig:
        return train_sft.parse_arguments(words).config

    assert parse(["mini", "--model.rope-scaling.factor", "4"]).model.rope_scaling == RopeScaling(factor=4.0)
    changed = parse(["v2_lite", "--model.rope_scaling.factor", "8"]).model.rope_scaling
    assert changed == RopeScaling(factor=8.0, mscale=0.707, mscale_all_dim=0.707)
    assert parse(["mini"]).model.rope_scaling is None


def test_a_character_that_the_terminal_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    with one_line_errors():
        print("é ☂")
    assert written.getvalue() == "é ?\n".encode("cp1252")


def test_control_characters_in_an_error_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("column \x1b]0;title\x07")
    assert capsys.readouterr().err == "error: column \ufffd]0;title\ufffd\n"


def test_output_that_cannot_be_written_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with lasting_output():
            print("progress", flush=True)
            print("more", flush=True)


def test_windows_has_neither_a_hangup_signal_nor_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "poll")
    with pytest.raises(SystemExit, match="141"), one_line_errors():
        raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.delattr(signal, "SIGHUP")
    module = runpy.run_path(str(ROOT / "launch/command_line.py"))
    assert module["STOP_SIGNALS"] == (signal.SIGINT, signal.SIGTERM)
