"""The effect of compilation, checkpointing and batch size on a device; see train_step.py --settings.

Each line of the table is a separate process that trains the model of train_sft.py on packed rows of chitchat. On CUDA
the device's clock is used, and the host waits once, after the last step.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rivals import in_child, measure_peak, peak_memory  # first: sets the environment
from torch import nn

from config import DataConfig, ModelConfig, TrainConfig
from datacollator import DataCollator, RowStream, Step, StepLoader
from launch.build import build_model
from launch.cost import attention_flops, training_cost
from optimizer import make_optimizers
from parallel import World
from tokenizer import Tokenizer

WARM_UP = 3  # steps


class Measured(NamedTuple):
    tokens: int  # real ones, in all timed steps
    flops: int
    seconds: float
    memory: float  # peak, in bytes


def settings_table(model: ModelConfig, device: torch.device, dtype: str, sizes: Sequence[int], steps: int) -> None:
    """Print a line per setting. MFU is the model's FLOP/s over those of large matrix products."""
    peak = measure_peak(device, getattr(torch, dtype))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{dtype} on {device.type}, {name}, torch {torch.__version__}: {peak / 1e12:,.2f} TFLOP/s at most")
    print(f"{'compile':>9}{'checkpointing':>15}{'rows':>6}{'tokens/s':>12}{'MFU':>7}{'peak memory':>14}")
    compiled = (False, True) if dtype == "bfloat16" else (False,)  # torch cannot trace the grouped product in fp32
    for compile_, checkpointing, size in itertools.product(compiled, (False, True), sizes):
        config = TrainConfig().changed(
            model=model,
            device=str(device),
            dtype=dtype,
            compile=compile_,
            gradient_checkpointing=checkpointing,
            batch_size=size,
            gradient_accumulation_steps=1,
            max_seq_len=min(2048, model.max_position_embeddings),
        )
        line = f"{'yes' if compile_ else 'no':>9}{'yes' if checkpointing else 'no':>15}{size:6}"
        result = in_child(measure, config, steps)
        if result is None:
            print(f"{line}  does not fit", flush=True)
            continue
        tokens, flops, seconds, memory = result
        print(f"{line}{tokens / seconds:12,.0f}{flops / seconds / peak:7.1%}{memory / 1e9:11.2f} GB", flush=True)


def measure(config: TrainConfig, number: int) -> Measured | None:
    """Train for `number` steps; return None if the device has too little memory. Runs in a separate process."""
    world = World(0, 1, torch.device(config.compute.device))
    steps = load_steps(config, world, WARM_UP + number)
    libraries = peak_memory()
    try:
        model = build_model(config, None, world).train()
        optimizers = make_optimizers(model, config.optimizer, getattr(torch, config.compute.dtype))
        train(model, optimizers, steps[:WARM_UP], config)
        seconds = timed(lambda: train(model, optimizers, steps[WARM_UP:], config), world.device)
    except torch.OutOfMemoryError:
        return None
    on_cuda = world.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_cuda else peak_memory() - libraries
    cost, tokens, flops = training_cost(model), 0, 0
    for step in steps[WARM_UP:]:
        documents = step.micro_batches[0].documents
        real = documents.lengths.values[: documents.num_documents]
        tokens += step.counts.tokens
        flops += cost.flops(step.counts.tokens, step.counts.targets)
        flops += sum(attention_flops(config.model, length) for length in real)
    return Measured(tokens, flops, seconds, memory)


def load_steps(config: TrainConfig, world: World, number: int) -> list[Step]:
    """Return steps whose batches have fixed shapes, as on GPUs and in compiled code."""
    from dataset import load_data

    tokenizer, width = Tokenizer(vocab_size=config.model.vocab_size), config.data.max_seq_len
    options = DataConfig(("chitchat",), train_split="train", max_seq_len=width, long_conversations="truncate")
    data = load_data(options, tokenizer, seed=0, want_eval=False).train
    rows = RowStream(data, DataCollator(width, tokenizer.pad_token_id), seed=0)
    loader = StepLoader(rows, config.batch, world, fixed_length=True)
    return [loader.load(step * loader.rows_per_step) for step in range(number)]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: list[Step], config: TrainConfig) -> None:
    """Trainer.train_step without its bookkeeping; the host never waits for the device."""
    device = torch.device(config.compute.device)
    for step in steps:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.compute.dtype == "bfloat16"):
            output = model(**step.micro_batches[0].arguments(device))
        (output.loss_sum / step.counts.targets + output.balance_loss / step.counts.documents).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that the work takes, by the device's clock on CUDA."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - began
