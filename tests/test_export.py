"""Adapters merged, models published and turned into GGUF. Oracles: transformers, huggingface_hub, gguf's tables."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import lora
from checkpoint import load_model_and_tokenizer, save_checkpoint, save_pretrained
from config import PRESETS, RopeScaling, UserError
from hub import peft as peft_files
from hub.card import model_card
from hub.gguf import check_runnable
from hub.weights import write_tensors
from launch.run_directory import read_metrics
from model import DeepSeekV2
from small_models import relative_difference, small_config, small_model
from small_runs import arguments, conversations, run_main, train_here, write_jsonl
from tokenizer import Tokenizer

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.7)
TOKENS = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapted(tmp_path: Path) -> DeepSeekV2:
    """Return the model of a run whose checkpoint holds only an adapter. The run and its base are in tmp_path."""
    model = small_model(vocab_size=512)
    save_pretrained(tmp_path / "base", model, Tokenizer(vocab_size=512))
    lora.add_lora(model, 4, 8.0, 0.0, ["q_proj", "down_proj", "experts.gate_up_proj"])
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.normal_(std=0.2)
    base = str(tmp_path / "base")
    save_checkpoint(tmp_path / "run", 5, lambda place: peft_files.save_adapter(place, model, base), limit=1)
    return model


@torch.no_grad()
def test_merging_writes_a_plain_model_with_the_same_logits(
    adapted: DeepSeekV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter and its base, loaded together, give them too."""
    loaded, tokenizer = load_model_and_tokenizer(tmp_path / "run")
    torch.testing.assert_close(loaded(TOKENS), adapted(TOKENS))
    assert tokenizer.vocab_size == 512
    command = ["merge", str(tmp_path / "run"), str(tmp_path / "merged")]
    assert run_main(export.main, command, tmp_path) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits
    assert relative_difference(adapted(TOKENS), theirs) < 1e-5
    assert run_main(export.main, command, tmp_path) == 2
    assert f"error: {tmp_path}/merged exists already" in capsys.readouterr().err
    # as GGUF, whose tensors are those of the merged model
    assert run_main(export.main, ["gguf", str(tmp_path / "run"), str(tmp_path / "m.gguf")], tmp_path) == 0
    weights = load_file(tmp_path / "merged/model.safetensors")
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if ".attn_q." in tensor.name:
            weight = weights[f"model.layers.{tensor.name.split('.')[1]}.self_attn.q_proj.weight"]
            assert torch.equal(torch.from_numpy(tensor.data.copy()), weight)


