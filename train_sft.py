"""Supervised fine-tuning, from conversations to a chat model.

    python train_sft.py [tiny|mini|v2_lite] [--field value ...]
    torchrun --nproc_per_node N train_sft.py ... --parallel ddp|fsdp|hsdp

Without a preset: mini where there is CUDA, else tiny. All fields, their defaults and reasons stand in config.py.
"""

import os
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import TrainConfig, UserError, check
from engine.cli import given_fields, one_line_errors, parse_arguments, useless_flags

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
    """Config -> tokenizer -> data -> model -> trainer; each of the functions below makes one of them.

    given: the fields that the command line names (engine/cli.py), which have to have an effect.
    """
    import torch

    from engine.build import build_model, describe
    from engine.data_report import write_skipped
    from engine.job import agents, check_shared_files, is_own_run
    from engine.run_directory import NO_TRACKER, check_changes, check_start, open_run, start_tracker
    from parallel import replicate
    from tokenizer import load_tokenizer
    from trainer import Trainer

    run = config.checkpoint.output_dir
    check_shared_files(run, world)
    goes_on = config.checkpoint.resume or is_own_run(run, world)
    checkpoint = checkpoint_to_resume(run, world) if goes_on else None
    config = name_start(config, given, checkpoint, world)
    source = find_source(config, checkpoint, world)
    tokenizer = load_tokenizer(config, source, goes_on=checkpoint is not None)
    config = resolve(config, given, source, tokenizer, world).changed(resume=goes_on)
    check_start(config)
    if world.is_main and config.checkpoint.resume:
        check_changes(config)
    if config.watch.dry_run:
        plan(config, given, tokenizer, world)
        return
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
        to_come = (trainer.total_steps - trainer.step) * trainer.rows_per_step
        epochs = (trainer.rows_seen + to_come) / train_rows.rows_per_epoch
        print(
            f"{describe(model)}; step {trainer.step} to {trainer.total_steps} of {trainer.rows_per_step} rows "
            f"({epochs:.3g} epochs) on {world.size} x {world.device} in {config.compute.dtype} into {run}"
        )
    trainer.train(tracker)


def checkpoint_to_resume(run: str, world: "World") -> Path | None:
    """The newest good one, as the first process sees it; None where there is none yet. Raises UserError if all are
    damaged."""
    from checkpoint import checkpoints, newest_checkpoint
    from engine.job import look_up

    checkpoint = look_up(lambda: newest_checkpoint(run), world)
    damaged = checkpoint is None and checkpoints(run)
    check(not damaged, f"{run} has no checkpoint left that is whole; start without --resume")
    return checkpoint


def name_start(config: TrainConfig, given: Collection[str], checkpoint: Path | None, world: "World") -> TrainConfig:
    """With the model directory that init_from stands for, whose tokenizer is taken too. What a resumed run has noted of
    them stays, wherever that lies by now."""
    from checkpoint import resolve_model
    from engine.job import look_up

    base = config.checkpoint.init_from
    noted = checkpoint and config.checkpoint.resume and "init_from" not in given
    if base is None or noted:
        return config
    start = str(look_up(lambda: resolve_model(base), world))
    return config.changed(init_from=start, tokenizer=start)


def find_source(config: TrainConfig, checkpoint: Path | None, world: "World") -> Path | None:
    """The directory of the model whose tokenizer and shape a run has, and whose weights it trains or adapts: where it
    goes on, its own checkpoint or that one's base, which may both have moved. None for a run from scratch."""
    from engine.adapter_base import model_directory
    from engine.job import look_up

    base = config.checkpoint.init_from
    if base is None or checkpoint is None:
        return Path(base) if base else None
    return look_up(lambda: model_directory(checkpoint), world)


def resolve(
    config: TrainConfig, given: Collection[str], source: Path | None, tokenizer: "Tokenizer", world: "World"
) -> TrainConfig:
    """The complete configuration, as the run has it and keeps it: with what `source` (see find_source), the tokenizer
    and the device decide. Raises UserError for one that no run can have, or that leaves a flag no effect."""
    from engine.hub_config import changed_config, load_config
    from parallel import choose_dtype

    dtype = choose_dtype(config.compute.dtype, world.device)
    config = config.changed(dtype=dtype, chat_template=tokenizer.chat_template)
    if source:
        kept = {f"model.{name}" for name in vars(config.model)} if config.checkpoint.resume else set()
        loaded = load_config(source)
        if tokenizer.new_ids:
            loaded = replace(loaded, vocab_size=max(loaded.vocab_size, tokenizer.vocab_size))
        model = changed_config(loaded, config.model, kept | set(given), source)
        config = config.changed(model=model)
    else:
        config = config.changed(vocab_size=tokenizer.vocab_size)
    config.validate()
    useless = useless_flags(config, given, world.size)
    check(not useless, "; ".join(useless))
    return config


def plan(config: TrainConfig, given: Collection[str], tokenizer: "Tokenizer", world: "World") -> None:
    """A dry run: what the run would see, and what it would take. That needs no data: where the Hub cannot be reached,
    it is said. Raises UserError for data that no run can have."""
    from engine.dry_run import report

    try:
        load_rows(config, given, tokenizer, world)
    except UserError as error:
        if world.size > 1 or not isinstance(error.__cause__, ConnectionError):
            raise
        print(f"note: {error}")
    if world.size == 1:
        print(report(config))


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


def load_rows(
    config: TrainConfig, given: Collection[str], tokenizer: "Tokenizer", world: "World"
) -> tuple["RowStream", "RowStream | None", list[dict[str, Any]]]:
    """What is trained on and what is held out, in rows; and the malformed rows that were skipped. Raises UserError for
    an eval_fraction that was told and that no source needs."""
    from datacollator import DataCollator, RowStream
    from dataset import load_data
    from engine.data_view import table
    from parallel import first_process_first, from_all_ranks

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


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        config, given = parse_arguments(sys.argv[1:], __doc__), given_fields(sys.argv[1:])

        from parallel import join_world, leave_world, recorded

        world = join_world(config.compute.device, config.watch.dry_run)
        recorded(train)(config, given, world)
        leave_world()


if __name__ == "__main__":
    main()
