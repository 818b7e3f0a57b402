"""What a run sees of its data: conversations that are split, what is held out, formats, several sources, bad rows."""

import contextlib
import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from data import formats, text_files
from data.formats import RowError
from data.pieces import PIECE, malformed, tokenize_row
from dataset import column, lottery, parse_source
from small_data import (
    GOOD,
    HELLO,
    NUMBERED,
    TOKENIZER,
    dropped,
    load,
    own_cache,  # noqa: F401
    said,
    texts,
    write,
    write_table,
)
from small_runs import arguments, conversations, train_here, write_jsonl
from tokenizer import CHAT_TEMPLATES, ROLES, Tokenizer

TOKENIZERS = {name: Tokenizer(vocab_size=512, chat_template=name) for name in CHAT_TEMPLATES}


# ---------------------------------------------------------------- conversations longer than a row

WORDS = st.text("ab cdé☂", min_size=1, max_size=40).filter(str.strip)
PLAIN = {"role": st.sampled_from(ROLES), "content": WORDS}
ANSWER = {"role": st.just("assistant"), "content": WORDS, "weight": st.sampled_from((0, 1))}
CONVERSATION = st.lists(st.fixed_dictionaries(PLAIN) | st.fixed_dictionaries(ANSWER), min_size=1, max_size=12)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@given(messages=CONVERSATION, max_seq_len=st.integers(2, 80))
def test_each_token_of_an_answer_is_trained_on_once_after_what_precedes_it(
    template: str, messages: list[dict[str, Any]], max_seq_len: int
) -> None:
    tokenizer = TOKENIZERS[template]
    if all(message["role"] != "assistant" for message in messages):
        messages.append({"role": "assistant", "content": "yes"})
    ids, mask = tokenizer.render(messages)
    pieces = tokenize_row({"messages": messages}, tokenizer, max_seq_len)
    leading = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    opening = tokenizer.render(messages[:leading])[0][: max_seq_len // 2]
    header = max(len(tokenizer.render_turn(message).header) for message in messages)
    to_learn = [place for place in range(len(ids)) if mask[place]]
    if not to_learn:
        assert [piece["reason"] for piece in pieces] == ["nothing to learn"]
        return
    assert len(pieces) == 1 or len(ids) > max_seq_len
    for piece in pieces:
        targets = [place for place, trained in enumerate(piece["mask"]) if trained]
        learned, to_learn = to_learn[: len(targets)], to_learn[len(targets) :]
        assert 0 < piece["length"] == len(piece["input_ids"]) <= max_seq_len
        assert piece["targets"] == len(targets) and targets[0] > 0
        start, begin = targets[0], learned[0]
        if len(ids) > max_seq_len:
            assert piece["input_ids"][: len(opening)] == opening
        # After the opening, and a header where it begins inside a turn, it's a stretch of the conversation.
        for place in range(min(len(opening) + header, start), len(piece["input_ids"])):
            assert piece["input_ids"][place] == ids[begin - start + place]
        assert start == 0 or begin == 0 or piece["input_ids"][start - 1] == ids[begin - 1] or start <= len(opening)
    assert to_learn == []


def test_pieces_start_with_system_message_and_context_and_end_with_an_answer() -> None:
    system, talk = {"role": "system", "content": "Rhyme."}, []
    for i in range(9):
        talk += [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]
    pieces = tokenize_row({"messages": [system, *talk, {"role": "user", "content": "bye"}]}, TOKENIZER, 150)
    seen = [re.findall(r"Rhyme|ask \d|say \d|bye", TOKENIZER.decode(piece["input_ids"])) for piece in pieces]
    learned = ["".join(re.findall(r"say \d", t)) for t in texts(datasets.Dataset.from_list(pieces))]
    assert "".join(learned) == "".join(f"say {i}" for i in range(9))
    assert all(found[0] == "Rhyme" and found[1].startswith("ask") and found[-1].startswith("say") for found in seen)
    assert all(found[1] != f"ask {learned[i][4]}" for i, found in enumerate(seen) if i)  # something is read before it
    assert all(piece["length"] <= 150 for piece in pieces) and 2 <= len(pieces) <= 4
    assert pieces[0]["cut"] == 0


def test_a_turn_longer_than_a_row_is_cut_and_counted(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Yes."}]
    answer = [HELLO[0], {"role": "assistant", "content": "0 1 2 3 4 5 6 7 8 9 " * 30}]
    data = load(write(tmp_path / "rows.jsonl", {"messages": long}, {"messages": answer}, GOOD), max_seq_len=64)
    question, *answers, hello = texts(data.train)
    assert question == "Yes.|" and hello == "Hi there!|"
    assert "".join(answers) == answer[1]["content"] + "|"
    (report,) = data.reports
    assert (report.counts["conversations"], report.counts["cut"]) == (3, 2)
    headers = [
        TOKENIZER.decode(row).startswith(("<|im_start|>user", "<|im_start|>assistant"))
        for row in data.train["input_ids"]
    ]
    assert all(headers)
    truncated = load(tmp_path / "rows.jsonl", max_seq_len=64, long_conversations="truncate").reports[0]
    assert dropped(truncated) == {"nothing to learn within max_seq_len tokens": 1}
    assert truncated.counts["trained on"] < report.counts["trained on"] and "1 cut" in str(truncated)


# ---------------------------------------------------------------- held out


def test_a_share_is_held_out_and_a_row_stays_on_its_side_when_rows_are_added(tmp_path: Path) -> None:
    few = load(write(tmp_path / "few.jsonl", *NUMBERED[:200]), want_eval=True)
    many = load(write(tmp_path / "many.jsonl", *NUMBERED[::-1]), want_eval=True)
    assert sorted(texts(few.train) + texts(few.held_out)) == sorted(said(*range(200)))
    assert set(texts(few.train)) < set(texts(many.train)) and set(texts(few.held_out)) < set(texts(many.held_out))
    held = len(texts(many.held_out))
    assert 8 < held < 36
    assert f"{held} of the 400 conversations of train are held out (eval_fraction 0.05)" in many.notes[0]
    assert "many.jsonl has no split 'test'" in many.notes[0]
    other = load(tmp_path / "many.jsonl", want_eval=True, seed=1)
    assert set(texts(other.held_out)) != set(texts(many.held_out))
    half = load(tmp_path / "many.jsonl", want_eval=True, eval_fraction=0.5)
    assert set(texts(half.held_out)) > set(texts(many.held_out))
    assert len(texts(load(tmp_path / "many.jsonl").train)) == 400  # without evaluation, nothing is held out


def test_the_lottery_is_even() -> None:
    numbers = lottery(np.arange(100_000), seed=3)
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] / 5000 - 1).max() < 0.06
    assert abs(np.corrcoef(numbers, lottery(np.arange(100_000), seed=4))[0, 1]) < 0.02