def test_merging_something_else_than_an_adapter_is_refused(
    adapted: DeepSeekV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(export.main, ["merge", str(tmp_path / "base"), str(tmp_path / "merged")], tmp_path) == 2
    error = f"{tmp_path}/base is not an adapter (it has no adapter_config.json): there is nothing to merge"
    assert capsys.readouterr().err == f"error: {error}\n"
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------- publishing


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(tmp_path / "model", small_model(vocab_size=512), Tokenizer(vocab_size=512))
    (tmp_path / "model/tokenizer.json").write_text(Tokenizer(vocab_size=600).to_json())
    with pytest.raises(UserError, match=r"vocab_size is 512, but .*model/tokenizer\.json has 600 entries"):
        load_model_and_tokenizer(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", conversations(2))
    assert train_here(arguments(data, tmp_path / "run", init_from=tmp_path / "model"), tmp_path) == 2
    assert "the tokenizer has 600 ids, but the embedding only 512 rows" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a model of 24 thousand parameters, whose data has been deleted."""
    directory = tmp_path_factory.mktemp("trained")
    data = write_jsonl(directory / "private.jsonl", conversations(20))
    flags = [*arguments(data, directory / "run", max_steps=4, eval_steps=2), "My secret?"]  # a sample prompt
    assert train_here(flags, directory) == 0
    data.unlink()
    return directory / "run"


def published(directory: Path, *private: Path | str) -> set[str]:
    """Return the names of the files after checking that none contains a private text."""
    assert {oct(file.stat().st_mode)[-3:] for file in directory.iterdir()} == {"644"}
    for file in directory.iterdir():
        assert not [place for place in private if str(place).encode() in file.read_bytes()], file
    return {file.name for file in directory.iterdir()}


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_run_is_published_with_a_card(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """huggingface_hub reads the front matter; settings, losses and code for transformers are right."""
    flags = ["hub", str(trained), str(tmp_path / "small"), "--license", "mit", "--base-name", "org/base"]
    assert run_main(export.main, flags, tmp_path) == 0
    assert published(tmp_path / "small", tmp_path, trained.parent, "private.jsonl", "My secret") == {
        *("README.md", "loss.png", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", "org/base", "transformers")
    _, text = read_card(tmp_path / "small")
    metrics = read_metrics(trained)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert f"| {losses[0]:.4f}, {losses[-1]:.4f} |" in text
    assert f"| {[line['eval_loss'] for line in metrics if 'eval_loss' in line][-1]:.4f} |" in text
    settings = dict(re.findall(r"^\| (\w+) \| (.*) \|$", text, re.MULTILINE))
    assert settings.items() >= {"max_steps": "4", "eval_steps": "2", "batch_size": "2"}.items()
    assert settings.keys().isdisjoint({"output_dir", "sample_prompts", "packing"})  # packing has its default
    code = text.split("```python\n")[1].split("```")[0]
    with contextlib.chdir(tmp_path):
        exec(code, {})
    assert capsys.readouterr().out.strip() != ""


def test_an_adapter_is_published_with_its_bases_public_name(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file names its local base; its answers stay the same, and another base is still refused."""
    data = write_jsonl(tmp_path / "private.jsonl", conversations(20))
    changes = {"init_from": trained, "lora_rank": 2, "learning_rate": 0.1, "max_steps": 2}
    assert train_here(arguments(data, tmp_path / "run", **changes), tmp_path) == 0
    hub = ["hub", str(tmp_path / "run"), str(tmp_path / "public")]
    capsys.readouterr()
    assert run_main(export.main, hub, tmp_path) == 2
    assert capsys.readouterr().err == "error: an adapter needs the name of its base on the Hub: --base-name ORG/MODEL\n"
    assert run_main(export.main, [*hub, "--base-name", "org/base"], tmp_path) == 0
    assert published(tmp_path / "public", tmp_path, trained.parent) == {
        *("README.md", "loss.png", "adapter_config.json", "adapter_model.safetensors", "base.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    config = json.loads((tmp_path / "public" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    front, _ = read_card(tmp_path / "public")
    assert (front["base_model"], front["library_name"]) == ("org/base", "peft")
    # a base downloaded next to it is found by that name
    assert run_main(export.main, ["hub", str(trained), str(tmp_path / "org" / "base")], tmp_path) == 0
    adapted, _ = load_model_and_tokenizer(tmp_path / "run")
    with contextlib.chdir(tmp_path):
        loaded, _ = load_model_and_tokenizer("public")
        torch.testing.assert_close(loaded(TOKENS), adapted(TOKENS))
        write_tensors(Path("org/base/model.safetensors"), {"other": torch.zeros(1)})
        with pytest.raises(UserError, match="its base model org/base has changed"):
            load_model_and_tokenizer("public")


def test_the_card_names_only_public_data_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "chats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    private = (
        "/gone/chats",
        "/gone/my chats.jsonl:2",
        "gone/chats.csv.gz",
        "gone/runs/base",
        "here/chats",
        "../org/data",
    )
    shown = {"chitchat:3": "chitchat:3", "org/data": "org/data", "org/data:2": "org/data:2"}
    for source in (*shown, *private):
        changes = {"dataset": (source,), "init_from": source, "sample_prompts": ("/a/b", "/c/d e")}
        config = json.loads(json.dumps(PRESETS["tiny"].changed(**changes).flat()))
        text = model_card("card", "", "mit", False, config, [{"step": 1, "loss": 2.0, "num_tokens": 10}])
        assert f"| data | {shown.get(source, 'private data')} |" in text
        assert not re.search("/a/b|gone|here|init_from", text)


def test_names_in_a_card_are_shown_literally_and_quoted_in_commands() -> None:
    """The front matter is read back by huggingface_hub; a value that is not finite, null in metrics.jsonl, is named."""
    name = "my_$run$ of 'Ä|B'\\n"
    lines = [{"step": 1, "loss": 2.0, "num_tokens": 10}, {"step": 2, "loss": None, "num_tokens": 20}]
    text = model_card(name, "org/a_b", "mit", True, {"dataset": ["/secret/a|b.csv", "org/x_y"]}, lines)
    assert r"# my\_\$run\$ of 'Ä\|B'\\n" in text
    assert shlex.split(text.splitlines()[-1]) == ["python", "chat.py", name]
    assert r"| data | private data, org/x\_y |" in text
    assert "2.0000, not finite" in text
    assert f"path = {json.dumps(name, ensure_ascii=False)} " in text
    assert (ModelCard(text).data.base_model, ModelCard(text).data.datasets) == ("org/a_b", ["org/x_y"])


def test_only_a_models_own_files_are_published(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither notes next to them, nor absolute paths that a library recorded, nor files that links lead to."""
    model = shutil.copytree(trained / "checkpoints/step-000004", tmp_path / "model")
    (model / "secret.json").write_text('{"password": "x"}')
    (model / "notes.safetensors").write_bytes(b"")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/someone/model"}))
    assert run_main(export.main, ["hub", str(model), str(tmp_path / "out")], tmp_path) == 0
    assert published(tmp_path / "out", "/home/someone").isdisjoint({"secret.json", "notes.safetensors"})
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    (model / "secret.json").rename(tmp_path / "secret.json")
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").symlink_to(tmp_path / "secret.json")
    assert run_main(export.main, ["hub", str(model), str(tmp_path / "linked")], tmp_path) == 2
    assert "generation_config.json lies outside of the directory" in capsys.readouterr().err
    assert not (tmp_path / "linked").exists()


@pytest.mark.parametrize("command", ["hub", "gguf", "merge"])
def test_nothing_is_published_from_a_run_without_a_checkpoint(
    command: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert run_main(export.main, [command, str(tmp_path / "run"), str(tmp_path / "out")], tmp_path) == 2
    assert "is a run with no checkpoint yet" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} <= {"run", "cache"}


# ---------------------------------------------------------------- GGUF (llama.cpp itself: benchmarks/clients.py)


def export_gguf(model: DeepSeekV2, tokenizer: Tokenizer, directory: Path) -> gguf.GGUFReader:
    save_pretrained(directory / "model", model, tokenizer)
    assert run_main(export.main, ["gguf", str(directory / "model"), str(directory / "m.gguf")], directory) == 0
    return gguf.GGUFReader(directory / "m.gguf")


@pytest.mark.parametrize("changes", [{"q_lora_rank": 18, "tie_word_embeddings": True}, {}], ids=["compressed", "plain"])
def test_gguf_names_the_weights_as_llama_cpp_does(changes: dict[str, Any], tmp_path: Path) -> None:
    """gguf's own table maps the Hub's names to llama.cpp's; kv_b_proj is split as in its converter."""
    model = small_model(vocab_size=512, **changes)
    reader = export_gguf(model, Tokenizer(vocab_size=512), tmp_path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 3)
    theirs = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = {"output.weight": model.output_weight}
    for name, tensor in model.state_dict().items():
        if name.endswith("kv_b_proj.weight"):
            prefix = f"blk.{name.split('.')[2]}"
            heads = tensor.view(3, 14 + 10, 20)
            expected[f"{prefix}.attn_k_b.weight"] = heads[:, :14].transpose(1, 2)
            expected[f"{prefix}.attn_v_b.weight"] = heads[:, 14:]
        elif name.endswith("experts.gate_up_proj"):
            for part, matrix in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                expected[names.get_name(name.replace("gate_up_proj", part)) + ".weight"] = matrix
        else:
            expected[names.get_name(name.removesuffix(".weight")) + ".weight"] = tensor
    assert theirs.keys() == expected.keys()
    assert theirs.keys() >= {"token_embd.weight", "blk.0.attn_kv_a_mqa.weight", "blk.1.ffn_gate_exps.weight"}
    for name, tensor in expected.items():
        assert torch.equal(theirs[name], tensor), name
    assert reader.get_field("deepseek2.attention.q_lora_rank").contents() == changes.get("q_lora_rank", 0)


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_gguf_has_the_vocabulary_and_the_template(template: str, tmp_path: Path) -> None:
    """With a vocabulary of 2,000 in an embedding of 2,048 rows."""
    tokenizer = Tokenizer(vocab_size=2000, chat_template=template)
    reader = export_gguf(small_model(vocab_size=2048), tokenizer, tmp_path)
    field = {name.removeprefix("tokenizer."): reader.get_field(name) for name in reader.fields}
    tokens, types = field["ggml.tokens"].contents(), field["ggml.token_type"].contents()
    control = sorted(tokenizer.control_ids.values())
    assert [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == control
    assert [tokens[i] for i in control] == [tokenizer.decode([i]) for i in control]
    assert [i for i, kind in enumerate(types) if kind == gguf.TokenType.UNUSED] == list(range(2000, 2048))
    assert len(set(tokens)) == len(tokens) == 2048
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokens[:2000] == theirs.convert_ids_to_tokens(range(2000))
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    assert field["ggml.merges"].contents() == [" ".join(merge) for merge in merges]
    assert field["ggml.pre"].contents() == "dbrx"
    assert field["ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    messages = [{"role": role, "content": f"I am {role}."} for role in ("system", "user", "assistant")]
    jinja = field["chat_template"].contents()
    assert "generation %" not in jinja
    rendered = theirs.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    assert theirs(rendered, add_special_tokens=False)["input_ids"] == tokenizer.render(messages)[0]


def test_bfloat16_weights_keep_their_dtype_in_gguf(tmp_path: Path) -> None:
    reader = export_gguf(small_model(vocab_size=512).to(torch.bfloat16), Tokenizer(vocab_size=512), tmp_path)
    for tensor in reader.tensors:
        in_fp32 = "norm" in tensor.name or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if in_fp32 else "BF16"), tensor.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "lacks DeepSeek-V2's group-limited"),
        ({"rope_scaling": YARN}, "mscale (1.0) equal to mscale_all_dim (0.7)"),
        ({"rms_norm_eps": 1e-5}, "one rms_norm_eps"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_runnable(small_config(**changes), Tokenizer(vocab_size=512))


def test_a_failed_export_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(tmp_path / "model", small_model(vocab_size=512, rms_norm_eps=1e-5), Tokenizer(vocab_size=512))
    assert run_main(export.main, ["gguf", str(tmp_path / "model"), str(tmp_path / "m.gguf")], tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"model"}
