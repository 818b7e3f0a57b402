"""What the ranks of a job must have in common: two processes in a real group, with a short timeout."""

import contextlib
import functools
import time
from datetime import timedelta
from pathlib import Path

import pytest

import train_sft
from config import TrainConfig, UserError
from launch.command_line import parse_arguments
from launch.run_directory import run_lock
from launch.start import check_shared_files, find_start, look_up
from parallel import ALONE, World, from_all_ranks
from small_runs import Work, cheap_process, conversations, run_ranks, write_jsonl
from tokenizer import Tokenizer

TIMEOUT = 2  # seconds, of every collective


def two_ranks(work: Work, folder: Path) -> list[str]:
    return run_ranks(2, work, folder, timedelta(seconds=TIMEOUT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a directory with two working directories, in which files of the same name have different content."""
    for rank in range(2):
        base = tmp_path / str(rank) / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text(str(rank))
        write_jsonl(base.with_name("data.jsonl"), conversations(20, seed=rank))
    return tmp_path


def take_long(world: World) -> Path | None:
    time.sleep(2 * TIMEOUT if world.is_main else 0)
    return None


def look_for_long(world: World) -> object:
    found = look_up(functools.partial(take_long, world), world)
    return found, from_all_ranks(world.rank, world)


def look_up_base(world: World) -> object:
    return look_up(functools.partial(Path, "base"), world)


def share_a_run(world: World) -> object:
    with run_lock("run") if world.is_main else contextlib.nullcontext():
        return check_shared_files("run", world)


def load_rows(world: World) -> object:
    config = TrainConfig().changed(dataset=("data.jsonl",), train_split="train", eval_steps=0, num_proc=1)
    with cheap_process(Path.cwd()):
        return len(train_sft.load_rows(config, Tokenizer(vocab_size=512), world)[0].lengths)


def test_work_of_the_first_rank_may_exceed_the_timeout(folder: Path) -> None:
    assert two_ranks(look_for_long, folder) == ["(None, [0, 1])"] * 2


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
    for rank, result in enumerate(two_ranks(work, folder)):
        assert result.startswith(message.format(folder / str(rank)))


def test_a_restarted_job_that_would_start_anew_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="restarted this job: pass --resume auto"):
        find_start(parse_arguments(["tiny", "--output-dir", str(tmp_path / "run")]), ALONE)
