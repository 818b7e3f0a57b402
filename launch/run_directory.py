"""A run's directory: its lock, its configuration and its metrics; its progress, on the terminal and in a tracker."""

import contextlib
import functools
import importlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from tqdm import tqdm

from config import TrainConfig, UserError, flatten
from files import disk_errors, read_json, read_value, replace_file, write_json

CONFIG, METRICS = "config.json", "metrics.jsonl"
# What a resumed run cannot change, because its weights or its place in the data would no longer fit. Data may move: its
# content is compared when the trainer resumes.
FIXED_FIELDS = {
    "model", "tokenizer", "chat_template", "add_control_tokens", "train_split", "max_seq_len", "packing", "shuffle",
    "long_conversations", "eval_fraction", "skip_bad_rows", "seed", "optimizer", "init_from", "lora_rank", "lora_alpha",
    "lora_target_modules", "quantize",
}  # fmt: skip


# ---------------------------------------------------------------- its lock


def lock_path(run: str | Path) -> Path:
    """Return the file next to a run's directory that is locked while the run is alive."""
    place = Path(run).resolve()
    return place.with_name(f".{place.name}.lock")


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def run_lock(run: str | Path) -> Iterator[None]:
    """Lock a run's directory. The operating system releases the lock when this process ends, in whatever way.

    Raises UserError, with host and process, if another process holds it.
    """
    path = lock_path(run)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with os.fdopen(descriptor, "r+") as file:
        try:
            import fcntl  # Windows has none

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked children do not hold it
        except (BlockingIOError, PermissionError):
            holder = file.read().strip() or "another process"
            raise UserError(f"{run} is in use by {holder}; stop it, or choose another --output-dir") from None
        except (OSError, ImportError) as error:
            print(f"warning: {path} cannot be locked ({error}); do not start a second run in {run}", file=sys.stderr)
        file.truncate(0)
        file.write(f"{this_process()}\n")
        file.flush()
        yield


# ---------------------------------------------------------------- its configuration


def saved_configuration(run: str | Path) -> TrainConfig:
    """Return the configuration in a run's directory. Raises UserError if there is none, or if a field is unknown or not
    of its declared type."""
    path = Path(run, CONFIG)
    if not path.is_file():
        raise UserError(f"{run} holds no run to resume: there is no {path}. Without --resume a new run starts")
    values = read_json(path)
    default = TrainConfig()
    kinds = {name: kind for group in default.groups.values() for name, kind in get_type_hints(type(group)).items()}
    model = values.pop("model", {})
    values |= model if isinstance(model, dict) else {"model": model}
    different = sorted(values.keys() ^ kinds.keys())
    if different:
        fields = ", ".join(different[:5])
        raise UserError(f"{path} is not the configuration of a run of this version: {fields} unknown or missing")
    try:
        return default.changed(**{name: read_value(kinds[name], value, name) for name, value in values.items()})
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None


def changes_between(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """Describe the fields in which two configurations of a run differ, apart from those that concern one start only."""
    before, after = (flatten(json.loads(json.dumps(config.flat()))) for config in (old, new))
    return {
        name: f"{name} {before.get(name)!r} -> {after.get(name)!r}"
        for name in before | after
        if before.get(name) != after.get(name) and name not in ("resume", "debug") and not name.startswith("dry_run")
    }


def fixed_changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Describe the changes that a resumed run cannot make."""
    return [text for name, text in changes_between(old, new).items() if name.split(".")[0] in FIXED_FIELDS]


# ---------------------------------------------------------------- a tracker

TRACKERS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


class Tracker(NamedTuple):
    """A destination of metrics in addition to metrics.jsonl."""

    track: Callable[[dict[str, float]], Any]
    close: Callable[[], Any]


NO_TRACKER = Tracker(lambda metrics: None, lambda: None)


def import_tracker(name: str) -> Any:
    """Return the module of a tracker. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise UserError(f"report_to {name} is not installed: pip install {name}") from error


def start_tracker(config: TrainConfig, step: int) -> Tracker:
    """Start the tracker `report_to` for a run that continues after `step`. Nothing changes on disk yet. Raises
    UserError if the tracker is missing or does not start."""
    name, run = config.watch.report_to, Path(config.checkpoint.output_dir)
    if name == "none":
        return NO_TRACKER
    tracker = import_tracker(name)
    if name == "tensorboard":
        # Created when first needed, since it writes into the run's directory. It hides what came after `step`.
        writer = functools.cache(lambda: tracker.SummaryWriter(run, purge_step=step + 1))

        def write(metrics: dict[str, float]) -> None:
            for key in metrics.keys() - {"step"}:
                writer().add_scalar(key, metrics[key], metrics["step"])

        return Tracker(write, lambda: writer().close())
    try:
        started = time.strftime("%Y%m%d-%H%M%S")  # a resumed run is an entry of its own
        tracker.init(project="sft-from-scratch", name=f"{run.name}-{started}", config=config.flat())
    except Exception as error:  # no key, no network, a full disk: trackers differ
        raise UserError(f"report_to {name} cannot start: {' '.join(str(error).split())}") from error
    return Tracker(lambda metrics: tracker.log(metrics, step=metrics["step"]), tracker.finish)


# ---------------------------------------------------------------- its directory


def holds_a_run(directory: Path) -> bool:
    return (directory / CONFIG).exists() or (directory / "checkpoints").exists()


def check_start(config: TrainConfig) -> None:
    """Raise UserError if the tracker is not installed, or if `open_run` would move a directory that the run needs."""
    if config.watch.report_to != "none":
        import_tracker(config.watch.report_to)
    directory = Path(config.checkpoint.output_dir)
    if config.checkpoint.resume or not holds_a_run(directory):
        return
    needed = (config.checkpoint.init_from, config.data.tokenizer, *config.data.dataset)
    inside = [place for place in needed if place and Path(place).resolve().is_relative_to(directory.resolve())]
    if inside:
        raise UserError(f"output_dir {directory} holds {', '.join(inside)}, which this run needs: choose another")


def open_run(config: TrainConfig) -> None:
    """Make the run's directory and write its configuration.

    An earlier run that is not resumed moves to a free name: nothing is overwritten. Raises UserError if the directory
    contains a link, through which files elsewhere would be overwritten.
    """
    directory = Path(config.checkpoint.output_dir).resolve()  # a link to the directory stays
    if holds_a_run(directory) and not config.checkpoint.resume:
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{directory}.{n}").exists())
        directory.rename(f"{directory}.{number}")
        print(f"{directory} held an earlier run, which is now {directory}.{number} (--resume would have continued it)")
    for path in directory.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path} is a link; remove it: a run's directory must not contain links")
    write_json(directory / CONFIG, config.flat())


