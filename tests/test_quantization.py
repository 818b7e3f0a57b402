"""NF4 against bitsandbytes' on CPU, and models with it against the same models with its dequantised weights."""

import gc
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import chat
import checkpoint
import kernels
import lora
import quantization
from checkpoint import load_model_and_tokenizer, load_pretrained, newest_checkpoint, save_pretrained
from config import TINY, UserError
from export import merge_adapter
from generation import generate
from hub import peft as peft_files
from hub.weights import StoredTensor
from kernels import GroupedProduct, RowProduct
from launch.build import build_model
from model import DeepSeekV2
from parallel import ALONE
from quantization import ABSMAX_LEVELS, LEVELS, NF4, FrozenProduct
from ranks import new_bytes, take_over
from small_models import WIDE, relative_difference, small_model, transformers_model
from small_runs import arguments, conversations, differing, final_tensors, numbers, run_main, train_here, write_jsonl
from test_lora import DEFAULT, EXPERTS, randomize, tokens, train_next_to_peft
from tokenizer import Tokenizer

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel of the Hub's that nothing here needs
import bitsandbytes.functional as bnb  # noqa: E402


def packed(weight: Tensor) -> NF4:
    """A weight in NF4."""
    quantized = NF4("w", weight)
    for name, value in quantized.quantized([weight]).items():
        setattr(quantized, name, value)
    return quantized


def dequantized_by_bitsandbytes(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    state.dtype = dtype
    return bnb.dequantize_4bit(codes, state)


def quantized_model(seed: int = 0, **changes: Any) -> DeepSeekV2:
    """The small model, wide, with NF4 in its blocks."""
    model = small_model(seed, **WIDE | changes)
    weights = {name: model.get_parameter(name) for name in block_matrices(model)}
    quantization.plan(model)
    for name, weight in quantization.quantized_weights(model).items():
        for buffer, value in weight.quantized([weights[name].detach()]).items():
            setattr(weight, buffer, value)
    return model


@torch.no_grad()
def rounded_model(seed: int = 0, **changes: Any) -> DeepSeekV2:
    """The same model with plain weights, rounded to NF4 by bitsandbytes."""
    model = small_model(seed, **WIDE | changes)
    for name in block_matrices(model):
        weight = model.get_parameter(name)
        weight.copy_(dequantized_by_bitsandbytes(weight.detach()))
    return model


def block_matrices(model: DeepSeekV2) -> list[str]:
    """Every matrix in the blocks but the routers'."""
    return [n for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1 and ".gate.weight" not in n]


# ---------------------------------------------------------------- numbers to codes and back


def test_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(ABSMAX_LEVELS), bnb.create_dynamic_map())


@settings(max_examples=60)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 5)),
        st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 5)),
    ),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    scale=st.sampled_from((1e-30, 1e-3, 0.02, 1.0, 300.0)),
    zeros=st.sampled_from((0.0, 0.5, 1.0)),
    chunk=st.sampled_from((64, 256, 2**18)),
    seed=st.integers(0, 2**31),
)
def test_codes_and_numbers_are_those_of_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float, zeros: float, chunk: int, seed: int
) -> None:
    """Matrices and stacks of whole blocks, some of them zero, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    *rows, blocks = shape
    weight = torch.randn(*rows, 64 * blocks, generator=generator) * scale
    weight *= torch.rand(*rows, blocks, 1, generator=generator).ge(zeros).expand(*rows, blocks, 64).flatten(-2)
    weight = weight.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.TUNING, "cpu", kernels.TUNING["cpu"]._replace(chunk=chunk))
        ours = packed(weight)
        numbers = {kind: ours.dequantize(kind) for kind in (torch.float32, torch.bfloat16, torch.float16)}
        parts = [ours.dequantize(torch.float32, slice(i, i + 2)) for i in range(0, len(weight), 2)]
    with kernels.tuned_as("cuda"):
        in_one = {kind: ours.dequantize(kind) for kind in numbers}
        last_first = ours.dequantize(torch.float32, torch.arange(len(weight)).flip(0))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax.flatten())
    assert torch.equal(ours.scale, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    for kind, ours_numbers in numbers.items():
        state.dtype = kind
        assert torch.equal(ours_numbers, bnb.dequantize_4bit(codes, state))
        assert torch.equal(in_one[kind], ours_numbers)
    assert torch.equal(torch.cat(parts), numbers[torch.float32])
    assert torch.equal(last_first.flip(0), numbers[torch.float32])


def test_a_number_goes_to_the_nearest_level_of_its_block() -> None:
    """The paper's equation, literally: codes and absmax before the absmax is quantised, too."""
    weight = torch.randn(32, 128)
    codes, absmax = quantization.quantize(weight)
    nibbles = torch.stack((codes >> 4, codes & 15), dim=1).view(-1, 64)
    blocks = weight.view(-1, 64)
    assert torch.equal(absmax, blocks.abs().amax(dim=1))
    distances = (blocks[..., None] / absmax[:, None, None] - torch.tensor(LEVELS)).abs()  # (blocks, 64, 16)
    chosen = distances.gather(2, nibbles[..., None].long())[..., 0]
    assert (chosen <= distances.amin(dim=2) + 1e-7).all()


