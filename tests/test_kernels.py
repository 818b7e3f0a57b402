"""Each fast operation against its plain form, forward and backward, and the plain forms against torch's own."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from documents import find_documents
from kernels import (
    document_attention,
    linear,
    plain_attention,
    plain_cross_entropy,
    plain_experts,
    sort_by_expert,
    sum_cross_entropy,
)
from small_models import relative_difference, small_model


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    """Compare outputs and gradients, relative to their largest entries."""
    a, b = ours(*inputs), theirs(*inputs)
    assert relative_difference(a, b) < tolerance
    direction = torch.randn_like(b)
    gradients = (torch.autograd.grad(output, inputs, direction.to(output.dtype)) for output in (a, b))
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        assert relative_difference(our_gradient, their_gradient) < tolerance


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("rows", [[[7, 1, 12], [5], [3, 3]], [[64, 65, 257]], [[300, 1024]], [[1025, 2]]])
def test_attention_within_documents(rows: list[list[int]]) -> None:
    """Includes the limits: the multiple that lengths are rounded up to, blocks of query rows, the fused kernel."""
    width = max(map(sum, rows))
    sequence_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
        sequence_ids[row, : len(numbers)] = numbers
    documents = find_documents(sequence_ids)
    n = len(documents.ids)
    mask = (documents.ids[:, None] == documents.ids) & torch.ones(n, n, dtype=torch.bool).tril()

    def fast(*x: Tensor) -> Tensor:
        return document_attention(*x, documents, 0.3)

    def plain(*x: Tensor) -> Tensor:
        return plain_attention(*x, documents, 0.3)

    def dense_mask(*x: Tensor) -> Tensor:
        heads_first = (y.transpose(0, 1) for y in x)
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3).transpose(0, 1)

    inputs = random_tensors((n, 3, 22), (n, 3, 22), (n, 3, 10))
    assert_same(fast, plain, inputs)
    assert_same(plain, dense_mask, inputs)


# ---------------------------------------------------------------- experts


def test_experts_equal_a_loop_over_experts() -> None:
    experts = small_model().model.layers[1].mlp.experts
    chosen = torch.stack([torch.randperm(7)[:3] for _ in range(40)])  # the last expert gets no token
    x, weights = torch.randn(40, 48, requires_grad=True), torch.rand(40, 3, requires_grad=True)
    inputs = (x, weights, experts.gate_up_proj, experts.down_proj)
    assert_same(lambda x, w, *_: experts(x, w, chosen), lambda x, w, a, b: plain_experts(x, w, chosen, a, b), inputs)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 2, 10, 11])
def test_few_tokens_in_generation_are_multiplied_row_by_row(tokens: int) -> None:
    """30 rows are few, 33 are not."""
    mlp = small_model().model.layers[1].mlp
    x = torch.randn(tokens, 48)
    _, weights, chosen = mlp.gate(x)
    assert kernels.is_few(chosen.flatten()) == (tokens < 11)
    theirs = plain_experts(x, weights, chosen, mlp.experts.gate_up_proj, mlp.experts.down_proj)
    assert relative_difference(mlp.experts(x, weights, chosen), theirs) < 1e-5


def test_the_worked_example_of_sorting() -> None:
    experts = torch.tensor([2, 0, 2, 0, 0, 2])
    for run, expected_places, expected_ends in ((1, [3, 0, 4, 1, 2, 5], [3, 3, 6]), (4, [4, 0, 5, 1, 2, 6], [4, 4, 8])):
        places, ends = sort_by_expert(experts, 3, run)
        assert (places.tolist(), ends.tolist()) == (expected_places, expected_ends)


@given(experts=st.lists(st.integers(0, 5), max_size=40), run=st.sampled_from((1, 4, 64)))
def test_rows_are_sorted_by_expert_and_keep_their_order(experts: list[int], run: int) -> None:
    places, ends = sort_by_expert(torch.tensor(experts, dtype=torch.int64), 6, run)
    expected, end = [], 0
    for expert in range(6):
        rows = [row for row, own in enumerate(experts) if own == expert]
        expected += [(row, end + i) for i, row in enumerate(rows)]
        end += -(-len(rows) // run) * run
        assert ends[expert] == end
    assert sorted(enumerate(places.tolist())) == sorted(expected)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 1024])
@pytest.mark.parametrize("n", [1, 50, 64])
def test_the_loss_in_chunks(n: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.TUNING, "cpu", kernels.TUNING["cpu"]._replace(targets=chunk))
    targets = torch.randint(0, 301, (n,))
    inputs = random_tensors((n, 24), (301, 24))
    assert_same(lambda h, w: sum_cross_entropy(h, w, targets), lambda h, w: plain_cross_entropy(h, w, targets), inputs)
    reference = F.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum")
    assert plain_cross_entropy(*inputs, targets).item() == pytest.approx(reference.item(), rel=1e-6)


def test_the_loss_in_bfloat16_is_right_to_four_digits() -> None:
    inputs = random_tensors((200, 64), (5000, 64))
    targets = torch.randint(0, 5000, (200,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = sum_cross_entropy(*inputs, targets)
    theirs = F.cross_entropy((inputs[0].bfloat16() @ inputs[1].bfloat16().T).float(), targets, reduction="sum")
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        assert relative_difference(our_gradient, their_gradient) < 1e-2


def test_without_gradients_only_the_logits_are_computed() -> None:
    """An autograd function sees a parameter's requires_grad even if autograd is off."""
    hidden, weight = random_tensors((100, 24), (301, 24))
    targets = torch.randint(0, 301, (100,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = sum_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * 100 * 24 * 301
    assert loss.item() == pytest.approx(plain_cross_entropy(hidden, weight, targets).item(), rel=1e-6)


# ---------------------------------------------------------------- a few rows


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 3, 32, 33])
@pytest.mark.parametrize("out_features", [1, 6, 7, 512])
def test_a_matrix_in_two_halves_multiplies_as_the_whole(rows: int, out_features: int) -> None:
    x, weight = torch.randn(rows, 24), torch.randn(out_features, 24)
    assert relative_difference(linear(x, weight), x @ weight.T) < 1e-6
