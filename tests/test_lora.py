"""Adapters against PEFT on transformers' DeepSeek-V2, with the same weights."""

import contextlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from config import MINI, OptimizerConfig, UserError
from hub import peft as peft_files
from model import DeepSeekV2
from optimizer import make_optimizers
from small_models import relative_difference, small_config, small_model, transformers_model

DEFAULT = MINI.lora.lora_target_modules
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
COMPRESSED = {"q_lora_rank": 18}
# Name -> (targets, rank, changes of the model's shape)
CASES: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
    "default targets": (DEFAULT, 4, {}),
    "compressed queries": (DEFAULT, 4, COMPRESSED),
    "routed experts too": ((*DEFAULT, *EXPERTS), 4, COMPRESSED),
    "routed experts alone, odd rank": (EXPERTS, 3, {}),
    "one of the experts' weights": (("q_proj", "experts.down_proj"), 5, {}),
    "the other": (("experts.gate_up_proj",), 8, {}),
    "experts as narrow as the model": ((*DEFAULT, "experts.gate_up_proj"), 4, {"moe_intermediate_size": 48}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    return request.param


def adapted_model(targets: Sequence[str], rank: int = 4, alpha: float = 6.0, **changes: Any) -> DeepSeekV2:
    """Return a small model with random, non-zero adapters."""
    model = small_model(**changes)
    lora.add_lora(model, rank, alpha, 0.0, targets)
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: DeepSeekV2) -> None:
    """Give the model's adapters random, non-zero values."""
    for adapter in lora.adapters(model).values():
        adapter.normal_(0, 0.2)


def open_with_peft(directory: Path, trainable: bool = False, **changes: Any) -> PeftModel:
    """Open an adapter with PEFT, on transformers' base model. A key that it does not find is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(transformers_model(small_model(**changes)), directory, is_trainable=trainable)


def made_by_peft(directory: Path, settings: dict[str, Any], **changes: Any) -> PeftModel:
    """Return a model with PEFT's random, non-zero adapters, and save them."""
    model = get_peft_model(transformers_model(small_model(**changes)), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    return model.eval()


def tokens(rows: int = 3, length: int = 21, seed: int = 0) -> Tensor:
    return torch.randint(0, 112, (rows, length), generator=torch.Generator().manual_seed(seed))


def peft_parameters(model: DeepSeekV2, theirs: PeftModel) -> dict[str, nn.Parameter]:
    """Map the name of each of our adapters to PEFT's parameter."""
    parameters = dict(theirs.named_parameters())
    names = peft_files.peft_names(model)
    return {name: parameters[names[name].replace(".weight", ".default.weight")] for name in names}


# ---------------------------------------------------------------- new adapters


def test_default_targets_are_all_linear_layers_without_routed_experts() -> None:
    model = small_model(**COMPRESSED)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    lora.add_lora(model, 4, 8.0, 0.0, DEFAULT)
    assert {name for name, module in model.named_modules() if isinstance(module, lora.LoRALinear)} == linear
    assert {name.rpartition(".")[0] for name in lora.adapters(model)} == linear


def test_adapters_are_initialised_as_in_peft() -> None:
    """A is uniform with the bound of torch's (and PEFT's) linear layers and drawn with the generator; B is zero."""
    model = small_model()
    lora.add_lora(model, 64, 8.0, 0.0, ("o_proj", "experts.down_proj"))
    for name, parameter in lora.adapters(model).items():
        bound = 1 / math.sqrt(parameter.shape[-1]) if name.endswith("A") else 0.0
        assert 0.97 * bound <= parameter.abs().max() <= bound
    first, again = (dict(lora.initial_weights(model, torch.Generator().manual_seed(3))) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in lora.adapters(model))


def test_an_unknown_target_is_refused_with_a_list_of_those_present() -> None:
    for targets in (("q_proj", "o_porj"), ("lm_head",), ("q_a_proj",), ()):
        with pytest.raises(UserError, match=r"has no .*; it has down_proj, experts\.down_proj.*o_proj, q_proj"):
            lora.add_lora(small_model(), 4, 8.0, 0.0, targets)
    with pytest.raises(UserError, match=r"has no experts\.down_proj"):
        lora.add_lora(small_model(first_k_dense_replace=3), 4, 8.0, 0.0, (*DEFAULT, "experts.down_proj"))


@torch.no_grad()
def test_dropout_acts_only_in_training_and_keeps_the_mean() -> None:
    model = small_model().eval()
    lora.add_lora(model, 4, 8.0, 0.5, ("q_proj",))
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_B.normal_()
    x = torch.randn(1, 48)
    expected = x @ (layer.base_layer.weight + 2.0 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), expected)
    model.train()
    many = layer(x.expand(20_000, -1))
    assert many.std(dim=0).min() > 0
    assert relative_difference(many.mean(dim=0), expected[0]) < 0.05
    with pytest.raises(UserError, match="lora_dropout must be 0"):
        lora.add_lora(small_model(), 4, 8.0, 0.1, EXPERTS)


# ---------------------------------------------------------------- PEFT's format


