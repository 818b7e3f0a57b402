"""Training runs that take a second: in this process, or in children that can be killed.

A child is forked from a server that has imported everything, which saves the seconds that importing takes.
"""

import contextlib
import json
import multiprocessing
import os
import pty
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run as torchrun
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from tqdm import tqdm

import files
import train_sft
import trainer
from checkpoint import newest_checkpoint
from config import UserError
from datacollator import MicroBatch
from launch import run_directory
from launch.command_line import STOP_SIGNALS
from parallel import TIMEOUT, World, leave_world

WORDS = ("one", "three", "seven", "eleven", "the", "a", "is", "was", "not", "and", "or", "but", "there", "☂", "é")


def conversations(number: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return conversations of 2 or 4 messages of various lengths."""
    rng = random.Random(seed)
    return [
        [
            {"role": ("user", "assistant")[turn % 2], "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))}
            for turn in range(rng.choice((2, 4)))
        ]
        for _ in range(number)
    ]


def write_jsonl(path: Path, rows: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return path


SETTINGS = {
    "init-from": "none", "optimizer": "adamw", "learning-rate": 3e-3, "max-seq-len": 96, "batch-size": 2,
    "max-steps": 12, "warmup-steps": 2, "save-steps": 3, "eval-steps": 4, "train-split": "train[5:]",
    "eval-split": "train[:5]", "dtype": "float32", "device": "cpu", "num-proc": 1,
    "model.vocab-size": 512, "model.hidden-size": 32, "model.num-hidden-layers": 2, "model.num-attention-heads": 2,
    "model.kv-lora-rank": 16, "model.qk-nope-head-dim": 8, "model.qk-rope-head-dim": 8, "model.v-head-dim": 8,
    "model.intermediate-size": 32, "model.moe-intermediate-size": 16, "model.n-routed-experts": 4,
}  # fmt: skip


def arguments(dataset: Path, output_dir: Path, *flags: str, **changes: Any) -> list[str]:
    """Return the command line of a run of 24 thousand parameters. changes: as keywords, model_x for --model.x."""
    named = {name.replace("model_", "model.").replace("_", "-"): value for name, value in changes.items()}
    settings = SETTINGS | {"dataset": dataset, "output-dir": output_dir} | named
    if "init-from" in named:  # it has its own shape
        settings = {name: value for name, value in settings.items() if name in named or not name.startswith("model.")}
    if settings["eval-steps"] == 0:
        settings.pop("eval-split")
    if "warmup-steps" not in named and settings["max-steps"] == 1:
        settings["warmup-steps"] = 1
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["tiny", *words, "--sample-prompts", *flags]


# ---------------------------------------------------------------- in this process


@contextlib.contextmanager
def cheap_process(directory: Path) -> Iterator[pytest.MonkeyPatch]:
    """Context without drawings, with the cache in `directory`; it restores signal handlers."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "plot_runs", lambda runs, out, *_: Path(out).write_bytes(b"\x89PNG"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
        yield patch
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_main(main: Callable[[], None], arguments: list[str], directory: Path) -> int:
    """Return the exit code of a command's main function."""
    with cheap_process(directory) as patch:
        patch.setattr(sys, "argv", ["program", *arguments])
        try:
            main()
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


def train_here(arguments: list[str], directory: Path) -> int:
    return run_main(train_sft.main, arguments, directory)


# ---------------------------------------------------------------- in a child

Fault = Callable[[], None]
FORKSERVER = multiprocessing.get_context("forkserver")


def start_forkserver() -> ForkServerContext:
    FORKSERVER.set_forkserver_preload(["pytest", "small_runs"])
    path = os.pathsep.join(str(Path(__file__).resolve().parents[i]) for i in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path, prepend=os.pathsep)
        forkserver.ensure_running()
    return FORKSERVER


def start(arguments: list[str], log: Path, fault: Fault | None = None) -> ForkServerProcess:
    """Start train_sft.py in a child that first calls `fault`, and appends its output to `log`."""
    child = start_forkserver().Process(target=run_child, args=(arguments, log, fault))
    child.start()
    return child


def print_to(log: Path) -> None:
    """Append the output of this process to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_child(arguments: list[str], log: Path, fault: Fault | None) -> None:
    print_to(log)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # a killed process would not release a lock between processes
    if fault:
        fault()
    sys.exit(train_here(arguments, log.parent))


def train_in_child(arguments: list[str], log: Path, fault: Fault | None = None) -> int:
    """Return the exit code, or minus the signal that ended the child."""
    child = start(arguments, log, fault)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def wait_for(text: str, log: Path, child: ForkServerProcess) -> None:
    """Wait until the child has printed the text, or has ended."""
    while not (log.exists() and text in log.read_text()) and child.is_alive():
        time.sleep(0.01)


def kill_after(seconds: float, arguments: list[str], log: Path) -> int:
    """Send SIGKILL some seconds after the child has begun to train. Return -9, or 0 if it had finished."""
    log.unlink(missing_ok=True)
    child = start(arguments, log)
    wait_for("parameters, ", log, child)
    time.sleep(seconds)
    child.kill()
    child.join()
    return child.exitcode or 0


# ---------------------------------------------------------------- on several ranks

Work = Callable[[World], object]


def run_ranks(number: int, work: Work, folder: Path) -> list[str]:
    """Call `work` in children that form a process group. Return the text of each one's result, or of its UserError.

    Rank N works in the directory folder/N. All ranks append their output to folder/log.
    """
    server = start_forkserver()
    ranks = [server.Process(target=be_rank, args=(rank, number, work, folder)) for rank in range(number)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()
    return [(folder / str(rank) / "result").read_text() for rank in range(number)]


def be_rank(rank: int, number: int, work: Work, folder: Path) -> None:
    print_to(folder / "log")
    torch.set_num_threads(1)
    place = folder / str(rank)
    place.mkdir(exist_ok=True)
    os.chdir(place)
    store = dist.FileStore(str(folder / "store"), number)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=TIMEOUT)
    try:
        result = work(World(rank, number, torch.device("cpu"), min(number, 2), store))  # as nodes of two ranks
    except UserError as error:
        result = error
    (place / "result").write_text(str(result))
    leave_world()


# ---------------------------------------------------------------- under torchrun

ROOT = Path(__file__).resolve().parents[1]


def run_job(folder: Path, log: Path, *words: object) -> int:
    """Return the exit code of torchrun on one node, in a child; its ranks are forks of it, which saves their imports.
    All of them append their output to `log`."""
    child = start_forkserver().Process(target=be_torchrun, args=([str(word) for word in words], log, folder / "cache"))
    child.start()
    child.join()
    return child.exitcode or 0


def be_torchrun(words: list[str], log: Path, cache: Path) -> None:
    print_to(log)
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        torchrun.main(["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=fork", *words])
    except Exception as error:
        sys.exit(str(error))


def run_nodes(folder: Path, logs: list[Path], *words: object) -> list[int]:
    """Return the exit codes of torchrun on several nodes with one rank each, started as a user does."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    line = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(logs)}", "--rdzv-backend=c10d", endpoint]
    line += ["--local-addr=127.0.0.1", *map(str, words)]
    with contextlib.ExitStack() as ending:
        jobs = []
        for log in logs:
            output = ending.enter_context(log.open("a"))
            jobs.append(subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT))
            ending.callback(jobs[-1].terminate)  # if the test runs out of time
        return [job.wait() for job in jobs]


