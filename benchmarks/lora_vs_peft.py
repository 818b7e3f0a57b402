"""LoRA here, PEFT around transformers, and full fine-tuning: what each learns, and its time and memory.

    python benchmarks/lora_vs_peft.py [BASE] [--dataset ../shared/data/ultrachat_200k] [--steps 50]

All three start from BASE, a model directory or a run, and train on the same batches of 8 conversations in fp32; both
kinds of LoRA start from the same adapter. They take turns on each batch, ours with packed rows and PEFT with padded
ones. Memory is the peak of a fresh process, minus what it holds after importing its libraries.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from peft import PeftModel
from rivals import in_child, pack, pad, peak_memory, transformers_loss, update  # first of ours: sets the environment
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora
from checkpoint import load_model_and_tokenizer, load_pretrained, resolve_checkpoint, save_pretrained
from config import DataConfig, LoraConfig, OptimizerConfig, UserError
from datacollator import IGNORE, Batch, DataCollator, Piece, RowStream
from dataset import load_data
from hub import peft as peft_files
from launch.command_line import one_line_errors
from optimizer import make_optimizers
from tokenizer import Tokenizer

FULL, LORA, PEFT = "full fine-tuning", "LoRA, this repository", "LoRA, PEFT + transformers"
RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-3
BATCH_SIZE = 8
MAX_TOKENS = 512
Batches = Sequence[Sequence[Piece]]


@dataclass
class Options:
    # Model directory or run to start from. `python train_sft.py tiny` makes the default one.
    base: Annotated[str, tyro.conf.Positional] = "runs/tiny"
    dataset: str = "../shared/data/ultrachat_200k"
    train_split: str = "train_sft"
    eval_split: str = "test_sft"
    steps: int = 50
    # Held-out conversations.
    eval_rows: int = 200
    # Steps of the processes whose memory is measured.
    memory_steps: int = 5


# ---------------------------------------------------------------- the three


class Contender(NamedTuple):
    model: nn.Module
    # Collates conversations into a batch, padded or packed.
    collate: Callable[[Sequence[Piece]], Batch]
    # Returns a batch's summed cross entropy, without balance losses, which transformers does not have.
    loss: Callable[[Batch], Tensor]
    # Writes the trained parameters.
    save: Callable[[str], Any]


def build_full(base: Path, adapter: str) -> Contender:
    model, tokenizer = load_model_and_tokenizer(base, torch.float32)
    save = partial(save_pretrained, model=model, tokenizer=tokenizer)
    return Contender(model, pack, lambda batch: model(**batch).loss_sum, save)


def build_lora(base: Path, adapter: str) -> Contender:
    model = load_pretrained(base, torch.float32)
    peft_files.load_adapter(model, adapter)
    save = partial(peft_files.save_adapter, model=model, base=str(base))
    return Contender(model, pack, lambda batch: model(**batch).loss_sum, save)


def build_peft(base: Path, adapter: str) -> Contender:
    """Use transformers' fastest attention and experts, and apply the head at target positions only."""
    fastest = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **fastest)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return Contender(adapted, pad, partial(transformers_loss, adapted.get_base_model()), adapted.save_pretrained)


CONTENDERS = {FULL: build_full, LORA: build_lora, PEFT: build_peft}


def new_adapter(base: Path, directory: str) -> None:
    """Write the adapter from which both kinds of LoRA start."""
    torch.manual_seed(0)
    model = load_pretrained(base, torch.float32)
    lora.add_lora(model, RANK, ALPHA, 0.0, LoraConfig.lora_target_modules)
    peft_files.save_adapter(directory, model, str(base))


# ---------------------------------------------------------------- measuring


def load_rows(options: Options, tokenizer: Tokenizer, split: str) -> RowStream:
    source = DataConfig((options.dataset,), train_split=split, max_seq_len=MAX_TOKENS, long_conversations="truncate")
    data = load_data(source, tokenizer, seed=0, want_eval=False)
    print(*data.reports)
    return RowStream(data.train, DataCollator(MAX_TOKENS, tokenizer.pad_token_id, packing=False), seed=0)


def batches_of(rows: RowStream, count: int) -> Batches:
    conversations = [rows.row(i)[0] for i in range(count)]
    return [conversations[i : i + BATCH_SIZE] for i in range(0, count, BATCH_SIZE)]


