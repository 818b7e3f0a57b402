"""The training loop. Oracles: the same run arranged otherwise, a literal AdamW, a literal loop over conversations."""

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import get_cosine_with_min_lr_schedule_with_warmup

import kernels
import lora
import train_sft
import trainer as trainer_module
from checkpoint import load_pretrained, optimizer_state
from config import DataConfig, OptimizerConfig, TrainConfig, UserError
from datacollator import DataCollator, RowStream
from dataset import load_data
from launch import run_directory
from launch.command_line import STOP_SIGNALS
from launch.run_directory import read_metrics
from optimizer import Muon, learning_rate
from parallel import ALONE, choose_dtype
from small_models import small_config, small_model
from small_runs import arguments, cheap_process, conversations, train_here, write_jsonl
from tokenizer import Tokenizer
from trainer import Trainer

TOKENIZER = Tokenizer(vocab_size=512)
TEXTS = conversations(12, seed=1)
WIDTH = 128
# Weights move by about the learning rate, 1e-3, a step. Where a gradient is hardly more than its rounding error, Adam
# blows that up, but not beyond a hundredth of a step.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def one_cheap_process(tmp_path: Path) -> Iterator[None]:
    with cheap_process(tmp_path):
        yield


def rows(texts: list, packing: bool = False, shuffle: bool = False, width: int = WIDTH) -> RowStream:
    rendered = [TOKENIZER.render(messages) for messages in texts]
    ids, masks = ([turns[i] for turns in rendered] for i in (0, 1))
    columns = {"input_ids": ids, "mask": masks, "length": [*map(len, ids)], "targets": [sum(m[1:]) for m in masks]}
    return RowStream(
        datasets.Dataset.from_dict(columns), DataCollator(width, TOKENIZER.pad_token_id, packing), 0, shuffle
    )


def make_trainer(directory: Path, train: RowStream | None = None, held_out: RowStream | None = None, **changes: Any):
    """A trainer of a few thousand parameters; changes to its configuration, model_x to its model's."""
    model_changes = {name.removeprefix("model_"): changes.pop(name) for name in [*changes] if name.startswith("model_")}
    config = TrainConfig(model=small_config(vocab_size=512, **model_changes)).changed(
        dataset=("talk.jsonl",), batch_size=4, gradient_accumulation_steps=1, max_steps=4, warmup_steps=2,
        learning_rate=1e-3, dtype="float32", eval_steps=0, save_steps=0, sample_prompts=(), output_dir=str(directory),
    ).changed(**changes)  # fmt: skip
    torch.manual_seed(0)
    model = small_model(vocab_size=512, **model_changes)
    model.model.gradient_checkpointing = config.compute.gradient_checkpointing
    return Trainer(config, model, TOKENIZER, train or rows(TEXTS), held_out, ALONE)


def run_steps(trainer: Trainer, number: int) -> list[dict[str, float]]:
    """Take a number of steps, without the loop around them."""
    trainer.model.train()
    return [trainer.train_step(trainer.batches.load(trainer.rows_seen)) for _ in range(number)]


def losses(lines: list[dict[str, float]]) -> Tensor:
    return torch.tensor([line["loss"] for line in lines])


