"""The predicted cost of a run. Oracle: torch's own count of the products in a forward and backward pass."""

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
from launch.cost import GPUS, Gpu, Roofline, as_one_kernel, training_cost
from small_models import WIDE, small_config, small_model

TOKENS, TARGETS = 4000, 1500


def counted(model: torch.nn.Module) -> float:
    """Count the FLOPs of all matrix products but attention's, for 4,000 tokens, 1,500 of them targets."""
    ids = torch.randint(0, 112, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(TOKENS) < TARGETS, ids, IGNORE)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(model_module, "document_attention", without_products)
        patch.setattr(F, "grouped_mm", one_by_one)
        output = model(ids, labels=labels)
        (output.loss_sum + output.balance_loss).backward()
    return counter.get_total_flops()


def one_by_one(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """A grouped product made of products that torch counts."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([part @ matrix for part, matrix in zip(x.split(sizes), matrices, strict=True)])


def without_products(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """A function of q, k and v, like attention."""
    return v * (q.mean(dim=-1, keepdim=True) + k.mean(dim=-1, keepdim=True))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"q_lora_rank": 12}])
def test_training_all_weights_costs_what_torch_counts(changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    assert training_cost(model).flops(TOKENS, TARGETS) == pytest.approx(counted(model), rel=0.02)


@pytest.mark.parametrize("targets", [("q_proj", "o_proj", "down_proj"), ("kv_b_proj", "experts.gate_up_proj")])
def test_frozen_weights_cost_no_gradient_of_their_own(targets: tuple[str, ...]) -> None:
    """Layers below the first adapter need no backward pass at all, which the cost ignores."""
    model = small_model(num_hidden_layers=8)
    lora.add_lora(model, 8, 4.0, 0.0, targets)
    expected = counted(model)
    assert training_cost(model).flops(TOKENS, TARGETS) == pytest.approx(expected, rel=0.06)
    trained = small_model(num_hidden_layers=8)
    assert training_cost(trained).flops(TOKENS, TARGETS) > 1.3 * expected


def test_weights_in_4_bits_cost_what_frozen_ones_cost() -> None:
    """Quantised weights are buffers, not parameters."""
    changes = {"model": small_config(**WIDE), "dtype": "bfloat16", "lora_rank": 4}
    plain, quantized = (plan_model(TrainConfig().changed(**changes, quantize=kind)) for kind in (None, "nf4"))
    assert sum(p.numel() for p in quantized.parameters()) < 0.2 * sum(p.numel() for p in plain.parameters())
    assert training_cost(quantized) == training_cost(plain)


# ---------------------------------------------------------------- how long a GPU takes


SLOW = Gpu(bf16=1e12, fp32=1e11, bandwidth=1e9, memory=0.0, link=0.0, attention=0.5)


def predicted(work: Callable[..., Any], *shapes: tuple[int, ...]) -> Counter[str]:
    """Return the seconds by region of some work on fake tensors in bf16."""
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        with Roofline(SLOW) as roofline:
            work(*inputs)
    return roofline.seconds


def added_to_fp32(x: Tensor, y: Tensor) -> None:
    torch.addmm(x.float(), x, y, out_dtype=torch.float32)


@pytest.mark.parametrize(
    ("work", "bandwidth_share", "seconds"),
    [
        (torch.mm, 0.85, 2 * 4096**3 / 1e12 / 0.67),  # 205 ms; the bytes take 118
        (torch.mm, 0.1, 3 * 2 * 4096**2 / 1e9 / 0.1),
        (added_to_fp32, 100.0, 2 * 4096**3 / 1e12 / 0.67),  # as long as in bf16
    ],
)
def test_a_product_takes_the_longer_of_its_bytes_and_its_flops(
    work: Callable[..., Any], bandwidth_share: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "BANDWIDTH_SHARE", bandwidth_share)
    assert predicted(work, (4096, 4096), (4096, 4096))["other products"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("work", "numbers"),
    [
        (lambda x: x + x.clone(), 2 + 3),  # the clone, and two read, one written
        (lambda x: x.add_(1), 2),
        (lambda x: torch._foreach_mul_([x], 2.0), 2),  # returns nothing
        (lambda x: x.t().view(-1, 1000, 500)[0].detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch.add(x, x, out=x), 3),
    ],
)
def test_bytes_are_counted_where_they_are_read_or_written(work: Callable[..., Any], numbers: float) -> None:
    seconds = predicted(work, (500, 1000))
    assert seconds.total() == pytest.approx(numbers * 1e6 / 1e9 / 0.85)


def chain(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sigmoid() + y


@pytest.mark.parametrize(
    ("work", "numbers"),
    [
        (lambda x, y: as_one_kernel(chain)(x, y), 3),  # two read, one written
        (lambda x, y: chain(x, y), 3 + 2 + 3),
        # forward 3; backward reads x and y, which is also the output's gradient, and writes theirs
        (lambda x, y: torch.autograd.grad(as_one_kernel(chain)(x.requires_grad_(), y.requires_grad_()), (x, y), y), 7),
    ],
)
def test_a_fused_chain_reads_its_inputs_and_writes_its_outputs(work: Callable[..., Any], numbers: float) -> None:
    seconds = predicted(work, (500, 1000), (500, 1000))
    assert seconds.total() == pytest.approx(numbers * 1e6 / 1e9 / 0.85)


def test_compiled_blocks_fuse_what_lies_between_products() -> None:
    """The product reads x, whose chain ends there: three numbers, then two for the chain of its output."""
    x, y = (torch.empty(1000, 1000, dtype=torch.bfloat16) for _ in range(2))
    with FakeTensorMode(allow_non_fake_inputs=True), Roofline(SLOW, merge=True) as roofline:
        z = chain(x, y) @ y
        z = z.sigmoid() * 2
        with record_function("optimizer"):
            pass
    assert roofline.seconds["elementwise"] == pytest.approx(5 * 2e6 / 1e9 / 0.85)


def test_one_kernel_computes_what_its_function_does() -> None:
    """With its gradients, also for arguments that need none or are no tensors."""
    x, y = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    x.requires_grad_()
    ours, theirs = as_one_kernel(torch.sub)(x, y), torch.sub(x, y)
    scaled = as_one_kernel(lambda x, y, power: (x * y) ** power)
    assert torch.equal(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: scaled(x, y, 3), (x,))


def test_operations_are_assigned_to_regions() -> None:
    def work(x: Tensor, w: Tensor) -> None:
        with record_function("loss"):
            x @ x
        F.grouped_mm(x, w, offs=torch.empty(2, dtype=torch.int32))
        with record_function("optimizer"), record_function("another"):
            x.add_(1)
        x.mul(2)

    assert predicted(work, (512, 512), (2, 512, 512)).keys() == {"loss", "experts", "optimizer", "elementwise"}
    assert GPUS.keys() == set(get_args(GpuName))


def test_attention_takes_the_time_of_the_products_of_a_causal_document() -> None:
    """Oracle: the FLOPs in `attention_flops`, a third of them forward; backward has 2.5 times as many, not 2."""
    config, length = small_config(), 1000
    heads, qk, v = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    q, k, value = (torch.empty(length, heads, width) for width in (qk, qk, v))
    calls = {
        1: (varlen._varlen_attn, (q, k, value, None, None, length, length)),
        2.5: (varlen._varlen_attn_backward, (value, q, k, value, None, None, None, None, length)),
    }
    expected = cost.attention_flops(config, length) / config.num_hidden_layers / 3 / 0.5 / 1e11
    for factor, (operation, arguments) in calls.items():
        region, seconds = Roofline(SLOW).compute(operation._opoverload._schema.name, arguments)
        assert (region, seconds) == ("attention", pytest.approx(factor * expected, rel=0.01))
