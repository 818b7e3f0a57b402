"""Jobs of several ranks: what the ranks must have in common, torchrun's restarts, errors, signals and nodes."""

import contextlib
import functools
import json
import re
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import parallel
import train_sft
from config import MINI, TrainConfig, UserError
from launch.command_line import one_line_errors, parse_arguments
from launch.run_directory import read_metrics, run_lock
from launch.start import check_shared_files, find_start, look_up
from parallel import ALONE, World
from small_runs import (
    ROOT,
    Work,
    cheap_process,
    conversations,
    run_job,
    run_nodes,
    run_ranks,
    train_here,
    write_jsonl,
)
from test_parallel import assert_same_run, command
from tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a directory with two working directories, in which files of the same name have different content."""
    for rank in range(2):
        base = tmp_path / str(rank) / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text(str(rank))
        write_jsonl(base.with_name("data.jsonl"), conversations(20, seed=rank))
    return tmp_path


def wait_for_the_other(world: World) -> Path | None:
    """Return on the first rank once the other one waits for it, without a collective: that would run into a timeout."""
    if world.is_main and world.store:
        world.store.wait(["the other rank polls"], timedelta(minutes=5))
    return None


def look_for_long(world: World) -> object:
    def sleep(seconds: float) -> None:
        if world.store:
            world.store.set("the other rank polls", "")
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "time", SimpleNamespace(sleep=sleep))
        return look_up(functools.partial(wait_for_the_other, world), world)


def look_up_base(world: World) -> object:
    return look_up(functools.partial(Path, "base"), world)


def share_a_run(world: World) -> object:
    with run_lock("run") if world.is_main else contextlib.nullcontext():
        return check_shared_files("run", world)


def load_rows(world: World) -> object:
    config = TrainConfig().changed(dataset=("data.jsonl",), train_split="train", eval_steps=0, num_proc=1)
    with cheap_process(Path.cwd()):
        return len(train_sft.load_rows(config, Tokenizer(vocab_size=512), world)[0].lengths)


def test_no_collective_waits_for_work_of_the_first_rank(folder: Path) -> None:
    """Which may take longer than the timeout of a collective."""
    assert run_ranks(2, look_for_long, folder) == ["None"] * 2


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (look_up_base, "rank 1 sees other files at base than the first rank does"),
        (load_rows, "rank 1 read different rows of data.jsonl than rank 0; give all nodes the same data"),
        (
            share_a_run,
            "rank 1 does not see what the first rank writes in {}: all nodes need a shared file system; put ",
        ),
    ],
)
def test_ranks_with_different_files_are_refused(work: Work, message: str, folder: Path) -> None:
    for rank, result in enumerate(run_ranks(2, work, folder)):
        assert result.startswith(message.format(folder / str(rank)))


def test_a_job_whose_restart_would_start_anew_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(UserError, match="--max-restarts needs --resume auto"):
        find_start(parse_arguments(["tiny", "--output-dir", str(tmp_path / "run")]), ALONE)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "words",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:3311",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL 2.29",
        "[Rank 1] NCCL communicator was aborted on rank 1.",
    ],
)
def test_the_death_of_another_rank_is_left_to_torchrun(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Gloo and with NCCL, whose own errors take many lines. Any other error keeps its traceback."""
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0/error.json"))
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        raise RuntimeError(words)
    assert leaving.value.code == 1
    assert json.loads((tmp_path / "0/error.json").read_text())["message"]["message"] == "another rank has failed"
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="out of bounds"), one_line_errors():
        raise RuntimeError("index out of bounds")


