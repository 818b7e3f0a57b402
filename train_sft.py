"""Supervised fine-tuning, from conversations to a chat model.

    python train_sft.py [tiny|mini|v2_lite] [--field value ...]
    torchrun --nproc_per_node N train_sft.py ... --parallel ddp|fsdp|hsdp

Without a preset: mini where there is CUDA, else tiny. All fields, their defaults and reasons stand in config.py.
"""

import os
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from config import TrainConfig, UserError, check
from launch.command_line import given_fields, one_line_errors, parse_arguments

if TYPE_CHECKING:
    from datacollator import RowStream
    from parallel import World
    from tokenizer import Tokenizer
    from trainer import Trainer

# torch takes a while to import, and --help should not wait for it: what needs torch is imported where it is used.
# On CPU, torch takes large tensors from huge pages if told so before it starts: a tenth of a step otherwise goes
# into handing out small ones.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# On CPU, oneDNN generates code for each shape and keeps it. Packed batches hardly ever repeat one, so it would pile up.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def train(config: TrainConfig, given: Collection[str], world: "World") -> None:
    """Config -> tokenizer -> data -> model -> trainer, each made by one call.

    given: the fields that the command line names (launch/command_line.py), which have to have an effect.
    """
    import torch

    from data.report import write_skipped
    from launch.build import build_model
    from launch.job import agents
    from launch.run_directory import NO_TRACKER, open_run, start_tracker
    from launch.start import find_start
    from parallel import replicate
    from trainer import Trainer

    config, tokenizer, source, checkpoint = find_start(config, given, world)
    if config.watch.dry_run:
        return plan(config, given, tokenizer, world)
    train_rows, held_out, skipped = load_rows(config, given, tokenizer, world)

    torch.manual_seed(config.compute.seed)
    model = build_model(config, source or checkpoint, world, checkpoint, tokenizer.new_ids)
    wrapped = replicate(model, config.compute.parallel, world)
    trainer = Trainer(config, wrapped, tokenizer, train_rows, held_out, world, source)
    if checkpoint:
        trainer.resume(checkpoint)
    check_length(config, given, trainer)

    job, tracker = agents(world), NO_TRACKER
    if world.is_main:
        tracker = start_tracker(config, trainer.step)
        open_run(config, job, tracker)
        if skipped:
            print(write_skipped(config.checkpoint.output_dir, skipped))
        announce(trainer)
    trainer.train(tracker)


def load_rows(
    config: TrainConfig, given: Collection[str], tokenizer: "Tokenizer", world: "World"
) -> tuple["RowStream", "RowStream | None", list[dict[str, Any]]]:
    """What is trained on and what is held out, in rows; and the malformed rows that were skipped. Raises UserError for
    an eval_fraction that was told and that no source needs."""
    from datacollator import DataCollator, RowStream
    from dataset import load_data
    from parallel import first_process_first, from_all_ranks
    from view.terminal import table

    options, seed = config.data, config.compute.seed
    with first_process_first(world):
        data = load_data(options, tokenizer, seed, want_eval=config.watch.eval_steps > 0)
    useless = f"eval_fraction has no effect: all that is trained on has a split {options.eval_split!r} to evaluate on"
    check(data.divided or "eval_fraction" not in given, useless)
    collator = DataCollator(options.max_seq_len, tokenizer.pad_token_id, options.packing)
    train = RowStream(data.train, collator, seed, options.shuffle)
    unequal = f"{', '.join(options.dataset)}: not all ranks have read the same rows; give all nodes the same data"
    check(len(set(from_all_ranks(train.fingerprint, world))) == 1, unequal)
    if world.is_main:
        print(
            *data.notes, *([table(data, train, config, world.size)] if config.watch.dry_run else data.reports), sep="\n"
        )
    # Shuffled, so that the first rows of it are a fair sample.
    return train, RowStream(data.held_out, collator, seed) if data.held_out else None, data.skipped


def check_length(config: TrainConfig, given: Collection[str], trainer: "Trainer") -> None:
    """Refuse a run whose end lies behind it. One that is over before its warm-up is said, or refused if that was told.
    Raises UserError."""
    step, steps, warmup = trainer.step, trainer.total_steps, config.optimizer.warmup_steps
    check(step <= steps, f"{config.checkpoint.output_dir} is at step {step}, beyond the {steps} that were asked for")
    if warmup > steps:
        never = f"warmup_steps is {warmup}, but there are {steps} steps: the learning rate never reaches its peak"
        check("warmup_steps" not in given, never)
        if trainer.world.is_main:
            print(f"note: {never}")


def announce(trainer: "Trainer") -> None:
    """What is about to be trained, for how long, on what and where."""
    from launch.build import parameter_summary

    config, world, rows = trainer.config, trainer.world, trainer.rows_per_step
    to_come = (trainer.total_steps - trainer.step) * rows
    epochs = (trainer.rows_seen + to_come) / trainer.train_rows.rows_per_epoch
    print(
        f"{parameter_summary(trainer.plain_model)}; step {trainer.step} to {trainer.total_steps} of {rows} rows "
        f"({epochs:.3g} epochs) on {world.size} x {world.device} in {config.compute.dtype} "
        f"into {config.checkpoint.output_dir}"
    )


def plan(config: TrainConfig, given: Collection[str], tokenizer: "Tokenizer", world: "World") -> None:
    """A dry run: what the run would see, and what it would take. That needs no data: where the Hub cannot be reached,
    it is said. Raises UserError for data that no run can have."""
    from launch.dry_run import report

    try:
        load_rows(config, given, tokenizer, world)
    except UserError as error:
        if world.size > 1 or not isinstance(error.__cause__, ConnectionError):
            raise
        print(f"note: {error}")
    if world.size == 1:
        print(report(config))


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        config, given = parse_arguments(sys.argv[1:], __doc__), given_fields(sys.argv[1:])

        from parallel import join_world, leave_world, recorded

        world = join_world(config.compute.device, config.watch.dry_run)
        recorded(train)(config, given, world)
        leave_world()


if __name__ == "__main__":
    main()
