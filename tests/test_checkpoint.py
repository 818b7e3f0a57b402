"""Model directories against transformers; run state against kills, full disks, damage and hostile files."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from files import checksum, read_json, write_json, write_tensors
from generation import generate
from hub import peft as peft_files
from model import DeepSeekV2
from optimizer import make_optimizers
from parallel import ALONE
from small_models import make_batch, relative_difference, small_config, small_model, transformers_model
from small_runs import conversations, peak_memory, run_python, train_here, write_jsonl
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
every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(vocab_size=512)


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


def test_disk_has_the_hubs_names_and_a_tied_head_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=512, tie_word_embeddings=True)
    save_pretrained(tmp_path, model, tokenizer)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in on_disk
    experts = model.model.layers[1].mlp.experts
    for expert in (0, 7):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(on_disk[f"{prefix}.gate_proj.weight"], gate)
        assert torch.equal(on_disk[f"{prefix}.up_proj.weight"], up)
        assert torch.equal(on_disk[f"{prefix}.down_proj.weight"], experts.down_proj[expert])
    hub_names = set(transformers_on_disk(model, tmp_path / "theirs"))
    assert on_disk.keys() == hub_names


def transformers_on_disk(model: DeepSeekV2, directory: Path, max_shard_size: str = "5GB") -> dict[str, Tensor]:
    transformers_model(model).save_pretrained(directory, max_shard_size=max_shard_size)
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_config_that_transformers_would_read_otherwise_says_so(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(tmp_path, small_model(vocab_size=512, norm_topk_prob=True), tokenizer)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "norm_topk_prob" in captured.err
    assert load_config(tmp_path).norm_topk_prob


@pytest.mark.parametrize("mscale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mscale_all_dim", [0.0, 0.5])
@torch.no_grad()
def test_a_yarn_that_transformers_computes_otherwise_is_a_warning(
    mscale: float, mscale_all_dim: float, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Warned of if, and only if, its logits differ."""
    yarn = RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=mscale, mscale_all_dim=mscale_all_dim)
    model = small_model(vocab_size=512, rope_scaling=replace(yarn))
    save_pretrained(tmp_path, model, tokenizer)
    ids = torch.arange(40)[None]
    differs = relative_difference(model(ids), AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits) > 1e-4
    assert (f"mscale={mscale}, mscale_all_dim={mscale_all_dim}" in capsys.readouterr().err) == differs


