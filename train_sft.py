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


def train(config: TrainConfig, world: "World") -> None:
    """Config -> tokenizer -> data -> model -> trainer; each of the functions below makes one of them."""
    import torch

    from checkpoint import resolve_checkpoint
    from engine.run_directory import check_changes, open_run
    from parallel import replicate
    from quantization import quantized_weights
    from trainer import Trainer

    source = resolve_checkpoint(config.checkpoint.init_from) if config.checkpoint.init_from else None
    tokenizer = load_tokenizer(config, source)
    config = resolve(config, source, tokenizer, world)
    if world.is_main and config.checkpoint.resume:
        check_changes(config)
    train_rows = load_rows(config, config.data.train_split, tokenizer, world, config.data.shuffle)
    held_out = load_rows(config, config.data.eval_split, tokenizer, world, False) if config.watch.eval_steps else None

    torch.manual_seed(config.compute.seed)
    checkpoint = checkpoint_to_resume(config, world)
    model = build_model(config, checkpoint, world)
    trainer = Trainer(config, replicate(model, config.compute.parallel, world), tokenizer, train_rows, held_out, world)
    if checkpoint:
        trainer.resume(checkpoint)
    if world.is_main:
        open_run(config)
        in_4_bits = sum(weight.numel() for weight in quantized_weights(model).values())
        parameters = sum(p.numel() for p in model.parameters()) + in_4_bits
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{parameters / 1e6:,.1f} M parameters, {f'{in_4_bits / 1e6:,.1f} M of them in 4 bits, ' * bool(in_4_bits)}"
            f"{trained / 1e6:,.1f} M of them trained; step {trainer.step} to "
            f"{trainer.total_steps} of {trainer.rows_per_step} rows on {world.size} x {world.device} in "
            f"{config.compute.dtype} into {config.checkpoint.output_dir}"
        )
    trainer.train()


def load_tokenizer(config: TrainConfig, source: Path | None) -> "Tokenizer":
    """That of `source`, the checkpoint that the run starts from; else the configured one. Raises UserError."""
    from tokenizer import Tokenizer

    name = str(source or config.data.tokenizer)
    vocab_size = config.model.vocab_size if name == "cl100k_base" else None
    return Tokenizer(name, vocab_size, config.data.chat_template)


def resolve(config: TrainConfig, source: Path | None, tokenizer: "Tokenizer", world: "World") -> TrainConfig:
    """The complete configuration, as the run has it and keeps it: with what the checkpoint that it starts from, the
    tokenizer and the device decide. Raises UserError for one that no run can have."""
    from checkpoint import load_config
    from parallel import choose_dtype

    dtype = choose_dtype(config.compute.dtype, world.device)
    config = config.changed(dtype=dtype, chat_template=tokenizer.chat_template)
    if source:
        config = config.changed(init_from=str(source), tokenizer=str(source), model=load_config(source))
    else:
        config = config.changed(vocab_size=tokenizer.vocab_size)
    config.validate()
    return config


def load_rows(config: TrainConfig, split: str, tokenizer: "Tokenizer", world: "World", shuffle: bool) -> "RowStream":
    """A split's conversations in rows."""
    import datasets

    from datacollator import DataCollator, RowStream
    from dataset import load_dataset_split
    from parallel import first_process_first

    data, parts = config.data, []
    with first_process_first(world):
        for source in data.dataset:
            name, _, weight = source.partition(":")
            part, report = load_dataset_split(
                name, split, tokenizer, data.max_seq_len, data.num_proc, data.skip_bad_rows
            )
            parts += [part] * int(weight or 1)
            if world.is_main:
                print(report)
    collator = DataCollator(data.max_seq_len, tokenizer.pad_token_id, data.packing)
    return RowStream(datasets.concatenate_datasets(parts), collator, config.compute.seed, shuffle)


def checkpoint_to_resume(config: TrainConfig, world: "World") -> Path | None:
    """The newest good one, as the first process sees it; None for a new run. Raises UserError if all are damaged."""
    from checkpoint import checkpoints, newest_checkpoint
    from parallel import from_first_rank

    run, resume = config.checkpoint.output_dir, config.checkpoint.resume
    checkpoint = from_first_rank(newest_checkpoint(run) if resume and world.is_main else None, world)
    damaged = resume and checkpoint is None and checkpoints(run)
    check(not damaged, f"{run} has no checkpoint left that is whole; start without --resume")
    return checkpoint


def build_model(config: TrainConfig, checkpoint: Path | None, world: "World") -> "DeepSeekV2":
    """The model on its device, with the weights of `checkpoint`, from which the run goes on; else those of init_from;
    else new ones. With LoRA, init_from has the base's weights and `checkpoint` the adapters'.

    It is planned on the meta device and filled one tensor at a time, so that a rank never holds more than its share.
    """
    import torch

    import lora
    import quantization
    from checkpoint import iterate_weights
    from model import DeepSeekV2
    from parallel import load_weights, parallelize

    adapters, compute, quantized = config.lora, config.compute, {}
    with torch.device("meta"):
        model = DeepSeekV2(config.model)
        if adapters.lora_rank:
            model.requires_grad_(False)
            if compute.dtype == "bfloat16":
                model.to(torch.bfloat16)
            if adapters.quantize:
                quantization.plan(model)
                quantized = quantization.quantized_weights(model)
            lora.add_lora(
                model, adapters.lora_rank, adapters.lora_alpha, adapters.lora_dropout, adapters.lora_target_modules
            )
    parallelize(model, model.model.layers, compute.parallel, world)
    generator = torch.Generator().manual_seed(compute.seed)
    base = config.checkpoint.init_from
    source = base if adapters.lora_rank else checkpoint or base
    stored = iterate_weights(source, config.model, quantized) if source else None
    load_weights(model, stored or model.initial_weights(generator))
    if adapters.lora_rank:
        start = lora.read_adapter(model, checkpoint) if checkpoint else lora.initial_weights(model, generator)
        load_weights(model, start)
    model.model.gradient_checkpointing = compute.gradient_checkpointing
    if compute.compile:
        for block in model.model.layers:
            block.compile()
    return model


def main() -> None:
    with one_line_errors("--debug" in sys.argv):
        config = parse_arguments(sys.argv[1:], __doc__)

        from parallel import join_world, leave_world, recorded, was_restarted

        world = join_world(config.compute.device)
        config = config.changed(resume=was_restarted(world) or config.checkpoint.resume)
        recorded(train)(config, world)
        leave_world()


if __name__ == "__main__":
    main()