def test_numbers_next_to_a_midpoint_are_rounded_as_in_bitsandbytes() -> None:
    levels = torch.tensor(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    near = torch.stack([midpoints, *(torch.nextafter(midpoints, torch.tensor(side)) for side in (2.0, -2.0))])
    weight = F.pad(torch.cat((near.flatten(), torch.tensor([1.0]))), (0, 18)).view(1, 64)
    theirs, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(quantization.quantize(weight)[0], theirs.flatten())


def test_a_stack_takes_4_13_bits_per_number() -> None:
    stack = packed(torch.randn(8, 128, 512))
    size = sum(tensor.nbytes for tensor in stack.state_dict().values())
    assert 8 * size / stack.shape.numel() == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(number: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 7] = number
    with pytest.raises(UserError, match="w holds infinity or NaN"):
        packed(weight)


# ---------------------------------------------------------------- products


class LargestTensor(TorchDispatchMode):
    """Numbers of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype != torch.uint8 and not func.is_view:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("at_a_time", [1, 3, 8])
def test_a_stack_is_multiplied_in_parts(at_a_time: int) -> None:
    """Outputs and gradients are those of one product with all of it, also with experts that get no row; no more than
    the part is ever in full precision."""
    stack = packed(torch.randn(8, 128, 64))
    ends = torch.tensor([2, 2, 5, 9, 9, 9, 14, 16], dtype=torch.int32)
    product = GroupedProduct(ends)
    x = torch.randn(16, 64, requires_grad=True)
    whole = product(x, stack.dequantize(torch.float32))
    direction = torch.randn_like(whole)
    (wanted,) = torch.autograd.grad(whole, x, direction)
    with LargestTensor() as largest:
        output = FrozenProduct.apply(x, stack, list(product.parts(at_a_time)))
        (gradient,) = torch.autograd.grad(output, x, direction)
    assert relative_difference(output, whole) < 1e-6
    assert relative_difference(gradient, wanted) < 1e-6
    assert largest.numbers == at_a_time * 128 * 64


def test_a_few_rows_unpack_only_their_own_experts() -> None:
    stack = packed(torch.randn(8, 128, 64))
    product = RowProduct([5, 0, 5])
    x = torch.randn(3, 64)
    with torch.inference_mode(), LargestTensor() as largest:
        output = FrozenProduct.apply(x, stack, list(product.parts(1)))
    assert relative_difference(output, product(x, stack.dequantize(torch.float32))) < 1e-6
    assert largest.numbers == 128 * 64


@torch.inference_mode()
def test_generation_on_a_gpu_unpacks_the_chosen_experts_only() -> None:
    """Two rows of eight experts' stacks; without knowing on the host which experts those are."""
    model, rounded = quantized_model(), rounded_model()
    x = torch.randn(2, 64)
    weights, chosen = torch.rand(2, 2), torch.tensor([[6, 1], [3, 6]])
    with kernels.tuned_as("cuda"), LargestTensor() as largest:
        ours = model.model.layers[1].mlp.experts(x, weights, chosen)
    theirs = rounded.model.layers[1].mlp.experts(x, weights, chosen)
    assert relative_difference(ours, theirs) < 1e-5
    assert largest.numbers <= 4 * 128 * 64


def test_nothing_is_kept_for_the_backward_pass() -> None:
    layer = quantized_model().model.layers[0].mlp.gate_proj
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, 64, requires_grad=True)).sum().backward()
    assert saved == []


