"""Loading, checking and tokenising conversations; the oracle is a plain loop over the same rows."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer as tokenizer_module
import vocabulary
from config import DataConfig, UserError
from data import formats, pieces, sources, text_files
from data.pieces import tokenize_row
from data.sources import BUILT_IN, open_split, read_chatterbot, read_chitchat_text
from dataset import load_data
from small_data import GOOD, HELLO, TOKENIZER, dropped, own_cache, write, write_table  # noqa: F401
from tokenizer import ROLES, Tokenizer

HELLO_IDS, HELLO_MASK = TOKENIZER.render(HELLO)


def answered(content):
    return {"messages": [HELLO[0], {"role": "assistant", "content": content}]}


def load(name, split="train", max_seq_len=512, tokenizer=TOKENIZER, **settings):
    fields = {"long_conversations": "truncate", "num_proc": 1} | settings
    options = DataConfig((str(name),), train_split=split, max_seq_len=max_seq_len, **fields)
    data = load_data(options, tokenizer, seed=0, want_eval=False)
    return data.train.select_columns(["input_ids", "mask"]), data.reports[0]


def load_rows(path, rows, **arguments):
    return load(write(path / "data.jsonl", *rows), **arguments)


# --- Sources ---


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    rows = [answered(f"Hi {i}") for i in range(20)]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved_dict")
    write_table(tmp_path / "data.parquet", rows)
    write_table(tmp_path / "hub/data/train_sft-00000-of-00001.parquet", rows)
    header = "configs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: data/train_sft-*\n"
    write(tmp_path / "hub/README.md", "---", f"{header}---")
    write(tmp_path / "array.json", json.dumps(rows, indent=1))
    write(tmp_path / "lines.json", *rows)
    lines = write(tmp_path / "lines.jsonl", *rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())

    expected = [TOKENIZER.render(row["messages"])[0] for row in rows]
    for name in ("data.parquet", "saved", "saved_dict", "array.json", "lines.json", "lines.jsonl", "bom.jsonl"):
        assert load(tmp_path / name)[0]["input_ids"][:] == expected, name
    assert load(tmp_path / "hub", "train_sft")[0]["input_ids"][:] == expected
    assert load(tmp_path / "hub", "train_sft[75%:]")[0]["input_ids"][:] == expected[15:]
    assert load(tmp_path / "saved_dict", "test[:2]+train[-1:]")[0]["input_ids"][:] == [*expected[:2], expected[-1]]


def test_a_new_process_finds_what_was_tokenised(tmp_path):
    dataset, _ = load("chatterbot", long_conversations="split")
    options = "DataConfig(('chatterbot',), train_split='train', max_seq_len=512)"
    loaded = f"load_data({options}, Tokenizer(vocab_size=512), 0, False)"
    program = f"from dataset import *; print({loaded}.train.cache_files[0]['filename'])"
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == dataset.cache_files[0]["filename"]
    assert "Tokenising" not in run.stderr


def test_chitchat_has_two_speakers_in_turn_and_a_fixed_held_out_split(chitchat, monkeypatch):
    train, test = chitchat["train"], chitchat["test"]
    assert (len(train), len(test)) == (3814, 200)
    for messages in train + test:
        assert [message["role"] for message in messages] == [("user", "assistant")[i % 2] for i in range(len(messages))]
    assert train[0][0]["content"] == "Hello How are you doing today?"
    assert not {json.dumps(m) for m in train} & {json.dumps(m) for m in test}
    monkeypatch.setattr(sources, "read_chitchat", lambda split, _: ({"messages": m} for m in chitchat[split]))
    as_text = [row["text"] for row in read_chitchat_text("test", "")]
    assert as_text == ["\n".join(message["content"] for message in messages) for messages in test]


def test_chatterbot_keeps_every_opening_for_training():
    train, test = ([row["messages"] for row in read_chatterbot(split, "")] for split in ("train", "test"))
    assert len(train) + len(test) == 792
    answers = defaultdict(set)
    for messages in train + test:
        answers[messages[0]["content"]].add(messages[1]["content"])
    assert {messages[0]["content"] for messages in train} == answers.keys()
    assert all(len(answers[messages[0]["content"]]) > 1 for messages in test)


def test_built_in_datasets_are_found_by_name(monkeypatch):
    dataset, report = load("chatterbot", "test")
    assert report.counts["conversations"] == len(dataset) == len(open_split("chatterbot", "test")) == 44
    with pytest.raises(UserError, match="chatterbot has no split 'valid', only train, test"):
        load("chatterbot", "valid")
    monkeypatch.setitem(BUILT_IN, "chatterbot", ("no-such-package", read_chatterbot))
    with pytest.raises(UserError, match="pip install no-such-package"):
        load("chatterbot")


def test_documents_come_from_lines_and_tables_and_empty_ones_are_counted(tmp_path):
    rows = [{"text": "Once upon a time"}, {"text": ""}, {"text": "The end"}]
    end = TOKENIZER.control_ids["<|endoftext|>"]
    for path in (write(tmp_path / "data.jsonl", *rows), write_table(tmp_path / "data.parquet", rows)):
        dataset, report = load(path)
        assert dataset["input_ids"][:] == [[*TOKENIZER.encode(row["text"]), end] for row in rows if row["text"]]
        assert dropped(report) == {"a single token": 1}


# --- Malformed rows ---


def turn(content="", role="user", **fields):
    return {"messages": [{"role": role, "content": content, **fields}]}


CALLS_NAN = {"name": "f", "arguments": "1e999"}
TWO_SYSTEMS = {"messages": [{"role": "system", "content": "."}, *HELLO], "system": ","}
BAD_ROWS = [
    ({"messages": HELLO[:1]}, "messages: no assistant turn"),
    (turn(role="robot"), r"messages\[0\].role: unknown role \('robot'"),
    (turn(role=["user"]), r"messages\[0\].role: unknown role"),
    (turn(role="\x1b]0;x"), r"unknown role \('\\x1b\]0;x'"),
    (answered(None), r"\[1\].content: .*it is null"),
    ({"messages": [HELLO[0], {"role": "assistant"}]}, r"messages\[1\].content: not text"),
    (turn(7), r"content: not text \(it is int"),
    (turn([{"type": "image"}]), r"\[0\]: not a text part"),
    (turn(["Hi"]), r"content\[0\]: not a text part"),
    ({"messages": []}, "messages: an empty list"),
    ({"messages": None}, r"messages: not a list of messages \(it is null"),
    ({"messages": "Hello"}, r"messages: not a list of messages \(it is str"),
    ({"messages": ["Hello"]}, r"messages\[0\]: not an object with role and content \(it is str"),
    ({"conversations": [{"from": "x", "value": ""}]}, r"conversations\[0\].from: unknown role"),
    ({"prompt": "Hello", "completion": None}, "completion: not a list of messages"),
    ({"words": "Hello", "id": 1}, r'they are words, id; name them: --columns "prompt=words" "completion=id"'),
    (answered(" \n"), r"\[1\].content: an empty assistant turn"),
    ({"prompt": "Hello", "completion": ""}, r"completion\[0\].content: an empty assistant turn"),
    ({"instruction": "Hi", "output": "Ho", "history": 5}, r"history: not a list \(it is int"),
    (turn(role="assistant", weight=0.5), r"\[0\].weight: neither 0 nor 1 \(it is 0.5\)"),
    (TWO_SYSTEMS, "the conversation has another system"),
    (turn(role="assistant", tool_calls="x"), r"\[0\].tool_calls: invalid JSON"),
    (turn(role="assistant", tool_calls=[{"id": 1}]), r"\[0\]: not a call with a function's name"),
    (turn(role="assistant", function_call=CALLS_NAN), "call.*cannot be written as JSON"),
    ({**GOOD, "tools": {"name": "time"}}, r"tools: not a list \(it is dict\)"),
    (json.dumps(GOOD)[:-1] + ', "tools": [{"limit": NaN}]}', "tools: cannot be written as JSON .*Out of ra"),
    ('{"text": "a", "text": "b"}', r"line: invalid JSON \(the key 'text' occurs twice\)"),
    ({"prompt": "a", "question": "b", "answer": "c"}, "ambiguous .the question may be prompt, question, the answer a"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "columns: preference data"),
    ({"title": "a", "mapping": {}}, "columns: a ChatGPT export"),
    ({"\x1b[2J": 1}, "columns: of no known format .they are \ufffd\\[2J"),
    ("[1]", r"line: not a JSON object \(it is list"),
    ('{"messages": [{"role": "us', "line: invalid JSON"),
    ("[" * 100_000, "line: invalid JSON"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:30] for _, message in BAD_ROWS])
def test_a_malformed_row_is_refused_with_its_place_or_dropped_and_counted(tmp_path, row, message):
    path = write(tmp_path / "data.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(UserError, match=rf"data.jsonl, line 3: .*{message}"):
        load(path)
    dataset, report = load(path, skip_bad_rows=True)
    assert dataset["input_ids"][:] == [HELLO_IDS] * 2
    assert list(dropped(report).values()) == [1]


# --- Sources that cannot be read ---


def test_sources_without_rows_are_refused(tmp_path):
    empty = datasets.Dataset.from_list([GOOD]).select([])
    empty.to_parquet(tmp_path / "empty.parquet")
    empty.save_to_disk(tmp_path / "empty")
    for name in ("empty.parquet", "empty"):
        with pytest.raises(UserError, match=rf"{name}.* (is empty|cannot be read)"):
            load(tmp_path / name)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no file or directory ./nowhere"),
        ("no/where/at-all", "there is no file or directory no/where/at-all"),
        ("tiny", "tiny is a preset, not a dataset; it comes first: train_sft.py tiny --dataset"),
        ("someone/something", "the Hub cannot be reached"),
    ],
)
def test_names_that_are_no_source_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


# --- Size ---


def test_long_rows_are_truncated(tmp_path):
    for unit in ("a", "a b"):
        content = unit * (1_000_000 // len(unit)) + "x"
        dataset, report = load_rows(tmp_path, [answered(content)])
        assert (len(dataset[0]["input_ids"]), report.counts["cut"]) == (512, 1)
        assert content.startswith(TOKENIZER.decode(dataset[0]["input_ids"]).split("assistant\n")[1])
    dataset, report = load_rows(tmp_path, [{"messages": HELLO * 10_000}])
    assert dataset[0]["input_ids"] == TOKENIZER.render(HELLO * 100)[0][:512]
    assert report.counts["cut"] == 1
    with pytest.raises(UserError, match="line 1: text: not encodable"):
        load_rows(tmp_path, [answered(" " * 1_000_000 + "x")])


WORDS = st.text(min_size=1, max_size=20).filter(str.strip)
CONVERSATION = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": WORDS}), min_size=1, max_size=6
).filter(lambda messages: any(message["role"] == "assistant" for message in messages))


@given(messages=CONVERSATION, max_seq_len=st.integers(2, 60))
def test_truncation_keeps_a_prefix_with_targets_or_drops_the_row(messages, max_seq_len):
    ids, mask = TOKENIZER.render(messages)
    (row,) = tokenize_row({"messages": messages}, TOKENIZER, max_seq_len, "truncate")
    if any(mask[1:max_seq_len]):
        assert (row["input_ids"], row["mask"]) == (ids[:max_seq_len], mask[:max_seq_len])
        assert (row["reason"], row["cut"] > 0) == ("", len(ids) > max_seq_len)
        assert (row["length"], row["targets"]) == (min(len(ids), max_seq_len), sum(mask[1:max_seq_len]))
    else:
        assert row["input_ids"] == row["mask"] == [] and "nothing to learn" in row["reason"]


@given(text=st.text(max_size=200), max_seq_len=st.integers(2, 60))
def test_each_token_of_a_text_except_the_first_is_a_target_once(text, max_seq_len):
    found = tokenize_row({"text": text}, TOKENIZER, max_seq_len)
    ids = [*TOKENIZER.encode(text), TOKENIZER.control_ids["<|endoftext|>"]]
    if len(ids) == 1:
        assert [piece["reason"] for piece in found] == ["a single token"]
        return
    targets = [token for piece in found for token in piece["input_ids"][1:]]
    assert [found[0]["input_ids"][0], *targets] == ids
    assert all(2 <= piece["length"] == len(piece["input_ids"]) <= max_seq_len for piece in found)
    assert all(piece["targets"] == piece["length"] - 1 == sum(piece["mask"][1:]) for piece in found)


# --- Report, cache, processes ---


def test_the_report_counts_what_a_loop_counts(tmp_path):
    long = [{"role": "user", "content": "word " * 100}, HELLO[1]]
    cut = [HELLO[0], {"role": "assistant", "content": "word " * 100}]
    dataset, report = load_rows(tmp_path, [GOOD, {"messages": long}, {"messages": cut}], max_seq_len=50)
    rendered = [TOKENIZER.render(messages) for messages in (HELLO, cut)]
    assert dataset["input_ids"][:] == [ids[:50] for ids, _ in rendered]
    assert (report.counts["conversations"], report.counts["cut"]) == (2, 1)
    assert report.counts["tokens"] == len(HELLO_IDS) + 50
    assert report.counts["trained on"] == sum(sum(mask[:50]) for _, mask in rendered)
    assert dropped(report) == {"nothing to learn within max_seq_len tokens": 1}
    assert "2 conversations" in str(report) and "1 dropped: nothing to learn" in str(report)


def test_rows_are_tokenised_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    calls = []
    render = Tokenizer.render_turn
    monkeypatch.setattr(Tokenizer, "render_turn", lambda self, *args: calls.append(1) or render(self, *args))

    def rendered(tokenizer=TOKENIZER, max_seq_len=512, rows=(GOOD, GOOD)) -> int:
        path = tmp_path / "data.jsonl"
        if not path.exists() or path.read_text().count("\n") != len(rows):
            write(path, *rows)
        calls.clear()
        load(path, tokenizer=tokenizer, max_seq_len=max_seq_len)
        return len(calls) // len(HELLO)

    assert rendered() == 2
    assert rendered() == 0
    assert rendered(tokenizer=Tokenizer(vocab_size=512)) == 0  # another object, but the same tokenizer
    assert rendered(max_seq_len=100) == 2
    assert rendered(tokenizer=Tokenizer(vocab_size=600)) == 2
    assert rendered(tokenizer=Tokenizer(vocab_size=512, chat_template="deepseek")) == 2
    assert rendered(rows=(GOOD, GOOD, GOOD)) == 3
    for module in (pieces, formats, text_files, tokenizer_module, vocabulary):  # their code
        changed = tmp_path / f"{module.__name__}.py"
        changed.write_text(Path(module.__file__).read_text() + "# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert rendered(rows=(GOOD, GOOD, GOOD)) == 3, module
    assert rendered(rows=(GOOD, GOOD, GOOD)) == 0


def test_several_processes_give_the_same_as_one(tmp_path):
    rows = [{"messages": [HELLO[0], {"role": "assistant", "content": f"Hi {i}"}]} for i in range(5001)]
    dataset, report = load_rows(tmp_path, [*rows, {"messages": []}], num_proc=2, skip_bad_rows=True)
    assert dataset["input_ids"][:] == [TOKENIZER.render(row["messages"])[0] for row in rows]
    assert dropped(report) == {"an empty list": 1}