def assert_same_weights(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("packing", [True, False])
def test_accumulated_and_one_big_batch_train_the_same(packing: bool, tmp_path: Path) -> None:
    """Micro-batches differ in their number of targets, so a mean of means would not pass."""
    train = rows(TEXTS, packing, shuffle=True)
    whole = make_trainer(tmp_path, train, batch_size=4)
    parts = make_trainer(tmp_path, train, batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(losses(run_steps(parts, 4)), losses(run_steps(whole, 4)), atol=0, rtol=1e-6)
    assert_same_weights(parts.model, whole.model, ROUNDING)


def test_packed_and_padded_rows_train_the_same(tmp_path: Path) -> None:
    """Steps on all of the data, with one conversation per row, and packed."""
    packed_rows = rows(TEXTS, packing=True, width=256)
    assert packed_rows.rows_per_epoch < len(TEXTS) / 2
    padded = make_trainer(tmp_path, rows(TEXTS), batch_size=len(TEXTS))
    packed = make_trainer(tmp_path, packed_rows, batch_size=packed_rows.rows_per_epoch)
    torch.testing.assert_close(losses(run_steps(packed, 4)), losses(run_steps(padded, 4)), atol=1e-5, rtol=0)
    assert_same_weights(packed.model, padded.model, ROUNDING)


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_a_step_is_adamw_on_the_clipped_gradient_of_the_mean_loss(max_grad_norm: float, tmp_path: Path) -> None:
    """Against the formulas of the AdamW paper (algorithm 2), and cross entropy over all logits."""
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm, model_aux_loss_alpha=0.0, weight_decay=0.5)
    model = copy.deepcopy(trainer.plain_model)
    parameters = list(model.parameters())
    means = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    beta1, beta2 = 0.9, 0.95
    lines = run_steps(trainer, 3)
    for step in range(3):
        batch = trainer.train_rows.batch(range(4 * step, 4 * step + 4))
        labels = batch.pop("labels")
        loss = F.cross_entropy(model(**batch).flatten(0, 1), labels.flatten())  # the mean over all targets
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        assert lines[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert lines[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        rate = (0.5e-3, 1e-3, 1e-3)[step]
        assert lines[step]["learning_rate"] == pytest.approx(rate)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
                g = g * min(1.0, max_grad_norm / norm)
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                direction = (m / (1 - beta1 ** (step + 1))) / ((v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
                decay = 0.5 * p if p.dim() >= 2 else 0.0
                p -= rate * (direction + decay)
    assert any(p.dim() == 1 for p in parameters)
    assert_same_weights(trainer.model, model, ROUNDING)


def test_muon_moves_the_blocks_matrices_evenly_and_adamw_the_rest(tmp_path: Path) -> None:
    """Muon's update has singular values near one (its five iterations end between 0.7 and 1.2), and the root mean
    square that AdamW's usually has, 0.2."""
    muon, adamw = (make_trainer(tmp_path, optimizer=name, weight_decay=0.0) for name in ("muon", "adamw"))
    before = copy.deepcopy(muon.plain_model)
    for one in (muon, adamw):
        run_steps(one, 1)
    rate, moved = 0.5e-3, set()
    for name, weight in muon.model.named_parameters():
        if torch.equal(weight, adamw.model.get_parameter(name)):
            continue
        moved.add(name)
        update = (before.get_parameter(name) - weight).double() / rate
        values = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(update.shape)))
        assert values.max() < 1.3
        assert values.median() > 0.6
    attention = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert {name.split(".")[-2] for name in moved} == {*attention, "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_muon_moves_weights_like_torchs(shape: tuple[int, int]) -> None:
    """torch's computes in bf16 only: ours equals it closely in bf16, and up to bf16's rounding in fp32."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)

    def moved(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
        matrix = nn.Parameter(start.clone())
        optimizer = make([matrix])
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        return matrix.detach() - start

    theirs = moved(lambda p: torch.optim.Muon(p, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    ours, exact = (moved(lambda p, dtype=dtype: Muon(p, 0.1, dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert relative_distance(ours, theirs) < 1e-5
    assert relative_distance(exact, theirs) < 0.02


def relative_distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_bfloat16_trains_fp32_weights_to_nearly_the_same_losses(tmp_path: Path) -> None:
    exact, rounded = (make_trainer(tmp_path, dtype=dtype) for dtype in ("float32", "bfloat16"))
    torch.testing.assert_close(losses(run_steps(rounded, 3)), losses(run_steps(exact, 3)), atol=0.05, rtol=0)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
    ],
)
def test_a_run_takes_bf16_if_the_processor_has_it(
    abilities: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert choose_dtype("auto", ALONE.device) == expected
    assert choose_dtype("float32", ALONE.device) == "float32"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_its_numbers_once_after_the_optimizer(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's path runs on fake tensors, which raise if anything else reads a number."""
    monkeypatch.setitem(kernels.TUNING, "cpu", kernels.TUNING["cuda"])
    train, done = rows(TEXTS, packing=True), []
    changes = {"gradient_accumulation_steps": 2, "batch_size": 1, "compile": True, "dtype": "bfloat16"}
    with FakeTensorMode() as fake:
        trainer = make_trainer(tmp_path, train, optimizer=optimizer, **changes)
    step = trainer.batches.load(0)
    assert {x.documents.tokens.shape for x in step.micro_batches} == {(WIDTH,)}
    update_weights = trainer.update_weights
    monkeypatch.setattr(trainer, "update_weights", lambda *x: done.append("optimizer") or update_weights(*x))
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: done.append("numbers") or [1.0] * x.numel())
    forward = trainer.forward
    monkeypatch.setattr(trainer, "forward", lambda x: forward(tree_map_only(Tensor, fake.from_tensor, x)))
    with fake:
        trainer.train_step(step)
    assert done == ["optimizer", "numbers"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_packed_step_of_fixed_shapes_is_the_same_step(optimizer: str, tmp_path: Path) -> None:
    """With padding, as compiled code and GPUs get it, and without, as on the CPU."""
    train, changes = rows(TEXTS, packing=True, shuffle=True), {"optimizer": optimizer, "batch_size": 2}
    plain, fixed = (make_trainer(tmp_path, train, compile=wanted, **changes) for wanted in (False, True))
    assert fixed.batches.fixed_length and not plain.batches.fixed_length
    torch.testing.assert_close(losses(run_steps(fixed, 4)), losses(run_steps(plain, 4)), atol=0, rtol=1e-5)
    assert_same_weights(fixed.model, plain.model, ROUNDING)


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (1, 1), (10, 10), (20, 10), (0, 1)])
def test_the_rate_warms_up_and_follows_transformers_cosine(warmup: int, total: int) -> None:
    config = OptimizerConfig(learning_rate=0.5, min_learning_rate_ratio=0.1, warmup_steps=warmup)
    ours = [learning_rate(step, config, total) for step in range(total + 1)]
    expected = [0.5 * (step + 1) / warmup for step in range(min(warmup, total + 1))]  # no step is wasted at rate 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr=0.05)
    for step in range(total + 1):
        if step >= warmup:
            expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert ours == pytest.approx(expected)
    assert max(ours) <= 0.5
    if warmup < total:
        assert ours[-1] == pytest.approx(0.05)


def test_other_batches_resume_at_the_same_place_in_data_and_schedule(tmp_path: Path) -> None:
    """12 rows in steps of 2, then of 3: every row once, and rates on one cosine over rows."""
    train = rows(TEXTS, shuffle=True)
    one = make_trainer(tmp_path, train, batch_size=2, max_steps=0, warmup_steps=0)
    lines = run_steps(one, 3)
    one.save()
    other = make_trainer(tmp_path, train, batch_size=3, max_steps=0, warmup_steps=0)
    assert other.total_steps == 4
    other.resume(tmp_path / "checkpoints/step-000003")
    assert (other.total_steps, other.rows_seen) == (5, 6)
    lines += run_steps(other, 2)
    assert (other.step, other.rows_seen, lines[-1]["num_tokens"]) == (5, 12, train.lengths.sum())
    config = one.config.optimizer
    assert [line["learning_rate"] for line in lines] == [learning_rate(row, config, 12) for row in (0, 2, 4, 6, 9)]


def test_steps_are_counted_in_epochs_or_given(tmp_path: Path) -> None:
    """12 rows, 4 per step. A given number holds with other batches, too."""
    one, other = (make_trainer(tmp_path, batch_size=size, max_steps=6) for size in (2, 4))
    run_steps(one, 3)
    one.save()
    other.resume(tmp_path / "checkpoints/step-000003")
    assert (other.place, other.total_steps) == ((3, 6), 6)
    assert make_trainer(tmp_path, max_steps=0).total_steps == 3
    assert make_trainer(tmp_path, max_steps=0, num_train_epochs=1.5).total_steps == 5
    assert make_trainer(tmp_path, max_steps=7, num_train_epochs=1.5).total_steps == 7


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("packing", "batch_size"), [(False, 5), (True, 2), (False, 100)])
def test_evaluation_equals_a_loop_over_single_conversations(packing: bool, batch_size: int, tmp_path: Path) -> None:
    """Each exactly once, also if the last batch is not full; bits per byte of the assistant's text."""
    held_out = rows(TEXTS, packing)
    assert held_out.rows_per_epoch % batch_size
    trainer = make_trainer(tmp_path, held_out=held_out, batch_size=batch_size if batch_size < 100 else 12)
    trainer.config.batch.batch_size = batch_size
    nats, targets, num_bytes = 0.0, 0, 0
    for messages in TEXTS:
        ids, mask = (torch.tensor(x) for x in TOKENIZER.render(messages))
        logits = trainer.plain_model(ids[None])[0, :-1]
        learned = mask[1:] == 1
        nats += F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum").item()
        targets += int(learned.sum())
        num_bytes += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    line = trainer.evaluate()
    assert line["eval_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert line["eval_bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert trainer.model.training


def test_evaluation_leaves_dropout_and_random_numbers_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, held_out=rows(TEXTS), sample_prompts=("Hello", "Oh?"))
    lora.add_lora(trainer.plain_model, 2, 4.0, 0.5, ("o_proj",))
    for name, parameter in trainer.plain_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    before = torch.get_rng_state()
    first = trainer.evaluate()
    trainer.print_samples(lambda text: None)
    assert trainer.evaluate() == first
    assert torch.get_rng_state().equal(before)


def test_evaluation_may_be_limited_to_the_first_rows(tmp_path: Path) -> None:
    few = make_trainer(tmp_path, held_out=rows(TEXTS[:3])).evaluate()
    assert make_trainer(tmp_path, held_out=rows(TEXTS), eval_max_rows=3).evaluate() == pytest.approx(few)


def test_the_first_held_out_rows_are_a_fair_sample(tmp_path: Path) -> None:
    """Even if the data are sorted by length, and without --shuffle. eval_max_rows takes the first rows."""
    texts = sorted(conversations(300), key=lambda messages: len(TOKENIZER.render(messages)[0]))
    changes = {"train_split": "train[200:]", "eval_split": "train[:200]"}
    data, flags = write_jsonl(tmp_path / "data.jsonl", texts), ("--packing", "--no-shuffle")
    config = train_sft.parse_arguments(arguments(data, tmp_path / "run", *flags, **changes)).config
    _, held_out, _ = train_sft.load_rows(config, TOKENIZER, ALONE)
    assert held_out is not None
    first = [index for row in range(held_out.rows_per_epoch // 4) for index in held_out.row_indices(row)]
    assert held_out.lengths[first].mean() == pytest.approx(held_out.lengths.mean(), rel=0.05)


def test_samples_fit_into_the_smallest_context(tmp_path: Path) -> None:
    """A context with room for one token after the prompt gives a sample; one without room gives none."""
    prompt, _ = TOKENIZER.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    for context in (len(prompt) + 1, len(prompt), len(prompt) - 1):
        trainer = make_trainer(tmp_path, sample_prompts=("a",), model_max_position_embeddings=context)
        printed: list[str] = []
        trainer.print_samples(printed.append)
        assert len(printed) == 1
        assert context > len(prompt) or printed[0].startswith("  no samples: the conversation has ")


@pytest.mark.parametrize("error", [UserError("logits are NaN"), RuntimeError("logits are NaN")])
def test_a_model_without_samples_is_still_trained(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because it cannot answer, or no rank has all of it."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(trainer_module, "answers", fail)
    trainer, printed = make_trainer(tmp_path, sample_prompts=("a", "b")), list[str]()
    trainer.print_samples(printed.append)
    monkeypatch.setattr(trainer_module, "FSDPModule", type(trainer.model))
    trainer.print_samples(printed.append)
    assert printed == ["  no samples: logits are NaN", "  no samples: under fsdp no rank has the whole model"]
    assert trainer.model.training


# ---------------------------------------------------------------- the loop


def test_a_run_writes_metrics_and_checkpoints_and_changes_nothing_else(tmp_path: Path) -> None:
    """Signal handlers that stay would keep the model, and a rank's process group, alive."""
    trainer = make_trainer(tmp_path, held_out=rows(TEXTS[:4]), max_steps=5, eval_steps=2, save_steps=2, seed=2**63 - 1)
    config, handlers = copy.deepcopy(trainer.config), [signal.getsignal(number) for number in STOP_SIGNALS]
    trainer.train()
    assert trainer.config == config
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    lines = read_metrics(tmp_path)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    fields = ("step", "loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second")
    assert all(line.keys() >= set(fields) for line in training)
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5]
    assert all(line.keys() == {"step", "eval_loss", "eval_bpb"} for line in evaluations)
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    lengths = trainer.train_rows.lengths.tolist()
    assert training[2]["num_tokens"] == sum(lengths)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert_same_weights(load_pretrained(tmp_path / "checkpoints/step-000005"), trainer.model, 0)


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps take two seconds here."""
    log = run_directory.RunLog(tmp_path, 0, 300, shown=True)
    metrics = {"step": 0, "loss": 1.0, "tokens_per_second": 5.0, "expert_load": 1.0}
    monkeypatch.setattr(run_directory, "time", SimpleNamespace(monotonic=lambda: 2.0 * metrics["step"]))
    with log:
        for step in range(1, 301):
            metrics["step"] = step
            log.advance(metrics)
            log.write(metrics)
            if step == 150:
                log.print("step 150: eval_loss 1.0")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 60 + 1
    assert lines[0] == "step 1 of 300: loss 1.000, 5 tokens/s, expert load 1.0"
    assert "step 150: eval_loss 1.0" in lines
    assert "\r" not in printed.out + printed.err
    assert len(read_metrics(tmp_path)) == 300


def test_without_a_terminal_loading_data_draws_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.enable_progress_bars()
    options = DataConfig((str(write_jsonl(tmp_path / "data.jsonl", TEXTS)),))
    with cheap_process(tmp_path):
        load_data(options, TOKENIZER, seed=0, want_eval=False)
    assert capsys.readouterr().err == ""


def test_damaged_metrics_are_an_error_that_names_them(tmp_path: Path) -> None:
    for line in ("{", "[]", "{}"):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
            read_metrics(tmp_path)


def test_a_step_without_targets_is_an_error_that_names_its_rows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    step = trainer.batches.load(0)
    with pytest.raises(UserError, match=r"step 1 has no target tokens: conversations \[0, 1, 2, 3\] of talk.jsonl"):
        trainer.train_step(step._replace(counts=step.counts._replace(targets=0)))


def test_evaluating_only_prints_a_runs_last_evaluation_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_jsonl(tmp_path / "data.jsonl", TEXTS), tmp_path / "run"
    assert train_here(arguments(data, run, max_steps=2), tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "cache" not in path.parts}
    capsys.readouterr()
    flags = ["--evaluate-only", "--init-from", str(run), "--dataset", str(data), "--max-seq-len", "96"]
    options = ["--eval-split", "train[:5]", "--device", "cpu", "--dtype", "float32", "--num-proc", "1"]
    assert train_here(["tiny", *flags, *options], tmp_path) == 0
    last = read_metrics(run)[-1]
    expected = "eval_loss {eval_loss:.4f}, eval_bpb {eval_bpb:.4f}".format(**last)
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}/checkpoints/step-000002: {expected}"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_deterministic_algorithms_give_the_same_run(tmp_path: Path) -> None:
    """torch is deterministic on a CPU by default."""
    data, losses = write_jsonl(tmp_path / "data.jsonl", TEXTS), []
    for name in ("deterministic", "no-deterministic"):
        run = tmp_path / name
        assert train_here(arguments(data, run, f"--{name}", max_steps=2, eval_steps=0), tmp_path) == 0
        assert torch.are_deterministic_algorithms_enabled() == (name == "deterministic")
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[0] == losses[1]


def test_balance_losses_are_trained_on_but_not_reported(tmp_path: Path) -> None:
    without, with_balance = (make_trainer(tmp_path, model_aux_loss_alpha=alpha) for alpha in (0.0, 1.0))
    assert losses(run_steps(without, 1)).equal(losses(run_steps(with_balance, 1)))
    router = "model.layers.1.mlp.gate.weight"
    assert not without.model.get_parameter(router).equal(with_balance.model.get_parameter(router))


def test_zero_turns_evaluation_and_saving_off_except_for_the_last_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=3)
    trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4]
    assert not any("eval_loss" in line for line in read_metrics(tmp_path))


def test_a_signal_during_an_evaluation_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, held_out=rows(TEXTS[:2]), eval_steps=2)
    evaluate = trainer.evaluate

    def interrupted() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate()

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    with pytest.raises(SystemExit) as leaving:
        trainer.train()
    assert leaving.value.code == 143
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


# ---------------------------------------------------------------- the best evaluation


def scripted_losses(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Replace the results of its evaluations."""
    given = iter(values)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"step": trainer.step, "eval_loss": next(given), "eval_bpb": 1.0})


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_the_best_checkpoint_is_kept_next_to_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of step 3 is kept after two more evaluations, and in a resumed run until there is a better one."""
    changes = {"held_out": rows(TEXTS[:2]), "eval_steps": 1, "save_total_limit": 1, "save_best": True}
    trainer = make_trainer(tmp_path, max_steps=5, **changes)
    scripted_losses(trainer, monkeypatch, [3.0, 2.5, 2.0, 2.0, 2.1])
    trainer.train()
    assert saved_steps(tmp_path) == [3, 5]
    checkpoints = tmp_path / "checkpoints"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"saved {checkpoints}/step-000005",
        f"talk to it: python chat.py {tmp_path}",
        f"eval_loss was lowest after step 3, 2.0000; --save-best keeps {checkpoints}/step-000003",
    ]
    shutil.copytree(checkpoints / "step-000005", tmp_path / "step 5")
    for values, expected in (([2.2, 2.3], [3, 7]), ([1.9, 2.3], [6, 7])):
        resumed = make_trainer(tmp_path, max_steps=7, resume=True, **changes)
        resumed.resume(tmp_path / "step 5")
        scripted_losses(resumed, monkeypatch, values)
        resumed.train()
        assert saved_steps(tmp_path) == expected


def test_a_run_ends_early_if_eval_loss_does_not_fall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, held_out=rows(TEXTS[:2]), max_steps=20, eval_steps=2, early_stopping_patience=2)
    scripted_losses(trainer, monkeypatch, [3.0, 3.1, 2.0, 2.1, 2.0])
    trainer.train()
    assert saved_steps(tmp_path) == [10]
    printed = capsys.readouterr().out
    assert "ended after 10 of 20 steps: 2 evaluations without a lower eval_loss\n" in printed
    assert f"lowest after step 6, 2.0000; --save-best keeps {tmp_path}/checkpoints/step-000006\n" in printed
    assert [line["step"] for line in read_metrics(tmp_path) if "eval_loss" in line] == [2, 4, 6, 8, 10]


# ---------------------------------------------------------------- trackers


class Tracker(SimpleNamespace):
    """Records the calls that wandb, trackio and torch's tensorboard get."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(started=[], lines=[], closed=0)
        patch.setattr(run_directory, "import_tracker", lambda name: self)

    def init(self, **options: Any) -> None:
        self.started.append(options)

    def log(self, line: dict[str, float], step: int) -> None:
        self.lines.append((step, line))

    def SummaryWriter(self, directory: Path, purge_step: int) -> "Tracker":
        self.started.append(purge_step)
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.lines.append((step, name))

    def finish(self) -> None:
        self.closed += 1

    close = finish


def train_with_tracker(trainer: Trainer) -> None:
    """Start the tracker and the run as train_sft.py does."""
    tracker = run_directory.start_tracker(trainer.config, trainer.step)
    run_directory.open_run(trainer.config)
    trainer.train(tracker)


def fail_and_resume(directory: Path, **changes: Any) -> None:
    """Fail in step 4 of 4, and resume from the checkpoint of step 2."""
    first = make_trainer(directory, save_steps=2, **changes)
    forward = first.forward

    def fail(batch: dict) -> Any:
        if first.step == 3:
            raise UserError("step 4 fails")
        return forward(batch)

    first.forward = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="step 4 fails"):
        train_with_tracker(first)
    again = make_trainer(directory, resume=True, **changes)
    again.resume(directory / "checkpoints/step-000002")
    train_with_tracker(again)


