"""The training loop: accumulate, clip, step, schedule, evaluate, log, save, resume."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import newest_checkpoint, save_checkpoint, save_pretrained, save_state
from config import TrainConfig, UserError
from datacollator import Batch, RowStream
from lora import save_adapter
from model import DeepSeekV2, LossOutput
from parallel import World, full_tensor, gather_state, sum_over_ranks, synchronize_gradients
from tokenizer import Tokenizer

MAX_BAD_STEPS = 5  # non-finite steps in a row before a run stops


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """Rate of a step counted from 0: linear warm-up, then half a cosine down to min_learning_rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; decay pulls on matrices only, not on the norms' gains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, fused=True)


class Trainer:
    """Trains `model` (wrapped by an engine or not) on the rows of `train`, from `state` on if there is one.

    The data of a step is a pure function of the seed and of the number of rows seen, so a run continues exactly from
    weights, optimizer state, random state and a few counters.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        tokenizer: Tokenizer,
        train: RowStream,
        held_out: RowStream | None,
        world: World,
    ) -> None:
        self.config, self.model, self.tokenizer, self.world = config, model, tokenizer, world
        self.train_rows, self.held_out = train, held_out
        self.plain_model: DeepSeekV2 = getattr(model, "module", model)
        self.optimizer = make_optimizer(model, config)
        self.output_dir = Path(config.output_dir)
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.size
        if train.rows_per_epoch < self.rows_per_step:
            raise UserError(
                f"{config.dataset}: its {train.rows_per_epoch} rows don't fill one step of {self.rows_per_step}; lower "
                "batch_size or gradient_accumulation_steps"
            )
        epochs_steps = math.ceil(config.num_train_epochs * train.rows_per_epoch / self.rows_per_step)
        self.total_steps = config.max_steps or epochs_steps
        self.step = self.rows_seen = self.num_tokens = self.skipped_steps = self.bad_steps = 0
        self.last_checkpoint: Path | None = None
        self.token_num_bytes = torch.tensor(tokenizer.token_num_bytes, device=world.device)
        self.tracker = make_tracker(config) if world.is_main else None
        self.stop_signal = 0

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run to the last step. Exits with 128 + signal after SIGINT or SIGTERM, once the step is done and saved."""
        config = self.config
        self.catch_signals()
        self.model.train()
        bar = tqdm(total=self.total_steps, initial=self.step, disable=not self.world.is_main, dynamic_ncols=True)
        with bar, contextlib.closing(self.prefetch()) as steps:
            for batches in steps:
                metrics = self.train_step(batches)
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", tokens_per_second=f"{metrics['tokens_per_second']:,.0f}")
                last = self.step == self.total_steps or self.stop_signal != 0
                if self.step % config.logging_steps == 0 or last:
                    self.log(metrics)
                if self.held_out and not self.stop_signal and (last or self.due(config.eval_steps)):
                    self.log(self.evaluate())
                    self.print_samples(bar)
                if last or self.due(config.save_steps):
                    self.save()
                if self.stop_signal:
                    raise SystemExit(128 + self.stop_signal)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def prefetch(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step to come; a thread prepares the next step's during this one."""
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.load_step, self.rows_seen)
            for _ in range(self.step, self.total_steps):
                batches = following.result()
                following = pool.submit(self.load_step, self.rows_seen + self.rows_per_step)
                yield batches

    def load_step(self, first_row: int) -> list[Batch]:
        size = self.config.batch_size
        starts = range(first_row + self.world.rank * size, first_row + self.rows_per_step, size * self.world.size)
        return [self.train_rows.batch(range(start, start + size)) for start in starts]

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step on all micro-batches: the gradient of the sum over all their target tokens, on all ranks,
        divided by the number of these tokens."""
        began = time.perf_counter()
        counts = torch.tensor([count_batch(batch) for batch in batches]).sum(dim=0).to(self.world.device)
        num_targets, num_documents, num_tokens = sum_over_ranks(counts).tolist()
        rate = learning_rate(self.step, self.config, self.total_steps)
        sums = torch.zeros(2, device=self.world.device)
        expert_counts: Tensor | int = 0
        for i, batch in enumerate(batches):
            with synchronize_gradients(self.model, wanted=i == len(batches) - 1):
                output = self.forward(batch)
                loss = output.loss_sum / num_targets + output.balance_loss / num_documents
                (loss * self.world.size).backward()  # the engines divide the sum over ranks by their number
            sums += torch.stack((output.loss_sum.detach(), output.balance_loss.detach()))
            expert_counts = expert_counts + output.expert_counts
        loss_sum, balance_sum = sum_over_ranks(sums).tolist()
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)).item()
        self.update_weights(loss_sum, grad_norm, rate)
        self.step += 1
        self.rows_seen += self.rows_per_step
        self.num_tokens += num_tokens
        self.stop_signal = int(max_over_ranks(self.stop_signal, self.world))
        load = sum_over_ranks(torch.as_tensor(expert_counts, dtype=torch.float32))
        return {
            "step": self.step,
            "loss": loss_sum / num_targets,
            "balance_loss": balance_sum / num_documents,
            "expert_load": (load.amax(dim=-1) / load.mean(dim=-1)).mean().item() if load.numel() else 1.0,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "num_tokens": self.num_tokens,
            "tokens_per_second": num_tokens / (time.perf_counter() - began),
        }
