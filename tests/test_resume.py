"""Runs that are killed, interrupted, out of disk space or damaged, against the same run undisturbed."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
import trainer
from checkpoint import load_pretrained
from config import ModelConfig, RopeScaling, TrainConfig, UserError
from files import checksum, read_json, write_json
from launch.run_directory import fixed_changes, read_metrics, run_lock, saved_configuration
from small_runs import (
    arguments,
    conversations,
    differing,
    final_tensors,
    kill_after,
    numbers,
    start,
    start_forkserver,
    train_here,
    train_in_child,
    wait_for,
    write_jsonl,
)

RESUME = "--resume"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_jsonl(folder / "data.jsonl", conversations(40))


@pytest.fixture(scope="module")
def alone(folder: Path, data: Path) -> Path:
    """A run of 12 steps that is not disturbed."""
    assert train_here(arguments(data, folder / "alone"), folder) == 0
    return folder / "alone"


@pytest.fixture
def run(alone: Path, tmp_path: Path) -> Path:
    """A copy of it without its last checkpoint, but with the metrics of its last steps."""
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000012")
    return tmp_path / "run"


def assert_same_run(run: Path, reference: Path) -> None:
    """Compare losses, of each step once, and weights and optimizer state bit by bit."""
    assert numbers(run) == numbers(reference)
    assert differing(final_tensors(run), final_tensors(reference)) == []


def files(directory: Path) -> dict[str, str]:
    """Return all files below a directory with their checksums."""
    return {str(path.relative_to(directory)): checksum(path) for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"gradient_accumulation_steps": 2, "optimizer": "muon"}, ["--packing"]),
        ({"init_from": "alone", "lora_rank": 2, "lora_dropout": 0.2, "dtype": "bfloat16"}, ["--no-packing"]),
    ],
)
def test_a_run_that_is_killed_four_times_ends_like_an_undisturbed_one(
    changes: dict[str, Any], flags: list[str], folder: Path, data: Path, alone: Path, tmp_path: Path
) -> None:
    """Killed within the first step, in its first save, in its second, and at a random moment; each run goes through its
    data more than once."""
    if "init_from" in changes:
        changes = changes | {"init_from": alone}
    log = tmp_path / "log"
    assert train_here(arguments(data, tmp_path / "reference", *flags, **changes), folder) == 0
    first = arguments(data, tmp_path / "run", *flags, **changes)
    then = ["tiny", RESUME, "--output-dir", str(tmp_path / "run")]
    rng = random.Random(str(flags) + str(len(changes)))
    flushes = 8  # at least as many as in a save: files, the directory and its parent
    for command, fault in (
        (first, functools.partial(small_runs.signal_in_step, 1, signal.SIGKILL)),
        (then, functools.partial(small_runs.die_at_flush, rng.randint(0, flushes - 1))),
        (then, functools.partial(small_runs.die_at_flush, flushes + 1 + rng.randint(0, flushes - 1))),
    ):
        assert train_in_child(command, log, fault) == -signal.SIGKILL
    kill_after(rng.uniform(0, 0.1), then, log)
    assert train_in_child(then, log) == 0
    assert_same_run(tmp_path / "run", tmp_path / "reference")
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_kill_in_the_middle_of_a_line_leaves_whole_lines(run: Path, data: Path, alone: Path) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]) + lines[-1][:20])
    assert train_here(arguments(data, run, RESUME), run.parent) == 0
    assert_same_run(run, alone)


def test_resuming_a_finished_run_changes_nothing_and_says_so(
    run: Path, data: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(alone, run, dirs_exist_ok=True)
    assert train_here(arguments(data, run, RESUME), run.parent) == 0
    assert files(run / "checkpoints") == files(alone / "checkpoints")
    assert read_metrics(run) == read_metrics(alone)
    saved = f"saved {run}/checkpoints/step-000012\ntalk to it: python chat.py {run}\n"
    assert saved in capsys.readouterr().out


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_exits_and_the_run_resumes(
    number: signal.Signals, code: int, data: Path, alone: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    fault = functools.partial(small_runs.signal_in_step, 4, number)
    assert train_in_child(arguments(data, tmp_path / "run"), log, fault) == code
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("finishing this step, then saving; press Ctrl-C again to exit at once\n") == 1
    run = tmp_path / "run"
    saved = f"saved {run}/checkpoints/step-000004; the same command with --resume continues from there\n"
    assert said.endswith(f"{saved}talk to it: python chat.py {run}\n")
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4
    assert train_here(arguments(data, tmp_path / "run", RESUME), tmp_path) == 0
    assert_same_run(tmp_path / "run", alone)


def test_repeated_signals_save_once(data: Path, alone: Path, tmp_path: Path) -> None:
    """A process gets them from the scheduler, again with its group, and from torchrun; with Ctrl-C it is the same."""
    log = tmp_path / "log"
    assert train_in_child(arguments(data, tmp_path / "run"), log, small_runs.signals_in_save) == 143
    assert "Traceback" not in log.read_text()
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]  # the save that was interrupted, and one after the next step
    assert train_here(arguments(data, tmp_path / "run", RESUME), tmp_path) == 0
    assert_same_run(tmp_path / "run", alone)


def test_a_run_outlives_its_terminal_until_it_has_saved(data: Path, alone: Path, tmp_path: Path) -> None:
    """The terminal that it prints to is gone when the signal comes."""
    fault = functools.partial(small_runs.lose_terminal, 4)
    assert train_in_child(arguments(data, tmp_path / "run"), tmp_path / "log", fault) == 129
    assert train_here(arguments(data, tmp_path / "run", RESUME), tmp_path) == 0
    assert_same_run(tmp_path / "run", alone)


def test_a_second_interrupt_exits_at_once(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start(arguments(data, tmp_path / "run", eval_steps=0, save_steps=1), log, small_runs.save_forever)
    wait_for("saving", log, child)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    wait_for("finishing this step", log, child)
    assert child.is_alive()
    while child.is_alive():  # those that follow within a second count as one
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGINT)
        child.join(0.2)
    assert child.exitcode == 130
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("descriptors", [(1,), (1, 2)], ids=["out", "out and err"])
def test_a_run_continues_if_nobody_reads_its_output(
    descriptors: tuple[int, ...], data: Path, alone: Path, tmp_path: Path
) -> None:
    """python train_sft.py ... | head -2, and the same with 2>&1."""
    fault = functools.partial(small_runs.nobody_reads, descriptors)
    assert train_in_child(arguments(data, tmp_path / "run"), tmp_path / "log", fault) == 0
    assert_same_run(tmp_path / "run", alone)
    assert (tmp_path / "run/loss.png").exists()


# ---------------------------------------------------------------- a full disk, damaged and hostile files


def test_a_full_disk_stops_the_run_with_one_line_and_loses_no_checkpoint(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    fault = functools.partial(small_runs.fill_disk, step=9, size=300_000)
    assert train_in_child(arguments(data, tmp_path / "run"), log, fault) == 2
    assert "Traceback" not in log.read_text()
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "step-000009 cannot be written" in error
    assert "File too large" in error
    kept = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000003", "step-000006"]
    for path in kept:
        load_pretrained(path)
        assert read_json(path / "trainer_state.json")["step"] == int(path.name[5:])
    assert train_here(arguments(data, tmp_path / "run", RESUME), tmp_path) == 0
    assert_same_run(tmp_path / "run", alone)


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_one_before(
    data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    weights = run / "checkpoints/step-000012/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert train_here(arguments(data, run, RESUME), tmp_path) == 0
    printed = capsys.readouterr()
    assert f"warning: {weights.parent} is damaged (model.safetensors); trying the one before" in printed.err
    assert "step 9 to 12" in printed.out
    assert_same_run(run, alone)


def test_a_run_without_an_undamaged_checkpoint_is_not_touched(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step-000009/model.safetensors").unlink()
    before = files(run)
    assert train_here(arguments(data, run, RESUME), run.parent) == 2
    assert "has no undamaged checkpoint" in capsys.readouterr().err
    assert files(run) == before


@pytest.mark.parametrize("changes", [{"step": "9"}, {"step": True}, {"rows_seen": -1}, {"best_loss": None}])
def test_a_run_state_that_is_not_what_was_saved_is_refused(
    changes: dict[str, Any], run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run / "checkpoints/step-000009/trainer_state.json"
    write_json(state, read_json(state) | changes)
    write_json(
        state.parent / "checksums.json", read_json(state.parent / "checksums.json") | {state.name: checksum(state)}
    )
    assert train_here(arguments(data, run, RESUME), run.parent) == 2
    ((name, value),) = changes.items()
    assert f"error: {state} is invalid: {name} is {value!r}\n" in capsys.readouterr().err


# ---------------------------------------------------------------- another configuration, another run


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model_hidden_size": 48}, "model.hidden_size 32 -> 48"),
        ({"model_vocab_size": 520}, "model.vocab_size 512 -> 520"),
        ({"chat_template": "llama3"}, "chat_template 'chatml' -> 'llama3'"),
        ({"max_seq_len": 64, "seed": 7}, "max_seq_len 96 -> 64, seed 42 -> 7"),
    ],
)
def test_changes_that_a_resumed_run_cannot_make_are_refused(
    changes: dict[str, Any], difference: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    assert train_here(arguments(data, run, RESUME, **changes), run.parent) == 2
    error = capsys.readouterr().err
    assert error == f"error: {run} cannot be resumed with another configuration: {difference}\n"
    assert files(run) == before


def test_changes_that_a_resumed_run_can_make_are_printed(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The optimizer's settings are among them."""
    changes = {"max_steps": 14, "logging_steps": 2, "learning_rate": 0.001, "weight_decay": 0.5, "adam_beta2": 0.9}
    optimizers: list[torch.optim.Optimizer] = []
    load = trainer.load_optimizer

    def load_and_keep(directory: Path, model: Any, loaded: list[torch.optim.Optimizer], world: Any) -> None:
        load(directory, model, loaded, world)
        optimizers.extend(loaded)

    monkeypatch.setattr(trainer, "load_optimizer", load_and_keep)
    assert train_here(arguments(data, run, RESUME, **changes), run.parent) == 0
    printed = capsys.readouterr().out
    for difference in ("max_steps 12 -> 14", "logging_steps 1 -> 2", "learning_rate 0.003 -> 0.001"):
        assert difference in printed
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [*range(1, 10), 10, 12, 14]
    config = json.loads((run / "config.json").read_text())
    assert {name: config[name] for name in changes} == changes
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert [(group["weight_decay"], group["betas"][1]) for group in groups] == [(0.5, 0.9), (0.0, 0.9)]