def test_a_tracker_gets_every_line_under_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(monkeypatch)
    train_with_tracker(make_trainer(tmp_path / "run", report_to="wandb"))
    assert tracker.lines == [(line["step"], line) for line in read_metrics(tmp_path / "run")]
    (options,) = tracker.started
    assert options["name"].startswith("run-")
    assert tracker.closed == 1


def test_tensorboard_is_trimmed_like_the_metrics_and_has_no_curve_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(monkeypatch)
    fail_and_resume(tmp_path, report_to="tensorboard")
    assert tracker.started == [1, 3]
    assert [step for step, name in tracker.lines if name == "loss"] == [1, 2, 3, 3, 4]
    assert "step" not in {name for _, name in tracker.lines}
    assert tracker.closed == 2


def test_a_full_disk_under_the_metrics_is_named(tmp_path: Path) -> None:
    log = run_directory.RunLog(tmp_path, 0, 4, shown=True)
    log.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(.*No space left"):
        log.write({"step": 1})


# ---------------------------------------------------------------- NaN and infinity


def poison_gradient(trainer: Trainer, steps: tuple[int, ...], value: float) -> None:
    """Replace one entry of one gradient, at these steps, counted from 1."""

    def poison(gradient: Tensor) -> Tensor:
        if trainer.step + 1 in steps:
            gradient = gradient.clone()
            gradient.view(-1)[3] = value
        return gradient

    trainer.plain_model.model.norm.weight.register_hook(poison)


def poison_loss(trainer: Trainer, steps: tuple[int, ...], value: float) -> None:
    forward = trainer.forward

    def poisoned(batch: dict) -> Any:
        output = forward(batch)
        return output._replace(loss_sum=output.loss_sum * (value if trainer.step + 1 in steps else 1.0))

    trainer.forward = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("poison", [poison_gradient, poison_loss])
@pytest.mark.parametrize(("value", "optimizer"), [(math.nan, "adamw"), (math.inf, "adamw"), (-math.inf, "muon")])
def test_a_bad_step_is_skipped_bit_for_bit_counted_and_logged(
    poison: Any, value: float, optimizer: str, tmp_path: Path
) -> None:
    """Steps 2 and 3 are bad. Weights and moments stay those of step 1, and step 4 is the optimizer's second."""
    trainer = make_trainer(tmp_path, optimizer=optimizer)
    poison(trainer, (2, 3), value)
    lines = run_steps(trainer, 1)
    weights = copy.deepcopy(trainer.model.state_dict())
    state = copy.deepcopy(optimizer_state(trainer.model, trainer.optimizers))
    lines += run_steps(trainer, 2)
    assert all(weights[name].equal(tensor) for name, tensor in trainer.model.state_dict().items())
    same = optimizer_state(trainer.model, trainer.optimizers)
    assert all(state[name].equal(tensor) for name, tensor in same.items())
    lines += run_steps(trainer, 1)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not weights["lm_head.weight"].equal(trainer.model.state_dict()["lm_head.weight"])


def test_metrics_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    poison_loss(trainer, (2,), math.nan)
    trainer.train()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] is None
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]


