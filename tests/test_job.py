"""A job of several ranks: what they have to have in common. Two processes in a real group, whose timeout is shrunk."""

import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train_sft
from config import TrainConfig, UserError
from launch.run_directory import AGENTS
from launch.start import agents, fingerprint, is_own_run, look_up
from parallel import World, first_process_first, from_all_ranks
from small_runs import cheap_process, conversations, start_forkserver, write_jsonl
from tokenizer import Tokenizer

TIMEOUT = 2  # seconds, of every collective
ALONE = World(0, 1, torch.device("cpu"))
Work = Callable[[World], object]


def two_ranks(work: Work, folder: Path) -> list[str]:
    """What each of them returns, or the UserError that it raises; each has a working directory of its own."""
    server = start_forkserver()
    ranks = [server.Process(target=as_rank, args=(rank, work, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [(folder / f"result-{rank}").read_text() for rank in range(2)]


def as_rank(rank: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    os.chdir(folder / str(rank))
    try:
        result = work(World(rank, 2, torch.device("cpu"), 1, store))
    except UserError as error:
        result = error
    (folder / f"result-{rank}").write_text(str(result))
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the two working directories, in which files of the same name differ in content but not in size."""
    for rank in range(2):
        base = tmp_path / str(rank) / "base"
        base.mkdir(parents=True)
        (base / "model.safetensors").write_bytes(bytes([rank]) * 200_000)
        write_jsonl(base.with_name("data.jsonl"), conversations(20, seed=rank))
    return tmp_path


def take_long(world: World) -> Path | None:
    time.sleep(2 * TIMEOUT if world.is_main else 0)
    return None


def wait_for_the_first(world: World) -> object:
    with first_process_first(world):
        take_long(world)
    return from_all_ranks(world.rank, world)


def look_for_long(world: World) -> object:
    return look_up(functools.partial(take_long, world), world)


def look_up_base(world: World) -> object:
    return look_up(functools.partial(Path, "base"), world)


def load_rows(world: World) -> object:
    config = TrainConfig().changed(dataset=("data.jsonl",), train_split="train", eval_steps=0, num_proc=1)
    with cheap_process(Path.cwd()):
        return len(train_sft.load_rows(config, Tokenizer(vocab_size=512), world)[0].lengths)


@pytest.mark.parametrize(("work", "result"), [(wait_for_the_first, "[0, 1]"), (look_for_long, "None")])
def test_what_the_first_rank_does_alone_may_outlast_a_collective(work: Work, result: str, folder: Path) -> None:
    assert two_ranks(work, folder) == [result, result]


def test_a_rank_that_sees_other_files_is_named(folder: Path) -> None:
    message = "rank 1 sees other files at base than the first rank does"
    assert two_ranks(look_up_base, folder) == [message, message]


def test_ranks_with_other_data_are_refused(folder: Path) -> None:
    message = "data.jsonl: not all ranks have read the same rows; give all nodes the same data"
    assert two_ranks(load_rows, folder) == [message, message]


@pytest.mark.parametrize("place", [0, 199_999])
def test_other_weights_of_the_same_size_are_other_files(place: int, folder: Path) -> None:
    base = folder / "0/base"
    before = fingerprint(base)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[place] = 7
    (base / "model.safetensors").write_bytes(weights)
    assert fingerprint(base) != before


def test_a_run_stays_its_jobs_when_nodes_come_or_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents start the ranks again under another attempt; those of a later job have other directories."""
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)

    def started(agent: str, attempt: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / agent / f"attempt_{attempt}" / "0" / "error.json"))

    started("first", 0)
    gone = "another-node /tmp/second"
    (tmp_path / AGENTS).write_text("\n".join([gone, *agents(ALONE)]))
    assert is_own_run(tmp_path, ALONE)
    started("first", 1)
    assert is_own_run(tmp_path, ALONE)
    started("third", 0)
    assert not is_own_run(tmp_path, ALONE)