def test_logits_and_gradients_are_pefts(case: tuple[tuple[str, ...], int, dict[str, Any]], tmp_path: Path) -> None:
    """PEFT opens our files; new adapters change nothing; merged, the model is plain and computes the same."""
    targets, rank, changes = case
    model, plain = small_model(**changes).eval(), small_model(**changes)
    before = model(tokens())
    lora.add_lora(model, rank, 6.0, 0.0, targets)
    assert torch.equal(model(tokens()), before)
    randomize(model)
    peft_files.save_adapter(tmp_path, model, "base")
    reference = open_with_peft(tmp_path, trainable=True, **changes)
    # logits
    logits, their_logits = model(tokens()), reference(tokens()).logits
    assert relative_difference(their_logits, logits) < 1e-5
    assert relative_difference(before, logits) > 1e-2
    # gradients
    model(tokens(), labels=tokens(seed=1)).loss_sum.backward()
    F.cross_entropy(their_logits.flatten(0, 1), tokens(seed=1).flatten(), reduction="sum").backward()
    theirs, ours = peft_parameters(model, reference), lora.adapters(model)
    assert theirs.keys() == ours.keys()
    largest = max(parameter.grad.abs().max().item() for parameter in theirs.values())
    for name, adapter in ours.items():
        wanted = peft_files.from_peft(theirs[name].grad, adapter.shape, name)
        scale = max(wanted.abs().max().item(), 1e-2 * largest)
        assert (adapter.grad - wanted).abs().max() < 2e-5 * scale, name
    # merging
    lora.merge(model)
    assert relative_difference(model(tokens()), logits) < 1e-5
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


ATTENTION = {"r": 4, "target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}
STACKS_ONLY = {"r": 4, "target_modules": []}
MADE_BY_PEFT: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "some layers": ATTENTION | {"layers_to_transform": [1]},
    "rank-stabilised scaling": ATTENTION | {"use_rslora": True},
    "several ranks": ATTENTION | {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 12}},
    "gate and up, which PEFT fuses": {"r": 4, "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    "both of the experts' weights": {
        "r": 3,
        "target_modules": ["o_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
    },
    "one of them": STACKS_ONLY | {"target_parameters": ["experts.down_proj"]},
    "the other": STACKS_ONLY | {"target_parameters": ["experts.gate_up_proj"]},
    "a dense layer's weight": {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["0.mlp.up_proj.weight"]},
}


