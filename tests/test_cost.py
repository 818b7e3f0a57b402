"""What a run is said to cost. Oracle: torch's own count of the products in a forward and backward pass."""

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

import lora
import model as model_module
from config import GpuName, TrainConfig
from datacollator import IGNORE
from launch import cost
from launch.build import plan_model
from launch.cost import GPUS, Gpu, Roofline, measure_peak, training_cost
from small_models import WIDE, small_config, small_model

TOKENS, TARGETS = 4000, 1500


def counted(model: torch.nn.Module) -> float:
    """FLOPs of all matrix products but attention's, of 4,000 tokens, 1,500 of them targets."""
    ids = torch.randint(0, 112, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(TOKENS) < TARGETS, ids, IGNORE)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(model_module, "document_attention", without_products)
        patch.setattr(F, "grouped_mm", one_by_one)
        output = model(ids, labels=labels)
        (output.loss_sum + output.balance_loss).backward()
    return counter.get_total_flops()


def one_by_one(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """A grouped product in products that torch counts."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(x.split(sizes), matrices, strict=True)])


def without_products(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """Something that depends on all three, as attention does."""
    return v * (q.mean(dim=-1, keepdim=True) + k.mean(dim=-1, keepdim=True))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"q_lora_rank": 12}])
def test_training_all_weights_costs_what_torch_counts(changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    assert training_cost(model).flops(TOKENS, TARGETS) == pytest.approx(counted(model), rel=0.02)


@pytest.mark.parametrize("targets", [("q_proj", "o_proj", "down_proj"), ("kv_b_proj", "experts.gate_up_proj")])
def test_frozen_weights_cost_no_gradient_of_their_own(targets: tuple[str, ...]) -> None:
    """What lies below the first adapter needs no backward pass at all, which is not looked at."""
    model = small_model(num_hidden_layers=8)
    lora.add_lora(model, 8, 4.0, 0.0, targets)
    expected = counted(model)
    assert training_cost(model).flops(TOKENS, TARGETS) == pytest.approx(expected, rel=0.06)
    trained = small_model(num_hidden_layers=8)
    assert training_cost(trained).flops(TOKENS, TARGETS) > 1.3 * expected


def test_weights_in_4_bits_cost_what_frozen_ones_cost() -> None:
    """They are no parameters."""
    changes = {"model": small_config(**WIDE), "dtype": "bfloat16", "lora_rank": 4}
    plain, quantized = (plan_model(TrainConfig().changed(**changes, quantize=kind)) for kind in (None, "nf4"))
    assert sum(p.numel() for p in quantized.parameters()) < 0.2 * sum(p.numel() for p in plain.parameters())
    assert training_cost(quantized) == training_cost(plain)


def test_starting_a_product_is_no_part_of_a_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes 1 microsecond for a product of any size, and 99 until its host has heard of it."""
    clock = 0.0

    class Product:
        def __matmul__(self, other: "Product") -> "Product":
            nonlocal clock
            clock += 1e-6
            return self

        def __getitem__(self, index: object) -> "Product":
            return self

        def item(self) -> float:
            nonlocal clock
            clock += 99e-6
            return 0.0

        def __iter__(self):
            return iter((self, self))

        def to(self, dtype: torch.dtype) -> "Product":
            return self

    monkeypatch.setattr(cost.torch, "randn", lambda *_, device: Product())
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock)
    seen = measure_peak(torch.device("cuda"), torch.bfloat16)
    assert seen == pytest.approx(2 * 8192**3 / (1e-6 + 99e-6 / 8))


# ---------------------------------------------------------------- how long a GPU takes


def predicted(work: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Counter[str]:
    """Seconds by region of some work on fake tensors, on a GPU of 1 GB/s and 1 TFLOP/s."""
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with Roofline(Gpu(1e12, 1e11, 1e9, 0.0, 0.0, 0.5)) as roofline:
            work(*inputs)
    return roofline.seconds


def test_a_product_takes_the_longer_of_its_bytes_and_its_flops() -> None:
    size = 4096
    seconds = predicted(torch.mm, (size, size), (size, size))
    assert seconds == {"other products": pytest.approx(2 * size**3 / 1e12 / 0.67)}  # 205 ms; the bytes take 118
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "BANDWIDTH_SHARE", 0.1)
        seconds = predicted(torch.mm, (size, size), (size, size))
    assert seconds == {"other products": pytest.approx(3 * 2 * size**2 / 1e9 / 0.1)}


def test_a_product_of_bf16_that_adds_to_an_fp32_sum_takes_bf16s_time() -> None:
    def work(total: Tensor, a: Tensor) -> None:
        torch.addmm(total.float(), a, a, out_dtype=torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "BANDWIDTH_SHARE", 100.0)
        seconds = predicted(work, (4096, 4096), (4096, 4096))
    assert seconds["other products"] == pytest.approx(2 * 4096**3 / 1e12 / 0.67)


@pytest.mark.parametrize(
    ("work", "numbers"),
    [
        (lambda x: x + x.clone(), 2 + 3),  # the clone, and two read, one written
        (lambda x: x.add_(1), 2),
        (lambda x: x.zero_(), 1),
        (lambda x: x.t().view(-1, 1000, 500)[0].detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch.add(x, x, out=x), 3),
        (lambda x: x[:1].expand(500, 1000).clone(), 1 + 1 / 500),
    ],
)
def test_bytes_are_counted_where_they_are_read_or_written(work: Callable[..., Any], numbers: float) -> None:
    seconds = predicted(work, (500, 1000))
    assert seconds.total() == pytest.approx(numbers * 1e6 / 1e9 / 0.85)


def test_regions_are_told_apart() -> None:
    def work(x: Tensor, w: Tensor) -> None:
        with record_function("loss"):
            x @ x
        F.grouped_mm(x, w, offs=torch.empty(2, dtype=torch.int32))
        with record_function("optimizer"), record_function("another"):
            x.add_(1)
        x.mul(2)

    assert predicted(work, (512, 512), (2, 512, 512)).keys() == {"loss", "experts", "optimizer", "elementwise"}
    assert GPUS.keys() == set(get_args(GpuName))


def test_attention_counts_the_products_of_a_causal_document() -> None:
    """Oracle: the FLOPs that the model's cost has for them, forward and 2.5 times as much backward instead of 2."""
    config = small_config()
    heads, qk, v = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    length = 1000
    q, k, value = (torch.empty(length, heads, width) for width in (qk, qk, v))
    args = (q, k, value, None, None, length, length)
    _, forward = cost.products(varlen._varlen_attn._opoverload, args)
    _, backward = cost.products(
        varlen._varlen_attn_backward._opoverload, (value, q, k, value, None, None, None, None, length)
    )
    expected = cost.attention_flops(config, length) / config.num_hidden_layers / 3
    assert forward == pytest.approx(expected, rel=0.01)
    assert backward == pytest.approx(2.5 * expected, rel=0.01)