def test_copies_and_pieces_of_a_conversation_are_on_one_side(tmp_path: Path) -> None:
    written = [{"prompt": "Hello", "completion": row["messages"][1]["content"]} for row in NUMBERED]
    data = load(write(tmp_path / "rows.jsonl", *NUMBERED, *written), want_eval=True)
    assert not set(texts(data.train)) & set(texts(data.held_out))
    train, held_out = (report.counts for report in data.reports)
    assert [side["duplicates"] * 2 for side in (train, held_out)] == [train["conversations"], held_out["conversations"]]
    assert train["conversations"] + held_out["conversations"] == 800
    assert f"{train['duplicates']} duplicates" in str(data.reports[0])
    long = [{"messages": row["messages"] * 20} for row in NUMBERED[:100]]
    data = load(write(tmp_path / "long.jsonl", *long), want_eval=True, max_seq_len=64, eval_fraction=0.3)
    assert data.held_out is not None
    sides = [set(column(side, "row").tolist()) for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(100))


def test_few_conversations_and_no_eval_split(tmp_path: Path) -> None:
    """One of three conversations is held out. If none can be, or none may be, the error names a remedy."""
    data = load(write(tmp_path / "three.jsonl", *NUMBERED[:3]), want_eval=True)
    assert len(texts(data.held_out)) == 1 and len(texts(data.train)) == 2
    with pytest.raises(UserError, match=r"too few different conversations .* --eval-steps 0 holds out none"):
        load(write(tmp_path / "one.jsonl", *NUMBERED[:1] * 5), want_eval=True)
    refused = r"has no split 'test', only train, and eval_fraction is 0; --eval-steps 0 evaluates nothing"
    with pytest.raises(UserError, match=refused):
        load(tmp_path / "three.jsonl", want_eval=True, eval_fraction=0)
    other_name = load(tmp_path / "three.jsonl", eval_fraction=0, train_split="train_sft")
    assert texts(other_name.train) == said(0, 1, 2)
    assert other_name.notes == ["three.jsonl has no split 'train_sft'; its only one is trained on: 'train'"]


def test_held_out_conversations_that_are_trained_on_are_dropped(tmp_path: Path) -> None:
    train, test = write(tmp_path / "both/train.jsonl", *NUMBERED[:50]), tmp_path / "both/test.jsonl"
    write(test, *NUMBERED[45:60])
    data = load(tmp_path / "both", want_eval=True)
    assert (texts(data.train), texts(data.held_out)) == (said(*range(50)), said(*range(50, 60)))
    assert dropped(data.reports[1]) == {"also trained on": 5}
    write(test, *NUMBERED[:9])
    with pytest.raises(UserError, match="test: all 9 rows were dropped: 9 for also trained on"):
        load(tmp_path / "both", want_eval=True)
    overlapping = load(train, want_eval=True, train_split="train[5:]", eval_split="train[:9]")
    assert texts(overlapping.held_out) == said(*range(5))
    assert dropped(overlapping.reports[1]) == {"also trained on": 4}