def num_targets(batch: Batch) -> int:
    return int((batch["labels"] != IGNORE).sum())


@torch.no_grad()
def evaluate(contender: Contender, batches: Batches) -> float:
    collated = [contender.collate(conversations) for conversations in batches]
    return sum(contender.loss(batch).item() for batch in collated) / sum(map(num_targets, collated))


def training_step(contender: Contender) -> Callable[[Sequence[Piece]], float]:
    """Return a function that trains on some conversations and returns their mean loss."""
    (optimizer,) = make_optimizers(contender.model, OptimizerConfig(), torch.float32)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE

    def step(conversations: Sequence[Piece]) -> float:
        batch = contender.collate(conversations)
        loss = contender.loss(batch) / num_targets(batch)
        loss.backward()
        update(contender.model, optimizer)
        return loss.item()

    return step


def train_in_turns(contenders: dict[str, Contender], batches: Batches) -> tuple[dict, dict]:
    """Return the losses and the seconds of each contender's steps."""
    steps = {name: training_step(contender) for name, contender in contenders.items()}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for conversations in batches:
        for name, step in steps.items():
            began = time.perf_counter()
            losses[name].append(step(conversations))
            seconds[name].append(time.perf_counter() - began)
    return losses, seconds


def measure_memory(name: str, base: Path, adapter: str, batches: Batches) -> float:
    """Return the peak memory of building and training in this process, minus what it held before, in bytes."""
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    before = int(resident.split()[1]) * 1024
    step = training_step(CONTENDERS[name](base, adapter))
    for conversations in batches:
        step(conversations)
    return peak_memory() - before


def parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def file_size(contender: Contender) -> int:
    """Return the size of a checkpoint's weights in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        contender.save(directory)
        return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


# ---------------------------------------------------------------- the report


def print_curves(losses: dict[str, list[float]]) -> None:
    print(f"\n{'loss at step':26}" + "".join(f"{step:>9}" for step in reported(losses[LORA])))
    for name, curve in losses.items():
        print(f"{name:26}" + "".join(f"{curve[step - 1]:9.4f}" for step in reported(curve)))
    largest = max(abs(ours - theirs) for ours, theirs in zip(losses[LORA], losses[PEFT], strict=True))
    print(f"largest difference between the two kinds of LoRA: {largest:.1e}")


def reported(curve: Sequence[float]) -> list[int]:
    return [1, *range(10, len(curve) + 1, 10)]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if not Path(options.base).exists():
        raise UserError(f"{options.base} does not exist; `python train_sft.py tiny` makes runs/tiny")
    base = resolve_checkpoint(options.base)
    tokenizer = Tokenizer(str(base))
    train = batches_of(load_rows(options, tokenizer, options.train_split), options.steps * BATCH_SIZE)
    eval_rows = load_rows(options, tokenizer, options.eval_split)
    held_out = batches_of(eval_rows, min(options.eval_rows, eval_rows.rows_per_epoch))

    with tempfile.TemporaryDirectory() as adapter:
        new_adapter(base, adapter)
        memory = {
            name: in_child(measure_memory, name, base, adapter, train[: options.memory_steps]) for name in CONTENDERS
        }
        contenders = {name: build(base, adapter) for name, build in CONTENDERS.items()}
    before = {name: evaluate(contender, held_out) for name, contender in contenders.items()}
    losses, seconds = train_in_turns(contenders, train)
    after = {name: evaluate(contender, held_out) for name, contender in contenders.items()}

    print(f"\nfp32, {torch.get_num_threads()} threads, torch {torch.__version__}; rank {RANK}, rate {LEARNING_RATE}")
    print_curves(losses)
    print(f"\n{'':26}{'validation loss':>20}{'trained':>18}{'file':>10}{'step':>9}{'memory':>10}")
    for name, contender in contenders.items():
        trained, total = parameters(contender.model)
        print(
            f"{name:26}{before[name]:10.4f} ->{after[name]:7.4f}{trained:11,} {trained / total:6.2%}"
            f"{file_size(contender) / 1e6:7.2f} MB{statistics.median(seconds[name]) * 1000:6.0f} ms"
            f"{memory[name] / 1e6:7.0f} MB"
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
