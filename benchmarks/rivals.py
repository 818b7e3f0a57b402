"""What the benchmarks share: data, our training step, and the alternatives to it.

Each training step is a function of 8 conversations that returns the mean loss. This is not a script: see train_step.py
and decode.py.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

# As train_sft.py does, and to everyone's benefit: take large tensors from huge pages, and limit oneDNN's cache of
# generated code, which would otherwise hold a thousand matrix shapes, because hardly two batches have the same.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from config import DataConfig, ModelConfig, OptimizerConfig
from datacollator import IGNORE, Batch, DataCollator, Piece, RowStream, pack_best_fit
from hub.tokenizer_json import save_tokenizer
from model import DeepSeekV2, LossOutput
from optimizer import make_optimizers
from tokenizer import Tokenizer

Step = Callable[[Sequence[Piece]], float]
Batches = Sequence[Sequence[Piece]]
BATCH_SIZE = 8
MAX_TOKENS = 1000  # conversations longer than this are left out
ROW = 2048  # width of our packed rows
LEARNING_RATE = 1e-4


def benchmark_config(**changes: Any) -> ModelConfig:
    """A shape of 58 million parameters, most of them in the embedding and the head."""
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "moe_intermediate_size": 128,
        "intermediate_size": 768,
    }
    return ModelConfig(**(shape | changes))


def load_conversations(count: int, vocab_size: int) -> list[list[Piece]]:
    """Return `count` batches of 8 shuffled chitchat conversations of less than 1,000 tokens."""
    from dataset import load_data  # takes 200 MB, which are not part of a training step

    tokenizer = Tokenizer(vocab_size=vocab_size)
    options = DataConfig(("chitchat",), train_split="train", max_seq_len=MAX_TOKENS, long_conversations="truncate")
    data = load_data(options, tokenizer, seed=0, want_eval=False).train
    rows = RowStream(data, DataCollator(MAX_TOKENS, tokenizer.pad_token_id, packing=False), seed=0)
    short = (i for i in range(rows.rows_per_epoch) if rows.lengths[rows.row_indices(i)[0]] < MAX_TOKENS)
    return [[rows.row(next(short))[0] for _ in range(BATCH_SIZE)] for _ in range(count)]


def pack(conversations: Sequence[Piece]) -> Batch:
    """Collate with several conversations per row, as our trainer does."""
    lengths = [len(ids) for ids, _ in conversations]
    width = max(ROW, *lengths)
    rows = pack_best_fit(lengths, width)
    return DataCollator(width, pad_token_id=0)([[conversations[i] for i in row] for row in rows])


def pad(conversations: Sequence[Piece]) -> Batch:
    """Collate with one conversation per row, padded to the longest, as most trainers do."""
    return DataCollator(ROW, pad_token_id=0, packing=False)([[conversation] for conversation in conversations])


def count_tokens(conversations: Sequence[Piece]) -> tuple[int, int]:
    """Return the numbers of real tokens and of targets."""
    return sum(len(ids) for ids, _ in conversations), sum(sum(map(int, mask[1:])) for _, mask in conversations)


def autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- us


def our_loop(config: ModelConfig, dtype: str) -> Step:
    """Trainer.train_step without its bookkeeping."""
    torch.manual_seed(0)
    model = DeepSeekV2(config)
    (optimizer,) = make_optimizers(model, OptimizerConfig(), getattr(torch, dtype))
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE

    def step(conversations: Sequence[Piece]) -> float:
        with autocast(dtype):
            output: LossOutput = model(**pack(conversations))
        (output.loss_sum / output.num_targets + output.balance_loss / output.num_documents).backward()
        update(model, optimizer)
        return output.loss_sum.item() / int(output.num_targets)

    return step


# ---------------------------------------------------------------- transformers


def transformers_model(config: ModelConfig, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """Return a DeepseekV2ForCausalLM of the same shape, with its fastest attention and experts.

    weights: ours; None: random ones.
    """
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    settings = asdict(config)
    theta, scaling = settings.pop("rope_theta"), settings.pop("rope_scaling")
    assert scaling is None, "the benchmarks need no YaRN"
    settings |= {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    their_config = DeepseekV2Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": theta})
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(their_config)
    if weights is not None:
        model.load_state_dict(weights)  # in memory they have the same names
    return model


def transformers_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the summed cross entropy of a padded batch, with the head at target positions only. Padding is on the
    right, so attention needs no mask but the causal one."""
    learned = batch["labels"] != IGNORE
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[learned]).float(), batch["labels"][learned], reduction="sum")


def transformers_loop(config: ModelConfig, dtype: str) -> Step:
    """A plain loop around transformers' model that avoids its known slow paths."""
    model = transformers_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)

    def step(conversations: Sequence[Piece]) -> float:
        batch = pad(conversations)
        with autocast(dtype):
            loss = transformers_loss(model, batch) / (batch["labels"] != IGNORE).sum()
        loss.backward()
        update(model, optimizer)
        return loss.item()

    return step


# ---------------------------------------------------------------- TRL


def trl_sft(config: ModelConfig, dtype: str, batches: Batches) -> list[float]:
    """Return the seconds of each step of TRL's SFTTrainer on these batches."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    seconds: list[float] = []
    rows = [
        {
            "input_ids": [int(i) for i in ids],
            "labels": [int(i) if m else IGNORE for i, m in zip(ids, mask, strict=True)],
        }
        for conversations in batches
        for ids, mask in conversations
    ]
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=len(batches),
            max_length=MAX_TOKENS,
            train_sampling_strategy="sequential",
            bf16=dtype == "bfloat16",
            gradient_checkpointing=False,  # on by default: less memory, a third more compute
            optim="adamw_torch_fused",
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokenizer = transformers_tokenizer(Tokenizer(vocab_size=config.vocab_size), directory)
        trainer = SFTTrainer(
            model=transformers_model(config),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def transformers_tokenizer(tokenizer: Tokenizer, directory: str) -> Any:
    """Return transformers' tokenizer with our vocabulary and chat template."""
    from transformers import AutoTokenizer

    save_tokenizer(directory, tokenizer)
    return AutoTokenizer.from_pretrained(directory)


# ---------------------------------------------------------------- the machine


def measure_peak(device: torch.device, dtype: torch.dtype, largest: int | None = None) -> float:
    """Measure the FLOP/s of large matrix products. Sizes double while they are quick, up to `largest` rows; None: 8192,
    on a CPU 2048. On a GPU several are queued before the host waits, so that launching one does not count."""
    on_cpu = device.type == "cpu"
    best, seconds, size, together = 0.0, 0.0, 256, 1 if on_cpu else 8
    while size <= (largest or (2048 if on_cpu else 8192)) and seconds < 0.1:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            for _ in range(together):
                product = a @ b
            product[0, 0].item()  # waits for the device
            seconds = (time.perf_counter() - began) / together
            best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def gemm_peak(dtype: str) -> float:
    """Return the FLOP/s of large matrix products, the upper limit on this machine."""
    return measure_peak(torch.device("cpu"), getattr(torch, dtype), largest=4096)


class Child:
    """A separate process, whose memory can be measured and which no earlier measurement affects."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.submit(function, *arguments).result()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result, computed in a fresh process."""
    with Child() as child:
        return child.run(function, *arguments)


def peak_memory() -> float:
    """Return this process's peak memory in bytes. (ru_maxrss would include the process that started it.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
