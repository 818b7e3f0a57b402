"""The command line: config.py's dataclasses as flags, errors as one line, signals, lost terminals."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import tyro

from config import PRESETS, RopeScaling, TrainConfig, UserError
from files import printable

# ---------------------------------------------------------------- errors and output

# What Gloo and NCCL report on the surviving ranks when another one has died.
PEER_DIED = ("closed by peer", "reset by peer", "remote process exited", "communicator was aborted")


@contextlib.contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Print errors that the user can fix (including a full disk) as one line, and exit with 2; with `debug`, keep
    Python's traceback. Ctrl-C exits with 130 and `| head` with 141, as in a shell. A rank of a job in which another one
    has died exits with 1, and leaves the reason to torchrun."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks becomes a question mark
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():
            sys.exit(141)
        if debug:
            raise
        if report_to_torchrun(f"error: {printable(str(error))}"):
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        leave(2)
    except RuntimeError as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ or not any(words in str(error) for words in PEER_DIED):
            raise
        report_to_torchrun("another rank has failed")
        leave(1)
    finally:
        flush_or_discard(sys.stdout)
        flush_or_discard(sys.stderr)


def reader_has_left() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # on Windows
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def leave(code: int) -> None:
    """Exit with a code."""
    flush_or_discard(sys.stdout)
    group = sys.modules.get("torch.distributed")
    if group and group.is_initialized():  # a rank that exits with its group can hang in Gloo's destructors
        os._exit(code)
    sys.exit(code)


def flush_or_discard(stream: Any) -> None:
    """Flush a stream. If its reader has left or the disk is full, discard what it holds: Python would try again at
    exit, and report the error."""
    try:
        if stream is not None:  # closed by the shell
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LastingStream:
    """Wraps a text stream so that a run outlives its terminal, its pipe or the space on its disk: output that cannot
    be written is discarded."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except OSError:
            self.flush()

    def flush(self) -> None:
        flush_or_discard(self.stream)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Wrap standard output and standard error as LastingStreams."""
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with contextlib.redirect_stdout(cast(Any, out)), contextlib.redirect_stderr(cast(Any, err)):
        yield


def report_to_torchrun(message: str) -> bool:
    """Under torchrun, leave it an error to print next to the rank. Return whether no other process of the job on this
    machine has reported the same one: they share a directory, in which torchrun collects their errors."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return True
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    Path(place).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
    try:
        Path(place).parent.with_name(hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# ---------------------------------------------------------------- signals

# Ctrl-C, what schedulers send, and what a closing terminal sends (not on Windows).
STOP_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopSignal:
    """Context in which STOP_SIGNALS only set `number`: the run finishes its step, saves and exits.

    Schedulers and torchrun send the same signal to a process and to its group, so it arrives twice or more. Only a
    second Ctrl-C that comes a second later, from a person, ends the process at once.
    """

    def __init__(self, shown: bool = True) -> None:
        """shown: print a line when the first signal arrives."""
        self.number, self.interrupted, self.shown = 0, math.inf, shown

    def __enter__(self) -> None:
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores
        self.handlers = {number: signal.signal(number, self.note) for number in handled}

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:  # after an error the process exits, and further signals must not disturb it
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if time.monotonic() > self.interrupted + 1.0:
                os._exit(128 + number)
            self.interrupted = min(self.interrupted, time.monotonic())
        if self.shown and not self.number:
            with contextlib.suppress(OSError):  # bypasses Python's buffers, which the signal may have interrupted
                os.write(2, b"\nfinishing this step, then saving; press Ctrl-C again to exit at once\n")
        self.number = self.number or number


# ---------------------------------------------------------------- flags


class Arguments(NamedTuple):
    """A command line of train_sft.py."""

    preset: str
    flags: list[str]
    given: frozenset[str]  # fields that the flags set, see given_fields
    config: TrainConfig  # the preset's, with the flags

    def over(self, default: TrainConfig) -> TrainConfig:
        """Return `default` with the fields that the flags set. Epochs that are given replace its number of steps."""
        model, names = default.model, {name.removeprefix("model.") for name in self.given}
        if any(name.startswith("rope_scaling.") for name in names):  # any of its fields turns it on
            model = replace(model, rope_scaling=model.rope_scaling or RopeScaling())
        default = replace(default, model=model, changed_fields=default.changed_fields.union(names))
        config = parse_flags(TrainConfig, args=self.flags, prog=f"train_sft.py {self.preset}", default=default)
        if "num_train_epochs" in self.given and "max_steps" not in self.given:
            config = config.changed(max_steps=0)
        return config if config.checkpoint.init_from not in ("none", "None") else config.changed(init_from=None)


def parse_arguments(words: list[str]) -> Arguments:
    """Parse the command line of train_sft.py. Raises UserError for an unknown preset; tyro exits for unknown flags."""
    preset, flags = "", list(words)
    if flags and not flags[0].startswith("-"):
        preset = flags.pop(0)
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    given = given_fields(flags)
    if not preset and {"-h", "--help"} & set(flags):
        preset = "tiny"  # without the slow import of torch
    elif not preset:
        import torch

        preset = "mini" if torch.cuda.is_available() else "tiny"
        if "resume" not in given:  # a resumed run has its own configuration
            print(f"preset {preset}: there is {'a' if preset == 'mini' else 'no'} CUDA device")
    default = PRESETS[preset]
    if "dataset" in given and "max_steps" not in given:  # a preset's number of steps is for its own dataset
        default = default.changed(max_steps=0)
    arguments = Arguments(preset, with_resume_value(flags), given, default)
    config = arguments.over(default)
    return arguments._replace(config=config.changed(output_dir=config.checkpoint.output_dir or f"runs/{preset}"))


def with_resume_value(flags: list[str]) -> list[str]:
    """Return the flags with a value for `--resume`, whose default is True: tyro needs one, since it may be auto."""
    values = {"--resume": "--resume=True", "--no-resume": "--resume=False"}
    following = [*flags, "--"][1:]
    return [values.get(f, f) if then.startswith("-") else f for f, then in zip(flags, following, strict=True)]


def given_fields(flags: list[str]) -> frozenset[str]:
    """Return the fields that the flags set, e.g. {"packing", "model.hidden_size"}, whatever their values."""
    names = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    return frozenset(re.sub(r"(^|\.)no_", r"\1", name) for name in names)


# Returns a dataclass from flags. tyro prints help and errors itself, and exits.
parse_flags = functools.partial(tyro.cli, config=(tyro.conf.AvoidSubcommands,))