# ---------------------------------------------------------------- its progress


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return all lines of a run's metrics.jsonl, except an incomplete last one, which a crash may leave. Raises
    UserError for lines that are not metrics."""
    path = Path(run, METRICS)
    if not path.is_file():
        raise UserError(f"{run} is not a run: it has no {METRICS}")
    complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        lines = [json.loads(line) for line in complete]
        return [line for line in lines if isinstance(line["step"], int)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


class RunLog:
    """A run's metrics.jsonl, and its progress: a bar on a terminal, elsewhere a line at most every ten seconds.

    Every rank has one, but only the first one's (`shown`) prints and writes. What an earlier start wrote after `step`
    is dropped.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, run: Path, step: int, total_steps: int, shown: bool, tracker: Tracker = NO_TRACKER) -> None:
        self.run, self.path = run, run / METRICS
        self.total_steps, self.shown, self.tracker = total_steps, shown, tracker
        if shown:
            kept = [line for line in read_metrics(run) if line["step"] <= step] if self.path.exists() else []
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.next_line = 0.0
        self.has_bar = shown and sys.stderr.isatty()
        # Drawn at each step, but not yet (hence the delay): tqdm ends a bar's line only if a step has drawn it.
        options = {"dynamic_ncols": True, "unit": "step", "delay": 0.01, "mininterval": 0, "miniters": 1}
        self.bar = tqdm(total=total_steps, initial=step, disable=not self.has_bar, **options)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.shown:
            self.tracker.close()

    def advance(self, metrics: dict[str, float]) -> None:
        """Move the bar by one step."""
        self.bar.set_postfix_str(describe(metrics), refresh=False)
        self.bar.update()

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.has_bar:
            self.bar.write(text)
        elif self.shown:
            print(text, flush=True)

    def write(self, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; without a bar, also print it if it is time. Raises UserError if the disk is
        full."""
        if not self.shown:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self.tracker.track(metrics)
        if "loss" in metrics and not self.has_bar and time.monotonic() >= self.next_line:
            self.print(f"step {metrics['step']} of {self.total_steps}: {describe(metrics)}")
            self.next_line = time.monotonic() + self.SECONDS_BETWEEN_LINES

    def finish(self, checkpoint: Path | None, counters: dict[str, float], stopped: bool) -> None:
        """Print what was saved, how to chat with it, and how to continue a run that was stopped. counters: the
        trainer's."""
        lines = [f"saved {checkpoint}{'; the same command with --resume continues from there' if stopped else ''}"]
        lines += [f"talk to it: python chat.py {self.run}"]
        step, best, since = (counters[name] for name in ("step", "best_step", "evaluations_since"))
        if step < self.total_steps and not stopped:
            lines += [f"ended after {step} of {self.total_steps} steps: {since} evaluations without a lower eval_loss"]
        if since:
            place = self.run / f"checkpoints/step-{best:06}"
            lines += [f"eval_loss was lowest after step {best}, {counters['best_loss']:.4f}; --save-best keeps {place}"]
        self.bar.close()
        self.print("\n".join(lines))


def describe(metrics: dict[str, float]) -> str:
    """Return the metrics that a person watches, as text."""
    return "loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, expert load {expert_load:.1f}".format(**metrics)