def test_added_and_removed_settings_are_described() -> None:
    plain, stretched = (TrainConfig(model=ModelConfig(rope_scaling=scaling)) for scaling in (None, RopeScaling()))
    assert "model.rope_scaling.factor None -> 40.0" in fixed_changes(plain, stretched)
    assert fixed_changes(plain, plain.changed(quantize="nf4")) == ["quantize None -> 'nf4'"]
    assert "model.rope_scaling.factor 40.0 -> None" in fixed_changes(stretched, plain)


def test_an_earlier_run_is_renamed_and_never_overwritten(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = files(run)
    assert train_here(arguments(data, run, max_steps=1, eval_steps=0), tmp_path) == 0
    assert f"{run} held an earlier run, which is now {run}.1" in capsys.readouterr().out
    second = files(run)
    assert train_here(arguments(data, run, max_steps=2, eval_steps=0), tmp_path) == 0
    assert files(Path(f"{run}.1")) == first
    assert files(Path(f"{run}.2")) == second


def test_a_failed_start_leaves_an_earlier_run_in_place(run: Path, data: Path, tmp_path: Path) -> None:
    before = files(run)
    assert train_here(arguments(tmp_path / "nothing.jsonl", run), tmp_path) == 2
    assert train_here(arguments(data, run, batch_size=1000), tmp_path) == 2
    assert files(run) == before
    assert not Path(f"{run}.1").exists()


# ---------------------------------------------------------------- one run per directory


def hold(run: Path, answers: Connection) -> None:
    """Hold a run's lock until the other end of the connection is closed; send "held", or why it cannot be held."""
    try:
        with run_lock(run):
            answers.send("held")
            with contextlib.suppress(EOFError):
                answers.recv()
    except UserError as error:
        answers.send(str(error))


@contextlib.contextmanager
def holders(number: int, run: Path) -> Iterator[list[tuple[ForkServerProcess, str]]]:
    """Processes that try to hold a run's lock at the same time, with their answers."""
    pairs, server = [Pipe() for _ in range(number)], start_forkserver()
    processes = [server.Process(target=hold, args=(run, theirs)) for _, theirs in pairs]
    for process in processes:
        process.start()
    yield [(process, ours.recv()) for process, (ours, _) in zip(processes, pairs, strict=True)]
    for process, (ours, _) in zip(processes, pairs, strict=True):
        ours.close()
        process.join()


@pytest.mark.parametrize("flags", [[], [RESUME], [RESUME, "auto"]])
def test_a_directory_in_use_is_refused_until_its_process_dies(
    flags: list[str], run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holders(1, run) as [(other, answer)]:
        assert answer == "held"
        before = files(run)
        assert train_here(arguments(data, run, *flags), run.parent) == 2
        remedy = "stop it, or choose another --output-dir"
        expected = f"error: {run} is in use by process {other.pid} on {socket.gethostname()}; {remedy}\n"
        assert capsys.readouterr().err == expected
        assert files(run) == before
        other.kill()
        other.join()
        with run_lock(run):
            pass


def test_one_of_four_processes_that_start_together_gets_the_directory(tmp_path: Path) -> None:
    with holders(4, tmp_path / "run") as others:
        answers = [answer for _, answer in others]
    assert answers.count("held") == 1
    assert sum("is in use by process" in answer for answer in answers) == 3


def test_resume_auto_starts_resumes_or_starts_anew(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued job repeats the same command."""

    def train(**changes: Any) -> list[int]:
        settings = {"eval_steps": 0, "save_steps": 1} | changes
        assert train_here(arguments(data, tmp_path / "run", RESUME, "auto", **settings), tmp_path) == 0
        return [line["step"] for line in read_metrics(tmp_path / "run")]

    assert train(max_steps=1) == [1]
    assert train(max_steps=2) == [1, 2]
    assert f"resuming {tmp_path}/run with changes: max_steps 1 -> 2" in capsys.readouterr().out
    assert train(max_steps=1, seed=7) == [1]
    assert (
        f"{tmp_path}/run is a run with another configuration (seed 42 -> 7); starting anew" in capsys.readouterr().out
    )
    assert (tmp_path / "run.1/metrics.jsonl").exists()


def test_a_resumed_run_recognises_data_by_its_content(
    run: Path, data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "other.jsonl", conversations(40, seed=1))
    resume = [RESUME, "--output-dir", str(run)]
    with pytest.raises(UserError, match="these are not the rows that the run was trained on"):
        train_here([*resume, "--debug", "--dataset", str(tmp_path / "other.jsonl")], tmp_path)
    shutil.copy(data, tmp_path / "moved.jsonl")
    monkeypatch.chdir(tmp_path)
    assert train_here([*resume, "--dataset", "moved.jsonl"], tmp_path) == 0
    assert_same_run(run, alone)
    assert json.loads((run / "config.json").read_text())["dataset"] == [str(tmp_path / "moved.jsonl")]


def test_an_output_directory_that_is_a_link_stays_one(data: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert train_here(arguments(data, tmp_path / "run", max_steps=1, eval_steps=0), tmp_path) == 0
        assert (tmp_path / "run").readlink() == tmp_path / "disk"
    assert (tmp_path / "disk.1/config.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-000099"])
def test_links_in_a_run_directory_are_refused(
    name: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").write_text("private")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "elsewhere")
    assert train_here(arguments(data, run, RESUME), tmp_path) == 2
    assert f"error: {run}/{name} is a link" in capsys.readouterr().err
    assert (tmp_path / "elsewhere").read_text() == "private"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("report_to", "run.evil", "report_to is 'run.evil', which is not of type"),
        ("max_steps", "12", "max_steps is '12', which is not of type int"),
        ("packing", 1, "packing is 1, which is not of type bool"),
        ("dataset", ["a", 3], "dataset is 3, which is not of type str"),
        ("model", {"hidden_size": 3.5}, "hidden_size is 3.5, which is not of type int"),
        ("model", [], "is not the configuration of a run of this version"),
        ("model", {"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear', which is not of type"),
        ("tie_embeddings", True, "tie_embeddings unknown or missing"),
        ("seed", None, "seed is None, which is not of type int"),
    ],
)
def test_saved_fields_have_their_declared_types(name: str, value: Any, message: str, tmp_path: Path) -> None:
    """A tracker's name that is unknown is never imported."""
    saved = TrainConfig().flat()
    saved[name] = saved[name] | value if name == "model" and value else value
    write_json(tmp_path / "config.json", saved)
    with pytest.raises(UserError, match=re.escape(message)):
        saved_configuration(tmp_path)


def test_a_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig().changed(rope_scaling=RopeScaling(factor=4.0), q_lora_rank=8, resume="auto", quantize="nf4")
    write_json(tmp_path / "config.json", config.flat())
    assert saved_configuration(tmp_path).flat() == config.flat()
