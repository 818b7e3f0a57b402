"""Supervised fine-tuning, from conversations to a chat model.

    python train_sft.py [tiny|mini|v2_lite] [--field value ...]
    torchrun --nproc_per_node N train_sft.py ... --parallel ddp|fsdp

Without a preset: mini where there is CUDA, else tiny. All fields, their defaults and reasons stand in config.py.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from config import (
    FIXED_FIELDS,
    GROUPS,
    PRESETS,
    ModelConfig,
    RopeScaling,
    TrainConfig,
    UserError,
    check,
    one_line_errors,
)

if TYPE_CHECKING:
    from model import DeepSeekV2
    from parallel import World

Config = TypeVar("Config")

# torch takes a while to import, and --help should not wait for it: what needs torch is imported where it is used.
# On CPU, torch takes large tensors from huge pages if told so before it starts: a tenth of a step otherwise goes
# into handing out small ones.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# On CPU, oneDNN generates code for each shape and keeps it. Packed batches hardly ever repeat one, so it would pile up.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """The preset, with the fields that the command line overrides. Raises UserError."""
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
    parsed: Any = parse_flags(COMMAND_LINE, flags, f"train_sft.py {preset}", __doc__, default=in_groups(default))
    groups = [vars(getattr(parsed, name)) for name in GROUP_NAMES]
    config = TrainConfig(**{name: value for group in groups for name, value in group.items()}, model=parsed.model)
    config.output_dir = config.output_dir or f"runs/{preset}"
    return config


# TrainConfig's fields in groups, as --help shows them; only the model's flags have their group's name before them.
GROUP_NAMES = {group.__name__.removesuffix("Config").lower(): group for group in GROUPS}
COMMAND_LINE = make_dataclass(
    "CommandLine",
    [(name, Annotated[group, tyro.conf.OmitArgPrefixes]) for name, group in GROUP_NAMES.items()]
    + [("model", ModelConfig)],
)


def in_groups(config: TrainConfig) -> Any:
    """The same configuration as a COMMAND_LINE."""
    groups = {
        name: group(**{field.name: getattr(config, field.name) for field in fields(group)})
        for name, group in GROUP_NAMES.items()
    }
    return COMMAND_LINE(**groups, model=config.model)


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


def check_changes(config: TrainConfig) -> None:
    """Say what is new in the configuration of a run that is to be resumed. Raises UserError where it had another shape
    or other data."""
    from checkpoint import read_json

    path = Path(config.output_dir, "config.json")
    if not path.exists():
        return
    old, new = read_json(path), json.loads(json.dumps(asdict(config)))
    changed = {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}
    changed.pop("resume", None)
    fixed = {name: values for name, values in changed.items() if name in FIXED_FIELDS}
    check(not fixed, f"{path.parent} cannot be resumed with another configuration: {describe_changes(fixed)}")
    if changed:
        print(f"resuming with changes: {describe_changes(changed)}")


def open_run(config: TrainConfig) -> None:
    """Make the run directory and write the configuration into it. A run that is there and is not resumed moves aside:
    nothing is overwritten."""
    from checkpoint import disk_errors

    directory = Path(config.output_dir)
    path = directory / "config.json"
    if path.exists() and not config.resume:
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{directory}.{n}").exists())
        directory.rename(f"{directory}.{number}")
        print(f"{directory} held an earlier run, which is now {directory}.{number} (--resume would have continued it)")
    with disk_errors(path):
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")
        temporary.replace(path)


def describe_changes(changes: dict[str, tuple]) -> str:
    parts = []
    for name, (old, new) in changes.items():
        if isinstance(old, dict) and isinstance(new, dict):
            inner = {f"{name}.{key}": (old.get(key), new[key]) for key in new if old.get(key) != new[key]}
            parts.append(describe_changes(inner))
        else:
            parts.append(f"{name} {old!r} -> {new!r}")
    return ", ".join(parts)


def build_model(config: TrainConfig, source: Path | None, adapter: Path | None, world: "World") -> "DeepSeekV2":
    """The model on its device, with weights from `source` (None: new ones) and, with LoRA, its adapters.

    It is planned on the meta device and filled one tensor at a time, so that a rank never holds more than its share.
    """
    import torch

    import lora
    from checkpoint import iterate_weights
    from model import DeepSeekV2
    from parallel import load_weights, parallelize

    with torch.device("meta"):
        model = DeepSeekV2(config.model)
        if config.lora_rank:
            model.requires_grad_(False)
            if config.dtype == "bfloat16":
                model.to(torch.bfloat16)
            lora.add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    parallelize(model, model.model.layers, config.parallel, world)
    generator = torch.Generator().manual_seed(config.seed)
    load_weights(model, iterate_weights(source, config.model) if source else model.initial_weights(generator))
    if config.lora_rank:
        load_weights(model, lora.read_adapter(model, adapter) if adapter else lora.initial_weights(model, generator))
    model.model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        for block in model.model.layers:
            block.compile()
    return model


def train(config: TrainConfig, world: "World") -> None:
    """Config -> data -> model -> trainer."""
    import torch

    from checkpoint import checkpoints, load_config, newest_checkpoint, resolve_checkpoint
    from datacollator import DataCollator, RowStream
    from dataset import load_dataset_split
    from parallel import choose_dtype, from_first_rank, replicate, wait_for_all
    from tokenizer import Tokenizer
    from trainer import Trainer

    config.dtype = choose_dtype(config.dtype, world.device)
    source = resolve_checkpoint(config.init_from) if config.init_from else None
    check(source is not None or not config.lora_rank, "lora_rank needs init_from: adapters adapt a trained model")
    if source:
        config.init_from, config.tokenizer, config.model = str(source), str(source), load_config(source)
    config.validate()
    vocab_size = config.model.vocab_size if config.tokenizer == "cl100k_base" else None
    tokenizer = Tokenizer(config.tokenizer, vocab_size, config.chat_template)
    config.chat_template = tokenizer.chat_template
    if source is None:
        config.model.vocab_size = tokenizer.vocab_size
    if world.is_main and config.resume:
        check_changes(config)

    def load_rows(split: str, shuffle: bool) -> RowStream:
        if not world.is_main:
            wait_for_all()  # the first process fills the cache that the others read
        data, report = load_dataset_split(
            config.dataset, split, tokenizer, config.max_seq_len, config.num_proc, config.skip_bad_rows
        )
        if world.is_main:
            print(report)
            wait_for_all()
        collator = DataCollator(config.max_seq_len, tokenizer.pad_token_id, config.packing)
        return RowStream(data, collator, config.seed, shuffle)

    train_rows = load_rows(config.train_split, config.shuffle)
    held_out = load_rows(config.eval_split, shuffle=False) if config.eval_steps else None

    torch.manual_seed(config.seed)
    newest = newest_checkpoint(config.output_dir) if config.resume and world.is_main else None
    checkpoint = from_first_rank(newest, world)
    damaged = config.resume and checkpoint is None and checkpoints(config.output_dir)
    check(not damaged, f"{config.output_dir} has no checkpoint left that is whole; start without --resume")
    model = build_model(config, source if config.lora_rank else checkpoint or source, checkpoint, world)
    trainer = Trainer(config, replicate(model, config.parallel, world), tokenizer, train_rows, held_out, world)
    if checkpoint:
        trainer.resume(checkpoint)
    if world.is_main:
        open_run(config)
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{parameters / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained; step {trainer.step} to "
            f"{trainer.total_steps} of {trainer.rows_per_step} rows on {world.size} x {world.device} in {config.dtype} into "
            f"{config.output_dir}"
        )
    trainer.train()


def main() -> None:
    debug = "--debug" in sys.argv
    with one_line_errors(debug):
        config = parse_arguments(sys.argv[1:])

        from parallel import join_world, leave_world, recorded, was_restarted

        world = join_world(config.device)
        config.resume |= was_restarted(world)
        recorded(train)(config, world)
        leave_world()


if __name__ == "__main__":
    main()