@pytest.mark.parametrize("missing", ["RANK", "MASTER_PORT", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_incomplete_variables_of_torchrun_are_one_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    variables |= {"LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    variables["TORCHELASTIC_ERROR_FILE"] = "error.json"
    for name, value in (variables | {"TORCHELASTIC_RUN_ID": "run"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"{missing}.*: start with torchrun, or unset it"):
        parallel.join_world("cpu")


def test_compile_is_refused_with_sharded_blocks() -> None:
    """Norms and routers are gathered separately in bf16: seven graph breaks per step."""
    for engine in ("fsdp", "hsdp"):
        with pytest.raises(UserError, match="compile works only with parallel ddp"):
            MINI.changed(compile=True, dtype="bfloat16", parallel=engine).validate()
    MINI.changed(compile=True, dtype="bfloat16", parallel="ddp").validate()


# ---------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data.jsonl and "alone", a run of eight steps in one process."""
    whole = tmp_path_factory.mktemp("jobs")
    write_jsonl(whole / "data.jsonl", conversations(60))
    assert train_here(command(whole, "packed", "1", whole / "alone", max_steps=8), whole) == 0
    return whole


def assert_resumed_as_alone(run: Path, whole: Path) -> None:
    """Resume a run in one process, and compare it with the one that was never interrupted."""
    assert train_here(command(whole, "packed", "1", run, "--resume", max_steps=8), whole) == 0
    assert_same_run(run, whole / "alone")


def our_frames(printed: str) -> list[str]:
    """Return a traceback's lines that name a file of ours; a virtual environment may be inside the checkout."""
    frames = [line for line in printed.splitlines() if "File" in line and "site-packages" not in line]
    return [line for line in frames if str(ROOT) in line]


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def test_a_job_outlives_an_error_and_a_kill_and_an_interrupt_saves_once(whole: Path, tmp_path: Path) -> None:
    """The job fails in step 4, after the checkpoint of step 3. After the restart, the last rank is killed in step 6;
    after another one, torchrun is interrupted in step 7."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(whole, "packed", "fsdp-2", run, "--resume", "auto", max_steps=8, save_steps=3)
    faults = "raise:4,kill:6,interrupt:7"
    assert run_job(whole, log, "--max-restarts=2", ROOT / "tests/faulty_rank.py", faults, *words) == 1
    printed = log.read_text()
    assert errors(printed) == ["error: out of cheese"]
    # torchrun notices the killed rank first, or the one that has lost its connection
    assert re.search(r"failed \(exitcode: (-9\) local_rank: 1|1\) local_rank: 0)", printed)
    assert re.findall(r"step \d to 8", printed) == ["step 0 to 8", "step 3 to 8", "step 3 to 8"]
    assert printed.count("finishing this step") == 1
    assert len(re.findall("Closing process .* via signal SIGINT", printed)) == 2
    assert "SIGKILL" not in printed.partition("signal SIGINT")[2]
    assert not our_frames(printed)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [*range(1, 8)]
    assert_resumed_as_alone(run, whole)


def test_an_error_of_every_rank_is_printed_once_in_one_line(whole: Path, tmp_path: Path) -> None:
    log, words = tmp_path / "log", command(whole, "packed", "ddp-2", tmp_path / "run", lora_alpha=3)
    assert run_job(whole, log, ROOT / "train_sft.py", *words) == 1
    assert errors(log.read_text()) == ["error: lora_alpha has no effect: lora_rank is 0"]
    assert not our_frames(log.read_text())
    assert not (tmp_path / "run").exists()


def test_two_nodes_form_one_job_and_name_the_rank_that_fails(whole: Path, tmp_path: Path) -> None:
    """Two torchrun agents with one rank each; the second raises an error in step 5."""
    run, logs = tmp_path / "run", [tmp_path / f"log-{node}" for node in (0, 1)]
    words = ("raise:5", *command(whole, "packed", "ddp-2", run, max_steps=8))
    assert 0 not in run_nodes(whole, logs, ROOT / "tests/faulty_rank.py", *words)
    printed = "".join(log.read_text() for log in logs)
    assert re.search(r", 8 rows each \(.* epochs\) on 2 x cpu", printed)
    assert re.search(r"rank +: 1 (.*\n)+? +traceback : error: out of cheese", printed)
    assert errors(printed) == ["error: out of cheese"]
    assert not our_frames(printed)
    assert_resumed_as_alone(run, whole)
