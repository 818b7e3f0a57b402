"""Supervised fine-tuning, from conversations to a chat model.

    python train_sft.py [tiny|base|mini|v2_lite] [--field value ...]
    torchrun --nproc_per_node N train_sft.py ... --parallel ddp|fsdp|hsdp
    python train_sft.py tiny --evaluate-only --init-from RUN --dataset FILE

Without a preset: mini if CUDA is available, otherwise tiny. config.py explains all fields and their defaults.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError
from launch.command_line import Arguments, lasting_output, one_line_errors, parse_arguments

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # exits before the slow import of torch
    with one_line_errors():
        parse_arguments(sys.argv[1:])
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the import: no traceback
# On CPU, torch allocates large tensors in huge pages if this is set before its import; small pages cost a tenth of a
# step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# On CPU, oneDNN caches generated code per shape. Packed batches rarely repeat a shape, so the cache is kept small.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic

import torch

import parallel
from checkpoint import load_model_and_tokenizer
from datacollator import DataCollator, RowStream
from dataset import load_data, write_skipped
from launch.build import build_model, parameter_summary
from launch.cost import memory_errors
from launch.dry_run import fit_to_memory, report
from launch.run_directory import NO_TRACKER, open_run, read_metrics, run_lock, start_tracker
from launch.start import Start, find_start
from parallel import World
from tokenizer import Tokenizer
from trainer import Trainer
from view.plots import plot_runs
from view.terminal import table


@memory_errors()
def dispatch(arguments: Arguments, world: World) -> None:
    """Resolve the command line into a `Start`; train, evaluate or plan."""
    watch, output_dir = arguments.config.watch, arguments.config.checkpoint.output_dir
    writes = world.is_main and not (watch.dry_run or watch.evaluate_only)
    with run_lock(output_dir) if writes else contextlib.nullcontext():
        command = plan if watch.dry_run else evaluate if watch.evaluate_only else train
        command(find_start(arguments, world), world)


def train(start: Start, world: World) -> None:
    """Load the data, fit the configuration to it, build the model and the trainer, and train."""
    tokenizer, source, checkpoint = start.tokenizer, start.source, start.checkpoint
    train_rows, held_out, skipped = load_rows(start.config, tokenizer, world)
    config = asked = fit_warmup(start, train_rows.rows_per_epoch, world)
    if world.device.type == "cuda":
        free = min(parallel.from_all_ranks(torch.cuda.mem_get_info(world.device)[0], world))
        config, note = fit_to_memory(config, free, start.given)
        if note and world.is_main:
            print(note)

    torch.manual_seed(config.compute.seed)
    torch.use_deterministic_algorithms(config.compute.deterministic)
    model = build_model(config, source or checkpoint, world, checkpoint, tokenizer.new_ids)
    # DDP wraps the model; FSDP was applied while it was built
    wrapped = parallel.replicate(model, config.compute.parallel, world)
    trainer = Trainer(config, wrapped, tokenizer, train_rows, held_out, world, source)
    if checkpoint:
        trainer.resume(checkpoint)

    directory, tracker = config.checkpoint.output_dir, NO_TRACKER
    if trainer.step > trainer.total_steps:
        raise UserError(f"{directory} is at step {trainer.step}, past the last one, {trainer.total_steps}")
    if world.is_main:
        tracker = start_tracker(config, trainer.step)
        open_run(asked)  # its batch size is fitted again where the run is resumed
        if skipped:
            print(write_skipped(directory, skipped))
        announce(trainer)
    parallel.wait_for_first_rank(world)
    trainer.train(tracker)
    if world.is_main:
        plot_runs({directory: read_metrics(directory)}, Path(directory, "loss.png"))


def load_rows(
    config: TrainConfig, tokenizer: Tokenizer, world: World
) -> tuple[RowStream, RowStream | None, list[dict[str, Any]]]:
    """Return the rows to train on, the held-out rows, and the malformed examples that were skipped. Raises UserError if
    ranks read different data."""
    options, seed = config.data, config.compute.seed
    with parallel.first_process_first(world):
        data = load_data(options, tokenizer, seed, want_eval=config.watch.eval_steps > 0)
    collator = DataCollator(options.max_seq_len, tokenizer.pad_token_id, options.packing)
    rows = RowStream(data.train, collator, seed, options.shuffle)
    problem = f"read different rows of {', '.join(options.dataset)} than rank 0; give all nodes the same data"
    parallel.require_same(rows.fingerprint, problem, world)
    if world.is_main:
        reports = [table(data, rows, config, world.size)] if config.watch.dry_run else data.reports
        print(*data.notes, *reports, sep="\n")
    # Shuffled, so that the first held-out rows are a fair sample.
    return rows, RowStream(data.held_out, collator, seed) if data.held_out else None, data.skipped


def fit_warmup(start: Start, rows_per_epoch: int, world: World) -> TrainConfig:
    """Shorten a new run's warm-up to a tenth of its steps (at least one), unless --warmup-steps is given. Raises
    UserError if the given warm-up exceeds the run, or if an epoch has less than one step."""
    config, warmup = start.config, start.config.optimizer.warmup_steps
    steps = config.batch.max_steps or config.batch.remaining_steps(rows_per_epoch, world.size)
    if problem := config.too_few_rows(rows_per_epoch, world.size):
        raise UserError(problem)
    if "warmup_steps" in start.given and warmup > steps:
        raise UserError(f"warmup_steps is {warmup}, but the run has {steps} steps: the rate would never reach its peak")
    if "warmup_steps" in start.given or config.checkpoint.resume or warmup * 10 <= steps:
        return config
    return config.changed(warmup_steps=max(steps // 10, 1))


def announce(trainer: Trainer) -> None:
    """Print the model's size, steps, epochs, devices and the output directory."""
    config, world, rows = trainer.config, trainer.world, trainer.rows_per_step
    left = (trainer.total_steps - trainer.step) * rows
    epochs = (trainer.rows_seen + left) / trainer.train_rows.rows_per_epoch
    print(
        f"{parameter_summary(trainer.plain_model)}; step {trainer.step} to {trainer.total_steps}, {rows} rows each "
        f"({epochs:.3g} epochs) on {world.size} x {world.device} in {config.compute.dtype} "
        f"into {config.checkpoint.output_dir}",
        flush=True,
    )
    if epochs > 10 and not config.checkpoint.save_best:
        print(f"warning: {epochs:.3g} epochs may overfit; --save-best keeps the checkpoint with the lowest eval_loss")


