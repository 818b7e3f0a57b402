"""A directory as DeepSeek-V2 is published, from its files through LoRA to a merged model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora
from checkpoint import load_model_and_tokenizer, load_pretrained, newest_checkpoint
from config import LoraConfig
from export import merge_adapter
from files import read_json
from generation import answers
from launch.run_directory import read_metrics
from small_models import relative_difference, small_model, transformers_model
from small_runs import arguments, conversations, optimizer_tensors, train_here, write_jsonl

# More entries than the tokenizer has, as published; YaRN far beyond its original context.
SHAPE: dict[str, Any] = {"vocab_size": 512, "moe_intermediate_size": 24, "max_position_embeddings": 640}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707}
# As transformers has it for DeepSeek-V2-Chat, with {% generation %} around what is trained on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEXTS = conversations(12)
TRAINED = conversations(12, seed=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of bf16 with an index, a tensor for each expert, config.json in the Hub's words, DeepSeek's tokens."""
    directory = tmp_path_factory.mktemp("hub") / "DeepSeek-V2-Mini"
    model = transformers_model(small_model(**SHAPE, q_lora_rank=18)).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="60KB")
    (directory / "generation_config.json").unlink()
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "rope_scaling": YARN,
        "rope_theta": 10_000,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    }
    path.write_text(json.dumps(config))
    write_tokenizer(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in index
    return directory


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE of about 400 entries; most of the control tokens are not marked as special."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([message["content"] for messages in TEXTS for message in messages], bpe)
    backend.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    names = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"]
    backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=True) for name in names])
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜end▁of▁sentence｜>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few LoRA steps through train_sft.py, each on all of TRAINED; in bf16, the routed experts' too."""
    directory = tmp_path_factory.mktemp(request.param)
    experts = ("experts.gate_up_proj", "experts.down_proj") if request.param == "bfloat16" else ()
    targets = ("--no-packing", "--lora-target-modules", *LoraConfig.lora_target_modules, *experts)
    changes = {"dtype": request.param, "lora_rank": 4, "lora_alpha": 6.0, "learning_rate": 3e-2, "max_seq_len": 200}
    changes |= {"batch_size": len(TRAINED), "max_steps": 6, "save_steps": 0, "eval_steps": 6}
    changes |= {"train_split": f"train[{len(TEXTS)}:]", "eval_split": f"train[:{len(TEXTS)}]"}
    data = write_jsonl(directory / "small.jsonl", TEXTS + TRAINED)
    start = {"init_from": published, "chat_template": "deepseek"}
    assert train_here(arguments(data, directory / "run", *targets, **start, **changes), directory) == 0
    return directory / "run"


def tokens(rows: int = 3, length: int = 70) -> Tensor:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def transformers_loss(model: torch.nn.Module, tokenizer: Any, texts: list[list[dict[str, str]]]) -> float:
    """Mean over the assistant's tokens of all texts, one at a time; ids and mask are transformers' own too."""
    nats, count = 0.0, 0
    for messages in texts:
        rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = (torch.tensor(rendered[name]) for name in ("input_ids", "assistant_masks"))
        chosen = learned[1:] == 1
        logits = model(ids[None]).logits[0, :-1].float()
        nats += F.cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum").item()
        count += int(chosen.sum())
    return nats / count


# ---------------------------------------------------------------- before training


@torch.no_grad()
def test_logits_before_training_are_transformers(published: Path) -> None:
    """They agree to 1e-5 in fp32; in the files' bf16, ours are as close to fp32 as transformers' are."""
    exact = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)(tokens()).logits
    assert relative_difference(load_pretrained(published, torch.float32)(tokens()), exact) < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16)(tokens()).logits
    ours = load_pretrained(published)(tokens())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


# ---------------------------------------------------------------- after training


@pytest.fixture(scope="module")
def with_peft(run: Path) -> tuple[Any, Any]:
    """The trained model in fp32 and its tokenizer, opened by PEFT and transformers; PEFT finds the base by itself."""
    checkpoint = newest_checkpoint(run)
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(checkpoint)


def test_losses_before_and_after_training_are_those_of_transformers_and_peft(
    run: Path, published: Path, with_peft: tuple[Any, Any]
) -> None:
    """The whole path: files, tokens, mask, training, adapter's files."""
    first, *_, last, evaluation = read_metrics(run)
    tolerance = 1e-5 if read_json(run / "config.json")["dtype"] == "float32" else 2e-3
    before = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    wanted = transformers_loss(before, AutoTokenizer.from_pretrained(published), TRAINED)
    assert first["loss"] == pytest.approx(wanted, rel=tolerance)
    assert evaluation["eval_loss"] == pytest.approx(transformers_loss(*with_peft, TEXTS), rel=tolerance)
    assert max(evaluation["eval_loss"], last["loss"]) < first["loss"] - 0.5


def test_the_checkpoint_holds_adapters_only(run: Path, published: Path) -> None:
    newest = newest_checkpoint(run)
    assert {file.name for file in newest.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("base.json", "trainer_state.json", "optimizer", "checksums.json"),
    }
    adapters = load_file(newest / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    moments = [t for name, t in optimizer_tensors(newest).items() if name.endswith(".exp_avg")]
    assert len(moments) == len(adapters)
    assert sum(t.numel() for t in moments) == sum(t.numel() for t in adapters.values())
    config = json.loads((newest / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(published), 4, 6.0)


@torch.no_grad()
def test_the_merged_model_is_like_the_published_one(run: Path, tmp_path: Path) -> None:
    merge_adapter(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    ours, _ = load_model_and_tokenizer(run, torch.float32)
    lora.merge(ours)
    assert all(torch.equal(merged.get_parameter(name), p.bfloat16()) for name, p in ours.named_parameters())
    assert merged.config.rope_parameters["factor"] == 40
    ours.bfloat16().float()  # what is left is the rounding of the weights
    assert relative_difference(ours(tokens()), merged.float()(tokens()).logits) < 1e-5


def test_answers_are_those_of_pefts_model(run: Path, with_peft: tuple[Any, Any]) -> None:
    """Greedy, from the cache: the prompt, the adapter and the end of a turn are those of transformers and PEFT."""
    messages = [{"role": "user", "content": "one three"}]
    theirs, tokenizer = with_peft
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    options = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    reply = theirs.generate(**prompt, max_new_tokens=30, **options)[0, prompt.input_ids.shape[1] :]
    model, our_tokenizer = load_model_and_tokenizer(run, torch.float32)
    (answer,) = answers(model.eval(), our_tokenizer, [messages], 30)
    assert answer.text.strip() == tokenizer.decode(reply, skip_special_tokens=True).strip()
