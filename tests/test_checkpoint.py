"""Model directories against transformers; run state against kills, full disks, damage and hostile files."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

import checkpoint
import lora
from checkpoint import (
    iterate_weights,
    load_config,
    load_model_and_tokenizer,
    load_optimizer,
    load_pretrained,
    newest_checkpoint,
    optimizer_state,
    resolve_checkpoint,
    save_checkpoint,
    save_optimizer,
    save_pretrained,
)
from config import OptimizerConfig, RopeScaling, TrainConfig, UserError
from files import checksum, read_json, write_json
from generation import generate
from hub import peft as peft_files
from hub.weights import write_tensors
from model import DeepSeekV2
from optimizer import make_optimizers
from parallel import ALONE
from small_models import make_batch, relative_difference, small_model, transformers_model
from small_runs import arguments, conversations, differing, train_here, write_jsonl
from tokenizer import Tokenizer

YARN = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "first_k_dense_replace": 0},
    "yarn, compressed queries, groups": {
        "rope_scaling": YARN,
        "rope_theta": 5e5,
        "max_position_embeddings": 163_840,
        "q_lora_rank": 18,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
}
SHORT_YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64)
MSCALES = list(itertools.product((0.0, 0.5, 1.0), (0.0, 0.5)))
every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Path, DeepSeekV2]:
    """A model directory, and the model in it."""
    model = small_model(vocab_size=512)
    save_pretrained(tmp_path / "model", model, tokenizer)
    return tmp_path / "model", model


def assert_same_weights(ours: DeepSeekV2, theirs: DeepSeekV2, dtype: torch.dtype = torch.float32) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == dtype
        assert torch.equal(a[name], b[name].to(dtype)), name


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


# ---------------------------------------------------------------- transformers opens ours


@every_case
@torch.no_grad()
def test_transformers_opens_our_directory(changes: dict, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=512, **changes)
    save_pretrained(tmp_path, model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief. <|im_end|> stays text."},
        {"role": "user", "content": "How are you, Zoë?\n\n  今日は 🙂"},
        {"role": "assistant", "content": "Fine, thank you! 12345"},
    ]
    ids, _ = tokenizer.render(messages[:2], add_generation_prompt=True)
    for message in messages[1:]:
        assert their_tokenizer.encode(message["content"]) == tokenizer.encode(message["content"])
    assert their_tokenizer.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    assert relative_difference(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits) < 1e-5
    continuation = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    ours = [token for (token,) in generate(model, [ids], 64, stop_token_ids=(tokenizer.eos_token_id,))]
    assert ours == continuation


@every_case
def test_files_hold_the_tensors_that_transformers_writes(changes: dict, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same names, one matrix per expert, a tied head once, and the same values."""
    model = small_model(vocab_size=512, **changes)
    save_pretrained(tmp_path, model, tokenizer)
    assert differing(load_file(tmp_path / "model.safetensors"), transformers_on_disk(model, tmp_path / "theirs")) == []