# ---------------------------------------------------------------- several sources


def test_sources_are_weighted_and_counted_apart(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", *NUMBERED[:3]), write(tmp_path / "b.jsonl", *NUMBERED[3:5], NUMBERED[0])
    data = load(f"{a}:2", b)
    assert texts(data.train) == said(0, 1, 2, 0, 1, 2, 3, 4, 0)
    found = [(r.source, r.counts["conversations"], r.weight, r.counts.get("duplicates", 0)) for r in data.reports]
    assert found == [("a.jsonl", 3, 2, 0), ("b.jsonl", 3, 1, 1)]
    assert str(data.reports[0]).startswith("a.jsonl, train, 2 times: 3 conversations;")
    same_name = [write(tmp_path / folder / "chats.jsonl", NUMBERED[0]) for folder in ("x", "y")]
    assert [report.source for report in load(*same_name).reports] == ["x/chats.jsonl", "y/chats.jsonl"]


def test_a_weight_follows_the_name() -> None:
    for source, parsed in (("a.jsonl:2", ("a.jsonl", 2)), ("hf://x/y", ("hf://x/y", 1)), (":3", (":3", 1))):
        assert parse_source(source) == parsed
    for weight in ("0", "-1", "0.5"):
        with pytest.raises(UserError, match=f"dataset a.jsonl:{weight}: {weight} must be a whole number above 0"):
            parse_source(f"a.jsonl:{weight}")


# ---------------------------------------------------------------- formats

ASK = HELLO[0]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
CALLED = '<tool_call>\n{"name": "time", "arguments": {"zone": "UTC"}}\n</tool_call>'
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi there!"}]
TOOLS = '# Tools\n\n<tools>\n{"name": "time", "unit": null}\n</tools>'
THOUGHT = "<think>\nGreet.\n</think>\n\nHi!"


def say(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | fields


READ_ONLY = [ASK, say("Hi there!", weight=0), *HELLO]
TOOL_TALK = [ASK, say(None, tool_calls=[CALL]), {"role": "tool", "content": "12:00", "id": 1}, say("Noon.")]
TOOL_READ = [ASK, say(CALLED), {"role": "tool", "content": "12:00"}, say("Noon.")]
PARTS = [{"type": "text", "value": text} for text in ("Hi ", "there!")]
THINKING = [{"type": "thinking", "thinking": "Greet."}, {"type": "text", "text": "Hi!"}]


@pytest.mark.parametrize(
    ("row", "messages", "unused"),
    [
        ({"conversations": SHAREGPT, "system": "Be brief.", "id": "7"}, [SYSTEM, *HELLO], ["id"]),
        ({"conversations": HELLO, "system": ""}, HELLO, []),
        ({"messages": SHAREGPT, "prompt": "ignored"}, HELLO, ["prompt"]),
        ({"messages": [SYSTEM, *HELLO], "system": "Be brief."}, [SYSTEM, *HELLO], []),
        ({"conversation": [ASK, say("Hi there!", role="bot", train=True)]}, HELLO, []),
        ({"messages": [ASK, say(PARTS, role="model")]}, HELLO, []),
        ({"messages": [ASK, say("Hi!", role="ai", reasoning_content="Greet.")]}, [ASK, say(THOUGHT)], []),
        ({"messages": [ASK, say(THINKING)]}, [ASK, say(THOUGHT)], []),
        ({"messages": [ASK, say("Hi there!", train=False), *HELLO]}, READ_ONLY, []),
        ({"messages": [ASK, say("Hi there!", loss_weight=0), *HELLO]}, READ_ONLY, []),
        ({"messages": [ASK, say("Hi there!", weight=0, name="Al"), *HELLO]}, READ_ONLY, ["messages[].name"]),
        ({"messages": [ASK, say(None, function_call=CALL["function"])]}, [ASK, say(CALLED)], []),
        ({"messages": TOOL_TALK}, TOOL_READ, ["messages[].id"]),
        ({"messages": [ASK | {"reasoning": "r"}, *HELLO[1:]]}, HELLO, ["messages[].reasoning"]),
        (
            {"conversations": SHAREGPT, "tools": '[{"name": "time", "unit": null}]', "system_prompt": "Be brief."},
            [SYSTEM | {"content": f"Be brief.\n\n{TOOLS}"}, *HELLO],
            [],
        ),
        ({"prompt": [*HELLO, ASK], "completion": HELLO[1:]}, READ_ONLY, []),
        ({"question": "Hello", "answer": "Hi there!", "topic": "small talk"}, HELLO, ["topic"]),
        ({"Question": "Hello", "ANSWER": "Hi there!", "text": "x"}, HELLO, ["text"]),
        ({"problem": "Hello", "solution": "Hi there!", "messages": None}, HELLO, []),
        ({"instruction": "Hello", "output": "Hi there!", "input": ""}, HELLO, []),
        ({"instruction": "Hello", "context": "", "response": "Hi there!"}, HELLO, []),
        ({"instruction": "Hello", "output": "Hi there!", "history": [["Hello", "Hi there!"]]}, [*HELLO, *HELLO], []),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
            [SYSTEM, {"role": "user", "content": "Add.\n\n1 2"}, say("3")],
            [],
        ),
    ],
)
def test_formats(row: dict[str, Any], messages: list[dict[str, Any]], unused: list[str]) -> None:
    content, _, ignored = formats.read_row(row)
    assert (content, ignored) == (messages, unused)


def test_every_name_of_a_role_maps_to_a_role_of_the_templates() -> None:
    assert set(formats.ROLE_NAMES.values()) == set(ROLES)


@pytest.mark.parametrize("arguments", ['{"id": 7, "due": null}', "0", "[1.5, null]"])
def test_arguments_of_a_call_are_learned_as_written(arguments: str, tmp_path: Path) -> None:
    """A table fills in a null for a call without `due`; a null inside a string was written by its author."""
    call = {"function": {"name": "add", "arguments": arguments}}
    rows = [
        {"messages": [ASK, say("", tool_calls=[call])]},
        {"messages": [*HELLO, ASK, HELLO[1] | {"name": "Al"}]},
    ]
    for file in (write(tmp_path / "calls.jsonl", *rows), write_table(tmp_path / "calls.parquet", rows)):
        assert f'{{"name": "add", "arguments": {arguments}}}' in texts(load(file).train)[0]
    row = {**GOOD, "tools": [{"name": "a", "default": None}, {"name": "b", "default": 0}]}
    for as_read, first in ((row, '{"name": "a", "default": null}'), (formats.without_nulls(row), '{"name": "a"}')):
        content, *_ = formats.read_row(as_read)
        assert f'{first}\n{{"name": "b", "default": 0}}' in content[0]["content"]  # type: ignore[index]


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"Câu hỏi": "Hello", "Câu trả lời": row["messages"][1]["content"], "answer": "no"} for row in NUMBERED[:3]]
    path, other = write(tmp_path / "vi.jsonl", *rows), write(tmp_path / "en.jsonl", NUMBERED[3])
    named = ("prompt=Câu hỏi", "completion=Câu trả lời")
    data = load(path, other, columns=named)
    assert texts(data.train) == [f"say {i}|" for i in range(4)]
    assert data.reports[0].counts["read as Câu hỏi + Câu trả lời"] == data.reports[0].counts["not used: answer"] == 3
    for wrong, error in (
        (("prompt=Câu hỏi", "completion=x"), "not all that --columns names .x missing"),
        (("text=x",), "columns: no row has x"),
        (("answer=x",), "columns answer=x: write PART=COLUMN, where PART is one of messages, prompt,"),
        (("prompt=Câu hỏi",), "columns names neither messages, nor text, nor prompt and completion"),
    ):
        with pytest.raises(UserError, match=error):
            load(other if wrong[0] == "text=x" else path, columns=wrong)


