"""The command line: config.py's dataclasses as flags, flags that could do nothing, errors as one line, signals."""

import contextlib
import hashlib
import io
import math
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro

from config import PRESETS, RopeScaling, TrainConfig, UserError, check
from files import reader_has_left
from launch.run_directory import saved_configuration

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
        if isinstance(error, BrokenPipeError) and reader_has_left(1):
            sys.exit(141)
        if debug:
            raise
        if says_it_first(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes what is left once more


def says_it_first(message: str) -> bool:
    """Whether no other process that torchrun has started on this machine has printed the same error. They have a
    directory in common, in which torchrun looks for what each of them has died of."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return True
    try:
        Path(place).parent.with_name(hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# Ctrl-C, what schedulers send, and what a terminal sends that closes.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """A context in which STOP_SIGNALS do no more than set `number`: the run saves and leaves after its step.

    Schedulers and torchrun send the same signal to a process and to its whole group, so that it comes twice or more.
    Only a second Ctrl-C by a person, who takes a moment for it, leaves the process at once.
    """

    A_MOMENT = 1.0  # seconds

    def __init__(self, shown: bool = True) -> None:
        """shown: say that the signal was heard."""
        self.number, self.interrupted, self.shown = 0, math.inf, shown

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
        if self.shown and not self.number:
            with contextlib.suppress(OSError):  # written past Python's buffers, which the signal may have come into
                os.write(2, b"\nfinishing this step, then saving; Ctrl-C once more leaves at once\n")
        self.number = self.number or number


def leave_terminal() -> None:
    """Print nowhere from now on if it was to a terminal: that one is gone, and printing to it would be an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# ---------------------------------------------------------------- train_sft.py's flags

# What other trainers, or people in a hurry, call our fields.
CALLED_ELSEWHERE = {
    "lr": "learning-rate",
    "bs": "batch-size",
    "per-device-train-batch-size": "batch-size",
    "per-device-eval-batch-size": "batch-size",
    "grad-accum": "gradient-accumulation-steps",
    "max-length": "max-seq-len",
    "model-name-or-path": "init-from",
    "dataset-name": "dataset",
    "lora-r": "lora-rank",
    "lr-min": "min-learning-rate-ratio",
    "bf16": "dtype bfloat16",
    "fp32": "dtype float32",
}


def parse_arguments(arguments: list[str], description: str | None = None) -> TrainConfig:
    """train_sft.py's: the preset, or with --resume the configuration that the run has kept, with the fields that the
    command line overrides. Raises UserError."""
    preset, flags = "", list(arguments)
    if flags and not flags[0].startswith("-"):
        preset = flags.pop(0)
        check(preset in PRESETS, f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    elif "-h" in flags or "--help" in flags:
        preset = "tiny"
    given = given_fields(flags)
    if not preset and not given >= {"resume", "output_dir"}:
        import torch

        preset = "mini" if torch.cuda.is_available() else "tiny"
        print(f"preset {preset}: there is {'a' if preset == 'mini' else 'no'} CUDA device")
    config = parse_fields(PRESETS[preset or "tiny"], flags, preset, description)
    directory = config.checkpoint.output_dir or f"runs/{preset}"
    if config.checkpoint.resume:
        config = parse_fields(saved_configuration(directory), flags, preset, description)
    if "num_train_epochs" in given and "max_steps" not in given:
        config = config.changed(max_steps=0)
    start = config.checkpoint.init_from
    return config.changed(output_dir=directory, init_from=None if start in ("none", "None") else start)


def parse_fields(default: TrainConfig, flags: list[str], preset: str, description: str | None) -> TrainConfig:
    """`default` with the fields that the flags name. Raises UserError, with a hint at what may have been meant."""
    if any(name.startswith("model.rope_scaling.") for name in given_fields(flags)):  # any of them turns it on
        yarn = default.model.rope_scaling or RopeScaling()
        default = replace(default, model=replace(default.model, rope_scaling=yarn))
    try:
        return parse_flags(TrainConfig, flags, f"train_sft.py {preset}".strip(), description, default=default)
    except UserError as error:
        raise UserError("; ".join([str(error), *hints(flags)])) from None


def given_fields(flags: list[str]) -> frozenset[str]:
    """The fields that a command line names, whatever their values: {"packing", "model.hidden_size"}."""
    names = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    return frozenset(re.sub(r"(^|\.)no_", r"\1", name) for name in names)


def hints(flags: list[str]) -> Iterator[str]:
    """What may have been meant by flags that were not understood."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    for word, value in pairwise([*words, ""]):
        name = word.removeprefix("--").replace("_", "-")
        if word.startswith("--") and name in CALLED_ELSEWHERE:
            yield f"{word} is --{CALLED_ELSEWHERE[name]} here"
        if word.startswith("--") and value.lower() in ("true", "false"):
            yield f"a switch has no value: say --{name} or --no-{name}"
        if word in PRESETS:
            yield f"a preset comes before the flags: train_sft.py {word} ..."


def useless_flags(config: TrainConfig, given: Collection[str], world_size: int) -> list[str]:
    """Why fields that the command line names can have no effect in this run: a sentence for each of them.

    config: the complete one. given: see given_fields.
    """
    start, lora, steps, model = config.checkpoint.init_from, config.lora, config.batch.max_steps, config.model
    without_lora = ("lora_alpha", "lora_dropout", "lora_target_modules")
    tokenizer = config.data.tokenizer
    of_groups = ("model.topk_group", "model.device_aux_loss_alpha", "model.communication_aux_loss_alpha")
    balanced = model.device_aux_loss_alpha or model.communication_aux_loss_alpha
    quiet, prompts = not config.watch.eval_steps, config.watch.sample_prompts
    alone = world_size == config.watch.dry_run_ranks == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    reasons = [
        (("tokenizer",), start, f"init_from brings its own tokenizer, that of {start}"),
        (("model.vocab_size",), not start and tokenizer != "cl100k_base", f"{tokenizer} brings its own vocabulary"),
        (("model.initializer_range",), start, f"init_from brings its own weights, those of {start}"),
        (("dry_run_ranks", "dry_run_share"), not config.watch.dry_run, "this is no dry run; add --dry-run"),
        (
            ("parallel",),
            alone and config.watch.dry_run_ranks == 1,
            "this is one process; start several: torchrun --nproc_per_node N train_sft.py ...",
        ),
        (without_lora, not lora.lora_rank, "lora_rank is 0: there are no adapters"),
        (("eval_split", "eval_fraction", "eval_max_rows"), quiet, "eval_steps is 0: nothing is evaluated"),
        (("sample_prompts",), quiet and prompts, "eval_steps is 0, and samples are shown at evaluations"),
        (("num_train_epochs",), steps, f"max_steps is {steps}, and counts; leave one of them out"),
        (of_groups, model.n_group == 1, "model.n_group is 1: there are no groups to choose from or to balance"),
        (
            ("model.n_group",),
            model.topk_method == "greedy" and not balanced,
            "model.topk_method greedy knows no groups, and no balance loss of groups is asked for",
        ),
    ]
    return [f"{name} has no effect: {why}" for names, true, why in reasons if true for name in names if name in given]


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