def test_a_token_that_is_trained_on_is_not_the_padding_of_the_embedding(tmp_path: Path) -> None:
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
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_what_was_saved_is_loaded(changes: dict, max_shard_bytes: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=512, aux_loss_alpha=0.1, device_aux_loss_alpha=0.2, **changes)
    save_pretrained(tmp_path, model, tokenizer, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 60_000)
    assert all(file.stat().st_size < max_shard_bytes + 50_000 for file in tmp_path.glob("*.safetensors"))
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert (loaded.output_weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(load_pretrained(tmp_path, torch.bfloat16), model, torch.bfloat16)


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


def test_a_save_replaces_what_was_saved_in_more_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_pretrained(tmp_path, small_model(vocab_size=512), tokenizer, max_shard_bytes=60_000)
    other = small_model(seed=1, vocab_size=512)
    save_pretrained(tmp_path, other, tokenizer)
    assert_same_weights(load_pretrained(tmp_path), other)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_weights_come_in_the_order_of_the_model(saved: tuple[Path, DeepSeekV2]) -> None:
    directory, model = saved
    names = [name for name, _ in iterate_weights(directory, model.config)]
    assert names == [name for name, _ in model.named_parameters()]


def test_deepseeks_own_config_is_read(tmp_path: Path) -> None:
    """config.json as published with DeepSeek-V2-Lite, the fields that bear on the model."""
    published = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 102400,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = load_config(tmp_path)
    assert config.rope_scaling == RopeScaling(mscale=0.707, mscale_all_dim=0.707)
    assert (config.q_lora_rank, config.hidden_size, config.aux_loss_alpha) == (None, 2048, 0.001)
    edit_json(
        tmp_path / "config.json",
        n_group=None,
        topk_group=None,
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    )
    config = load_config(tmp_path)
    assert (config.n_group, config.topk_group) == (1, 1)
    assert config.rope_scaling == RopeScaling(
        factor=2.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.0
    )


def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """In a process of its own: the peak of its resident memory over what it had before, by the model's size."""
    sizes = {"hidden_size": 480, "num_hidden_layers": 8, "n_routed_experts": 16, "moe_intermediate_size": 512}
    with torch.device("meta"):
        model = DeepSeekV2(small_config(vocab_size=512, **sizes)).to(torch.bfloat16)
    save_pretrained(
        tmp_path,
        model.to_empty(device="cpu"),
        tokenizer,
        max_shard_bytes=10**8,
    )
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 10**8
    load = "model = load_pretrained(sys.argv[1])"
    assert peak_memory("from checkpoint import load_pretrained", load, tmp_path) < 1.2 * size


# ---------------------------------------------------------------- what does not fit is refused


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_listed_in_one_error(saved: tuple[Path, DeepSeekV2]) -> None:
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


def test_a_long_list_of_errors_is_cut(saved: tuple[Path, DeepSeekV2]) -> None:
    directory, _ = saved
    edit_json(directory / "config.json", num_hidden_layers=4)  # a layer of 5 + 1 + 24 + 3 + 2 tensors too many
    with pytest.raises(UserError, match="and 25 more") as caught:
        load_pretrained(directory)
    assert str(caught.value).count("is missing") == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": "48"}, "hidden_size is '48'; it must be of type int"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"n_group": 3}, "n_group"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling lacks original_max_position_embeddings"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": 2,
                }
            },
            "rope_scaling's attention_factor is not supported",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "factor": 8}},
            "type 'llama3' is not supported",
        ),
        ({"rope_scaling": [1]}, "rope_scaling is"),
    ],
)
def test_settings_this_model_does_not_have_are_refused(
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
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path / "nowhere")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        load_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_pretrained(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json does not contain a JSON object"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**18}, "hidden_size is 1000000000000000000; it must be below 1000000"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be below 1000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be of type int"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be of type bool"),
        ({"kv_lora_rank": 21}, "kv_lora_rank must be even"),
        ({"qk_nope_head_dim": 13}, "qk_nope_head_dim must be even"),
        ({"rope_scaling": asdict(YARN) | {"beta_fast": 0.5}}, "beta_fast is below beta_slow"),
    ],
)
def test_an_impossible_shape_is_refused(changes: dict, message: str, saved: tuple[Path, DeepSeekV2]) -> None:
    edit_json(saved[0] / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(saved[0])


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


def test_a_truncated_weight_file_is_refused(saved: tuple[Path, DeepSeekV2]) -> None:
    file = saved[0] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_pretrained(saved[0])


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "..", "", "a\0b", 3, None]
)
def test_an_index_cannot_lead_outside_its_directory(name: object, saved: tuple[Path, DeepSeekV2]) -> None:
    directory, _ = saved
    shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match=r"lies outside of the directory|does not exist"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": ["b"]}}', "3", "{"]
)
def test_a_broken_index_is_refused(content: str, saved: tuple[Path, DeepSeekV2]) -> None:
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError):
        load_pretrained(directory)