# ---------------------------------------------------------------- models


def test_all_matrices_of_the_blocks_are_quantised_and_nothing_else() -> None:
    plain, model = small_model(**WIDE), quantized_model()
    assert quantization.quantized_weights(model).keys() == set(block_matrices(plain))
    kept = {name for name, _ in plain.named_parameters()} - set(block_matrices(plain))
    assert dict(model.named_parameters()).keys() == kept
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in kept} == {
        *("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "kv_a_layernorm", "gate")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_those_of_the_rounded_weights(dtype: torch.dtype) -> None:
    model, rounded = quantized_model(), rounded_model()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = model(tokens()), rounded(tokens())
    assert relative_difference(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-6)
    assert relative_difference(ours, small_model(**WIDE)(tokens())) > 1e-2  # it does round


def test_adapters_get_the_gradients_of_the_rounded_weights() -> None:
    gradients = []
    for model in (quantized_model(), rounded_model()):
        torch.manual_seed(1)
        lora.add_lora(model, 4, 6.0, 0.0, (*DEFAULT, *EXPERTS))
        randomize(model)
        model(tokens(), labels=tokens(seed=1)).loss_sum.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == lora.adapters(model).keys()
        gradients.append({name: p.grad for name, p in lora.adapters(model).items()})
    ours, theirs = gradients
    for name, gradient in ours.items():
        assert relative_difference(gradient, theirs[name]) < 1e-4, name


@torch.no_grad()
def test_generation_equals_that_of_the_rounded_model() -> None:
    """With few tokens and with many, and adapters in place: as the rounded model."""
    replies = []
    for model in (quantized_model(), rounded_model()):
        torch.manual_seed(1)
        lora.add_lora(model, 4, 6.0, 0.0, ("kv_b_proj", "experts.down_proj"))
        randomize(model)
        prompts = [tokens(1, 4)[0].tolist(), tokens(1, 40, seed=1)[0].tolist()]
        replies.append([list(generate(model.eval(), [prompt], 12)) for prompt in prompts])
    assert replies[0] == replies[1]


def test_widths_that_are_not_a_multiple_of_64_are_refused() -> None:
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj has rows of 32 numbers; .*of 64"):
        quantization.plan(small_model(**WIDE | {"moe_intermediate_size": 32, "n_shared_experts": 2}))


@pytest.mark.parametrize("targets", [DEFAULT, (*DEFAULT, *EXPERTS)], ids=["default targets", "routed experts too"])
def test_losses_equal_pefts(targets: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT, on transformers' model with weights rounded by bitsandbytes, starts from our adapter's files."""
    model = quantized_model()
    lora.add_lora(model, 8, 16.0, 0.0, targets)
    peft_files.save_adapter(tmp_path, model, "base")
    reference = PeftModel.from_pretrained(transformers_model(rounded_model()), tmp_path, is_trainable=True)
    ours, theirs = train_next_to_peft(model, reference, steps=15)
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-4
    assert ours[-1] < ours[0] - 0.3


# ---------------------------------------------------------------- whole runs

WIDE_RUN = {f"model_{name}": value for name, value in WIDE.items()}
ADAPTED = ("q_proj", "kv_b_proj", "o_proj", "down_proj", *EXPERTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.jsonl, a run "base" of all weights, and from it one with adapters on NF4, of eight steps, saved at every
    other; it checkpoints its blocks."""
    folder = tmp_path_factory.mktemp("nf4")
    write_jsonl(folder / "data.jsonl", conversations(60))
    assert train_here(arguments(folder / "data.jsonl", folder / "base", max_steps=20, **WIDE_RUN), folder) == 0
    assert train_here(quantized_run(folder, "adapted"), folder) == 0
    return folder


def quantized_run(folder: Path, name: str, *flags: str, **changes: Any) -> list[str]:
    """The command line of a run from folder/base."""
    settings = {"init_from": folder / "base", "quantize": "nf4", "lora_rank": 4, "max_steps": 8, "save_steps": 2}
    settings |= {"save_total_limit": 4, "learning_rate": 1e-3, "lora_alpha": 4}
    more = ("--gradient-checkpointing", "--lora-target-modules", *ADAPTED, *flags)
    return arguments(folder / "data.jsonl", folder / name, *more, **settings | changes)


def test_a_run_prints_what_is_quantised_and_learns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(quantized_run(folder, "said", max_steps=1, eval_steps=0), folder) == 0
    model = DeepSeekV2(checkpoint.load_config(newest_checkpoint(folder / "base")))
    in_4_bits = sum(model.get_parameter(name).numel() for name in block_matrices(model))
    assert f"{in_4_bits / 1e6:,.1f} M of them in 4 bits" in capsys.readouterr().out
    base, adapted = (numbers(folder / run)[-1]["eval_loss"] for run in ("base", "adapted"))
    assert adapted < base


def test_a_resumed_run_ends_with_the_same_bits(folder: Path) -> None:
    """The run is resumed from step 2; a run without gradient checkpointing ends with them too."""
    take_over(folder / "adapted", folder / "resumed", step=2)
    assert train_here(quantized_run(folder, "resumed", "--resume"), folder) == 0
    whole, resumed = final_tensors(folder / "adapted"), final_tensors(folder / "resumed")
    assert differing(whole, resumed) == []
    steps = [line for line in numbers(folder / "resumed") if "loss" in line]
    assert steps == [line for line in numbers(folder / "adapted") if "loss" in line]
    assert train_here(quantized_run(folder, "plain", "--no-gradient-checkpointing"), folder) == 0
    assert differing(whole, final_tensors(folder / "plain")) == []


@torch.no_grad()
def test_the_adapter_opens_in_peft_on_the_original_base(folder: Path) -> None:
    """The adapter names the directory with the full weights."""
    adapter, base = newest_checkpoint(folder / "adapted"), newest_checkpoint(folder / "base")
    assert adapter is not None
    assert json.loads((adapter / peft_files.ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(base)
    ids = torch.randint(0, 512, (2, 30))
    theirs = PeftModel.from_pretrained(transformers_model(load_pretrained(base)), adapter)(ids).logits
    model, _ = load_model_and_tokenizer(folder / "adapted")
    assert relative_difference(model(ids), theirs) < 1e-5
    quantized, _ = load_model_and_tokenizer(folder / "adapted", quantize="nf4")
    assert 1e-4 < relative_difference(quantized(ids), theirs) < 0.2


def test_chat_answers_from_a_quantised_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "three or seven", "--max-new-tokens", "5", "--device", "cpu", "--quantize", "nf4"]
    assert run_main(chat.main, [str(folder / "adapted"), *words], folder) == 0
    model, tokenizer = load_model_and_tokenizer(folder / "adapted", quantize="nf4")
    ids, _ = tokenizer.render([{"role": "user", "content": "three or seven"}], add_generation_prompt=True)
    generator = torch.Generator().manual_seed(0)
    steps = generate(model.eval(), [ids], 5, (tokenizer.eos_token_id,), 0.7, top_p=0.9, generator=generator)
    reply = tokenizer.decode([token for (token,) in steps if token != tokenizer.eos_token_id])
    assert capsys.readouterr().out.strip() == reply.strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "quantize needs lora_rank"),
        ({"parallel": "fsdp"}, "quantize works only with parallel ddp"),
        ({"dtype": "bfloat16", "compile": True}, "without compile"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"quantize": "nf4", "lora_rank": 4, "init_from": "base"}
    with pytest.raises(UserError, match=message):
        TINY.changed(**settings | changes).validate()


def test_a_base_of_another_width_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_model(**WIDE | {"vocab_size": 512, "kv_lora_rank": 20})
    save_pretrained(tmp_path / "base", base, Tokenizer(vocab_size=512))
    assert train_here(quantized_run(folder, "refused", init_from=tmp_path / "base"), folder) == 2
    assert "kv_b_proj.weight has rows of 20 numbers" in capsys.readouterr().err
    assert not (folder / "refused").exists()


# ---------------------------------------------------------------- memory

NF4_RUN = {"lora_rank": 2, "dtype": "bfloat16", "quantize": "nf4"}
LARGEST = 64 * 2 * 192 * 64 * 2  # bytes of the stack of gate and up projections in one layer


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 22 MB whose stacks of experts are most of it, and an adapter "adapted"; its vocabulary is small."""
    directory = tmp_path_factory.mktemp("large")
    shape = WIDE | {"vocab_size": 512, "n_routed_experts": 64, "moe_intermediate_size": 192, "num_hidden_layers": 6}
    model = small_model(**shape).to(torch.bfloat16)
    save_pretrained(directory / "base", model, Tokenizer(vocab_size=512))
    lora.add_lora(model, 2, 4.0, 0.0, ("q_proj", "experts.down_proj", "experts.gate_up_proj"))
    for adapter in lora.adapters(model).values():
        nn.init.normal_(adapter, std=0.1)
    peft_files.save_adapter(directory / "adapted", model, str(directory / "base"))
    return directory


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Memory in tensors that are new since the test began, at every sixteenth read from a file."""
    seen: list[int] = []
    read_tensor, calls = StoredTensor.read, itertools.count()

    def watched(stored: StoredTensor) -> Tensor:
        tensor = read_tensor(stored)
        if next(calls) % 16 == 0:
            seen.append(new_bytes() + tensor.nbytes)
        return tensor

    monkeypatch.setattr(StoredTensor, "read", watched)
    gc.collect()
    gc.freeze()
    yield seen
    gc.unfreeze()


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "dtype": "bfloat16"}, NF4_RUN], ids=["all", "LoRA", "NF4"])
def test_loading_never_holds_more_than_the_model_and_two_weights(
    changes: dict[str, Any], large: Path, read: list[int]
) -> None:
    """A quantised weight is never whole while it is read."""
    config = TINY.changed(model=checkpoint.load_config(large / "base"), init_from=str(large / "base"), **changes)
    model = build_model(config, large / "base", ALONE)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    whole = (large / "base/model.safetensors").stat().st_size
    assert size < (0.35 if changes == NF4_RUN else 1.05 if changes else 2.01) * whole
    assert max(read) < size + (0.6 if changes == NF4_RUN else 2) * LARGEST


@torch.no_grad()
def test_merging_holds_the_adapter_and_two_weights(large: Path, read: list[int], tmp_path: Path) -> None:
    merge_adapter(large / "adapted", tmp_path / "merged")
    adapter = (large / "adapted" / peft_files.ADAPTER_WEIGHTS).stat().st_size
    assert max(read) < 1.1 * adapter + 2 * LARGEST < 0.5 * (tmp_path / "merged/model.safetensors").stat().st_size
    merged, _ = load_model_and_tokenizer(tmp_path / "merged")
    adapted, _ = load_model_and_tokenizer(large / "adapted")
    lora.merge(adapted)
    assert differing(merged.state_dict(), adapted.state_dict()) == []
    assert relative_difference(merged(tokens()), load_pretrained(large / "base")(tokens())) > 1e-2


def test_a_merge_that_fails_leaves_nothing(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"merged cannot be written .*No space left"):
        merge_adapter(large / "adapted", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
