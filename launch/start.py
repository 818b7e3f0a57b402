"""How a run starts: its complete configuration, its tokenizer, and the weights and the checkpoint that it continues.

preset or saved run ──flags──▶ what checkpoint, tokenizer and device decide ──▶ Start, which is only read
"""

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from checkpoint import checkpoints, load_config, newest_checkpoint, resolve_base, resolve_checkpoint, resolve_model
from config import PRESETS, ModelConfig, TrainConfig, UserError
from dataset import parse_source
from hub.config_json import changed_config
from launch import run_directory
from launch.command_line import Arguments
from launch.run_directory import changes_between, fixed_changes, lock_path, saved_configuration, this_process
from parallel import World, choose_dtype, first_process_first, from_first_rank, require_same
from tokenizer import Tokenizer


class Start(NamedTuple):
    config: TrainConfig  # complete, as the run's config.json holds it
    tokenizer: Tokenizer
    source: Path | None  # model directory whose weights are trained or adapted; None: new weights, or the checkpoint's
    checkpoint: Path | None  # where a resumed run continues; None: at step 0
    given: Collection[str]  # fields that flags set


def find_start(arguments: Arguments, world: World) -> Start:
    """Resolve a command line into a `Start`. Nothing changes on disk. Raises UserError for a run that cannot start."""
    asked, preset = arguments.config, arguments.preset
    run = Path(asked.checkpoint.output_dir)
    resume = asked.checkpoint.resume
    if not (asked.watch.dry_run or asked.watch.evaluate_only):
        if not resume and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError("--max-restarts needs --resume auto, so that a restarted job continues its run")
        check_shared_files(run, world)
    new = None if resume is True else resolve(asked.changed(resume=False), arguments.given, preset, None, world)
    if new and not (resume == "auto" and from_first_rank(run_directory.holds_a_run(run), world)):
        return new
    saved = saved_configuration(run)
    if new and (obstacles := fixed_changes(saved, new.config)):
        if world.is_main:
            print(f"{run} is a run with another configuration ({', '.join(obstacles)}); starting anew")
        return new
    config = arguments.over(saved)
    checkpoint = look_up(lambda: newest_checkpoint(run), world)
    if checkpoint is None and checkpoints(run):
        raise UserError(f"{run} has no undamaged checkpoint; start without --resume")
    start = resolve(config.changed(output_dir=str(run), resume=True), arguments.given, preset, checkpoint, world)
    obstacles, changes = fixed_changes(saved, start.config), ", ".join(changes_between(saved, start.config).values())
    if obstacles:
        raise UserError(f"{run} cannot be resumed with another configuration: {', '.join(obstacles)}")
    if world.is_main:
        print(f"resuming {run} with {f'changes: {changes}' if changes else 'its own configuration'}")
    return start


def resolve(config: TrainConfig, given: Collection[str], preset: str, checkpoint: Path | None, world: World) -> Start:
    """Complete a configuration from top to bottom. given: fields that flags set. checkpoint: the resumed run's.

    Raises UserError for a configuration that no run can have, or if a flag would change nothing that is learned.
    """
    # places, absolute so that the run can be resumed from anywhere
    base = config.checkpoint.init_from
    if base and ("init_from" in given or not config.checkpoint.resume):
        find = resolve_checkpoint if config.watch.evaluate_only else resolve_model
        found = look_up(lambda: find(str(base)).absolute(), world)
        config = config.changed(init_from=str(found), tokenizer=str(found))
    config = config.changed(dataset=tuple(map(absolute, config.data.dataset)))
    # weights: those of the checkpoint, or of the base that its adapters need
    source = Path(config.checkpoint.init_from) if config.checkpoint.init_from else None
    adapter = source if config.watch.evaluate_only else checkpoint
    if source and adapter:
        source = look_up(lambda: resolve_base(adapter)[0], world)
    # model and tokenizer
    config = config.changed(model=model_shape(config, preset, source))
    name = str(source or config.data.tokenizer)
    vocab_size = config.model.vocab_size if name == "cl100k_base" else None
    tokenizer = Tokenizer(name, vocab_size, config.data.chat_template, config.data.add_control_tokens)
    if "add_control_tokens" in given and not (checkpoint or tokenizer.new_ids):
        raise UserError(f"add_control_tokens has no effect: {name} has all that the chat template needs")
    ids, rows = tokenizer.vocab_size, config.model.vocab_size if source else 0  # rows of the embedding
    if source and ids > rows and not tokenizer.new_ids:
        raise UserError(f"{name}: the tokenizer has {ids} ids, but the embedding only {rows} rows")
    config = config.changed(vocab_size=max(ids, rows), chat_template=tokenizer.chat_template)
    # device
    config = config.changed(dtype=choose_dtype(config.compute.dtype, world.device))
    config.validate()
    refuse_useless_flags(config, given)
    run_directory.check_start(config)
    return Start(config, tokenizer, source, checkpoint, given)


