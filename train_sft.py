"""Supervised fine-tuning, from conversations to a chat model.

    python train_sft.py [tiny|mini|v2_lite] [--field value ...]
    torchrun --nproc_per_node N train_sft.py ... --parallel ddp|fsdp

Without a preset: mini where there is CUDA, else tiny. All fields, their defaults and reasons stand in config.py.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from config import TrainConfig, check
from engine.cli import one_line_errors, parse_arguments

if TYPE_CHECKING:
    from datacollator import RowStream
    from model import DeepSeekV2
    from parallel import World
    from tokenizer import Tokenizer

# torch takes a while to import, and --help should not wait for it: what needs torch is imported where it is used.
# On CPU, torch takes large tensors from huge pages if told so before it starts: a tenth of a step otherwise goes
# into handing out small ones.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# On CPU, oneDNN generates code for each shape and keeps it. Packed batches hardly ever repeat one, so it would pile up.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def load_tokenizer(config: TrainConfig, source: Path | None) -> "Tokenizer":
    """The tokenizer of `source`, the checkpoint that the run starts from, or a new one. What it and the checkpoint
    decide is noted in the configuration. Raises UserError for a configuration that no run can have."""
    from checkpoint import load_config
    from tokenizer import Tokenizer

    check(source is not None or not config.lora_rank, "lora_rank needs init_from: adapters adapt a trained model")
    if source:
        config.init_from, config.tokenizer, config.model = str(source), str(source), load_config(source)
    config.validate()
    vocab_size = config.model.vocab_size if config.tokenizer == "cl100k_base" else None
    tokenizer = Tokenizer(config.tokenizer, vocab_size, config.chat_template)
    config.chat_template = tokenizer.chat_template
    if source is None:
        config.model.vocab_size = tokenizer.vocab_size
    return tokenizer


def load_rows(config: TrainConfig, split: str, tokenizer: "Tokenizer", world: "World", shuffle: bool) -> "RowStream":
    """A split's conversations in rows. The first process fills the cache that the others then read."""
    import datasets

    from datacollator import DataCollator, RowStream
    from dataset import load_dataset_split
    from parallel import wait_for_all

    if not world.is_main:
        wait_for_all()
    parts = []
    for source in config.dataset:
        name, _, weight = source.partition(":")
        data, report = load_dataset_split(
            name, split, tokenizer, config.max_seq_len, config.num_proc, config.skip_bad_rows
        )
        parts += [data] * int(weight or 1)
        if world.is_main:
            print(report)
    if world.is_main:
        wait_for_all()
    data = datasets.concatenate_datasets(parts)
    collator = DataCollator(config.max_seq_len, tokenizer.pad_token_id, config.packing)
    return RowStream(data, collator, config.seed, shuffle)


def checkpoint_to_resume(config: TrainConfig, world: "World") -> Path | None:
    """The newest good one, as the first process sees it; None for a new run. Raises UserError if all are damaged."""
    from checkpoint import checkpoints, newest_checkpoint
    from parallel import from_first_rank

    newest = newest_checkpoint(config.output_dir) if config.resume and world.is_main else None
    checkpoint = from_first_rank(newest, world)
    damaged = config.resume and checkpoint is None and checkpoints(config.output_dir)
    check(not damaged, f"{config.output_dir} has no checkpoint left that is whole; start without --resume")
    return checkpoint


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

    from checkpoint import resolve_checkpoint
    from engine.run_directory import check_changes, open_run
    from parallel import choose_dtype, replicate
    from trainer import Trainer

    config.dtype = choose_dtype(config.dtype, world.device)
    source = resolve_checkpoint(config.init_from) if config.init_from else None
    tokenizer = load_tokenizer(config, source)
    if world.is_main and config.resume:
        check_changes(config)
    train_rows = load_rows(config, config.train_split, tokenizer, world, config.shuffle)
    held_out = load_rows(config, config.eval_split, tokenizer, world, shuffle=False) if config.eval_steps else None

    torch.manual_seed(config.seed)
    checkpoint = checkpoint_to_resume(config, world)
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
            f"{trainer.total_steps} of {trainer.rows_per_step} rows on {world.size} x {world.device} in {config.dtype} "
            f"into {config.output_dir}"
        )
    trainer.train()


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        config = parse_arguments(sys.argv[1:], __doc__)

        from parallel import join_world, leave_world, recorded, was_restarted

        world = join_world(config.device)
        config.resume |= was_restarted(world)
        recorded(train)(config, world)
        leave_world()


if __name__ == "__main__":
    main()
