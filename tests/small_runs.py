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
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from tqdm import tqdm

import files
import train_sft
import trainer
from checkpoint import newest_checkpoint
from datacollator import MicroBatch
from launch import run_directory
from launch.command_line import STOP_SIGNALS
from view import plots

WORDS = ("one", "three", "seven", "eleven", "the", "a", "is", "was", "not", "and", "or", "but", "there", "☂", "é")


def conversations(number: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Small talk of 2 or 4 messages and varied lengths."""
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
    "init-from": "none",
    "optimizer": "adamw",
    "learning-rate": 3e-3,
    "max-seq-len": 96,
    "batch-size": 2,
    "max-steps": 12,
    "warmup-steps": 2,
    "save-steps": 3,
    "eval-steps": 4,
    "train-split": "train[5:]",
    "eval-split": "train[:5]",
    "dtype": "float32",
    "device": "cpu",
    "num-proc": 1,
    "model.vocab-size": 512,
    "model.hidden-size": 32,
    "model.num-hidden-layers": 2,
    "model.num-attention-heads": 2,
    "model.kv-lora-rank": 16,
    "model.qk-nope-head-dim": 8,
    "model.qk-rope-head-dim": 8,
    "model.v-head-dim": 8,
    "model.intermediate-size": 32,
    "model.moe-intermediate-size": 16,
    "model.n-routed-experts": 4,
}


def arguments(dataset: Path, output_dir: Path, *flags: str, **changes: Any) -> list[str]:
    """The command line of a run of 24 thousand parameters; changes in Python's spelling, model_x for model.x."""
    named = {name.replace("model_", "model.").replace("_", "-"): value for name, value in changes.items()}
    settings = SETTINGS | {"dataset": dataset, "output-dir": output_dir} | named
    if "init-from" in named:  # which has a shape
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
    """Nothing is measured or drawn, the cache lies in `directory`, and signals are handled as before in the end."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "measure_peak", lambda *_: 1.0)
        patch.setattr(plots, "plot_runs", lambda runs, out, *_: Path(out).write_bytes(b"\x89PNG"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
        yield patch
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_main(main: Callable[[], None], arguments: list[str], directory: Path) -> int:
    """The exit code of an entry point's main function."""
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
    """Start train_sft.py in a child that appends to `log` what it prints; `fault` is called in it before it begins."""
    child = start_forkserver().Process(target=run_child, args=(arguments, log, fault))
    child.start()
    return child


def run_child(arguments: list[str], log: Path, fault: Fault | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, and so inherited, where the tests run under nohup
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # instead of one for several processes, which a killed one would leave behind
    if fault:
        fault()
    sys.exit(train_here(arguments, log.parent))


def train_in_child(arguments: list[str], log: Path, fault: Fault | None = None) -> int:
    """The exit code; minus the signal if one ended it."""
    child = start(arguments, log, fault)
    child.join(120)
    assert child.exitcode is not None, f"still running: {log.read_text()}"
    return child.exitcode


def wait_for(text: str, log: Path, child: ForkServerProcess) -> None:
    """Until the child has printed it, or has ended."""
    while not (log.exists() and text in log.read_text()) and child.is_alive():
        time.sleep(0.001)


def kill_after(seconds: float, arguments: list[str], log: Path) -> int:
    """SIGKILL that long after the child has begun to train. Its exit code: -9, or 0 if it was faster."""
    log.unlink(missing_ok=True)
    child = start(arguments, log)
    wait_for("parameters, ", log, child)
    time.sleep(seconds)
    child.kill()
    child.join()
    return child.exitcode or 0


# ---------------------------------------------------------------- under torchrun

ROOT = Path(__file__).resolve().parents[1]


def start_job(
    folder: Path, log: Path, ranks: int, *words: object, launcher: tuple[str, ...] = (), **options: Any
) -> subprocess.Popen:
    """torchrun on a script of ours, which with all its ranks appends to `log` what it prints."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", *(launcher or ("--standalone",))]
    line = [*torchrun, "--nproc-per-node", str(ranks), *(str(word) for word in words)]
    with log.open("a") as output:
        return subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT, **options)


def finish_job(job: subprocess.Popen) -> int:
    """Its exit code; nothing of it is left behind."""
    try:
        return job.wait(400)
    except subprocess.TimeoutExpired:
        job.terminate()  # torchrun passes it on
        raise


# ---------------------------------------------------------------- faults


def die_at_flush(number: int) -> None:
    """SIGKILL in the middle of saving: when a file is about to be flushed to disk for the number-th time."""
    flush, calls = files.flush_to_disk, iter(range(number))

    def flush_or_die(path: Path) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    files.flush_to_disk = flush_or_die


def fill_disk(step: int, size: int) -> None:
    """From that step on, no file can grow beyond `size` bytes."""
    save = trainer.Trainer.save

    def save_on_full_disk(self: trainer.Trainer) -> None:
        if self.step >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(self)

    trainer.Trainer.save = save_on_full_disk  # type: ignore[method-assign]


def save_slowly() -> None:
    """Saving takes a minute, and says so."""

    def save(self: trainer.Trainer) -> None:
        print("saving", flush=True)
        time.sleep(60)

    trainer.Trainer.save = save  # type: ignore[method-assign]


def nobody_reads(descriptors: tuple[int, ...]) -> None:
    """From the first step on, whoever read what is printed there has left."""
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
    """That signal comes in the middle of the step, counted from 1."""
    forward = trainer.Trainer.forward

    def interrupted(self: trainer.Trainer, micro_batch: MicroBatch) -> Any:
        if self.step + 1 == step and self.model.training:
            os.kill(os.getpid(), number)
        return forward(self, micro_batch)

    trainer.Trainer.forward = interrupted  # type: ignore[method-assign]


def signals_in_save() -> None:
    """The first save gets SIGTERM, SIGHUP and SIGINT, each twice."""
    save = trainer.Trainer.save

    def bombarded(self: trainer.Trainer) -> None:
        if not self.signal.number:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) * 2:
                os.kill(os.getpid(), number)
        save(self)

    trainer.Trainer.save = bombarded  # type: ignore[method-assign]


def lose_terminal(step: int) -> None:
    """Everything goes to a terminal, which closes in the middle of that step."""
    ours, terminal = pty.openpty()
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)
    forward = trainer.Trainer.forward

    def interrupted(self: trainer.Trainer, micro_batch: MicroBatch) -> Any:
        if self.step + 1 == step and self.model.training:
            os.close(ours)
            os.kill(os.getpid(), signal.SIGHUP)
        return forward(self, micro_batch)

    trainer.Trainer.forward = interrupted  # type: ignore[method-assign]
    threading.Thread(target=drain, args=(ours,), daemon=True).start()


def drain(descriptor: int) -> None:
    """Read what is printed, as terminals do."""
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass


# ---------------------------------------------------------------- what a run has come to


def numbers(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without what depends on the clock."""
    clock = ("tokens_per_second", "peak_share")
    return [{k: v for k, v in line.items() if k not in clock} for line in run_directory.read_metrics(run)]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the newest checkpoint, by name."""
    newest = newest_checkpoint(run)
    assert newest is not None
    (weights,) = newest.glob("*.safetensors")
    return load_file(weights) | optimizer_tensors(newest)


def optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Optimizer state, put together from all ranks' files by PyTorch's own reader."""
    reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
    stored = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]
