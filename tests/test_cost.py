"""What a run is said to cost. Oracle: torch's own count of the products in a forward and backward pass."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lora
import model as model_module
from config import TrainConfig
from datacollator import IGNORE
from launch import cost
from launch.build import plan_model
from launch.cost import measure_peak, training_cost
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
    plain, quantized = (plan_model(TrainConfig().changed(**changes, quantize=kind))[0] for kind in (None, "nf4"))
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
