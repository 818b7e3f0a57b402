"""The training loop: accumulate, clip, step, schedule, evaluate, log, save, resume.

The loss of an optimizer step is the sum over all its target tokens, in all micro-batches on all ranks, divided by their
number. The mean of the micro-batches' means differs, unless all have the same number of targets:

>>> loss_sums, targets = [6.0, 1.0], [3, 1]  # two micro-batches
>>> sum(loss_sums) / sum(targets)
1.75
>>> sum(s / n for s, n in zip(loss_sums, targets)) / 2
1.5
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import parallel
from checkpoint import load_optimizer, save_checkpoint, save_optimizer, save_pretrained
from config import TrainConfig, UserError
from datacollator import MicroBatch, RowStream, Step, StepLoader
from files import read_json, write_json
from generation import answers
from hub.peft import describe_base, record_base, save_adapter
from hub.tokenizer_json import save_tokenizer
from launch.command_line import StopSignal
from launch.run_directory import NO_TRACKER, RunLog, Tracker
from model import DeepSeekV2, LossOutput
from optimizer import learning_rate, make_optimizers
from parallel import World
from tokenizer import Tokenizer

STATE = "trainer_state.json"
# Saved with weights and optimizer state. With the seed and the data, they determine all that follows.
COUNTERS = (
    "step", "rows_seen", "num_tokens", "skipped_steps", "bad_steps", "best_step", "best_loss", "evaluations_since",
)  # fmt: skip
MAX_BAD_STEPS = 5  # non-finite steps in a row before a run stops


class Trainer:
    """Trains `model` (plain, under DDP or FSDP) on the rows of `train`.

    A step's data is a pure function of the seed and the number of rows seen, so weights, optimizer state and a few
    counters suffice to resume a run exactly.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        tokenizer: Tokenizer,
        train: RowStream,
        held_out: RowStream | None,
        world: World,
        base: Path | None = None,
    ) -> None:
        """base: directory of the model that adapters are trained on."""
        self.config, self.model, self.tokenizer, self.world = config, model, tokenizer, world
        self.train_rows = train
        self.plain_model = cast(DeepSeekV2, getattr(model, "module", model))
        self.dtype = getattr(torch, config.compute.dtype)
        self.optimizers = make_optimizers(model, config.optimizer, self.dtype)
        self.batches = StepLoader(train, config.batch, world, config.compute.compile)
        self.held_out = StepLoader(held_out, config.batch, world, config.compute.compile) if held_out else None
        self.rows_per_step = self.batches.rows_per_step
        self.step = self.rows_seen = self.num_tokens = self.skipped_steps = self.bad_steps = 0
        self.best_step, self.best_loss, self.evaluations_since = 0, math.inf, 0  # the lowest eval_loss
        self.output_dir = Path(config.checkpoint.output_dir)
        self.last_checkpoint: Path | None = None
        self.base, self.base_record = base, {}
        if base and config.lora.lora_rank and world.is_main:
            self.base_record = describe_base(base, config.model)
        self.token_num_bytes = torch.tensor(tokenizer.token_num_bytes)
        self.signal, self.stop = StopSignal(world.is_main), False

    @property
    def place(self) -> tuple[float, float]:
        """(progress, end) of the schedule, in steps. Without max_steps, progress is rows seen over rows per step, so a
        run resumed with another batch size or number of ranks keeps its place in data and schedule."""
        batch = self.config.batch
        if batch.max_steps:
            return self.step, batch.max_steps
        seen = self.rows_seen / self.rows_per_step
        return seen, seen + batch.remaining_steps(self.train_rows.rows_per_epoch, self.world.size, self.rows_seen)

    @property
    def counters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COUNTERS}

    @property
    def total_steps(self) -> int:
        progress, end = self.place
        return self.step + round(end - progress)

    # ---------------------------------------------------------------- the loop

    def train(self, tracker: Tracker = NO_TRACKER) -> None:
        """Run to the last step. After a signal to stop, finish the step, save, and exit with 128 + signal.

        tracker: also receives rank 0's metrics.
        """
        watch, saving, patience = self.config.watch, self.config.checkpoint, self.config.batch.early_stopping_patience
        self.model.train()
        with (
            self.signal,
            RunLog(self.output_dir, self.step, self.total_steps, self.world.is_main, tracker) as log,
            contextlib.closing(self.batches.steps(self.rows_seen, self.total_steps - self.step)) as steps,
        ):
            done = self.step == self.total_steps  # a finished run was resumed
            for step in steps:
                metrics = self.train_step(step)
                done, improved = self.step == self.total_steps, False
                # log
                log.advance(metrics)
                if done or self.due(watch.logging_steps):
                    log.write(metrics)
                # evaluate, stop early
                if self.held_out and (done or self.due(watch.eval_steps)):
                    improved = self.report_evaluation(log)
                    done = done or 0 < patience <= self.evaluations_since
                # save
                if done or self.stop or self.due(saving.save_steps) or (improved and saving.save_best):
                    self.save()
                if done or self.stop:
                    break
            log.finish(self.last_checkpoint, self.counters, stopped=not done)
            if self.stop:
                parallel.leave_world()
                raise SystemExit(128 + (self.signal.number or signal.SIGTERM))

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def train_step(self, step: Step) -> dict[str, float]:
        """Take one optimizer step and return its metrics. The host first waits for the device after queueing the
        update. Raises UserError without targets, or after MAX_BAD_STEPS non-finite steps in a row."""
        began, counts = time.perf_counter(), step.counts
        if not counts.targets:
            raise UserError(f"step {self.step + 1} has no target tokens: {self.rows_of_step()}")
        progress, end = self.place
        rate = learning_rate(self.step, self.config.optimizer, end, progress)
        # forward, backward
        sums, experts = self.accumulate(step)
        losses, expert_counts = sums.split([3, experts.numel()])
        loads = expert_counts.view_as(experts)  # (MoE layers, E)
        expert_load = (loads.amax(dim=1) / loads.mean(dim=1)).mean()
        # clip, step
        max_norm = self.config.optimizer.max_grad_norm
        grad_norm = parallel.full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))
        finite = losses[0].isfinite() & grad_norm.isfinite()
        self.update_weights(finite, rate)
        # read back
        values = torch.cat((losses, torch.stack((expert_load, grad_norm, finite.float())))).tolist()
        loss_sum, balance_sum, interrupted, load, norm, was_finite = values
        self.stop = self.stop or interrupted > 0
        self.count_bad_step(bool(was_finite))
        self.step += 1
        self.rows_seen += self.rows_per_step
        self.num_tokens += counts.tokens
        return {
            "step": self.step,
            "loss": loss_sum / counts.targets,
            "balance_loss": balance_sum / counts.documents,
            "expert_load": load,
            "learning_rate": rate,
            "grad_norm": norm,
            "num_tokens": self.num_tokens,
            "tokens_per_second": counts.tokens / (time.perf_counter() - began),
            "skipped_steps": self.skipped_steps,
        }

    def accumulate(self, step: Step) -> tuple[Tensor, Tensor]:
        """Add up the gradients of a step's micro-batches. Return one vector of sums over micro-batches and ranks (loss,
        balance loss, number of signals to stop, tokens per expert), and a tensor in the shape of its last part."""
        config, counts = self.config, step.counts
        # seeds LoRA's dropout; torch takes 64 bits
        torch.manual_seed(((config.compute.seed << 40) + self.step * self.world.size + self.world.rank) % 2**64)
        sums: list[Tensor] = []
        for i, micro_batch in enumerate(step.micro_batches):
            with parallel.synchronize_gradients(self.model, last=i == len(step.micro_batches) - 1):
                output = self.forward(micro_batch)
                loss = output.loss_sum / counts.targets + output.balance_loss / counts.documents
                (loss * self.world.size).backward()  # engines average over ranks, we need the sum
            # All ranks stop after the same step: their signals are summed with the rest.
            interrupted = output.loss_sum.new_full((), float(self.signal.number > 0))
            losses = torch.stack((output.loss_sum, output.balance_loss, interrupted)).detach()
            sums.append(torch.cat((losses, output.expert_counts.flatten())))
        return parallel.sum_over_ranks(torch.stack(sums).sum(dim=0)), output.expert_counts

    def forward(self, micro_batch: MicroBatch) -> LossOutput:
        """Run the model, in the same precision for training and evaluation."""
        device = self.world.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model(**micro_batch.arguments(device))

    def update_weights(self, finite: Tensor, rate: float) -> None:
        """Step, unless loss or gradient is NaN or infinite. The optimizers check `found_inf` on the device, without
        a host sync."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
            optimizer.step()
        self.model.zero_grad()

    def count_bad_step(self, finite: bool) -> None:
        """Raise UserError after MAX_BAD_STEPS in a row."""
        self.skipped_steps += not finite
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            raise UserError(
                f"step {self.step + 1}: loss or gradient was not finite {MAX_BAD_STEPS} times in a row (last: "
                f"{self.rows_of_step()}); last checkpoint: {self.last_checkpoint or 'none'}; try a lower learning_rate"
            )

    def rows_of_step(self) -> str:
        """Name the conversations of the current step."""
        rows = range(self.rows_seen, self.rows_seen + self.rows_per_step)
        conversations = sorted(index for row in rows for index in self.train_rows.row_indices(row))
        return f"conversations {conversations} of {', '.join(self.config.data.dataset)}"

    # ---------------------------------------------------------------- evaluation

    def report_evaluation(self, log: RunLog) -> bool:
        """Evaluate, and print samples. Returns whether eval_loss is the lowest so far."""
        evaluation = self.evaluate()
        log.print("step {step}: eval_loss {eval_loss:.4f}, eval_bpb {eval_bpb:.4f}".format(**evaluation))
        self.print_samples(log.print)
        log.write(evaluation)
        self.evaluations_since += 1
        if evaluation["eval_loss"] < self.best_loss:
            self.best_step, self.best_loss, self.evaluations_since = self.step, evaluation["eval_loss"], 0
        return self.evaluations_since == 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss in nats per target token, and in bits per UTF-8 byte of target text. The latter is comparable
        across tokenizers. Each held-out row, up to eval_max_rows, counts once, on one of the ranks."""
        assert self.held_out is not None
        self.model.eval()
        rows, size = self.held_out.rows.rows_per_epoch, self.config.batch.batch_size
        rows = min(rows, self.config.watch.eval_max_rows or rows)
        losses, counted = [], torch.zeros(2, dtype=torch.int64)  # targets, and their bytes
        for start in range(0, rows, size * self.world.size):
            first = start + self.world.rank * size
            mine = range(first, min(first + size, rows))
            # under FSDP every rank has to take part in every forward pass
            micro_batch = self.held_out.micro_batch(mine or [0], with_labels=len(mine) > 0)
            losses.append(self.forward(micro_batch).loss_sum)
            targets = micro_batch.documents.labels
            assert targets is not None
            counted += torch.stack((torch.tensor(len(targets)), self.token_num_bytes[targets].sum()))
        loss_sum = parallel.sum_over_ranks(torch.stack(losses).sum()).item()
        num_targets, num_bytes = parallel.sum_over_ranks(counted.to(self.world.device)).tolist()
        self.model.train()
        bits = loss_sum / math.log(2)
        return {"step": self.step, "eval_loss": loss_sum / num_targets, "eval_bpb": bits / max(num_bytes, 1)}

    def print_samples(self, show: Callable[[str], None]) -> None:
        """Print sample answers, or why there are none. A failure does not end the run."""
        questions = self.config.watch.sample_prompts
        if not questions or not self.world.is_main:
            return
        asked = [[{"role": "user", "content": question}] for question in questions]
        rng = torch.Generator(self.world.device).manual_seed(self.config.compute.seed)
        self.model.eval()
        try:
            if isinstance(self.model, FSDPModule):
                raise UserError("under fsdp no rank has the whole model")
            # Compiled blocks would be recompiled for every length of an answer, and in fp32, where torch cannot trace
            # the grouped product.
            with torch.compiler.set_stance("force_eager"):
                model, tokenizer = self.plain_model, self.tokenizer
                replies = answers(model, tokenizer, asked, 40, temperature=0.7, top_p=0.9, generator=rng)
            lines = [f"  {q!r} -> {reply.text.strip()!r}" for q, reply in zip(questions, replies, strict=True)]
        except (UserError, RuntimeError) as error:  # e.g. logits are NaN, or memory is full
            lines = [f"  no samples: {error}"]
        self.model.train()
        show("\n".join(lines))

    # ---------------------------------------------------------------- save, resume

    def save(self) -> None:
        """Write a checkpoint. The first rank writes the model, each rank its shard of the optimizer state."""
        config, world, base = self.config, self.world, self.base
        parallel.reshard(self.model)

        def write(directory: Path) -> dict[str, str]:
            if config.lora.lora_rank:
                save_adapter(directory, self.plain_model, str(base) if base else None, world.is_main)
                if base and world.is_main:
                    record_base(directory, base, self.base_record)
                    save_tokenizer(directory, self.tokenizer, config.model.max_position_embeddings)
            else:
                save_pretrained(directory, self.plain_model, self.tokenizer, is_main=world.is_main)
            if world.is_main:
                write_json(directory / STATE, self.counters | {"data": self.train_rows.fingerprint})
            parallel.wait_for_first_rank(world)
            return save_optimizer(directory, self.plain_model, self.optimizers, world)

        best = self.best_step if config.checkpoint.save_best else 0
        limit = config.checkpoint.save_total_limit
        self.last_checkpoint = save_checkpoint(self.output_dir, self.step, write, limit, best, world)

    def resume(self, directory: Path) -> None:
        """Restore all but the weights, which the model has already, from a checkpoint. Raises UserError if the state is
        damaged or belongs to other data."""
        state = read_json(directory / STATE)
        for name, value in self.counters.items():
            if type(state.get(name)) is not type(value) or state[name] < 0:
                raise UserError(f"{directory / STATE} is invalid: {name} is {state.get(name)!r}")
        if state.get("data") != self.train_rows.fingerprint:
            raise UserError(
                f"{', '.join(self.config.data.dataset)}: these are not the rows that the run was trained on (changed "
                "data, or evaluation turned on or off); the run cannot be resumed"
            )
        load_optimizer(directory, self.plain_model, self.optimizers, self.world)
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.last_checkpoint = directory
