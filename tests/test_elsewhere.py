"""Models and tokenizers saved here, opened by other programs: batches of transformers, data preparation of TRL."""

from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from checkpoint import save_pretrained
from generation import generate
from hub.tokenizer_json import save_tokenizer
from model import DeepSeekV2
from small_models import small_model
from small_runs import conversations
from tokenizer import CHAT_TEMPLATES, Tokenizer


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    return small_model(vocab_size=512, max_position_embeddings=256).eval()


@pytest.fixture(scope="module")
def saved(model: DeepSeekV2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_pretrained(directory, model, tokenizer)
    return directory


def in_parts(messages: list[dict[str, str]]) -> list[dict]:
    """Return messages whose contents are lists of text parts, as transformers' server and TRL send them."""
    cut = [(message["role"], message["content"][:5], message["content"][5:]) for message in messages]
    return [{"role": role, "content": [{"type": "text", "text": part} for part in parts]} for role, *parts in cut]


def test_a_batch_of_prompts_gets_the_answers_of_single_prompts(
    model: DeepSeekV2, tokenizer: Tokenizer, saved: Path
) -> None:
    """With the padding side that is saved with the tokenizer, which transformers' pipeline uses."""
    theirs = AutoTokenizer.from_pretrained(saved)
    questions = ["Hi", "Hello! How are you?", "one", "What did you do today? And the day before?", "?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    batch = theirs.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = AutoModelForCausalLM.from_pretrained(saved).generate(**batch, max_new_tokens=12, do_sample=False)
    for chat, new in zip(chats, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        prompt, _ = tokenizer.render(chat, add_generation_prompt=True)
        alone = [token for (token,) in generate(model, [prompt], 12, (tokenizer.eos_token_id,))]
        assert new[: len(alone)] == alone


def test_saved_files_are_readable_by_everyone_and_state_the_context_length(saved: Path) -> None:
    assert AutoTokenizer.from_pretrained(saved).model_max_length == 256
    assert {oct(file.stat().st_mode)[-3:] for file in saved.iterdir()} == {"644"}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_saved_template_accepts_content_in_parts(name: str, tmp_path: Path) -> None:
    ours = Tokenizer(vocab_size=512, chat_template=name)
    save_tokenizer(tmp_path, ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in conversations(10):
        rendered = theirs.apply_chat_template(
            in_parts(messages), return_assistant_tokens_mask=True, return_dict=True, add_special_tokens=False
        )
        assert (rendered["input_ids"], rendered["assistant_masks"]) == ours.render(messages)
    image = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]
    with pytest.raises(Exception, match="not text: image"):
        theirs.apply_chat_template(image)


@pytest.mark.parametrize("parts", [False, True])
def test_trl_prepares_the_same_ids_masks_and_labels(
    parts: bool, model: DeepSeekV2, tokenizer: Tokenizer, saved: Path, tmp_path: Path
) -> None:
    messages = conversations(8)
    rows = [{"messages": in_parts(each) if parts else each} for each in messages]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(saved),
        SFTConfig(str(tmp_path), assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False, max_length=None),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(saved),
    )
    assert trainer.train_dataset is not None
    assert len(trainer.train_dataset) == 8
    for row, each in zip(trainer.train_dataset, messages, strict=True):
        ids, mask = tokenizer.render(each)
        expected = [i if trained else -100 for i, trained in zip(ids, mask, strict=True)]  # not shifted yet
        assert (row["input_ids"], row["labels"]) == (ids, expected)
        assert trainer.data_collator([row])["labels"].tolist() == [expected]
