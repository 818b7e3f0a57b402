"""The path that CUDA takes through the model (kernels.TUNING), run on CPU, on fake tensors and compiled.

The plain form of attention replaces FlashAttention's kernel.
"""

import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import lora
import quantization
import train_sft
import trainer
from config import TrainConfig, UserError
from datacollator import StepLoader
from documents import Documents, find_documents
from kernels import document_attention, plain_attention
from launch import dry_run as dry_run_module
from launch.cost import parameter_counts
from launch.dry_run import DryRun, dry_run, fit_to_memory, report
from model import DeepSeekV2, LossOutput
from parallel import World, driver_problem, join_world
from small_models import WIDE, make_batch, relative_difference, small_config, small_model
from small_runs import arguments, conversations, train_here, write_jsonl

ROWS, WIDTH = 2, 64


def packed_batch(seed: int) -> dict[str, Tensor]:
    """Two rows with one to six conversations each, in all of them some padding."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = [[some(1, (WIDTH - 1) // 6) for _ in range(some(1, 6))] for _ in range(ROWS)]
    return make_batch(rows, seed, width=WIDTH)


def on_path(
    model: DeepSeekV2, batch: dict[str, Tensor], documents: Documents | None = None, backward: bool = True
) -> LossOutput:
    """The model in bf16, forward and backward; with documents: as a trainer calls it."""
    names = ("input_ids", "position_ids") if documents else tuple(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**{name: batch[name] for name in names}, documents=documents)
    if backward:
        (output.loss_sum + output.balance_loss).backward()
    return output


@pytest.fixture
def cudas_path() -> Iterator[None]:
    """With a CPU kernel for the product that adds to an fp32 sum, which torch has for CUDA only."""

    def add_product(
        total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, beta: int = 1, alpha: int = 1, *, out: Tensor
    ) -> Tensor:
        assert (a.dtype, out_dtype, out is total) == (torch.bfloat16, torch.float32, True)
        return out.copy_(total + a.float() @ b.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", add_product, "CPU")
    with kernels.tuned_as("cuda"):
        yield
    library._destroy()


def plain_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return one document's gradients by the formulas of the FlashAttention paper (section 3), since autograd is off
    within an operation."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    p = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
    dp = torch.einsum("qhd,khd->hqk", grad, v)
    ds = p * (dp - (dp * p).sum(dim=-1, keepdim=True)) * scale
    return (
        torch.einsum("hqk,khd->qhd", ds, k),
        torch.einsum("hqk,qhd->khd", ds, q),
        torch.einsum("hqk,qhd->khd", p, grad),
    )


@pytest.fixture
def flash_attention() -> Iterator[None]:
    """CPU kernels for the two operations that torch has for CUDA only. They insist on what CUDA's insist on."""

    def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, longest, _, causal, scale = rest[:5]
        assert causal and offsets.diff().max() <= longest
        assert offsets[-1] == len(q)  # what no document covers is left as the memory was
        assert q.dtype == torch.bfloat16 and q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        for x in (q, k, v):  # in units of 16 bytes
            assert all(8 * (place // 8) == place for place in (x.storage_offset(), *x.stride()[:-1]))
        output = plain_attention(q, k, v, cast(Documents, SimpleNamespace(offsets=offsets.unique())), scale)
        return output, torch.empty(q.shape[1], len(q)), torch.empty(2, dtype=torch.uint64)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        lengths, scale = rest[2].diff().tolist(), rest[8]
        documents = zip(*(x.split(lengths) for x in (grad, q, k, v)), strict=True)
        parts = [plain_gradients(*document, scale) for document in documents]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    operations = (varlen._varlen_attn, forward), (varlen._varlen_attn_backward, backward)
    for operation, function in operations:
        operation.register_kernel("cpu", function)
    yield
    for operation, _ in operations:
        del operation._backend_fns["cpu"]


# ---------------------------------------------------------------- the same numbers


def gradients(model: DeepSeekV2) -> dict[str, Tensor]:
    """Return the gradients, and remove them from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.usefixtures("cudas_path", "flash_attention")
@pytest.mark.parametrize("seed", range(3))
def test_fixed_shapes_and_values_in_padding_do_not_change_results(seed: int) -> None:
    """Oracle: real tokens only. With fixed shapes there are empty documents, and padding passes through all layers."""
    model = small_model(aux_loss_alpha=0.1, device_aux_loss_alpha=0.1, n_group=4, topk_group=2)
    batch = packed_batch(seed)
    plain, expected = on_path(model, batch), gradients(model)
    documents = find_documents(batch["sequence_ids"], batch["labels"], fixed_length=True)
    assert len(documents.tokens) == ROWS * WIDTH
    output, ours = on_path(model, batch, documents), gradients(model)
    assert output.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-5)
    assert output.balance_loss.item() == pytest.approx(plain.balance_loss.item(), rel=1e-5)
    assert torch.equal(output.expert_counts, plain.expert_counts)
    assert (output.num_targets, output.num_documents) == (plain.num_targets, plain.num_documents)
    assert all(relative_difference(ours[name], expected[name]) < 0.01 for name in expected)
    batch["input_ids"][batch["sequence_ids"] == 0] = 7
    again, others = on_path(model, batch, documents), gradients(model)
    assert torch.equal(again.loss_sum, output.loss_sum)
    assert all(torch.equal(ours[name], others[name]) for name in expected)


@pytest.mark.usefixtures("cudas_path", "flash_attention")
def test_values_at_unaligned_addresses_are_copied() -> None:
    """v is a view that begins after the 20 numbers of a key, not at a multiple of 16 bytes."""
    model = small_model(qk_nope_head_dim=20, qk_rope_head_dim=4, v_head_dim=24)
    assert on_path(model, packed_batch(0)).loss_sum.isfinite()


@pytest.mark.usefixtures("cudas_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [7, 4096])
def test_the_fused_loss_equals_the_plain_one(targets: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradients, the head's added up in fp32 over chunks."""
    monkeypatch.setitem(kernels.TUNING, "cpu", kernels.TUNING["cpu"]._replace(targets=targets))
    hidden, weight = (torch.randn(n, 24, requires_grad=True) for n in (50, 301))
    labels = torch.randint(0, 301, (50,))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = kernels.sum_cross_entropy(hidden, weight, labels)
    theirs = kernels.plain_cross_entropy(hidden.to(dtype), weight.to(dtype), labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5 if dtype == torch.float32 else 1e-3)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert relative_difference(a, b) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.usefixtures("cudas_path", "flash_attention")
def test_compiled_chains_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, for batches of different sizes, of which the first ones compile all; then also with
    checkpointing."""
    plain, model = (small_model(num_hidden_layers=2).train() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    fused = functools.cache(functools.partial(torch.compile, backend="aot_eager"))
    graphs = []
    for seed in range(4):
        model.model.gradient_checkpointing = seed == 3
        batch = packed_batch(seed)
        expected = on_path(plain, batch)
        with monkeypatch.context() as patch:
            patch.setitem(kernels.TUNING, "cpu", kernels.TUNING["cpu"]._replace(fused=fused))
            output = on_path(model, batch)
        graphs.append(counters["stats"]["unique_graphs"])
        assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-3)
        ours, theirs = gradients(model), gradients(plain)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert relative_difference(gradient, theirs[name]) < 0.02, name
    assert 0 < graphs[-1] == graphs[2] <= 2 * graphs[0], graphs
    torch._dynamo.reset()


@pytest.mark.usefixtures("cudas_path", "flash_attention")
@pytest.mark.parametrize(("qk", "v", "flash"), [(24, 16, True), (22, 10, True), (10, 22, True), (260, 128, False)])
def test_heads_of_any_width(qk: int, v: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention takes multiples of 8 up to 256: others are padded, wider ones go another way."""
    batch = packed_batch(1)
    documents = find_documents(batch["sequence_ids"])
    taken = []
    monkeypatch.setattr(kernels, "varlen_attn", lambda *x, **y: taken.append(x) or varlen.varlen_attn(*x, **y))
    inputs = [torch.randn(len(documents.ids), 3, width, requires_grad=True) for width in (qk, qk, v)]
    ours = document_attention(*(x.bfloat16() for x in inputs), documents, 0.3)
    theirs = plain_attention(*inputs, documents, 0.3)
    assert bool(taken) == flash
    assert relative_difference(ours, theirs) < 0.02
    direction = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(x, inputs, direction.to(x.dtype)) for x in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        assert relative_difference(a, b) < 0.05


# ---------------------------------------------------------------- nothing waits


class Uploads(TorchDispatchMode):
    """Records copies to the device, for which the host waits, and float64, which not every device has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        doubles = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.float64]
        if doubles or "lift_fresh" in str(func):
            self.seen.append(str(func))
        return result


def fake_step(packed: bool = False, quantized: bool = False, **changes: Any) -> None:
    """Run a micro-batch on tensors without values: reading one raises. quantized: with adapters."""
    batch = packed_batch(0)
    documents = find_documents(batch["sequence_ids"], batch["labels"], fixed_length=packed)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:

        def moved(x: Any) -> Any:
            return fake.from_tensor(x) if isinstance(x, Tensor) else x

        model = DeepSeekV2(small_config(**changes)).train()
        model.model.gradient_checkpointing = True
        if quantized:
            quantization.plan(model.requires_grad_(False))
            lora.add_lora(model, 4, 4.0, 0.0, ("kv_b_proj", "down_proj", "experts.gate_up_proj"))
        moved_batch = {name: moved(x) for name, x in batch.items()}
        with Uploads() as uploads:
            on_path(model, moved_batch, Documents(*map(moved, documents)))
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert uploads.seen == []


GROUPS = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "device_aux_loss_alpha": 0.1}


@pytest.mark.usefixtures("cudas_path")
@pytest.mark.parametrize("settings", [{"packed": True, **GROUPS}, GROUPS, {"quantized": True, **WIDE}])
def test_a_micro_batch_never_waits_for_the_device(settings: dict[str, Any]) -> None:
    fake_step(**settings)


def test_an_operation_that_waits_is_noticed() -> None:
    with pytest.raises(DataDependentOutputException):
        fake_step(packed=True)  # on the CPU's path, which reads how many rows each expert gets


# ---------------------------------------------------------------- copies to the device


def test_a_micro_batch_for_cuda_is_pinned_and_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, copied = list[Tensor](), list[dict[str, Any]]()
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    loader = StepLoader.__new__(StepLoader)
    loader.rows = SimpleNamespace(batch=packed_batch)  # type: ignore[assignment]
    loader.world, loader.fixed_length = World(0, 1, torch.device("cuda")), False
    micro_batch = loader.micro_batch(3)  # type: ignore[arg-type]
    monkeypatch.setattr(Tensor, "to", lambda x, *_, **options: copied.append(options) or x)
    arguments = micro_batch.arguments(torch.device("cuda"))
    tensors = [*arguments.values(), *arguments["documents"]]
    assert len(pinned) == len(copied) == sum(isinstance(x, Tensor) for x in tensors)
    assert all(options == {"non_blocking": True} for options in copied)


# ---------------------------------------------------------------- nothing is compiled twice


@pytest.mark.usefixtures("cudas_path", "flash_attention")
def test_packed_batches_are_compiled_once() -> None:
    """Dense blocks and blocks with experts: one graph, then one for any number of documents. Results stay the same."""
    model = small_model(num_hidden_layers=2).train()
    batch = packed_batch(0)
    plain, expected = on_path(model, batch), gradients(model)
    torch._dynamo.reset()
    counters.clear()
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    shapes, graphs = set(), []
    for seed in range(12):
        batch = packed_batch(seed)
        documents = find_documents(batch["sequence_ids"], batch["labels"], fixed_length=True)
        shapes.add((tuple(documents.lengths.values), len(documents.labels)))
        output = on_path(model, batch, documents, backward=seed < 3)
        graphs.append(counters["stats"]["unique_graphs"])
        if seed == 0:
            assert output.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-3)
            for name, gradient in gradients(model).items():
                assert (gradient - expected[name]).norm() <= 0.02 * expected[name].norm(), name
    assert len(shapes) >= 8
    assert graphs[-1] <= 4 and graphs[-1] == graphs[5]
    torch._dynamo.reset()


@pytest.mark.parametrize("path", ["cpu", "cuda"])
def test_without_flash_attention_the_first_batches_compile_all(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention stays in Python, and the results are those of uncompiled blocks."""
    monkeypatch.setitem(kernels.TUNING, "cpu", kernels.TUNING[path]._replace(fused=None))
    plain, compiled = (small_model(num_hidden_layers=2, qk_nope_head_dim=260).train() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    for block in compiled.model.layers:
        block.compile(backend="eager")
    graphs = []
    for seed in range(8):
        batch = packed_batch(seed)
        documents = find_documents(batch["sequence_ids"], batch["labels"], fixed_length=True)
        expected, output = (on_path(model, batch, documents) for model in (plain, compiled))
        assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] <= 2 * graphs[0] and graphs[-1] == graphs[6], graphs
    for name, p in compiled.named_parameters():
        assert relative_difference(p.grad, plain.get_parameter(name).grad) < 1e-5, name
    torch._dynamo.reset()


@pytest.mark.usefixtures("cudas_path", "flash_attention")
def test_samples_of_a_compiled_run_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_block, answers, graphs = nn.Module.compile, trainer.answers, list[int]()

    def watched(*arguments: Any, **options: Any) -> list[str]:
        before = counters["stats"]["unique_graphs"]
        replies = answers(*arguments, **options)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return replies

    monkeypatch.setattr(trainer, "answers", watched)
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    data = write_jsonl(tmp_path / "data.jsonl", conversations(40))
    command = arguments(data, tmp_path / "run", dtype="bfloat16", max_steps=2, eval_steps=1, save_steps=0)
    assert train_here([*command, "three or seven", "--compile"], tmp_path) == 0
    assert counters["stats"]["unique_graphs"] > 0
    assert graphs == [0, 0]
    torch._dynamo.reset()


# ---------------------------------------------------------------- what a run will take


# 20 million parameters, most of them experts'.
PLANNED = small_config(
    num_hidden_layers=1,
    first_k_dense_replace=0,
    hidden_size=192,
    moe_intermediate_size=256,
    n_routed_experts=32,
    vocab_size=2048,
)


@functools.cache
def planned(ranks: int = 1, **changes: Any) -> DryRun:
    settings = {"dtype": "bfloat16", "batch_size": 2, "gradient_accumulation_steps": 3, "max_seq_len": 512}
    return dry_run(TrainConfig().changed(model=PLANNED, **settings).changed(**changes), ranks)


def test_weights_gradients_moments_and_activations_are_predicted() -> None:
    size = 4 * sum(total for total, _ in parameter_counts(PLANNED).values())
    whole, larger, largest = (planned(batch_size=size) for size in (2, 4, 6))
    assert whole.memory["weights"] == pytest.approx(size, rel=0.01)
    assert whole.memory["gradients"] == pytest.approx(size, rel=0.01)
    assert whole.memory["optimizer"] == pytest.approx(2 * size, rel=0.01)
    assert whole.sent == 0
    assert largest.peak - larger.peak == pytest.approx(larger.peak - whole.peak, rel=0.02)
    kept, recomputed = (planned(num_hidden_layers=2, gradient_checkpointing=choice) for choice in (False, True))
    assert recomputed.peak < 0.95 * kept.peak
    assert larger.flops == pytest.approx(2 * whole.flops)


@pytest.mark.parametrize(("ranks", "engine", "shards"), [(64, "fsdp", 64), (512, "hsdp", 8), (64, "ddp", 1)])
def test_ranks_hold_and_send_their_share(ranks: int, engine: str, shards: int) -> None:
    """The process group sends nothing. Per micro-batch, experts are gathered in bf16 twice and their gradients
    scattered in fp32; those of a replica are reduced once per step."""
    whole, rank = planned(), planned(ranks, parallel=engine)
    for kind in ("weights", "optimizer", *(["gradients"] if engine == "fsdp" else [])):  # hsdp's wait in buffers
        assert rank.memory[kind] == pytest.approx(whole.memory[kind] / shards, rel=0.05), kind
    size, replicas = whole.memory["weights"], ranks // shards
    expected = (shards - 1) / shards * size * 3 * (2 / 2 + 1) + 2 * (replicas - 1) / replicas * size / shards
    assert rank.sent == pytest.approx(expected, rel=0.1 if shards > 1 else 0.01)


def test_the_batch_that_hides_the_traffic_is_recommended() -> None:
    """Oracle: the prediction for that batch."""
    settings = {"dtype": "bfloat16", "batch_size": 1, "gradient_accumulation_steps": 1, "max_seq_len": 4096}
    wide = {"hidden_size": 960, "moe_intermediate_size": 512}
    config = TrainConfig().changed(model=PLANNED, parallel="fsdp", dry_run_ranks=64, **settings).changed(**wide)
    printed = re.search(r"communication +([\d.]+) ms, hidden with --batch-size (\d+)\n", report(config))
    assert printed and float(printed[1]) > 1 and int(printed[2]) > 1
    hidden = dry_run(config.changed(batch_size=int(printed[2])), 64)
    assert hidden.seconds["communication"] * 1e3 < 0.02 * float(printed[1])


def test_replicas_of_half_a_node_are_refused() -> None:
    with pytest.raises(UserError, match="parallel hsdp: 12 ranks do not fill nodes of 8"):
        planned(12, parallel="hsdp")


def test_adapters_need_a_small_share_of_the_memory() -> None:
    adapted = {"lora_rank": 4, "lora_target_modules": ("q_proj", "o_proj")}
    whole, adapters, shard = planned(), planned(**adapted), planned(64, parallel="fsdp", **adapted)
    assert adapters.memory["weights"] < 0.55 * whole.memory["weights"]  # bf16
    assert adapters.memory["optimizer"] < 0.1 * whole.memory["optimizer"]
    assert shard.memory["weights"] < 1.1 * adapters.memory["weights"] / 64
    assert adapters.flops * 6 > whole.flops * 4 > adapters.flops * 4


def test_micro_batches_shrink_until_they_fit_and_the_global_batch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of 10 GB and 4 GB per row: 26 GB for four rows, on cards of 30, 24 and 12 GB."""
    monkeypatch.setattr(dry_run_module, "needed", float)
    monkeypatch.setattr(
        dry_run_module, "dry_run", lambda config: SimpleNamespace(peak=10e9 + 4e9 * config.batch.batch_size)
    )
    config = TrainConfig().changed(batch_size=4, gradient_accumulation_steps=3)
    assert fit_to_memory(config, 30e9) == (config, "")
    changed, note = fit_to_memory(config, 24e9)
    assert (changed.batch.batch_size, changed.batch.gradient_accumulation_steps) == (2, 6)
    assert "batch_size 4 needs 26.0 GB (predicted), the GPU has 24.0 GB free: using batch_size 2" in note
    with pytest.raises(UserError, match=r"the GPU has 12.0 GB free, and batch_size 1 needs 14.0 GB"):
        fit_to_memory(config, 12e9)


def test_blocks_are_recomputed_only_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row needs 3 GB, without checkpointing 5 GB. A flag that was given decides."""
    monkeypatch.setattr(dry_run_module, "needed", float)

    def predicted(config: TrainConfig) -> SimpleNamespace:
        return SimpleNamespace(peak=(3e9 if config.compute.gradient_checkpointing else 5e9) * config.batch.batch_size)

    monkeypatch.setattr(dry_run_module, "dry_run", predicted)
    config = TrainConfig().changed(batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=True)
    changed, note = fit_to_memory(config, 10e9)
    assert changed == config.changed(gradient_checkpointing=False)
    assert (
        "without gradient_checkpointing, which is faster, needs 10.0 GB (predicted), the GPU has 10.0 GB free" in note
    )
    assert fit_to_memory(config, 10e9, {"gradient_checkpointing"}) == (config, "")
    assert fit_to_memory(config, 9e9) == (config, "")
    changed, note = fit_to_memory(config, 5e9)
    assert changed.compute.gradient_checkpointing and changed.batch.batch_size == 1
    assert "batch_size 2 needs 6.0 GB (predicted), the GPU has 5.0 GB free: using batch_size 1" in note


@pytest.mark.parametrize(("place", "name"), [(train_sft, "build_model"), (trainer.Trainer, "train_step")])
def test_a_gpu_out_of_memory_is_one_line_that_names_the_flags(
    place: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 23.64 GiB.\nMore lines")

    monkeypatch.setattr(place, name, full)
    data = write_jsonl(tmp_path / "data.jsonl", conversations(20))
    assert train_here(arguments(data, tmp_path / "run", eval_steps=0), tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the GPU is out of memory (Tried to allocate 2.00 GiB): halve --batch-size" in error


def test_a_run_on_a_gpu_is_planned_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dtype is bf16 even if this machine's processor does not multiply in it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    data = write_jsonl(tmp_path / "data.jsonl", conversations(20))
    plans = []
    for device, dtype in (("cuda", "float32"), ("auto", "auto"), ("cuda:1", "auto")):
        changes: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": 64, "max_seq_len": 1024}
        command = arguments(data, tmp_path / "run", model_num_hidden_layers=1, model_first_k_dense_replace=0, **changes)
        assert train_here([*command, "--dry-run"], tmp_path) == 0
        plans.append(capsys.readouterr().out.partition("all of them targets; ")[2])
    fp32, automatic, numbered = plans
    assert automatic == numbered
    assert automatic.startswith("bfloat16 on cuda\n") and "at the peak" in automatic
    assert automatic.splitlines()[1:] != fp32.splitlines()[1:]


def test_a_device_that_torch_does_not_know_is_not_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(["tiny", "--device", "abacus", "--dry-run"], Path()) == 2
    assert "there is no device 'abacus' here" in capsys.readouterr().err


# ---------------------------------------------------------------- which GPU, and why none


@pytest.mark.parametrize(("cuda", "available"), [("13.0", False), ("13.0", True), (None, False)])
def test_a_gpu_whose_driver_is_too_old_is_reported(
    cuda: str | None, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    problem = driver_problem()
    assert ("needs driver 580 or later" in problem) == (cuda is not None and not available)
    assert bool(problem) == (cuda is not None and not available)


@pytest.mark.parametrize("planned", [False, True])
def test_the_gpu_that_is_named_becomes_the_current_one(planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert join_world("cuda:1", dry_run=planned).device == torch.device("cuda:1")
    assert current == ([] if planned else [torch.device("cuda:1")])