def test_links_lead_to_the_hubs_cache_and_nowhere_else(saved: tuple[Path, DeepSeekV2], tmp_path: Path) -> None:
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
    """A model whose tokenizer has <|endoftext|> only, and whose embedding has rows to spare: the error says what to do;
    done so, transformers reads the same tokens and logits, and the new rows begin as the mean of the others."""
    tokenizer = Tokenizer(vocab_size=512)
    spec = json.loads(tokenizer.to_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == "<|endoftext|>"]
    for name in ("<|im_start|>", "<|im_end|>"):
        del spec["model"]["vocab"][name]
    base = tmp_path / "base"
    save_pretrained(base, small_model(vocab_size=511), tokenizer)
    (base / "tokenizer.json").write_text(json.dumps(spec))
    (base / "tokenizer_config.json").unlink()
    entries = 1 + max([*spec["model"]["vocab"].values(), spec["added_tokens"][0]["id"]])
    assert entries == 510
    write_jsonl(tmp_path / "data.jsonl", conversations(8))
    flags = {"dataset": tmp_path / "data.jsonl", "output-dir": tmp_path / "run", "init-from": base, "dtype": "float32"}
    flags |= {"max-steps": 1, "batch-size": 2, "eval-steps": 0, "num-proc": 1, "learning-rate": 1e-9, "max-seq-len": 96}
    command = ["tiny", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    assert train_here([*command, "--optimizer", "adamw", "--weight-decay", "0"], tmp_path) == 2
    assert capsys.readouterr().err == (
        f"error: {base} lacks <|im_start|>, <|im_end|>, which chat template chatml needs; it fits no template "
        "(--chat-template); "
        "--add-control-tokens adds them, with new rows of the embedding and the head\n"
    )
    command += ["--optimizer", "adamw", "--weight-decay", "0", "--add-control-tokens"]
    assert train_here(command, tmp_path) == 0
    model, ours = load_model_and_tokenizer(tmp_path / "run")
    assert (ours.control_ids["<|im_start|>"], ours.control_ids["<|im_end|>"]) == (510, 511)
    before = load_pretrained(base)
    for new, old in zip(
        (model.model.embed_tokens.weight, model.output_weight),
        (before.model.embed_tokens.weight, before.output_weight),
        strict=True,
    ):
        assert new.shape[0] == 512
        torch.testing.assert_close(new[:510], old[:510], atol=1e-6, rtol=0)
        torch.testing.assert_close(new[510:], old[:510].mean(dim=0).expand(2, -1), atol=1e-6, rtol=0)
    place = tmp_path / "run/checkpoints/step-000001"
    theirs = AutoTokenizer.from_pretrained(place)
    talk = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Ho"}]
    ids, _ = ours.render([{"role": "user", "content": "Hi"}, talk[1]])
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}, talk[1]])["input_ids"] == ids
    assert ours.render(talk)[0].count(511) == 2
    reference = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits
    torch.testing.assert_close(model(torch.tensor([ids])), logits, atol=1e-4, rtol=1e-4)
    assert train_here([*command, "--max-steps", "2", "--resume"], tmp_path) == 0