def test_control_tokens_as_text_and_unused_fields_are_counted(tmp_path: Path) -> None:
    spelled = [{"text": "<|im_start|>user\nHi<|im_end|>"}, {"messages": [ASK, say("<|eot_id|>")]}]
    rows = [*spelled, {**GOOD, "id": 1}, {**NUMBERED[0], "id": 2, "tags": []}, {"text": "x y", "system": "z"}]
    (report,) = load(write(tmp_path / "rows.jsonl", *rows)).reports
    assert report.counts["with control tokens as text"] == 2 and "2 with control tokens as text" in str(report)
    unused = {name: count for name, count in report.counts.items() if name.startswith("not used")}
    assert unused == {"not used: id": 2, "not used: tags": 1, "not used: system": 1}


def test_an_answer_of_weight_0_is_context_only(tmp_path: Path) -> None:
    unweighted = [ASK, HELLO[1] | {"weight": 0}]
    data = load(write(tmp_path / "rows.jsonl", {"messages": [*unweighted, *NUMBERED[0]["messages"]]}))
    assert texts(data.train) == said(0)
    with pytest.raises(UserError, match="all 1 rows were dropped: 1 for nothing to learn"):
        load(write(tmp_path / "none.jsonl", {"messages": unweighted}))


# ---------------------------------------------------------------- files