def absolute(dataset: str) -> str:
    """Return the name of a dataset, with an absolute path if it is a local one."""
    name, weight = parse_source(dataset)
    return str(Path(name).absolute()) + f":{weight}" * (weight > 1) if Path(name).exists() else dataset


def model_shape(config: TrainConfig, preset: str, source: Path | None) -> ModelConfig:
    """Return the shape of the weights, or from scratch that of the preset's checkpoint, with the changes of the
    configuration. Raises UserError if they contradict the weights."""
    if source:
        return changed_config(load_config(source), config.model, config.model_changes, source)
    start = PRESETS[preset].checkpoint.init_from
    shape = load_config(resolve_model(start)) if start else ModelConfig()
    names = {name.split(".")[0] for name in config.model_changes}
    return replace(shape, **{name: getattr(config.model, name) for name in names})


def refuse_useless_flags(config: TrainConfig, given: Collection[str]) -> None:
    """Raise UserError if flags have no effect, so that something else would be learned than the user thinks."""
    start, model, tokenizer = config.checkpoint.init_from, config.model, config.data.tokenizer
    balanced = model.device_aux_loss_alpha or model.communication_aux_loss_alpha
    ungrouped = model.topk_method == "greedy" and not balanced
    losses = "model.device_aux_loss_alpha model.communication_aux_loss_alpha"
    of_model = " ".join(name for name in given if name.startswith("model."))
    steps = config.batch.max_steps
    reasons = [
        (of_model, config.watch.evaluate_only, "evaluate_only takes the model as it is"),
        ("tokenizer", start, f"init_from brings its own tokenizer, that of {start}"),
        ("model.vocab_size", not start and tokenizer != "cl100k_base", f"{tokenizer} brings its own vocabulary"),
        ("lora_alpha lora_dropout lora_target_modules", not config.lora.lora_rank, "lora_rank is 0"),
        ("eval_fraction", not config.watch.eval_steps, "eval_steps is 0: all conversations are trained on"),
        ("num_train_epochs", steps, f"max_steps is {steps} and takes precedence; leave one of them out"),
        (losses, model.n_group == 1, "it needs n_group > 1"),
        ("model.n_group model.topk_group", ungrouped, "it needs group_limited_greedy or a loss over groups"),
    ]
    for names, applies, why in reasons:
        for name in names.split():
            if applies and name in given:
                raise UserError(f"{name} has no effect: {why}")


# ---------------------------------------------------------------- several ranks


def look_up(find: Callable[[], Path | None], world: World) -> Path | None:
    """Return the directory that `find` returns on the first rank: a rank that looked for itself could see another
    step of a run that is being written. Raises UserError if a rank sees other files there."""
    with first_process_first(world):  # it reads all of a large checkpoint
        found = find() if world.is_main else None
    path = from_first_rank(found, world)
    require_same(fingerprint(path), f"sees other files at {path} than the first rank does", world)
    return path


def fingerprint(directory: Path | None) -> str:
    """Return a hash of the files' names and sizes, and of JSON files, which hold a checkpoint's checksums."""
    found = sorted(directory.iterdir()) if directory and directory.is_dir() else []
    files = [file for file in found if file.is_file()]
    known = [(f.name, f.stat().st_size, f.read_bytes() if f.suffix == ".json" else b"") for f in files]
    return hashlib.sha256(repr(known).encode()).hexdigest()


def check_shared_files(run: str | Path, world: World) -> None:
    """Raise UserError if a rank does not see the first rank's lock of the run, and so not what it will write."""
    place, expected = lock_path(run), from_first_rank(this_process(), world)
    # The first rank must not read its lock: closing the file would release it.
    sees_it = world.is_main or (place.is_file() and place.read_text().strip() == expected)
    unseen = f"does not see what the first rank writes in {place.parent}"
    require_same(sees_it, f"{unseen}: all nodes need a shared file system; put output_dir there", world)
