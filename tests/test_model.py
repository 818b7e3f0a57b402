"""The model against transformers, DeepSeek's published code, and literal loops over the paper's formulas."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from config import RopeScaling, TrainConfig, UserError
from documents import find_documents
from model import DeepSeekV2, LossOutput, rope_frequencies
from small_models import make_batch, relative_difference, small_config, small_model, transformers_model

YARN = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_and_gradients(model: DeepSeekV2, **batch: Tensor) -> tuple[LossOutput, dict[str, Tensor]]:
    """Return the output, and the gradients of cross entropy plus balance losses."""
    model.zero_grad()
    output = model(**batch)
    (output.loss_sum + output.balance_loss).backward()
    return output, gradients(model)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float = 1e-3) -> None:
    """Compare within 1e-5 of each gradient's largest entry; of `floor` of the largest of all, if that is more."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name in ours:
        scale = max(theirs[name].abs().max(), floor * largest)
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5 * scale, name


def one_at_a_time(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The conversations of a batch, each alone in a batch without padding."""
    found = []
    for row in range(len(batch["input_ids"])):
        for number in range(1, int(batch["sequence_ids"][row].max()) + 1):
            where = batch["sequence_ids"][row] == number
            found.append({name: batch[name][row, where][None] for name in batch})
            found[-1]["sequence_ids"] = torch.ones_like(found[-1]["sequence_ids"])
    return found


# ---------------------------------------------------------------- transformers

CASES = {
    "plain": {},
    "compressed queries": {"q_lora_rank": 18},
    "yarn as in V2-Lite": {"rope_scaling": YARN, "max_position_embeddings": 163_840},
    "yarn with mscale left out": {"rope_scaling": RopeScaling(), "max_position_embeddings": 163_840},
    "yarn with different mscales": {"rope_scaling": RopeScaling(mscale=1.2, mscale_all_dim=0.6), "rope_theta": 5e5},
    "groups": GROUPS,
    "scaled experts": {"routed_scaling_factor": 2.5},
    "no dense layer": {"first_k_dense_replace": 0},
    "only dense layers": {"first_k_dense_replace": 3},
    "tied": {"tie_word_embeddings": True},
    "another epsilon": {"rms_norm_eps": 1e-2, "q_lora_rank": 18},
    "one expert per token": {"num_experts_per_tok": 1, "n_shared_experts": 1},
    "as V2": {
        "q_lora_rank": 18,
        "rope_scaling": YARN,
        "routed_scaling_factor": 16.0,
        "num_experts_per_tok": 4,
        **GROUPS,
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_transformers(changes: dict) -> None:
    model = small_model(**changes)
    reference = transformers_model(model)
    batch = make_batch([[37], [50], [3]])
    batch["position_ids"] += 3000 * (batch["sequence_ids"] > 0)  # far out, where rotary frequencies have to be exact
    real = batch["sequence_ids"] > 0
    theirs = reference(batch["input_ids"], attention_mask=real.long(), position_ids=batch["position_ids"]).logits
    F.cross_entropy(theirs[real], batch["labels"][real], reduction="sum").backward()

    ours = model(**batch | {"labels": None})
    output = model(**batch)
    output.loss_sum.backward()
    assert relative_difference(ours[real], theirs[real]) < 1e-5
    assert ours[~real].count_nonzero() == 0
    assert_same_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("dim", [8, 32, 64])
@pytest.mark.parametrize(
    "scaling",
    [YARN, RopeScaling(), RopeScaling(factor=4.0, beta_fast=16.0, beta_slow=2.0, mscale=0.5, mscale_all_dim=1.0)],
)
def test_yarn_frequencies_equal_transformers(scaling: RopeScaling, dim: int) -> None:
    config = small_config(
        rope_scaling=scaling, qk_rope_head_dim=dim, num_hidden_layers=1, max_position_embeddings=163_840
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS["yarn"](transformers_model(DeepSeekV2(config)).config)
    ours, our_factor = rope_frequencies(config)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(their_factor, rel=1e-9)


def test_bfloat16_weights_stay_close_to_transformers() -> None:
    model = small_model(initializer_range=0.1).to(torch.bfloat16)
    reference = transformers_model(model)
    tokens = torch.randint(1, 112, (2, 30))
    exact = transformers_model(model.float())(tokens).logits
    theirs = reference(tokens).logits
    ours = model.to(torch.bfloat16)(tokens)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_logits_are_zero_at_padding_with_a_fixed_length_too() -> None:
    model, batch = small_model(), make_batch([[5, 9], [20]])
    documents = find_documents(batch["sequence_ids"], fixed_length=True)
    logits = model(batch["input_ids"], batch["position_ids"], documents=documents)
    expected = model(**batch | {"labels": None})
    assert logits[batch["sequence_ids"] == 0].count_nonzero() == 0
    assert relative_difference(logits, expected) < 1e-5


def test_by_default_a_row_is_one_conversation() -> None:
    model = small_model()
    batch = make_batch([[20], [20]])
    assert torch.equal(model(batch["input_ids"]), model(**batch | {"labels": None}))


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("groups", [{}, GROUPS], ids=["greedy", "groups"])
def test_norm_topk_prob_follows_deepseeks_code(chosen: int, groups: dict) -> None:
    model = small_model(norm_topk_prob=True, num_experts_per_tok=chosen, routed_scaling_factor=2.5, **groups)
    gate = model.model.layers[1].mlp.gate
    x = torch.randn(50, 48)
    scores, weights, experts = gate(x)
    for token in range(50):
        probabilities = (gate.weight @ x[token]).softmax(dim=0).tolist()
        candidates = range(8)
        if groups:
            best = sorted(range(4), key=lambda group: max(probabilities[2 * group : 2 * group + 2]))[-2:]
            candidates = [expert for expert in range(8) if expert // 2 in best]
        top = sorted(candidates, key=lambda expert: -probabilities[expert])[:chosen]
        # MoEGate.forward: if self.top_k > 1 and self.norm_topk_prob: divide, else: scale
        total = sum(probabilities[expert] for expert in top) + 1e-20
        expected = {e: probabilities[e] / total if chosen > 1 else probabilities[e] * 2.5 for e in top}
        got = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)
        assert scores[token].tolist() == pytest.approx(probabilities, rel=1e-5)


# ---------------------------------------------------------------- balance losses


def papers_balance_losses(scores: list[list[float]], chosen: list[list[int]], groups: int, limit: int) -> list[float]:
    """Equations 23, 26 and 29 for one sequence, without their factors; device i holds the i-th run of experts."""
    tokens, experts, per_token = len(scores), len(scores[0]), len(chosen[0])
    f = [experts / (per_token * tokens) * sum(i in chosen[t] for t in range(tokens)) for i in range(experts)]  # 24
    p = [sum(scores[t][i] for t in range(tokens)) / tokens for i in range(experts)]  # 25
    devices = [range(d * experts // groups, (d + 1) * experts // groups) for d in range(groups)]
    f_device = [sum(f[j] for j in device) / len(device) for device in devices]  # 27
    p_device = [sum(p[j] for j in device) for device in devices]  # 28, 31
    sent = [sum(any(j in chosen[t] for j in device) for t in range(tokens)) for device in devices]
    f_sent = [groups / (limit * tokens) * count for count in sent]  # 30
    return [
        sum(a * b for a, b in zip(f, p, strict=True)),
        sum(a * b for a, b in zip(f_device, p_device, strict=True)),
        sum(a * b for a, b in zip(f_sent, p_device, strict=True)),
    ]


@pytest.mark.parametrize("factors", [(0.01, 0.0, 0.0), (0.0, 0.02, 0.0), (0.0, 0.0, 0.03), (0.01, 0.02, 0.03)])
def test_balance_losses_equal_the_papers_formulas(factors: tuple[float, float, float]) -> None:
    names = ("aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha")
    model = small_model(**GROUPS, **dict(zip(names, factors, strict=True)))
    routed: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routed.append(output))
    batch = make_batch([[9, 17, 4], [21], [2, 6]])
    balance_loss = model(**batch).balance_loss
    expected = 0.0
    for scores, _, chosen in routed:
        start = 0
        for length in (9, 17, 4, 21, 2, 6):
            part = slice(start, start + length)
            losses = papers_balance_losses(scores[part].tolist(), chosen[part].tolist(), groups=4, limit=2)
            expected += sum(factor * loss for factor, loss in zip(factors, losses, strict=True))
            start += length
        assert start == len(scores)  # padding was never routed
    assert balance_loss.item() == pytest.approx(expected, rel=1e-5)


def test_balance_loss_reaches_the_router_and_counts_every_token_once() -> None:
    model = small_model(aux_loss_alpha=1.0)
    output = model(**make_batch([[9, 17, 4], [21]]))
    assert output.expert_counts.sum(dim=1).tolist() == [51 * 3, 51 * 3]
    assert (output.num_documents, output.num_targets > 0) == (4, True)
    output.balance_loss.backward()
    assert all(layer.mlp.gate.weight.grad.count_nonzero() > 0 for layer in model.model.layers[1:])


# ---------------------------------------------------------------- packing, padding, accumulation


@settings(max_examples=25)
@given(
    rows=st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=4), min_size=1, max_size=3), seed=st.integers(0, 9)
)
def test_packed_rows_equal_one_conversation_at_a_time(rows: list[list[int]], seed: int) -> None:
    factors = {"aux_loss_alpha": 0.1, "device_aux_loss_alpha": 0.1}
    model = small_model(initializer_range=0.1, rope_scaling=YARN, **factors, **GROUPS)
    batch = make_batch(rows, seed)
    packed, packed_gradients = loss_and_gradients(model, **batch)
    model.zero_grad()
    alone = [model(**conversation) for conversation in one_at_a_time(batch)]
    (sum(output.loss_sum for output in alone) + sum(output.balance_loss for output in alone)).backward()
    assert packed.num_targets == sum(output.num_targets for output in alone)
    assert packed.num_documents == len(alone)
    assert packed.loss_sum.item() == pytest.approx(sum(output.loss_sum.item() for output in alone), rel=1e-5)
    assert packed.balance_loss.item() == pytest.approx(sum(output.balance_loss.item() for output in alone), rel=1e-5)
    # the gradient for the queries of a conversation of one token is rounding error
    assert_same_gradients(packed_gradients, gradients(model), floor=0.1)


def test_values_in_padding_do_not_change_loss_or_gradients() -> None:
    model = small_model()
    batch = make_batch([[5, 9], [20]])
    output, expected = loss_and_gradients(model, **batch)
    padding = batch["sequence_ids"] == 0
    batch["input_ids"][padding], batch["position_ids"][padding], batch["labels"][padding] = 7, 99, 11
    again, got = loss_and_gradients(model, **batch)
    assert torch.equal(output.loss_sum, again.loss_sum)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = small_model().train()
    batch = make_batch([[30], [4, 8]])
    plain, expected = loss_and_gradients(model, **batch)
    model.model.gradient_checkpointing = True
    output, got = loss_and_gradients(model, **batch)
    assert torch.equal(plain.loss_sum, output.loss_sum)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- the loss


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    model = small_model(aux_loss_alpha=0.0)
    batch = make_batch([[5], [9]])
    batch["labels"].fill_(-100)
    output, got = loss_and_gradients(model, **batch)
    assert (output.loss_sum.item(), output.num_targets) == (0.0, 0)
    assert all(gradient.count_nonzero() == 0 for gradient in got.values())


def test_autocast_keeps_the_loss_near_that_of_float32() -> None:
    model = small_model(initializer_range=0.05)
    batch = make_batch([[30], [4, 8], [20]])
    exact, expected = loss_and_gradients(model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    model.zero_grad()
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=1e-3)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    assert relative_difference(gradients(model)["lm_head.weight"], expected["lm_head.weight"]) < 0.05


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", range(60, 69, 2))
def test_widths_are_refused_where_the_grouped_product_refuses_them(dtype: str, width: int) -> None:
    x, stack = (torch.zeros(*shape, width, dtype=getattr(torch, dtype)) for shape in ((4,), (2, 16)))
    error: Any = contextlib.nullcontext()
    try:
        F.grouped_mm(x, stack.mT, offs=torch.tensor([2, 4], dtype=torch.int32))
    except RuntimeError:
        error = pytest.raises(UserError)
    with error:
        TrainConfig().changed(dtype=dtype, hidden_size=width, num_attention_heads=1).validate()