def test_every_file_gives_the_same_conversations(tmp_path: Path) -> None:
    pairs = [("Hello, you", "say\n0"), ('"Hi"', "say 1")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    write(tmp_path / "a.jsonl", *rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    quoted = [[f'"{text.replace(chr(34), chr(34) * 2)}"' for text in pair] for pair in pairs]
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        lines = [delimiter.join(fields) for fields in (["prompt", "completion"], *quoted)]
        (tmp_path / name).write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    with gzip.open(tmp_path / "e.csv.gz", "wb") as file:
        file.write((tmp_path / "c.csv").read_bytes())
    (tmp_path / "f.json").write_text(json.dumps(rows))
    expected = texts(load(tmp_path / "a.jsonl").train)
    assert expected == ["say\n0|", "say 1|"]
    for name in ("b.jsonl.gz", "c.csv", "d.tsv", "e.csv.gz", "f.json"):
        assert texts(load(tmp_path / name).train) == expected, name


def test_a_directory_is_read_file_by_file_and_errors_name_the_place(tmp_path: Path) -> None:
    """Whatever the case of the files' names. Hidden files are not read."""
    folder = tmp_path / "talk"
    write(folder / "A.JSONL", *NUMBERED[:2])
    write(folder / "more/b.csv", "question,answer", "Hello,say 2", "Hello")
    (folder / "more/C.Jsonl.GZ").write_bytes(gzip.compress(json.dumps(NUMBERED[3]).encode()))
    for place in (folder / "dev.jsonl", folder / ".ipynb_checkpoints/a.jsonl", folder / ".b.jsonl"):
        write(place, *NUMBERED[7:9])
    with pytest.raises(UserError, match=r"^talk, more/b.csv, line 3: line: 1 fields, where the first line names 2"):
        load(folder)
    write(folder / "more/b.csv", "question,answer", "Hello,say 2")
    data = load(folder, eval_split="validation", want_eval=True)
    assert (sorted(texts(data.train)), texts(data.held_out)) == (said(0, 1, 2, 3), said(7, 8))
    assert texts(load(write_table(tmp_path / "T.PARQUET", NUMBERED[:2])).train) == said(0, 1)


def test_a_row_of_a_table_is_named_by_file_and_number(tmp_path: Path) -> None:
    """Slices of splits too. Datasets saved by `datasets` have no files to name."""
    folder, bad = tmp_path / "tables", {"messages": HELLO[:1]}
    rows = {"a.parquet": [GOOD, bad], "b.parquet": [GOOD, GOOD, bad, GOOD], "test/c.parquet": [bad, GOOD]}
    for name, content in rows.items():
        write_table(folder / name, content)
    a, b, c = "a.parquet, row 2", "b.parquet, row 3", "test/c.parquet, row 1"
    for split, places in (("train", [a, b]), ("train[3:5]", [b]), ("test+train[1:]", [c, a, b])):
        found = load(folder, train_split=split, skip_bad_rows=True).skipped
        assert [(row["place"], json.loads(row["row"])) for row in found] == [(place, bad) for place in places]
    datasets.Dataset.from_list([GOOD, bad]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="saved, split train, row 2: messages: no assistant turn"):
        load(tmp_path / "saved")


def test_unused_splits_and_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "talk"
    write(folder / "train.jsonl", *NUMBERED[:60])
    write(folder / "validation.jsonl", *NUMBERED[60:70])
    unused, named = "neither trained on nor evaluated on: split validation", "split validation is validation.jsonl"

    def notes(want_eval: bool = False, **splits: str) -> list[str]:
        found = load(folder, want_eval=want_eval, **splits).notes
        return [note.removeprefix("talk: ") for note in found if note.startswith("talk: ")]

    assert notes(want_eval=True) == [f"{unused} (--eval-split validation)", named]
    assert notes() == [unused, named]
    assert notes(want_eval=True, eval_split="validation") == notes(train_split="train[5:]+validation") == [named]
    write(folder / "notes.md", "not data")
    write(folder / "summary.json", json.dumps({"rows": 70}, indent=1))
    write(folder / "dataset_info.json", '{"license": "mit"}')
    unread = "not read: dataset_info.json, notes.md, summary.json"
    assert notes(eval_split="validation") == [named, unread]
    write(folder / "one.json", json.dumps(NUMBERED[80], indent=1))
    assert texts(load(folder, train_split="train[:1]").train) == said(80)


def test_a_txt_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time\n\nthere was", encoding="utf-8-sig")
    (row,) = load(tmp_path / "a.txt").train["input_ids"]
    assert TOKENIZER.decode(row) == "Once upon a time\n\nthere was<|endoftext|>"


FOUR_LINES = b'prompt,completion\nx,y\n"x,y\nx,y\nx,y\n'
NO_ROWS = json.dumps({"data": [GOOD] * 9}, indent=1).encode()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("missing.parquet", None, "there is no file or directory"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("empty.json", b"[ ]", "has no rows"),
        ("a.json", NO_ROWS, "a.json has no rows"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("bad.json", b'[{"messages":\n [}]', "bad.json cannot be read as a dataset: Expecting value: line 2"),
        ("deep.json", b'[{"text": "a"}, ' + b"[" * 100_000, "maximum recursion depth exceeded while decoding a JSON"),
        ("twice.json", b'[{"text": "a"}, {"text": "b", "text": "c"}]', "entry 2: line: invalid JSON (the key 'text'"),
        ("a.json", b'[{"text": "a"}, 2]', "a.json, entry 2: line: not a JSON object"),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', "cannot be read as a dataset: Expecting ',' delimiter: line 2"),
        ("a.json", b'[{"text": "a"}] {"text": "b"}', "cannot be read as a dataset: Extra data: line 1 column 17"),
        ("a.json", b'{"messages": [1}\n{"messages": 2}', "2 rows cannot be used"),
        ("bad.parquet", b"PAR1 no", "cannot be read as a dataset"),
        ("bomb.jsonl.gz", gzip.compress(b" \n" * 2**20), "unpacks to more than 200 times its size (MAX_RATIO in"),
        ("long.jsonl", b"x" * 5_000, "line 1 is longer than 4,096 characters (MAX_LINE in data/text_files.py)"),
        ("long.csv", b'a,b\n"' + b"x\n" * 3_000, "field larger than field limit (4096)"),
        ("a.csv", b"prompt,prompt\nx,y\n", "line 1: the column 'prompt' is named twice"),
        ("a.csv", b'prompt,completion\nx,"y\n', "line 2: line: invalid CSV: unexpected end of data"),
        ("a.csv", FOUR_LINES, "lines 3 to 5: line: invalid CSV: unexpected end of data (a quote that is opened here"),
        ("a.csv", b"prompt,completion\nx,\xff\n", "a.csv, line 2: line: invalid UTF-8"),
        ("a.csv", b"prompt\ncompletion\nx\n", "columns: of no known format (they are prompt; name them: --columns"),
        ("a.txt", b"\xff", "'utf-8' codec can't decode byte 0xff in position 0"),
        (
            "a.jsonl",
            b'{"text": "\xff"}',
            "line 1: line: invalid JSON ('utf-8' codec can't decode byte 0xff in position 10",
        ),
        ("a.jsonl.gz", b"not gzip", "cannot be read as a dataset: Not a gzipped file"),
        ("a.docx", b"", "files of this kind are not read, only .jsonl, .json, .csv, .tsv, .txt, .parquet"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: bytes | None, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE", 2**12)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(error)) as raised:
        load(tmp_path / name)
    assert len(str(raised.value).split("\n")) <= 3


def test_a_file_of_a_directory_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x\xe9 y")
    (tmp_path / "b.txt").write_text("hello")
    with pytest.raises(UserError, match=r"a\.txt, 'utf-8' codec can't decode byte 0xe9 in position 1"):
        load(tmp_path)


def readme(folder: Path, *entries: str) -> None:
    """Write a README for the Hub that lists a dataset's files, and other datasets if more than one entry is given."""
    configs = "".join(f"- config_name: c{i}\n  data_files:{entry}\n" for i, entry in enumerate(entries))
    write(folder / "README.md", "---", f"configs:\n{configs}---", "Hello")


def test_a_path_is_never_a_pattern(tmp_path: Path) -> None:
    names = ("weird[1]", "weird1", "a*", "ab")
    for i, name in enumerate(names):
        write_table(tmp_path / name / "set.parquet", [NUMBERED[i]])
        readme(tmp_path / name, " '*.parquet'")
    for i, name in enumerate(names):
        for place in (tmp_path / name, tmp_path / name / "set.parquet"):
            assert texts(load(place).train) == said(i)


def test_the_name_of_a_link_decides_the_format_and_links_are_followed_once(tmp_path: Path) -> None:
    revision, folder = tmp_path / "hub/snapshots/main/data", tmp_path / "talk"
    revision.mkdir(parents=True)
    write(tmp_path / "hub/blobs/9f86d0", NUMBERED[0])
    (revision / "train.jsonl").symlink_to("../../../../hub/blobs/9f86d0")  # as in the Hub's cache
    write(tmp_path / "export.txt", NUMBERED[1])
    (tmp_path / "chats.jsonl").symlink_to("export.txt")
    write(folder / ".store/a.jsonl", NUMBERED[2])
    for name, target in (("more", ".store"), ("again", ".store"), ("cycle", "."), (".store/up", "..")):
        (folder / name).symlink_to(target)
    for i, place in enumerate((revision, tmp_path / "chats.jsonl", folder)):
        assert texts(load(place).train) == said(i)


def test_files_outside_a_directory_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "secret.jsonl", GOOD)
    for name, link, target in (("link", "a.jsonl", "../secret.jsonl"), ("folder", "up", "..")):
        (tmp_path / name).mkdir()
        (tmp_path / name / link).symlink_to(target)
    readme(tmp_path / "listed", " ../*.jsonl")
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    write(tmp_path / "saved/state.json", state | {"_data_files": [{"filename": "../secret.jsonl"}]})
    cases = {"link": "a.jsonl", "folder": "up", "listed": "../secret.jsonl", "saved": "secret.jsonl"}
    for name, named in cases.items():
        with pytest.raises(UserError, match=rf"{named}.* lies outside of the directory(, at .*; copy it into .*)?$"):
            load(tmp_path / name)


def test_a_readme_defines_the_splits_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *NUMBERED[:2])
    write(tmp_path / "b.jsonl", NUMBERED[2])
    listed = "\n  - split: test\n    path: a*\n  - split: train\n    path: b*"
    readme(tmp_path, listed)
    data = load(tmp_path, want_eval=True)
    assert (texts(data.train), texts(data.held_out)) == (said(2), said(0, 1))
    readme(tmp_path, listed, " c*")
    with pytest.raises(UserError, match=r"has several datasets \(c0, c1\); name the files of one of them"):
        load(tmp_path)


def test_unused_columns_are_not_decoded_and_no_server_is_contacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.load, "get_session", lambda: pytest.fail("contacts a server"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    broken = {"bytes": b"no picture", "path": "/etc/hostname"}
    table = datasets.Dataset.from_list([{**GOOD, "picture": broken, "place": "x", "json": b"{}", "error": ""}])
    table = table.cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet")
    assert texts(data.train) == ["Hi there!|"]
    unused = [name for name in data.reports[0].counts if "not used" in name]
    assert unused == [f"not used: {name}" for name in ("picture", "place", "json", "error")]
    table.select_columns(["place", "json", "error"]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"columns: of no known format \(they are place, json, error"):
        load(tmp_path / "b.parquet")
    table.select_columns(["picture"]).rename_column("picture", "text").to_parquet(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="text hold Image; only text is learned"):
        load(tmp_path / "c.parquet")


def test_quotes_in_tables_are_text_where_they_cannot_be_quoting(tmp_path: Path) -> None:
    def answers(name: str, content: str) -> list[str]:
        (tmp_path / name).write_text(content)
        return texts(load(tmp_path / name).train)

    head = "prompt\tcompletion\n"
    assert answers("a.tsv", f'{head}"Hello\tsay 1\nHi"\tsay 2\n') == ["say 1|", "say 2|"]
    assert answers("b.tsv", f'{head}"Hi" they said\tsay 1\nHi\t"say 2\nHi\tsay 3\n') == ["say 1|", '"say 2|', "say 3|"]
    assert answers("c.tsv", f'{head}Hi\t"say\n1"\n') == ["say\n1|"]
    assert load(tmp_path / "c.tsv").notes == ["c.tsv: 1 rows have fields of several lines, the first in lines 2 to 3"]
    assert answers("d.csv", 'prompt;completion\n"a;b";say, 1\n') == ["say, 1|"]
    assert answers("e.csv", "text\nsay 1\n") == ["say 1<|endoftext|>"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    with pytest.raises(
        UserError, match=r"file/cache cannot be written \(Not a directory\); set HF_HOME to a directory"
    ):
        load(write(tmp_path / "rows.jsonl", GOOD))


# ---------------------------------------------------------------- whatever people have in their files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# Names and texts in a JSON file may hold half of a surrogate pair, which is not a character.
ANY_NAME = st.text("a☂\ud83d\ude00", max_size=3)
NAMES = sorted(formats.KNOWN_COLUMNS)
MALFORMED_MESSAGE = st.dictionaries(
    st.sampled_from(("role", "from", "content", "value", "weight", "tool_calls")),
    JSON | st.sampled_from(("user", "assistant", "gpt", "Hello")) | st.just([CALL]),
)
ROW = st.dictionaries(
    st.sampled_from(NAMES) | ANY_NAME,
    JSON | ANY_NAME | st.lists(MALFORMED_MESSAGE | JSON, max_size=4) | st.just("Hello"),
)


@settings(max_examples=120)
@given(
    row=ROW,
    columns=st.sampled_from((("messages",), ("question", "answer"), ("instruction", "input", "output"), ("text",))),
    filling=JSON,
    max_seq_len=st.integers(2, 30),
)
def test_any_row_is_read_or_reported_as_malformed(
    row: dict[str, Any], columns: tuple[str, ...], filling: Any, max_seq_len: int
) -> None:
    for value in (row, {name: row.get(name, filling) for name in columns} | row):
        try:
            pieces = tokenize_row(value, TOKENIZER, max_seq_len)
        except RowError as problem:
            pieces = [malformed(problem)]
        table = [piece | {"row": 0, "piece": 0} for piece in pieces]
        assert pa.Table.from_pylist(table, PIECE.arrow_schema).to_pylist() == table
        assert all(piece["targets"] > 0 for piece in pieces) or [bool(piece["reason"]) for piece in pieces] == [True]


LINE = st.one_of(
    JSON.map(json.dumps).map(str.encode),
    ROW.map(json.dumps).map(str.encode),
    st.just(json.dumps(GOOD).encode()),
    st.just(b'prompt,completion\na,"b"'),
    st.binary(max_size=12),
)


def lines_of(place: str) -> range:
    """ "lines 3 to 5" as 3, 4, 5."""
    first, *last = map(int, re.findall(r"\d+", place))
    return range(first, (last or [first])[0] + 1)


@pytest.mark.parametrize("suffix", text_files.READERS)
@settings(max_examples=40)
@given(lines=st.lists(LINE, max_size=6))
def test_every_row_of_any_file_is_counted_or_the_file_is_refused(
    suffix: str, lines: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    header = [b"prompt,completion"] if suffix in (".csv", ".tsv") else []
    path.write_bytes(b"\n".join(header + lines))
    try:
        found = list(text_files.read_files([str(path)], [""], []))
    except ValueError as error:
        assert str(error)
        return
    for row in found:
        with contextlib.suppress(RowError):
            assert len(tokenize_row(text_files.parse_line(row), TOKENIZER, 30)) >= 1
    if suffix == ".jsonl":
        assert len(found) == sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    if header:
        stands = dict(enumerate(path.read_bytes().splitlines(keepends=True), start=1))
        places = [lines_of(row["place"]) for row in found]
        filled = [number for number, line in stands.items() if line.strip(b"\r\n")]
        assert [number for place in places for number in place if number in filled] == filled[1:]
        for row, place in zip(found, places, strict=True):
            assert not row["error"] or row["json"] == b"".join(stands[number] for number in place)


# ---------------------------------------------------------------- malformed rows


def test_each_cause_is_printed_once_with_its_first_three_places(tmp_path: Path) -> None:
    rows = [GOOD, *[{"messages": [{"role": "wizard", "content": "x"}]}] * 5, {"messages": []}]
    with pytest.raises(UserError) as error:
        load(write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[:2]))
    first, *listed = str(error.value).split("\n")
    assert first == "7 rows cannot be used (--skip-bad-rows drops them):"
    unknown = "messages[0].role: unknown role ('wizard'; known are system,"
    assert listed[0].startswith(f"  a.jsonl, 5 rows, line 2; line 3; line 4; ...: {unknown}")
    assert listed[1] == "  a.jsonl, line 7: messages: an empty list"
    assert listed[2].startswith(f"  b.jsonl, line 2: {unknown}") and len(listed) == 3
    with pytest.raises(UserError) as error:
        load(*[write(tmp_path / f"{i}.jsonl", {"messages": []}) for i in range(30)])
    assert len(str(error.value).split("\n")) == 10
    assert str(error.value).endswith("\n  and 22 more causes")


def test_skipped_rows_are_written_with_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [*conversations(20), [{"role": "wizard", "content": "abracadabra"}]])
    with path.open("a") as file:
        file.write("{\n")
    command = arguments(path, tmp_path / "run", "--skip-bad-rows", max_steps=1, eval_steps=0)
    assert train_here(command, tmp_path) == 0
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [row["place"] for row in skipped] == ["line 21", "line 22"]
    assert skipped[0]["error"].startswith("messages[0].role: unknown role ('wizard'")
    assert json.loads(skipped[0]["row"])["messages"][0]["content"] == "abracadabra"
    assert skipped[1]["row"] == "{"
    assert "2 malformed rows were skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- a run


def test_a_run_is_resumed_with_its_own_rows_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", conversations(40))
    settings: dict[str, Any] = {"train_split": "train", "eval_split": "test"}

    def train(*flags: str, **changes: Any) -> int:
        return train_here(arguments(path, tmp_path / "run", *flags, **settings | changes), tmp_path)

    assert train(max_steps=3, eval_fraction=0.2) == 0
    assert "data.jsonl has no split 'test'" in capsys.readouterr().out
    assert train("--resume", max_steps=4) == 0
    assert train("--resume", max_steps=5, eval_steps=0) == 2
    assert "not the rows that the run was trained on" in capsys.readouterr().err
    write_jsonl(path, conversations(60))
    assert train("--resume", max_steps=5) == 2
    assert "not the rows that the run was trained on" in capsys.readouterr().err