def test_five_bad_steps_in_a_row_stop_the_run_and_name_rows_and_checkpoint(tmp_path: Path) -> None:
    """Steps 2 to 5 are bad, which is one too few; from step 7 on all are."""
    trainer = make_trainer(tmp_path, rows(TEXTS, shuffle=True), max_steps=20, save_steps=6)
    poison_loss(trainer, (2, 3, 4, 5, *range(7, 20)), math.nan)
    with pytest.raises(UserError) as caught:
        trainer.train()
    names = sorted(index for row in range(40, 44) for index in trainer.train_rows.row_indices(row))
    assert "step 11: loss or gradient was not finite 5 times in a row" in str(caught.value)
    assert f"conversations {names} of talk.jsonl" in str(caught.value)
    assert str(tmp_path / "checkpoints/step-000006") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same_weights(load_pretrained(tmp_path / "checkpoints/step-000006"), trainer.model, 0)


def test_counters_survive_a_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    poison_loss(trainer, (2, 3), math.nan)
    run_steps(trainer, 3)
    trainer.save()
    other = make_trainer(tmp_path)
    other.resume(tmp_path / "checkpoints/step-000003")
    names = trainer_module.COUNTERS
    assert [getattr(other, name) for name in names] == [getattr(trainer, name) for name in names]
    assert (other.skipped_steps, other.bad_steps, other.rows_seen) == (2, 2, 12)
