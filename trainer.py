"""The training loop: accumulate, clip, step, schedule, evaluate, log, save, resume."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_state, save_checkpoint, save_pretrained, save_state
from config import TrainConfig, UserError
from datacollator import IGNORE, Batch, RowStream
from engine.run_directory import MetricsLog
from generation import answers
from lora import save_adapter
from model import DeepSeekV2, LossOutput, parameter_counts
from optimizer import learning_rate, make_optimizers
from parallel import (
    World,
    from_first_rank,
    full_tensor,
    gather_state,
    is_sharded,
    largest_over_ranks,
    leave_world,
    scatter_optimizer_state,
    sum_over_ranks,
    synchronize_gradients,
    wait_for_all,
)
from tokenizer import Tokenizer

STATE = "trainer_state.pt"
# What a resumed run needs beside weights and optimizer state: data and random numbers are functions of these.
COUNTERS = ("step", "rows_seen", "num_tokens", "skipped_steps", "bad_steps")
MAX_BAD_STEPS = 5  # non-finite steps in a row before a run stops


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
        self.plain_model = cast(DeepSeekV2, getattr(model, "module", model))
        self.optimizers = make_optimizers(model, config)
        self.output_dir = Path(config.output_dir)
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.size
        if train.rows_per_epoch < self.rows_per_step:
            raise UserError(
                f"{', '.join(config.dataset)}: its {train.rows_per_epoch} rows don't fill one step of "
                f"{self.rows_per_step}; lower batch_size or gradient_accumulation_steps"
            )
        epochs_steps = math.ceil(config.num_train_epochs * train.rows_per_epoch / self.rows_per_step)
        self.total_steps = config.max_steps or epochs_steps
        self.step = self.rows_seen = self.num_tokens = self.skipped_steps = self.bad_steps = 0
        self.last_checkpoint: Path | None = None
        self.token_num_bytes = torch.tensor(tokenizer.token_num_bytes, device=world.device)
        self.stop_signal = 0
        counts = {part: active for part, (_, active) in parameter_counts(self.plain_model.config).items()}
        # The embedding is looked up, not multiplied.
        self.head_parameters = counts["head"] or counts["embedding"]
        self.body_parameters = sum(counts.values()) - counts["head"] - counts["embedding"]
        self.peak = measure_peak(world.device, getattr(torch, config.dtype)) * world.size

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run to the last step. Exits with 128 + signal after SIGINT or SIGTERM, once the step is done and saved."""
        config = self.config
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, self.stop_after_step) for number in numbers}
        self.model.train()
        log = MetricsLog(config, self.step) if self.world.is_main else None
        bar = tqdm(total=self.total_steps, initial=self.step, disable=log is None, dynamic_ncols=True, unit="step")
        with bar, contextlib.closing(self.prefetch()) as steps:
            for batches in steps:
                metrics = self.train_step(batches)
                # Asked once a step, so that all ranks do the same even if a signal comes in the middle of what follows.
                stop = largest_over_ranks(self.stop_signal, self.world)
                last = self.step == self.total_steps
                bar.update()
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
                    f"{metrics['peak_share']:.0%} of peak, expert load {metrics['expert_load']:.1f}"
                )
                if log and (last or self.due(config.logging_steps)):
                    log.write(metrics)
                if self.held_out and (last or self.due(config.eval_steps)):
                    evaluation = self.evaluate()
                    if log:
                        described = ", ".join(f"{k} {v:.4f}" for k, v in evaluation.items() if k != "step")
                        bar.write(f"step {self.step}: {described}")
                        self.print_samples(bar)
                        log.write(evaluation)
                if last or stop or self.due(config.save_steps):
                    self.save()
                if stop:
                    leave_world()
                    raise SystemExit(128 + stop)
        if log:
            log.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ours would keep this trainer, and with it the model, alive

    def stop_after_step(self, number: int, frame: object) -> None:
        """Signal handler: finish the step, save and exit; a second signal leaves at once."""
        if self.stop_signal:
            os._exit(128 + number)
        self.stop_signal = number

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def prefetch(self) -> Generator[list[Batch], None, None]:
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
        batches = [self.train_rows.batch(range(start, start + size)) for start in starts]
        if self.world.device.type == "cuda":  # page-locked memory, from which a copy runs beside the computation
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step on all micro-batches: the gradient of the sum over all their target tokens, on all ranks,
        divided by the number of these tokens."""
        began = time.perf_counter()
        counts = torch.tensor([count_batch(batch) for batch in batches]).sum(dim=0).to(self.world.device)
        num_targets, num_documents, num_tokens = sum_over_ranks(counts).tolist()
        rate = learning_rate(self.step, self.config, self.total_steps)
        # for dropout; torch takes 64 bits
        torch.manual_seed(((self.config.seed << 40) + self.step * self.world.size + self.world.rank) % 2**64)
        sums: list[Tensor] = []
        for i, batch in enumerate(batches):
            with synchronize_gradients(self.model, wanted=i == len(batches) - 1):
                output = self.forward(batch)
                loss = output.loss_sum / num_targets + output.balance_loss / num_documents
                (loss * self.world.size).backward()  # the engines divide the sum over ranks by their number
            losses = torch.stack((output.loss_sum, output.balance_loss)).detach()
            sums.append(torch.cat((losses, output.expert_counts.flatten())))
        totals = sum_over_ranks(torch.stack(sums).sum(dim=0).double())
        loss_sum, balance_sum = totals[:2].tolist()
        expert_counts = totals[2:].view_as(output.expert_counts)  # (MoE layers, E)
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)).item()
        self.update_weights(loss_sum, grad_norm, rate)
        self.step += 1
        self.rows_seen += self.rows_per_step
        self.num_tokens += num_tokens
        seconds = time.perf_counter() - began
        products = 6 * (self.body_parameters * num_tokens + self.head_parameters * num_targets)
        return {
            "step": self.step,
            "loss": loss_sum / num_targets,
            "balance_loss": balance_sum / num_documents,
            "expert_load": (expert_counts.amax(dim=1) / expert_counts.mean(dim=1)).mean().item(),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "num_tokens": self.num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "peak_share": products / seconds / self.peak,
            "skipped_steps": self.skipped_steps,
        }

    def forward(self, batch: Batch) -> LossOutput:
        """Training and evaluation share it, so that both see the same precision."""
        device = self.world.device
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.model(**moved)

    def update_weights(self, loss_sum: float, grad_norm: float, rate: float) -> None:
        """Step, unless the numbers have gone bad: NaN and infinity never reach the weights."""
        if math.isfinite(loss_sum) and math.isfinite(grad_norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            self.bad_steps = 0
        else:
            self.skipped_steps += 1
            self.bad_steps += 1
        self.model.zero_grad()
        if self.bad_steps == MAX_BAD_STEPS:
            rows = range(self.rows_seen, self.rows_seen + self.rows_per_step)
            conversations = sorted(index for row in rows for index in self.train_rows.row_indices(row))
            raise UserError(
                f"step {self.step + 1}: loss or gradient was not finite {MAX_BAD_STEPS} times in a row (now in "
                f"conversations {conversations} of {', '.join(self.config.dataset)}); the weights are those of the "
                f"last good step, and {self.last_checkpoint or 'no checkpoint'} is the last one saved: try a lower "
                "learning_rate"
            )

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss in nats per target token, and in bits per UTF-8 byte of the text to be learned, which doesn't depend on
        the tokenizer. Every held-out conversation counts once, on whichever rank."""
        assert self.held_out is not None
        self.model.eval()
        rows = self.held_out.rows_per_epoch
        if self.config.eval_max_rows and self.step < self.total_steps:
            rows = min(rows, self.config.eval_max_rows)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        size = self.config.batch_size * self.world.size
        for start in range(0, rows, size):
            first = start + self.world.rank * self.config.batch_size
            mine = range(first, min(first + self.config.batch_size, rows))
            batch = self.held_out.batch(mine or [0])
            if not mine:  # under FSDP every rank has to take part in every forward pass
                batch["labels"].fill_(IGNORE)
            output = self.forward(batch)
            labels = batch["labels"].to(self.world.device)
            num_bytes = self.token_num_bytes[labels[labels != IGNORE]].sum()
            sums += torch.stack((output.loss_sum.double(), output.num_targets, num_bytes))
        loss_sum, num_targets, num_bytes = sum_over_ranks(sums).tolist()
        self.model.train()
        bits = loss_sum / math.log(2)
        return {"step": self.step, "eval_loss": loss_sum / num_targets, "eval_bpb": bits / max(num_bytes, 1)}

    def print_samples(self, bar: tqdm) -> None:
        """What the model answers by now. Under FSDP no rank has the whole model, so there are none."""
        questions = self.config.sample_prompts
        if not questions or is_sharded(self.model):
            return
        generator = torch.Generator(self.world.device).manual_seed(self.config.seed)
        self.model.eval()
        replies = answers(
            self.plain_model, self.tokenizer, questions, 40, temperature=0.7, top_p=0.9, generator=generator
        )
        for question, reply in zip(questions, replies, strict=True):
            bar.write(f"  {question!r} -> {reply.strip()!r}")
        self.model.train()

    # ---------------------------------------------------------------- save, resume

    def save(self) -> None:
        """Write a checkpoint; every rank takes part in gathering it, the first one writes."""
        weights, optimizer_state = gather_state(self.model, self.optimizers)
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"config": asdict(self.config), "optimizer": optimizer_state}

        def write(directory: Path) -> None:
            if self.config.lora_rank:
                save_adapter(directory, self.plain_model, self.config.init_from, weights)
                self.tokenizer.save_pretrained(directory)
            else:
                save_pretrained(directory, self.plain_model, self.tokenizer, weights)
            save_state(directory / STATE, state)

        if self.world.is_main:
            self.last_checkpoint = save_checkpoint(self.output_dir, self.step, write, self.config.save_total_limit)
        wait_for_all()

    def resume(self, directory: Path) -> None:
        """Take over everything but the weights, which the model has already, from a checkpoint."""
        state = load_state(directory / STATE) if self.world.is_main else {"optimizer": {}}
        scatter_optimizer_state(self.model, self.optimizers, state.pop("optimizer"))
        for name, value in from_first_rank(state, self.world).items():
            if name in COUNTERS:
                setattr(self, name, value)
        self.last_checkpoint = directory


def count_batch(batch: Batch) -> list[int]:
    """Targets, documents and real tokens."""
    sequence_ids = batch["sequence_ids"]
    counts = ((batch["labels"] != IGNORE).sum(), sequence_ids.amax(dim=1).sum(), (sequence_ids > 0).sum())
    return [int(count) for count in counts]


def measure_peak(device: torch.device, dtype: torch.dtype, largest: int = 2048) -> float:
    """FLOP/s of large matrix products: the most that this machine could do. Larger ones are tried while it's quick."""
    best, seconds, size = 0.0, 0.0, 256
    while size <= largest and seconds < 0.1:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            (a @ b).sum().item()  # waits for the device
            seconds = time.perf_counter() - began
            best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best
