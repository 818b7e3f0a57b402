"""The command line: config.py's dataclasses as flags, and errors as one line, and signals."""

import contextlib
import io
import math
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import tyro

from config import PRESETS, RopeScaling, TrainConfig, UserError, check

Config = TypeVar("Config")


@contextlib.contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Print what the user can mend (a full disk and the like too) as one line and exit with 2; with `debug`, let Python
    show where it came from. Ctrl-C exits with 130 and `| head` with 141, as in a shell."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and nobody_reads_output():
            sys.exit(141)
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes what is left once more


def nobody_reads_output() -> bool:
    """Whether standard output is a pipe that was closed at its other end: a pipe of our own may break, too."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


# Ctrl-C, what schedulers send, and what a terminal sends that closes.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """A context in which STOP_SIGNALS do no more than set `number`: the run saves and leaves after its step.

    Schedulers and torchrun send the same signal to a process and to its whole group, so that it comes twice or more.
    Only a second Ctrl-C by a person, who takes a moment for it, leaves the process at once.
    """

    A_MOMENT = 1.0  # seconds

    def __init__(self) -> None:
        self.number, self.interrupted = 0, math.inf

    def __enter__(self) -> "StopSignal":
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup wants it
        self.handlers = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:  # else the process is about to leave, and another signal may still come
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if time.monotonic() > self.interrupted + self.A_MOMENT:
                os._exit(128 + number)
            self.interrupted = min(self.interrupted, time.monotonic())
        if number == signal.SIGHUP:
            leave_terminal()
        self.number = self.number or number


def leave_terminal() -> None:
    """Print nowhere from now on if it was to a terminal: that one is gone, and printing to it would be an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def parse_arguments(arguments: list[str], description: str | None = None) -> TrainConfig:
    """train_sft.py's: the preset, with the fields that the command line overrides. Raises UserError."""
    preset, flags = "", list(arguments)
    if flags and not flags[0].startswith("-"):
        preset = flags.pop(0)
        check(preset in PRESETS, f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    elif "-h" in flags or "--help" in flags:
        preset = "tiny"
    else:
        import torch

        preset = "mini" if torch.cuda.is_available() else "tiny"
        print(f"preset {preset}: there is {'a' if preset == 'mini' else 'no'} CUDA device")
    default = PRESETS[preset]
    if any(flag.replace("_", "-").startswith("--model.rope-scaling.") for flag in flags):  # any of them turns it on
        yarn = default.model.rope_scaling or RopeScaling()
        default = replace(default, model=replace(default.model, rope_scaling=yarn))
    config = parse_flags(TrainConfig, flags, f"train_sft.py {preset}", description, default=default)
    return config.changed(output_dir=config.checkpoint.output_dir or f"runs/{preset}")


def parse_flags(kind: type[Config], flags: list[str], prog: str, description: str | None, **options: Any) -> Config:
    """A dataclass from the command line, through tyro, whose complaints become one line. Raises UserError."""
    messages = io.StringIO()
    options |= {"prog": prog, "description": description, "config": (tyro.conf.AvoidSubcommands,)}
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(kind, args=flags, **options)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        lines = [line.strip("│| ") for line in messages.getvalue().splitlines()[1:]]  # tyro draws a box around it
        sections = " ".join(line if line.strip("─-+╰╯") else "\n" for line in lines).split("\n")
        raise UserError("; ".join(section.strip() for section in sections if section.strip())) from None