def test_a_run_directory_stands_for_its_newest_checkpoint(saved: tuple[Path, DeepSeekV2], tmp_path: Path) -> None:
    directory, _ = saved
    run = tmp_path / "run"
    with pytest.raises(UserError, match="is not a checkpoint"):
        resolve_checkpoint(run)
    assert resolve_checkpoint(directory) == directory
    run.mkdir()
    write_json(run / "config.json", TrainConfig().flat())
    with pytest.raises(UserError, match="run is a run with no checkpoint yet"):
        resolve_checkpoint(run)
    (run / "checkpoints/step-²").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint yet"):
        resolve_checkpoint(run)
    (run / "checkpoints/step-000001").mkdir()
    with pytest.raises(UserError, match="no checkpoint that is whole"):
        resolve_checkpoint(run)

    def copy(temporary: Path) -> None:
        shutil.copytree(directory, temporary, dirs_exist_ok=True)

    place = save_checkpoint(run, 7, copy, limit=1)
    assert resolve_checkpoint(run) == place
    assert_same_weights(load_pretrained(resolve_checkpoint(run)), load_pretrained(directory))


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
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "checksums.json").unlink()
    good = newest_checkpoint(tmp_path)
    assert good is not None
    assert stored_value(good) == 1
    report = capsys.readouterr().err
    assert str(newest) in report
    assert report.count("\n") == 1
    # The run goes on from there: its next checkpoints take the place of the damaged one.
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


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer(1), limit=1)

    def write(directory: Path) -> None:
        writer(2)(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, write, limit=1)
    assert steps(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("failing", [(2,), (2, 3)])
def test_a_failing_rename_costs_no_checkpoint(
    failing: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving a step again renames twice: the old directory away, the new one to its place; then the old one back. Where
    that fails, too, it is found again by the next save."""
    place = save_checkpoint(tmp_path, 1, writer(1), limit=1)
    rename, calls = Path.rename, itertools.count(1)

    def fail(self: Path, target: Path) -> Path:
        if next(calls) in failing:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match="step-000001 cannot be written"):
            save_checkpoint(tmp_path, 1, writer(11), limit=1)
    if 3 not in failing:
        assert stored_value(place) == 1
    save_checkpoint(tmp_path, 2, writer(2), limit=2)
    assert steps(tmp_path) == ["step-000001", "step-000002"]
    assert stored_value(place) == 1


def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path: Path, tokenizer: Tokenizer) -> None:
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


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stand(size: int, tmp_path: Path) -> None:
    """The limits hit the header and the numbers of the first file."""
    save_checkpoint(tmp_path, 1, writer(1), limit=1)
    with files_limited_to(size), pytest.raises(UserError, match=r"step-000002 cannot be written .*[Ff]ile too large"):
        save_checkpoint(tmp_path, 2, writer(2), limit=1)
    assert steps(tmp_path) == ["step-000001"]
    assert stored_value(newest_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_given_back_to_the_bit(optimizer: Literal["adamw", "muon"], tmp_path: Path) -> None:
    """Moments and step counts. Weights stay as they are, and the configured decay and betas count."""
    model, trained = trained_a_little(optimizer)
    checksums = save_optimizer(tmp_path, model, trained, ALONE)
    assert {name: checksum(tmp_path / name) for name in checksums} == checksums
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fresh = make_optimizers(model, OptimizerConfig(optimizer, weight_decay=0.7), torch.float32)
    load_optimizer(tmp_path, model, fresh, ALONE)
    expected, found = optimizer_state(model, trained), optimizer_state(model, fresh)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert fresh[0].param_groups[0]["weight_decay"] == 0.7


def trained_a_little(optimizer: Literal["adamw", "muon"]) -> tuple[DeepSeekV2, list[torch.optim.Optimizer]]:
    model = small_model()
    optimizers = make_optimizers(model, OptimizerConfig(optimizer), torch.float32)
    for _ in range(2):
        model(**make_batch([[9, 5]])).loss_sum.backward()
        for one in optimizers:
            one.step()
    return model, optimizers


@pytest.mark.parametrize("damage", ["another model", "a tensor less", "no files", "a broken file", "a broken header"])
def test_optimizer_state_of_something_else_is_one_line(damage: str, tmp_path: Path) -> None:
    model, optimizers = trained_a_little("adamw")
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


def test_a_disk_that_fills_up_within_the_optimizer_state_is_a_clear_error(tmp_path: Path) -> None:
    model, optimizers = trained_a_little("adamw")
    with (
        files_limited_to(100_000),
        pytest.raises(UserError, match=r"step-000001 cannot be written .*[Ff]ile too large"),
    ):
        save_checkpoint(tmp_path, 1, lambda directory: save_optimizer(directory, model, optimizers, ALONE), limit=1)
    assert steps(tmp_path) == []


def test_a_disk_that_fills_up_within_the_weights_is_a_clear_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=512)
    with (
        files_limited_to(100_000),
        pytest.raises(UserError, match=r"step-000001 cannot be written .*[Ff]ile too large"),
    ):
        save_checkpoint(tmp_path, 1, lambda directory: save_pretrained(directory, model, tokenizer), limit=1)
    assert steps(tmp_path) == []


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    """A process saves in a loop; its children are killed at random moments and continue from what they find."""
    script = """
import os, random, signal, sys, time
from test_checkpoint import newest_checkpoint, save_checkpoint, stored_value, writer

random.seed(0)
began = time.perf_counter()
for last in range(1, 6):
    save_checkpoint(sys.argv[1], last, writer(last), limit=2)
one_save = (time.perf_counter() - began) / 5
for kill in range(40):
    child = os.fork()
    if child == 0:
        step = stored_value(newest_checkpoint(sys.argv[1]))
        while True:
            step += 1
            save_checkpoint(sys.argv[1], step, writer(step), limit=2)
    time.sleep(random.uniform(0, 6 * one_save))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child failed by itself"
    newest = newest_checkpoint(sys.argv[1])
    assert stored_value(newest) == int(newest.name.removeprefix("step-"))
    assert stored_value(newest) >= last, "a checkpoint was lost"
    last = stored_value(newest)
print(last)
"""
    assert int(run_python(script, tmp_path)) > 10


def test_a_kill_between_files_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer(1), limit=1)
    child = os.fork()
    if child == 0:  # stops in the middle of its save, at a known place

        def write(directory: Path) -> None:
            writer(2)(directory)
            os.kill(os.getpid(), signal.SIGKILL)

        save_checkpoint(tmp_path, 2, write, limit=1)
    os.waitpid(child, 0)
    left, kept = steps(tmp_path)
    assert re.fullmatch(r"\.step-000002\.[0-9a-f]{16}\.tmp", left)
    assert kept == "step-000001"
    assert stored_value(newest_checkpoint(tmp_path)) == 1
    save_checkpoint(tmp_path, 3, writer(3), limit=1)
    assert steps(tmp_path) == ["step-000003"]
