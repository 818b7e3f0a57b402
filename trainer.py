"""The training loop: accumulate, clip, step, schedule, evaluate, log, save, resume."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import parallel
from checkpoint import load_state, save_checkpoint, save_pretrained, save_state
from config import TrainConfig, UserError, check
from datacollator import IGNORE, Batch, RowStream
from engine.adapter_base import describe_base, record_base
from engine.cli import StopSignal
from engine.cost import measure_peak, training_cost
from engine.prefetch import StepLoader
from engine.run_directory import RunLog
from generation import answers
from lora import save_adapter
from model import DeepSeekV2, LossOutput
from optimizer import learning_rate, make_optimizers
from parallel import World
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
        self.dtype = getattr(torch, config.compute.dtype)
        self.optimizers = make_optimizers(model, config.optimizer, self.dtype)
        self.batches = StepLoader(train, config.batch, world)
        self.rows_per_step = self.batches.rows_per_step
        rows, self.data_name = train.rows_per_epoch, ", ".join(config.data.dataset)
        too_few = f"{self.data_name}: its {rows} rows don't fill one step of {self.rows_per_step}"
        check(rows >= self.rows_per_step, f"{too_few}; lower batch_size or gradient_accumulation_steps")
        steps = math.ceil(config.batch.num_train_epochs * rows / self.rows_per_step)
        self.total_steps = config.batch.max_steps or steps
        self.step = self.rows_seen = self.num_tokens = self.skipped_steps = self.bad_steps = 0
        self.output_dir = Path(config.checkpoint.output_dir)
        self.last_checkpoint: Path | None = None
        self.base = None
        if config.lora.lora_rank and config.checkpoint.init_from and world.is_main:
            self.base = describe_base(config.checkpoint.init_from, config.model)
        self.token_num_bytes = torch.tensor(tokenizer.token_num_bytes)
        self.cost = training_cost(self.plain_model)
        self.peak = measure_peak(world.device, self.dtype) * world.size

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run to the last step. Exits with 128 + signal after SIGINT or SIGTERM, once the step is done and saved."""
        watch = self.config.watch
        self.model.train()
        with (
            StopSignal() as signal,
            RunLog(self.config, self.step, self.total_steps, self.world.is_main) as log,
            contextlib.closing(self.batches.steps(self.rows_seen, self.total_steps - self.step)) as steps,
        ):
            for batches in steps:
                metrics = self.train_step(batches)
                # Asked once a step, so that all ranks do the same even if a signal comes in the middle of what follows.
                stop = parallel.largest_over_ranks(signal.number, self.world)
                last = self.step == self.total_steps
                log.advance(metrics)
                if last or self.due(watch.logging_steps):
                    log.write(metrics)
                if self.held_out and (last or self.due(watch.eval_steps)):
                    evaluation = self.evaluate()
                    log.print("step {step}: eval_loss {eval_loss:.4f}, eval_bpb {eval_bpb:.4f}".format(**evaluation))
                    self.print_samples(log.print)
                    log.write(evaluation)
                if last or stop or self.due(self.config.checkpoint.save_steps):
                    self.save()
                if stop:
                    parallel.leave_world()
                    raise SystemExit(128 + stop)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step on all micro-batches: the gradient of the sum over all their target tokens, on all ranks,
        divided by the number of these tokens."""
        began = time.perf_counter()
        counts = torch.tensor([count_batch(batch) for batch in batches]).sum(dim=0).to(self.world.device)
        num_targets, num_documents, num_tokens = parallel.sum_over_ranks(counts).tolist()
        rate = learning_rate(self.step, self.config.optimizer, self.total_steps)
        # for dropout; torch takes 64 bits
        torch.manual_seed(((self.config.compute.seed << 40) + self.step * self.world.size + self.world.rank) % 2**64)
        sums: list[Tensor] = []
        for i, batch in enumerate(batches):
            with parallel.synchronize_gradients(self.model, wanted=i == len(batches) - 1):
                output = self.forward(batch)
                loss = output.loss_sum / num_targets + output.balance_loss / num_documents
                (loss * self.world.size).backward()  # the engines divide the sum over ranks by their number
            losses = torch.stack((output.loss_sum, output.balance_loss)).detach()
            sums.append(torch.cat((losses, output.expert_counts.flatten())))
        totals = parallel.sum_over_ranks(torch.stack(sums).sum(dim=0).double())
        loss_sum, balance_sum = totals[:2].tolist()
        expert_counts = totals[2:].view_as(output.expert_counts)  # (MoE layers, E)
        max_norm = self.config.optimizer.max_grad_norm
        grad_norm = parallel.full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)).item()
        self.update_weights(loss_sum, grad_norm, rate)
        self.step += 1
        self.rows_seen += self.rows_per_step
        self.num_tokens += num_tokens
        seconds = time.perf_counter() - began
        speed = self.cost.flops(num_tokens, num_targets) / seconds
        self.peak = max(self.peak, speed)  # it may have been measured while the machine was busy
        return {
            "step": self.step,
            "loss": loss_sum / num_targets,
            "balance_loss": balance_sum / num_documents,
            "expert_load": (expert_counts.amax(dim=1) / expert_counts.mean(dim=1)).mean().item(),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "num_tokens": self.num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "peak_share": speed / self.peak,
            "skipped_steps": self.skipped_steps,
        }

    def forward(self, batch: Batch) -> LossOutput:
        """Training and evaluation share it, so that both see the same precision."""
        device = self.world.device
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
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
                f"conversations {conversations} of {self.data_name}); the weights are those of the "
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
        rows, size = self.held_out.rows_per_epoch, self.config.batch.batch_size
        if self.config.watch.eval_max_rows and self.step < self.total_steps:
            rows = min(rows, self.config.watch.eval_max_rows)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for start in range(0, rows, size * self.world.size):
            first = start + self.world.rank * size
            mine = range(first, min(first + size, rows))
            batch = self.held_out.batch(mine or [0])
            if not mine:  # under FSDP every rank has to take part in every forward pass
                batch["labels"].fill_(IGNORE)
            sums[0] += self.forward(batch).loss_sum
            targets = batch["labels"][batch["labels"] != IGNORE]
            sums[1] += len(targets)
            sums[2] += int(self.token_num_bytes[targets].sum())
        loss_sum, num_targets, num_bytes = parallel.sum_over_ranks(sums).tolist()
        self.model.train()
        bits = loss_sum / math.log(2)
        return {"step": self.step, "eval_loss": loss_sum / num_targets, "eval_bpb": bits / max(num_bytes, 1)}

    def print_samples(self, show: Callable[[str], None]) -> None:
        """What the model answers by now."""
        questions = self.config.watch.sample_prompts
        if not questions or not self.world.is_main:
            return
        if parallel.is_sharded(self.model):
            show("  no samples: under fsdp no rank has the whole model")
            return
        rng = torch.Generator(self.world.device).manual_seed(self.config.compute.seed)
        self.model.eval()
        replies = answers(self.plain_model, self.tokenizer, questions, 40, temperature=0.7, top_p=0.9, generator=rng)
        self.model.train()
        for question, reply in zip(questions, replies, strict=True):
            show(f"  {question!r} -> {reply.strip()!r}")

    # ---------------------------------------------------------------- save, resume

    def save(self) -> None:
        """Write a checkpoint; every rank takes part in gathering it, the first one writes."""
        weights, optimizer_state = parallel.gather_state(self.model, self.optimizers)
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"config": self.config.flat(), "optimizer": optimizer_state}

        def write(directory: Path) -> None:
            if self.base:
                save_adapter(directory, self.plain_model, str(self.base.directory), weights)
                record_base(directory, self.base)
                self.tokenizer.save_pretrained(directory)
            else:
                save_pretrained(directory, self.plain_model, self.tokenizer, weights)
            save_state(directory / STATE, state)

        if self.world.is_main:
            limit = self.config.checkpoint.save_total_limit
            self.last_checkpoint = save_checkpoint(self.output_dir, self.step, write, limit)
        parallel.wait_for_all()

    def resume(self, directory: Path) -> None:
        """Take over everything but the weights, which the model has already, from a checkpoint."""
        state = load_state(directory / STATE) if self.world.is_main else {"optimizer": {}}
        parallel.scatter_optimizer_state(self.model, self.optimizers, state.pop("optimizer"))
        for name, value in parallel.from_first_rank(state, self.world).items():
            if name in COUNTERS:
                setattr(self, name, value)
        self.last_checkpoint = directory


def count_batch(batch: Batch) -> list[int]:
    """Targets, documents and real tokens."""
    sequence_ids = batch["sequence_ids"]
    counts = ((batch["labels"] != IGNORE).sum(), sequence_ids.amax(dim=1).sum(), (sequence_ids > 0).sum())
    return [int(count) for count in counts]