def evaluate(start: Start, world: World) -> None:
    """Print eval_loss and eval_bpb of a checkpoint on the dataset's eval_split, or on all of it if there is none."""
    config, place = start.config, str(start.config.checkpoint.init_from)
    dtype = torch.float32 if config.compute.dtype == "float32" else None  # None: that of the files
    model, tokenizer = load_model_and_tokenizer(place, dtype, world.device)
    rows, _, _ = load_rows(config.changed(train_split=config.data.eval_split, eval_steps=0), tokenizer, world)
    metrics = Trainer(config, model, tokenizer, rows, rows, world).evaluate()
    if world.is_main:
        print("{}: eval_loss {eval_loss:.4f}, eval_bpb {eval_bpb:.4f}".format(place, **metrics))


def plan(start: Start, world: World) -> None:
    """Print what a run would read, and predict its memory, traffic and time. The prediction needs no data, so an
    unreachable Hub is only noted. Raises UserError for bad data."""
    try:
        load_rows(start.config, start.tokenizer, world)
    except UserError as error:
        if world.size > 1 or not isinstance(error.__cause__, ConnectionError):
            raise
        print(f"note: {error}")
    if world.size == 1:
        print(report(start.config))


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with one_line_errors("--debug" in sys.argv), lasting_output():
        arguments = parse_arguments(sys.argv[1:])
        world = parallel.join_world(arguments.config.compute.device, arguments.config.watch.dry_run)
        dispatch(arguments, world)
        parallel.leave_world()


if __name__ == "__main__":
    main()
