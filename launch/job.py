"""The job that torchrun has started: which run is its own, and whether all its ranks see the same files."""

import hashlib
import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from config import check
from launch.run_directory import AGENTS
from parallel import World, first_process_first, from_all_ranks, from_first_rank


def agents(world: World) -> set[str]:
    """The torchrun processes (one a node) that started the ranks. They stay the same when torchrun starts the ranks
    again, after an error as well as when nodes come or go; a new job has others. Empty without torchrun."""
    if not dist.is_torchelastic_launched():
        return set()
    directory = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[2]  # a temporary one, an agent's own
    return set(from_all_ranks(f"{socket.gethostname()} {directory}", world))


def is_own_run(run: str | Path, world: World) -> bool:
    """Whether this job made the run, and so goes on with it. Those of earlier jobs are left alone."""
    own, file = agents(world), Path(run, AGENTS)
    written = file.read_text().splitlines() if world.is_main and file.is_file() else []
    return not own.isdisjoint(from_first_rank(written, world))


def look_up(find: Callable[[], Path | None], world: World) -> Path | None:
    """The directory that the first rank finds, on all ranks: who looks for oneself may find another step of a run that
    is being written. Raises UserError where a rank does not see the same files there."""
    with first_process_first(world):  # it checksums all of a large checkpoint
        found = find() if world.is_main else None
    path, expected = from_first_rank((found, fingerprint(found)), world)
    same = from_all_ranks(fingerprint(path) == expected, world)
    others = [str(rank) for rank, sees_it in enumerate(same) if not sees_it]
    check(not others, f"rank {', '.join(others)} sees other files at {path} than the first rank does")
    return path


def fingerprint(directory: Path | None) -> str:
    """sha256 of its files' names and sizes, what its JSON files say (a checkpoint's checksums are in one), and its
    weights' first and last bytes."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()) if directory and directory.is_dir() else []:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes() if file.suffix == ".json" else b"")
            digest.update(ends_of(file) if file.suffix == ".safetensors" else b"")
    return digest.hexdigest()


def ends_of(file: Path, size: int = 2**16) -> bytes:
    """Its first and its last bytes."""
    with file.open("rb") as opened:
        first = opened.read(size)
        opened.seek(max(file.stat().st_size - size, 0))
        return first + opened.read()


def check_shared_files(run: str | Path, world: World) -> None:
    """Raises UserError where a node doesn't see what the first one writes beside the run directory."""
    if world.size == 1:
        return
    parent, name = Path(run).parent, f".shared-{uuid.uuid4()}"
    if world.is_main:
        parent.mkdir(parents=True, exist_ok=True)
        (parent / name).touch()
    written = parent / from_first_rank(name, world)
    sees_it = from_all_ranks(written.exists(), world)
    if world.is_main:
        written.unlink()
    others = [str(rank) for rank, sees in enumerate(sees_it) if not sees]
    check(
        not others,
        f"rank {', '.join(others)} does not see what the first rank writes in {parent.resolve()}: all nodes need a "
        "file system in common; put output_dir there",
    )