# ---------------------------------------------------------------- faults


def die_at_flush(number: int) -> None:
    """Send SIGKILL while saving, when a file is about to be flushed to disk after `number` others."""
    flush, calls = files.flush_to_disk, iter(range(number))

    def flush_or_die(path: Path) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    files.flush_to_disk = flush_or_die


def fill_disk(step: int, size: int) -> None:
    """Limit files to `size` bytes, from a step on."""
    save = trainer.Trainer.save

    def save_on_full_disk(self: trainer.Trainer) -> None:
        if self.step >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(self)

    trainer.Trainer.save = save_on_full_disk  # type: ignore[method-assign]


def save_forever() -> None:
    """Make saving print a line and never end."""

    def save(self: trainer.Trainer) -> None:
        print("saving", flush=True)
        while True:
            time.sleep(1)

    trainer.Trainer.save = save  # type: ignore[method-assign]


def nobody_reads(descriptors: tuple[int, ...]) -> None:
    """Close the other end of these descriptors' pipe before the first step."""
    train = trainer.Trainer.train

    def train_unread(self: trainer.Trainer, *arguments: Any) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        for descriptor in descriptors:
            os.dup2(writer, descriptor)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        train(self, *arguments)

    trainer.Trainer.train = train_unread  # type: ignore[method-assign]


def signal_in_step(step: int, number: signal.Signals) -> None:
    """Send a signal in the middle of a step, counted from 1."""
    forward = trainer.Trainer.forward

    def interrupted(self: trainer.Trainer, micro_batch: MicroBatch) -> Any:
        if self.step + 1 == step and self.model.training:
            os.kill(os.getpid(), number)
        return forward(self, micro_batch)

    trainer.Trainer.forward = interrupted  # type: ignore[method-assign]


def signals_in_save() -> None:
    """Send SIGTERM, SIGHUP and SIGINT, each twice, in the first save."""
    save = trainer.Trainer.save

    def bombarded(self: trainer.Trainer) -> None:
        if not self.signal.number:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) * 2:
                os.kill(os.getpid(), number)
        save(self)

    trainer.Trainer.save = bombarded  # type: ignore[method-assign]


def lose_terminal(step: int) -> None:
    """Print to a terminal that closes in the middle of a step."""
    ours, terminal = pty.openpty()
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    closing = threading.Event()

    def show() -> None:
        while not closing.is_set():
            os.read(ours, 4096)
        os.close(ours)

    screen = threading.Thread(target=show)
    screen.start()
    forward = trainer.Trainer.forward

    def interrupted(self: trainer.Trainer, micro_batch: MicroBatch) -> Any:
        if self.step + 1 == step and self.model.training and not closing.is_set():
            closing.set()
            with contextlib.suppress(OSError):  # unless it is closed already
                os.write(1, b"the last output that is shown")
            screen.join()
            os.kill(os.getpid(), signal.SIGHUP)
        return forward(self, micro_batch)

    trainer.Trainer.forward = interrupted  # type: ignore[method-assign]


# ---------------------------------------------------------------- results of a run


def numbers(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the field that depends on the clock."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in run_directory.read_metrics(run)]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return weights and optimizer state of the newest checkpoint, by name."""
    newest = newest_checkpoint(run)
    assert newest is not None
    (weights,) = newest.glob("*.safetensors")
    return load_file(weights) | optimizer_tensors(newest)


def optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the optimizer state, read from all ranks' files with PyTorch's own reader."""
    reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
    stored = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal bit for bit."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]
