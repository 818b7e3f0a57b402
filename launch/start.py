"""Where a run starts: with which configuration, tokenizer and weights, and after which checkpoint."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from checkpoint import checkpoints, load_config, newest_checkpoint, resolve_model
from config import TrainConfig, check
from hub.config_json import changed_config
from hub.peft import model_directory
from launch.command_line import useless_flags
from launch.job import check_shared_files, is_own_run, look_up
from launch.run_directory import check_changes, check_start
from parallel import World, choose_dtype
from tokenizer import Tokenizer, load_tokenizer


class Start(NamedTuple):
    config: TrainConfig  # complete, as the run has it and keeps it
    tokenizer: Tokenizer
    source: Path | None  # the model whose tokenizer and shape the run has; see find_source
    checkpoint: Path | None  # that the run goes on from; None for a new one


def find_start(config: TrainConfig, given: Collection[str], world: World) -> Start:
    """Of what the command line says. given: the fields that it names, which have to have an effect.

    Nothing has changed on disk yet. Raises UserError for a run that cannot start so.
    """
    run = config.checkpoint.output_dir
    check_shared_files(run, world)
    goes_on = config.checkpoint.resume or is_own_run(run, world)
    checkpoint = checkpoint_to_resume(run, world) if goes_on else None
    config = name_start(config, given, checkpoint, world)
    source = find_source(config, checkpoint, world)
    tokenizer = load_tokenizer(config, source, goes_on=checkpoint is not None)
    config = resolve(config, given, source, tokenizer, world).changed(resume=goes_on)
    check_start(config)
    if world.is_main and goes_on:
        check_changes(config)
    return Start(config, tokenizer, source, checkpoint)


def checkpoint_to_resume(run: str, world: World) -> Path | None:
    """The newest good one, as the first process sees it; None where there is none yet. Raises UserError if all are
    damaged."""
    checkpoint = look_up(lambda: newest_checkpoint(run), world)
    damaged = checkpoint is None and checkpoints(run)
    check(not damaged, f"{run} has no checkpoint left that is whole; start without --resume")
    return checkpoint


def name_start(config: TrainConfig, given: Collection[str], checkpoint: Path | None, world: World) -> TrainConfig:
    """With the model directory that init_from stands for, whose tokenizer is taken too. What a resumed run has noted of
    them stays, wherever that lies by now."""
    base = config.checkpoint.init_from
    noted = checkpoint and config.checkpoint.resume and "init_from" not in given
    if base is None or noted:
        return config
    start = str(look_up(lambda: resolve_model(base), world))
    return config.changed(init_from=start, tokenizer=start)


def find_source(config: TrainConfig, checkpoint: Path | None, world: World) -> Path | None:
    """The directory of the model whose tokenizer and shape a run has, and whose weights it trains or adapts: where it
    goes on, its own checkpoint or that one's base, which may both have moved. None for a run from scratch, whose
    configuration says both."""
    base = config.checkpoint.init_from
    if base is None or checkpoint is None:
        return Path(base) if base else None
    return look_up(lambda: model_directory(checkpoint), world)


def resolve(
    config: TrainConfig, given: Collection[str], source: Path | None, tokenizer: Tokenizer, world: World
) -> TrainConfig:
    """The complete configuration, as the run has it and keeps it: with what `source` (see find_source), the tokenizer
    and the device decide. Raises UserError for one that no run can have, or that leaves a flag no effect."""
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