def transformers_on_disk(model: DeepSeekV2, directory: Path, max_shard_size: str = "5GB") -> dict[str, Tensor]:
    transformers_model(model).save_pretrained(directory, max_shard_size=max_shard_size)
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("norm_topk_prob", {"norm_topk_prob": True}),
        ("norm_topk_prob", {}),
        *(("mscale", {"rope_scaling": replace(SHORT_YARN, mscale=a, mscale_all_dim=b)}) for a, b in MSCALES),
    ],
)
@torch.no_grad()
def test_a_model_that_transformers_computes_differently_is_a_warning(
    name: str, changes: dict, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is a warning if, and only if, the logits differ."""
    model = small_model(vocab_size=512, **changes)
    save_pretrained(tmp_path, model, tokenizer)
    error = capsys.readouterr().err
    assert load_config(tmp_path) == model.config
    ids = torch.arange(40)[None]
    differs = relative_difference(model(ids), AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits) > 1e-4
    assert (f"transformers does not follow {name}=" in error) == differs
    assert error.count("\n") == differs


def test_tokens_that_are_trained_on_get_gradients_in_transformers(tmp_path: Path) -> None:
    """transformers gives the embedding of pad_token_id no gradient. A tokenizer without <|endoftext|> pads with the end
    of a turn."""
    tokenizer = Tokenizer(vocab_size=512)
    for pads_with_end in (False, True):
        if pads_with_end:
            tokenizer.pad_token, tokenizer.pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        save_pretrained(tmp_path, small_model(vocab_size=512), tokenizer)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert theirs.generation_config.pad_token_id == tokenizer.pad_token_id
        theirs(torch.tensor([[tokenizer.eos_token_id, 5]])).logits.square().sum().backward()
        assert theirs.model.embed_tokens.weight.grad[tokenizer.eos_token_id].norm() > 0


# ---------------------------------------------------------------- we open ours, and transformers'


@every_case
def test_what_was_saved_is_loaded(changes: dict, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=512, aux_loss_alpha=0.1, device_aux_loss_alpha=0.2, **changes)
    save_pretrained(tmp_path, model, tokenizer)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert (loaded.output_weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(load_pretrained(tmp_path, torch.bfloat16), model, torch.bfloat16)
    names = [name for name, _ in iterate_weights(tmp_path, model.config)]
    assert names == [name for name, _ in model.named_parameters()]


@every_case
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_we_open_what_transformers_saved(changes: dict, max_shard_size: str, tmp_path: Path) -> None:
    model = small_model(**changes)
    transformers_on_disk(model, tmp_path, max_shard_size)
    loaded = load_pretrained(tmp_path)
    balance = {"aux_loss_alpha": 0.003}
    assert loaded.config == replace(model.config, **balance)
    assert_same_weights(loaded, model)


def test_bfloat16_is_stored_and_loaded_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=512).to(torch.bfloat16)
    save_pretrained(tmp_path, model, tokenizer)
    assert_same_weights(load_pretrained(tmp_path), model, torch.bfloat16)
    assert_same_weights(load_pretrained(tmp_path, torch.float32), model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


# config.json as published with DeepSeek-V2-Lite, the fields that bear on the model.
PUBLISHED = """{
    "architectures": ["DeepseekV2ForCausalLM"], "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
    "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
    "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "v_head_dim": 128, "vocab_size": 102400
}"""


def test_deepseeks_own_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(PUBLISHED)
    config = load_config(tmp_path)
    assert config.rope_scaling == RopeScaling(mscale=0.707, mscale_all_dim=0.707)
    assert (config.q_lora_rank, config.hidden_size, config.aux_loss_alpha) == (None, 2048, 0.001)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    edit_json(tmp_path / "config.json", n_group=None, topk_group=None, rope_scaling=yarn)
    config = load_config(tmp_path)
    assert (config.n_group, config.topk_group) == (1, 1)
    assert config.rope_scaling == replace(SHORT_YARN, factor=2.0, mscale=1.0, mscale_all_dim=0.0)


# ---------------------------------------------------------------- what does not fit is refused


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_listed_in_one_error(saved: tuple[Path, DeepSeekV2]) -> None:
    """The first ten of them."""
    directory, _ = saved

    def edit(weights: dict[str, Tensor]) -> None:
        del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
        weights["model.norm.weight"] = torch.ones(49)
        weights["model.layers.9.mlp.gate.weight"] = torch.ones(2)

    edit_weights(directory, edit)
    with pytest.raises(UserError) as caught:
        load_pretrained(directory)
    message = str(caught.value)
    assert "model.layers.1.mlp.experts.3.up_proj.weight is missing" in message
    assert "model.norm.weight has shape (49,), not (48,)" in message
    assert "model.layers.9.mlp.gate.weight is not part of the model" in message
    assert str(directory) in message
    assert "\n" not in message
    edit_json(directory / "config.json", num_hidden_layers=4)  # a layer of 5 + 1 + 24 + 3 + 2 tensors too many
    with pytest.raises(UserError, match="and 28 more") as caught:
        load_pretrained(directory)
    assert str(caught.value).count("is missing") == 10


YARN_OF_2 = {"type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # settings that this model does not have
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', which is not of type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_scaling": YARN_OF_2}, "rope_scaling has factor; it needs factor, original_max_position_embeddings"),
        ({"rope_scaling": YARN_OF_2 | {"attention_factor": 2}}, "rope_scaling has factor, attention_factor; it needs"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "llama3"}}, "type 'llama3' is not supported"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_scaling": asdict(YARN) | {"factor": "40"}}, "rope_scaling.factor is '40', which is not of type float"),
        # missing values, wrong types, impossible shapes
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": "48"}, "hidden_size is '48', which is not of type int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, which is not of type int"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, which is not of type bool"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 10**18}, "hidden_size is 1000000000000000000; it must be below 1000000"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be below 1000"),
        ({"n_group": 3}, "n_group"),
        ({"kv_lora_rank": 21}, "kv_lora_rank must be even"),
        ({"qk_nope_head_dim": 13}, "qk_nope_head_dim must be even"),
        ({"rope_scaling": asdict(YARN) | {"beta_fast": 0.5}}, "beta_fast is below beta_slow"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(
    changes: dict, message: str, saved: tuple[Path, DeepSeekV2]
) -> None:
    path = saved[0] / "config.json"
    edit_json(path, **changes)
    with pytest.raises(UserError) as caught:
        load_config(path.parent)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_directories_without_a_model_are_refused(saved: tuple[Path, DeepSeekV2], tmp_path: Path) -> None:
    directory, _ = saved
    file = directory / "model.safetensors"
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path / "nowhere")
    for damaged in (file.read_bytes()[:-1], b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
            load_pretrained(directory)
    file.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        load_pretrained(directory)
    for content, message in (('{"model_type": ', "is not JSON"), ("[]", "does not contain a JSON object")):
        (directory / "config.json").write_text(content)
        with pytest.raises(UserError, match=rf"config\.json {message}"):
            load_pretrained(directory)


@pytest.mark.parametrize("width", ["qk_nope_head_dim", "kv_lora_rank"])
def test_transformers_refuses_odd_widths_too(width: str) -> None:
    """The reason why they are refused here."""
    model = small_model()
    wrong = DeepseekV2Config(**transformers_model(model).config.to_dict() | {width: getattr(model.config, width) + 1})
    with pytest.raises(RuntimeError):
        DeepseekV2ForCausalLM(wrong)(torch.arange(5)[None])


@pytest.mark.parametrize("changes", [{"n_routed_experts": 10**6 - 1}, {"num_hidden_layers": 999}])
def test_a_model_larger_than_its_files_is_refused_before_it_is_built(
    changes: dict, saved: tuple[Path, DeepSeekV2], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(saved[0] / "config.json", **changes)
    monkeypatch.setattr(checkpoint, "DeepSeekV2", None)
    with pytest.raises(UserError, match="but the weight files hold only 83 tensors"):
        load_pretrained(saved[0])
    with pytest.raises(UserError, match="but the weight files hold only 83 tensors"):
        iterate_weights(saved[0], load_config(saved[0]))


def test_weights_of_several_dtypes_are_loaded_in_the_widest(saved: tuple[Path, DeepSeekV2]) -> None:
    directory, model = saved
    edit_weights(directory, lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items() if "mlp" in n}))
    loaded = load_pretrained(directory)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    experts = model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(loaded.model.layers[1].mlp.experts.down_proj, experts.bfloat16().float())


def test_integer_weights_are_refused(saved: tuple[Path, DeepSeekV2]) -> None:
    edit_weights(saved[0], lambda weights: weights.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored as I64"):
        load_pretrained(saved[0])


OUTSIDE = ("../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "..", "", "a\0b", 3, None, ["b"])


@pytest.mark.parametrize("content", [*({"weight_map": {"a": name}} for name in OUTSIDE), {}, {"weight_map": []}, 3])
def test_an_index_that_is_broken_or_leads_outside_is_refused(content: object, saved: tuple[Path, DeepSeekV2]) -> None:
    directory, _ = saved
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    reasons = "lies outside of the directory|does not exist|has no weight_map|does not contain a JSON object"
    with pytest.raises(UserError, match=reasons):
        load_pretrained(directory)


def test_links_are_followed_only_within_a_hub_cache(saved: tuple[Path, DeepSeekV2], tmp_path: Path) -> None:
    directory, model = saved
    outside = tmp_path / "outside.safetensors"
    (directory / "model.safetensors").rename(outside)
    (directory / "model.safetensors").symlink_to(outside)
    with pytest.raises(UserError, match="lies outside of the directory"):
        load_pretrained(directory)
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, source in [("config.json", directory / "config.json"), ("model.safetensors", outside)]:
        shutil.copy(source, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert_same_weights(load_pretrained(snapshot), model)


# ---------------------------------------------------------------- run state


def writer(value: int) -> Callable[[Path], None]:
    """Write three files that belong together."""

    def write(directory: Path) -> None:
        tensor = torch.full((20_000,), float(value))
        write_tensors(directory / "model.safetensors", {"value": tensor})
        (directory / "optimizer").mkdir()
        write_tensors(directory / "optimizer/rank-00000.safetensors", {"moments": tensor})
        write_json(directory / "trainer_state.json", {"step": value})

    return write


def stored_value(directory: Path) -> int:
    step = read_json(directory / "trainer_state.json")["step"]
    assert (load_file(directory / "model.safetensors")["value"] == step).all()
    assert (load_file(directory / "optimizer/rank-00000.safetensors")["moments"] == step).all()
    return step


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints/step-of-mine").mkdir(parents=True)
    for step in (10, 20, 30, 1_000_000):
        place = save_checkpoint(tmp_path, step, writer(step), limit=2)
        assert newest_checkpoint(tmp_path) == place
    assert steps(tmp_path) == ["step-000030", "step-1000000", "step-of-mine"]
    assert stored_value(tmp_path / "checkpoints/step-1000000") == 1_000_000


def test_a_base_model_is_given_the_control_tokens_that_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer has <|endoftext|> only, and the embedding has rows to spare. The error names the flag; with it,
    transformers reads the same tokens and logits, and the new rows start at the mean of the others."""
    tokenizer = Tokenizer(vocab_size=512)
    spec = json.loads(tokenizer.to_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == "<|endoftext|>"]
    for name in ("<|im_start|>", "<|im_end|>"):
        del spec["model"]["vocab"][name]
    base, place = tmp_path / "base", tmp_path / "run/checkpoints/step-000001"
    save_pretrained(base, small_model(vocab_size=511), tokenizer)
    (base / "tokenizer.json").write_text(json.dumps(spec))
    (base / "tokenizer_config.json").unlink()
    assert 1 + max([*spec["model"]["vocab"].values(), spec["added_tokens"][0]["id"]]) == 510
    data = write_jsonl(tmp_path / "data.jsonl", conversations(8))
    flags = {"max_steps": 1, "eval_steps": 0, "learning_rate": 1e-9, "weight_decay": 0, "train_split": "train"}
    command = arguments(data, tmp_path / "run", init_from=base, **flags)
    assert train_here(command, tmp_path) == 2
    assert capsys.readouterr().err == (
        f"error: {base} lacks <|im_start|>, <|im_end|>, which chat template chatml needs: pass --chat-template "
        "(none fits), or --add-control-tokens to add rows of the embedding and the head\n"
    )
    command.append("--add-control-tokens")
    assert train_here(command, tmp_path) == 0
    model, ours = load_model_and_tokenizer(tmp_path / "run")
    assert (ours.control_ids["<|im_start|>"], ours.control_ids["<|im_end|>"]) == (510, 511)
    before = load_pretrained(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new, old = model.get_parameter(name), before.get_parameter(name)[:510]
        torch.testing.assert_close(new, torch.cat((old, old.mean(dim=0).expand(2, -1))), atol=1e-6, rtol=0)
    theirs = AutoTokenizer.from_pretrained(place)
    talk = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Ho"}]
    assert ours.render(talk)[0].count(511) == 2
    talk[0]["content"] = "Hi"
    ids, _ = ours.render(talk)
    assert theirs.apply_chat_template(talk)["input_ids"] == ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(place)(torch.tensor([ids])).logits
    torch.testing.assert_close(model(torch.tensor([ids])), logits, atol=1e-4, rtol=1e-4)
    assert train_here([*command, "--max-steps", "2", "--resume"], tmp_path) == 0


def test_a_run_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def check_refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            resolve_checkpoint(run)

    check_refused("is not a checkpoint")
    run.mkdir()
    write_json(run / "config.json", TrainConfig().flat())
    check_refused("run is a run with no checkpoint yet")
    (run / "checkpoints/step-²").mkdir(parents=True)
    check_refused("no checkpoint yet")
    (run / "checkpoints/step-000001").mkdir()
    check_refused("no checkpoint that is whole")
    place = save_checkpoint(run, 7, lambda directory: write_json(directory / "config.json", {}), limit=1)
    assert resolve_checkpoint(run) == resolve_checkpoint(place) == place


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no checksums"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        newest = save_checkpoint(tmp_path, step, writer(step), limit=2)
    file = newest / "model.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        (file if damage == "missing" else newest / "checksums.json").unlink()
    good = newest_checkpoint(tmp_path)
    assert good is not None
    assert stored_value(good) == 1
    report = capsys.readouterr().err
    assert str(newest) in report
    assert report.count("\n") == 1
    # the resumed run's next checkpoint replaces the damaged one
    save_checkpoint(tmp_path, 2, writer(22), limit=2)
    assert stored_value(newest_checkpoint(tmp_path)) == 22
    assert steps(tmp_path) == ["step-000001", "step-000002"]


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (1, 9):
        newest = save_checkpoint(tmp_path, step, writer(step), limit=2)
    (newest / "model.safetensors").unlink()
    save_checkpoint(tmp_path, 3, writer(3), limit=2)
    assert steps(tmp_path) == ["step-000001", "step-000003"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer(step), limit=2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert stored_value(save_checkpoint(tmp_path, 3, writer(3), limit=1)) == 3
    assert capsys.readouterr().err.count("cannot be deleted") == 2
    assert stored_value(save_checkpoint(tmp_path, 3, writer(33), limit=3)) == 33
    assert re.search(r"warning: .*\.step-000003\..*\.tmp cannot be deleted", capsys.readouterr().err)


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer(1), limit=1)

    def write(directory: Path) -> None:
        writer(2)(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, write, limit=1)
    assert steps(tmp_path) == ["step-000001"]


def test_a_failing_rename_costs_no_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_checkpoint(tmp_path, 1, writer(1), limit=1)

    def fail(self: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="step-000002 cannot be written"):
            save_checkpoint(tmp_path, 2, writer(2), limit=1)
    assert steps(tmp_path) == ["step-000001"]
    assert stored_value(place) == 1


def test_weights_have_the_permissions_of_other_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    before = os.umask(0o027)
    try:
        model = small_model(vocab_size=512)
        save_pretrained(tmp_path / "merged", model, tokenizer)
        save_checkpoint(tmp_path, 1, lambda directory: save_pretrained(directory, model, tokenizer), limit=1)
        lora.add_lora(model, 2, 4.0, 0.0, ("o_proj",))
        peft_files.save_adapter(tmp_path / "adapter", model, None)
    finally:
        os.umask(before)
    modes = {oct(file.stat().st_mode & 0o777) for file in tmp_path.rglob("*") if file.is_file()}
    assert modes == {"0o640"}


def write_model_directory(directory: Path) -> None:
    save_pretrained(directory, small_model(vocab_size=512), Tokenizer(vocab_size=512))


def write_optimizer(directory: Path) -> None:
    save_optimizer(directory, *trained_briefly("adamw"), ALONE)


@pytest.mark.parametrize(
    ("size", "write"),
    [(100, writer(2)), (50_000, writer(2)), (100_000, write_optimizer), (100_000, write_model_directory)],
    ids=["header", "numbers", "optimizer", "model"],
)
def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(
    size: int, write: Callable[[Path], None], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, 1, writer(1), limit=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match=r"step-000002 cannot be written .*[Ff]ile too large"):
            save_checkpoint(tmp_path, 2, write, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(tmp_path) == ["step-000001"]
    assert stored_value(newest_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_restored_bit_for_bit(optimizer: Literal["adamw", "muon"], tmp_path: Path) -> None:
    """Moments and step counts. Weights stay as they are, and the configured decay and betas count."""
    model, trained = trained_briefly(optimizer)
    checksums = save_optimizer(tmp_path, model, trained, ALONE)
    assert {name: checksum(tmp_path / name) for name in checksums} == checksums
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fresh = make_optimizers(model, OptimizerConfig(optimizer, weight_decay=0.7), torch.float32)
    load_optimizer(tmp_path, model, fresh, ALONE)
    assert differing(optimizer_state(model, trained), optimizer_state(model, fresh)) == []
    assert differing(before, dict(model.named_parameters())) == []
    assert fresh[0].param_groups[0]["weight_decay"] == 0.7


def trained_briefly(optimizer: Literal["adamw", "muon"]) -> tuple[DeepSeekV2, list[torch.optim.Optimizer]]:
    model = small_model()
    optimizers = make_optimizers(model, OptimizerConfig(optimizer), torch.float32)
    for _ in range(2):
        model(**make_batch([[9, 5]])).loss_sum.backward()
        for one in optimizers:
            one.step()
    return model, optimizers


@pytest.mark.parametrize("damage", ["another model", "a tensor less", "no files", "a broken file", "a broken header"])
def test_optimizer_state_that_does_not_fit_is_one_line(damage: str, tmp_path: Path) -> None:
    model, optimizers = trained_briefly("adamw")
    save_optimizer(tmp_path, model, optimizers, ALONE)
    (file,) = (tmp_path / "optimizer").iterdir()
    if damage == "another model":
        model = small_model(hidden_size=96)
        optimizers = make_optimizers(model, OptimizerConfig(), torch.float32)
    elif damage == "a tensor less":
        tensors = load_file(file)
        tensors.pop("model.norm.weight.exp_avg")
        save_file(tensors, file)
    elif damage == "no files":
        file.unlink()
    elif damage == "a broken file":
        os.truncate(file, 1000)
    else:
        save_file(
            load_file(file), file, {"DCP_SHARDING_INFO": '{"model.norm.weight.exp_avg": {"saved_offsets": "\x1b"}}'}
        )
    with pytest.raises(UserError, match="optimizer is not this run's optimizer state") as caught:
        load_optimizer(tmp_path, model, optimizers, ALONE)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def start_saving(save: Callable[[], object]) -> int:
    """Return the id of a child process that saves until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            save()
        finally:
            os._exit(1)  # never back into pytest
    return child


def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    """At the earliest while the second checkpoint is written."""
    save_checkpoint(tmp_path, 1, writer(1), limit=2)
    last = 1
    for moment in torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist():
        saved, saving = os.pipe()

        def save_forever(last: int = last, saving: int = saving) -> None:
            for step in itertools.count(last + 1):
                save_checkpoint(tmp_path, step, writer(step), limit=2)
                os.write(saving, b".")

        began = time.perf_counter()
        child = start_saving(save_forever)
        os.close(saving)
        os.read(saved, 1)
        time.sleep(3 * moment * (time.perf_counter() - began))  # in one of the next three saves or so
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(saved)
        assert os.WTERMSIG(status) == signal.SIGKILL, "the child failed by itself"
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        assert stored_value(newest) == int(newest.name.removeprefix("step-"))
        assert stored_value(newest) > last, "a checkpoint was lost"
        last = stored_value(newest)


def test_a_kill_between_files_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer(1), limit=1)

    def write_half(directory: Path) -> None:
        writer(2)(directory)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(start_saving(lambda: save_checkpoint(tmp_path, 2, write_half, limit=1)), 0)
    left, kept = steps(tmp_path)
    assert re.fullmatch(r"\.step-000002\.[0-9a-f]{16}\.tmp", left)
    assert kept == "step-000001"
    assert stored_value(newest_checkpoint(tmp_path)) == 1
    save_checkpoint(tmp_path, 3, writer(3), limit=1)
    assert steps(tmp_path) == ["step-000003"]