@pytest.mark.parametrize("settings", MADE_BY_PEFT.values(), ids=MADE_BY_PEFT.keys())
@torch.no_grad()
def test_adapters_of_peft_survive_reading_and_saving(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = made_by_peft(tmp_path / "theirs", {"lora_alpha": 8} | settings)(tokens()).logits
    model = small_model()
    peft_files.load_adapter(model, tmp_path / "theirs")
    assert relative_difference(model(tokens()), theirs) < 1e-5
    assert relative_difference(small_model()(tokens()), theirs) > 1e-2
    peft_files.save_adapter(tmp_path / "ours", model, "base")
    with warnings.catch_warnings():
        # our file names q_proj for all layers; PEFT notes those that it then leaves at zero
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        again = PeftModel.from_pretrained(transformers_model(small_model()), tmp_path / "ours")
    assert relative_difference(again(tokens()).logits, theirs) < 1e-5


def test_files_hold_only_the_adapters_bit_for_bit(tmp_path: Path) -> None:
    model = adapted_model((*DEFAULT, *EXPERTS), rank=3)
    weights = {name: parameter.detach().clone() for name, parameter in lora.adapters(model).items()}
    peft_files.save_adapter(tmp_path / "whole", model, "base")
    read = dict(peft_files.read_adapter(model, tmp_path / "whole"))
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert len(load_file(tmp_path / "whole" / peft_files.ADAPTER_WEIGHTS)) == len(weights)
    config = json.loads((tmp_path / "whole" / peft_files.ADAPTER_CONFIG).read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, "base")


UNSUPPORTED: dict[str, Any] = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "peft_type": "LOHA",
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2]],
    "an_option_of_tomorrow": {"that": "matters"},
    "r": 0,
    "lora_alpha": "eight",
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_adapters_with_unsupported_options_are_refused(option: str, tmp_path: Path) -> None:
    peft_files.save_adapter(tmp_path, adapted_model(("q_proj",)), "base")
    path = tmp_path / peft_files.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: UNSUPPORTED[option]}))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        peft_files.load_adapter(small_model(), tmp_path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def changed(path: Path, remove: str = "", **tensors: Tensor) -> None:
    save_file({name: t for name, t in load_file(path).items() if not remove or remove not in name} | tensors, path)


A_OF_EXPERTS = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
DAMAGE = {
    "no file": Path.unlink,
    "truncated": truncated,
    "a B is missing": lambda path: changed(path, remove="layers.1.self_attn.q_proj.lora_B"),
    "nothing in it": lambda path: changed(path, remove="lora"),
    "another model's": lambda path: changed(path, **{"model.elsewhere.lora_A.weight": torch.zeros(4, 4)}),
    "a vector": lambda path: changed(path, **{A_OF_EXPERTS: torch.zeros(32)}),
    "another width": lambda path: changed(path, **{A_OF_EXPERTS: torch.zeros(32, 31)}),
    "a rank that does not divide": lambda path: changed(path, **{A_OF_EXPERTS: torch.zeros(33, 32)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_adapters_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    model = adapted_model(("q_proj", "experts.down_proj"))
    peft_files.save_adapter(tmp_path, model, "base")
    DAMAGE[damage](tmp_path / peft_files.ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        peft_files.load_adapter(small_model(), tmp_path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        list(peft_files.read_adapter(model, tmp_path))


# ---------------------------------------------------------------- merging and generating


@torch.no_grad()
def test_merging_into_bf16_rounds_once() -> None:
    model = adapted_model(("o_proj", "experts.down_proj")).to(torch.bfloat16)
    for adapter in lora.adapters(model).values():
        adapter.data = adapter.float()
    linear, experts = model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.experts
    exact = (
        linear.base_layer.weight.double() + 1.5 * linear.lora_B.double() @ linear.lora_A.double(),
        experts.base_layer.down_proj.double()
        + 1.5 * experts.down_proj_lora_B.double() @ experts.down_proj_lora_A.double(),
    )
    lora.merge(model)
    merged = (model.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].mlp.experts.down_proj)
    for weight, wanted in zip(merged, exact, strict=True):
        assert weight.dtype == torch.bfloat16
        assert (weight.double() - wanted).abs().le(wanted.abs() * 2**-8 * 1.001 + 1e-7).all()  # half a step of bf16


# ---------------------------------------------------------------- training


def test_only_adapters_get_gradients_and_optimizer_state() -> None:
    model = adapted_model((*DEFAULT, *EXPERTS))
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in lora.adapters(model)}
    (optimizer,) = make_optimizers(model, OptimizerConfig(), torch.float32)
    model(tokens(), labels=tokens()).loss_sum.backward()
    optimizer.step()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == lora.adapters(model).keys()
    assert len(optimizer.state) == len(with_gradient)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    model = adapted_model(EXPERTS)
    model(tokens(1, 1), labels=tokens(1, 1)).loss_sum.backward()  # one token, three of eight experts
    for adapter in lora.adapters(model).values():
        assert (adapter.grad.flatten(1).abs().amax(dim=1) > 0).sum() == 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [4, 8])
def test_adapters_stay_fp32_on_a_bf16_base(autocast: bool, rank: int) -> None:
    """Logits are as close to an fp32 model's with the same weights as those of a bf16 model without adapters."""
    with torch.device("meta"):
        model = DeepSeekV2(small_config()).to(torch.bfloat16)
        lora.add_lora(model, rank, 6.0, 0.0, (*DEFAULT, *EXPERTS))
    exact, bf16 = adapted_model((*DEFAULT, *EXPERTS), rank), small_model()
    rounded = {
        name: value if name in lora.adapters(exact) else value.bfloat16() for name, value in exact.state_dict().items()
    }
    model.load_state_dict(rounded, assign=True)
    exact.load_state_dict(rounded)
    lora.merge(exact)
    bf16.load_state_dict(exact.state_dict())
    bf16.to(torch.bfloat16)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        logits = model(tokens())
        model(tokens(), labels=tokens()).loss_sum.backward()
        without_adapters = bf16(tokens())
    noise = (without_adapters - exact(tokens())).abs().mean()
    assert (logits - exact(tokens())).abs().mean() < 1.5 * noise
    for name, parameter in model.named_parameters():
        if name in lora.adapters(model):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
        else:
            assert parameter.dtype == torch.bfloat16
            assert parameter.grad is None


@pytest.mark.parametrize("targets", [DEFAULT, (*DEFAULT, *EXPERTS)], ids=["default targets", "routed experts too"])
def test_losses_equal_pefts(targets: tuple[str, ...], tmp_path: Path) -> None:
    model = small_model()
    lora.add_lora(model, 8, 16.0, 0.0, targets)
    peft_files.save_adapter(tmp_path, model, "base")
    ours, theirs = train_next_to_peft(model, open_with_peft(tmp_path, trainable=True))
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-3
    assert ours[-1] < ours[0] - 0.5


def train_next_to_peft(model: DeepSeekV2, reference: PeftModel, steps: int = 30) -> list[list[float]]:
    """Return the losses of our model and of PEFT's: the same batches, AdamW, fp32 and right padding on both sides."""
    decay = OptimizerConfig(weight_decay=0.1)
    optimizers = [make_optimizers(one, decay, torch.float32)[0] for one in (model, reference)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = 3e-3
    real = torch.arange(30) < torch.tensor([25, 11, 18, 30])[:, None]
    curves: list[list[float]] = [[], []]
    for step in range(steps):
        ids = tokens(4, 31, seed=step % 5)
        inputs, labels = ids[:, :-1].where(real, 0), ids[:, 1:].where(real, -100)
        output = model(inputs, sequence_ids=real.long(), labels=labels)
        logits = reference(inputs, attention_mask=real.long()).logits
        losses = (output.loss_sum / output.num_targets, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        for loss, optimizer, curve in zip(losses, optimizers, curves, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    return curves
