"""Chatting with checkpoints. Oracles: generation.generate, transformers' greedy decoding, Tokenizer.render."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

import chat
import generation
from chat import as_prompt
from checkpoint import save_checkpoint, save_pretrained
from data import formats
from files import printable
from generation import generate
from model import DeepSeekV2
from small_models import small_model, transformers_model
from small_runs import run_main
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
Say = Callable[..., str]
CONTEXT = 128
QUESTION = "Hello! How are you?"


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    return small_model(vocab_size=512, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def run(model: DeepSeekV2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two checkpoints, of which the newer one is `model`."""
    directory = tmp_path_factory.mktemp("run")
    older = small_model(seed=1, vocab_size=512, max_position_embeddings=CONTEXT)
    for step, weights in ((1, older), (2, model)):
        save_checkpoint(directory, step, lambda place, weights=weights: save_pretrained(place, weights, tokenizer), 2)
    return directory


@pytest.fixture
def say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs chat.py and returns what it prints."""

    def run_chat(*arguments: Any) -> str:
        assert run_main(chat.main, [str(a) for a in arguments], tmp_path) == 0
        return capsys.readouterr().out

    return run_chat


def text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    end = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))
    return printable(tokenizer.decode(ids[:end]))


# ---------------------------------------------------------------- one answer


def test_greedy_is_transformers_greedy(run: Path, model: DeepSeekV2, tokenizer: Tokenizer, say: Say) -> None:
    flags = ("--prompt", QUESTION, "--temperature", 0, "--max-new-tokens", 20)
    ours = say(run, *flags)
    prompt, _ = tokenizer.render([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    theirs = transformers_model(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert ours == text_of(theirs[0, len(prompt) :].tolist(), tokenizer) + "\n"


def test_the_seed_and_the_sampling_options_reach_the_model(run: Path, say: Say) -> None:
    flags = ("--prompt", QUESTION, "--max-new-tokens", 20)
    replies = [say(run, *flags, "--temperature", 2, "--seed", seed) for seed in (5, 5, 6)]
    assert replies[0] == replies[1] != replies[2]
    greedy = say(run, *flags, "--temperature", 0)
    for option in (("--top-k", 1), ("--top-p", 1e-6)):  # only the likeliest token is left
        assert say(run, *flags, "--temperature", 5, *option) == greedy != replies[0]


CTRL_C = -1  # in a scripted answer: Ctrl-C is pressed


class Scripted:
    """A model with scripted answers that records its prompts."""

    def __init__(self, *answers: list[int], context: int = 10_000) -> None:
        self.answers = list(answers)
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.prompts: list[list[int]] = []

    def eval(self) -> None:
        pass

    def speak(self, prompts: list[list[int]], max_new_tokens: int, *_: Any) -> Iterator[list[int]]:
        self.prompts += prompts
        for token in self.answers.pop(0)[:max_new_tokens]:
            if token == CTRL_C:
                raise KeyboardInterrupt
            yield [token]


@pytest.fixture(autouse=True)
def scripts_are_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    def speak(model: Any, *arguments: Any, **options: Any) -> Iterator[list[int]]:
        return model.speak(*arguments) if isinstance(model, Scripted) else generate(model, *arguments, **options)

    monkeypatch.setattr(generation, "generate", speak)


def speaking(tokenizer: Tokenizer, *texts: str, **options: Any) -> Scripted:
    """Return a model that says these texts and ends its turn."""
    return Scripted(*([*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts), **options)


def printed_pieces(model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is printed for an answer, one item per call of print."""
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", **_: pieces.append(text + end))
    writer = chat.Writer(model, tokenizer, chat.ChatConfig(""), torch.Generator())
    chat.print_answer(writer, [{"role": "user", "content": "?"}])
    return pieces


def test_characters_are_printed_whole_and_nothing_after_the_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "    né 👩‍🚀 — 漢字"  # leading spaces are part of an answer
    ids = tokenizer.encode(text)
    assert any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids[:i]) for i in range(len(ids)))
    model = Scripted([*ids, tokenizer.eos_token_id, *tokenizer.encode("more")])
    pieces = printed_pieces(model, tokenizer, monkeypatch)
    assert "".join(pieces) == text + "\n"
    assert len(pieces) > 4
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_and_terminal_escapes_are_replaced(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scripted(tokenizer.encode("a\x1b]0;title\x07\tb\n👩")[:-1])
    pieces = printed_pieces(model, tokenizer, monkeypatch)
    assert "".join(pieces[:-1]) == "a\ufffd]0;title\ufffd\tb\n\ufffd\n"


# ---------------------------------------------------------------- a conversation


@pytest.fixture
def conversation(
    run: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Pipe lines to a scripted model and return standard output and standard error."""

    def converse(
        model: Scripted, *lines: str, flags: tuple[str, ...] = (), end: type[BaseException] = EOFError
    ) -> tuple[str, str]:
        said = iter(lines)

        def read(prompt: str = "") -> str:
            assert prompt == "> " * chat.at_terminal()
            for line in said:
                return line
            raise end

        monkeypatch.setattr("chat.load_model_and_tokenizer", lambda *_, **__: (model, tokenizer))
        monkeypatch.setattr("builtins.input", read)
        assert run_main(chat.main, [str(run), *flags], tmp_path) == 0
        return capsys.readouterr()

    return converse


def prompt_of(tokenizer: Tokenizer, *texts: str, system: str = "") -> list[int]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.render([{"role": "system", "content": system}] * bool(system) + messages, True)[0]


def test_piped_input_prints_answers_and_nothing_else(conversation: Any, tokenizer: Tokenizer) -> None:
    """Blank lines are skipped."""
    assert conversation(speaking(tokenizer, "One.", "Two."), "", "a", "", "  ", "b", "") == ("One.\nTwo.\n", "")


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_end_the_conversation(
    end: type, conversation: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "at_terminal", lambda: True)
    out, _ = conversation(speaking(tokenizer, "One."), "a", "", end=end)
    assert out.startswith("Ctrl-C ends an answer, Ctrl-D the conversation")
    assert out.endswith("One.\n\n")


def test_ctrl_c_in_an_answer_ends_the_answer_only(conversation: Any, tokenizer: Tokenizer) -> None:
    one, two = tokenizer.encode("One."), tokenizer.encode("Two.")
    model = Scripted([*one, CTRL_C, *two], [*two, tokenizer.eos_token_id])
    assert conversation(model, "a", "b") == ("One.\nTwo.\n", "(interrupted)\n")
    assert model.prompts == [prompt_of(tokenizer, "a"), prompt_of(tokenizer, "a", "One.", "b")]


def test_ctrl_c_in_the_answer_to_a_prompt_ends_the_command_with_130(
    run: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scripted([*tokenizer.encode("One."), CTRL_C])
    writer = chat.load(str(run), chat.ChatConfig(str(run), prompt="Hi"))
    monkeypatch.setattr(chat, "load", lambda *_: replace(writer, model=model))
    assert run_main(chat.main, [str(run), "--prompt", "Hi"], tmp_path) == 130


def test_a_cut_answer_is_reported(conversation: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four")
    out, error = conversation(Scripted(ids), "a", flags=("--max-new-tokens", "3"))
    assert (out, error) == (tokenizer.decode(ids[:3]) + "\n", "(cut after 3 tokens by --max-new-tokens)\n")
    context = len(prompt_of(tokenizer, "a")) + 2
    out, error = conversation(Scripted(ids, context=context), "a")
    cut = "(cut after 2 tokens by the end of the model's context)\n"
    assert (out, error) == (tokenizer.decode(ids[:2]) + "\n", cut)


def test_a_full_context_forgets_the_oldest_turns_and_reports_it(conversation: Any, tokenizer: Tokenizer) -> None:
    context = len(prompt_of(tokenizer, "a", "x", "b", system="Hm.")) + 8
    model = speaking(tokenizer, "x", "x", "x", context=context)
    out, error = conversation(model, "a", "b", "c", flags=("--system", "Hm.", "--max-new-tokens", "8"))
    assert out == "x\nx\nx\n"
    assert error == f"(the context of {context} tokens is full: the oldest 2 messages are forgotten)\n"
    talks = (("a",), ("a", "x", "b"), ("b", "x", "c"))
    assert model.prompts == [prompt_of(tokenizer, *talk, system="Hm.") for talk in talks]


def test_a_question_beyond_the_context_is_dropped(conversation: Any, tokenizer: Tokenizer) -> None:
    """Earlier turns are still part of the conversation."""
    model = speaking(tokenizer, "x", "x", context=100)
    out, error = conversation(model, "a", "b " * 100, "c")
    assert (out, error.count("\n")) == ("x\nx\n", 1)
    assert "but the model's context is 100" in error
    assert model.prompts == [prompt_of(tokenizer, "a"), prompt_of(tokenizer, "a", "x", "c")]


def test_reset_starts_over_with_the_system_message(conversation: Any, tokenizer: Tokenizer) -> None:
    model = speaking(tokenizer, "x", "x", "x")
    assert conversation(model, "a", "b", "/reset", "c", flags=("--system", "Hm.")) == ("x\n" * 3, "")
    expected = [prompt_of(tokenizer, *texts, system="Hm.") for texts in (("a",), ("a", "x", "b"), ("c",))]
    assert model.prompts == expected


def test_at_a_real_terminal(run: Path, tmp_path: Path) -> None:
    """The whole program, in a pseudo-terminal: arrow keys edit the line and recall the last one; Ctrl-C ends a long
    answer, Ctrl-D the conversation."""
    command = [sys.executable, "-c", SLOW, str(ROOT), str(run)]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)

    def expect(pattern: str) -> str:
        seen = ""
        while not re.search(pattern, seen):
            assert select.select([ours], [], [], 300)[0], seen
            seen += os.read(ours, 1024).decode(errors="replace")
        return seen

    def press(keys: str) -> None:
        os.write(ours, keys.encode())

    try:
        expect("> ")
        press("ello\x01H\r")  # Ctrl-A goes to the start of the line
        expect("Hello[\\s\\S]*AAA")
        os.killpg(child.pid, signal.SIGINT)
        expect(r"\(interrupted\)[\s\S]*> ")
        press("\x1b[A\r")  # the up arrow
        expect("Hello[\\s\\S]*AAA")
        os.killpg(child.pid, signal.SIGINT)
        expect(r"\(interrupted\)[\s\S]*> ")
        press("\x04")  # Ctrl-D
        assert child.wait(300) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)


# A model that repeats its prompt, then writes A until it is stopped.
SLOW = """
import runpy, sys, time
sys.path.insert(0, sys.argv.pop(1))
import generation
def generate(model, prompts, room, stops, *_, **__):
    yield from ([token] for token in prompts[0] if token not in stops)
    while True:
        yield [ord("A") - 33]
        time.sleep(0.05)
generation.generate = generate
runpy.run_module("chat", run_name="__main__")
"""


# ---------------------------------------------------------------- many prompts

ASKED = ["Hello there", "Why?", "What is the name of the longest river that you know of?", "Who are you?", "Yes?"]
GREEDY = ("--temperature", 0, "--max-new-tokens", 10, "--device", "cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n\n" for i, text in enumerate(ASKED)))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_from_a_file_are_answered_as_each_alone(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, say: Say
) -> None:
    monkeypatch.setattr(chat, "BATCH", 2)
    (tmp_path / "a.tmp").write_text("the user's own")
    flags = ("--prompts", prompts, "--out", tmp_path / "a.jsonl", *GREEDY)
    assert say(run, *flags) == f"wrote 5 answers to {tmp_path}/a.jsonl\n"
    assert (tmp_path / "a.tmp").read_text() == "the user's own"
    lines = read(tmp_path / "a.jsonl")
    assert [line["place"] for line in lines] == [f"{prompts}, line {i}" for i in (1, 3, 5, 7, 9)]
    assert [line["row"] for line in lines] == [{"prompt": text, "id": i} for i, text in enumerate(ASKED)]
    assert {line["checkpoint"] for line in lines} == {str(run)}
    for line, text in zip(lines, ASKED, strict=True):
        assert printable(line["answer"]) + "\n" == say(run, "--prompt", text, *GREEDY)


def test_two_checkpoints_answers_are_printed_below_each_prompt(run: Path, prompts: Path, say: Say) -> None:
    new, old = (str(run / f"checkpoints/step-00000{step}") for step in (2, 1))
    alone = {(name, text): say(name, "--prompt", text, *GREEDY)[:-1] for name in (new, old) for text in ASKED[:2]}
    blocks = [f"> {text}\n{new}: {alone[new, text]}\n{old}: {alone[old, text]}\n\n" for text in ASKED[:2]]
    shown = say(new, "--prompts", prompts, "--compare", old, *GREEDY).replace(" (cut)", "")
    assert shown.startswith("".join(blocks))
    shown = say(new, "--prompt", ASKED[1], "--compare", old, *GREEDY).replace(" (cut)", "")
    assert shown == blocks[1]
    assert alone[new, "Why?"] != alone[old, "Why?"]


def test_a_conversation_is_asked_up_to_its_last_answer_and_a_text_continued(
    run: Path, model: DeepSeekV2, tokenizer: Tokenizer, tmp_path: Path, say: Say
) -> None:
    talk = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"), ("user", "Why?"))]
    rows = [{"messages": [*talk, {"role": "assistant", "content": "Because."}]}, {"messages": talk}, {"text": "Once"}]
    (tmp_path / "q.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = ("--prompts", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", "--system", "Be kind.", *GREEDY)
    say(run, *flags)
    chat_prompt = prompt_of(tokenizer, "Hi", "Ho", "Why?", system="Be kind.")
    answered = text_of([token for (token,) in generate(model, [chat_prompt], 10)], tokenizer)
    continued = text_of([token for (token,) in generate(model, [tokenizer.encode("Once")], 10)], tokenizer)
    assert [printable(line["answer"]) for line in read(tmp_path / "a.jsonl")] == [answered, answered, continued]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.txt", "\ufeffHi there\n\nWhy?\n"),
        ("q.csv", '\ufeffprompt,id\nHi there,1\n"Why?",2\n'),
        ("q.json", '[{"prompt": "Hi there"}, {"prompt": "Why?"}]'),
    ],
)
def test_prompts_are_read_from_files_as_for_training(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    config = chat.ChatConfig("", prompts=str(tmp_path / name))
    assert [prompt for _, _, prompt in chat.given_prompts(config)] == [
        [{"role": "user", "content": text}] for text in ("Hi there", "Why?")
    ]


def test_prompts_of_a_table_are_read_without_its_pictures(tmp_path: Path) -> None:
    """Decoding one would open the file that the table names."""
    features = datasets.Features({"prompt": datasets.Value("string"), "picture": datasets.Image()})
    (tmp_path / "secret").write_text("no picture")
    row = {"prompt": "Why?", "picture": {"path": str(tmp_path / "secret"), "bytes": None}}
    datasets.Dataset.from_list([row], features).to_parquet(tmp_path / "q.parquet")
    assert chat.read_rows(str(tmp_path / "q.parquet")) == [(f"{tmp_path}/q.parquet, row 1", {"prompt": "Why?"})]


def test_a_lone_surrogate_survives_from_the_prompts_to_the_answers(run: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "a\\ud800é"}\n')
    say(run, "--prompts", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", *GREEDY)
    assert "a\\ud800é" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert read(tmp_path / "a.jsonl")[0]["row"] == {"prompt": "a\ud800é"}


SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi there!"}]
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there!"}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHAREGPT, "system": "Be brief.", "tools": '[{"name": "time"}]'},
        {"prompt": "Hello", "prompt_id": "7", "messages": [*MESSAGES, MESSAGES[0], MESSAGES[1]]},
        {"prompt": "Hello", "completion": "Hi there!", "system": "Be brief."},
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction.", "system": "Count."},
    ],
)
def test_a_row_is_asked_as_it_is_trained_on(row: dict[str, Any]) -> None:
    trained, *_ = formats.read_row(row)
    assert trained[-1]["role"] == "assistant"
    assert as_prompt(row, None) == trained[:-1]
    if trained[0]["role"] == "system":
        assert as_prompt(row, "Be kind.") == trained[:-1]
    else:
        assert as_prompt(row, "Be kind.") == [{"role": "system", "content": "Be kind."}, *trained[:-1]]


def test_a_row_without_a_question_is_refused() -> None:
    with pytest.raises(formats.RowError, match="messages: no question"):
        as_prompt({"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}, None)


# ---------------------------------------------------------------- limits and errors


def test_an_answer_ends_with_the_context(
    run: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], say: Say
) -> None:
    """The prompt leaves room for a single token; with one more, it is refused, with its place."""
    text = "a" + " a" * (CONTEXT - len(prompt_of(tokenizer, "")) - 2)
    assert len(prompt_of(tokenizer, text)) == CONTEXT - 1
    say(run, "--prompt", text)
    path = tmp_path / "q.txt"
    path.write_text(f"Hi\n{text} a\n")
    cases = {"the conversation": ["--prompt", text + " a"], f"{path}, line 2": ["--prompts", str(path)]}
    for name, flags in cases.items():
        assert run_main(chat.main, [str(run), *flags], tmp_path) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name} has {CONTEXT} tokens, but the model's context is {CONTEXT}")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--web", "--prompt", "Hi"], "--web answers what is typed on the page"),
        (["RUN", "--web"], "--web needs Gradio: pip install -r requirements-web.txt"),
        (["RUN", "--web", "--host", "0.0.0.0"], "--host 0.0.0.0 opens the page to others: give --auth USER:PASSWORD"),
        (["RUN", "--web", "--auth", "user"], "--auth is not USER:PASSWORD"),
        (["RUN", "--port", "8000"], "--host, --port and --auth need --web"),
        (["RUN", "--compare", "RUN"], "--out and --compare need --prompt or --prompts"),
        (["RUN", "--out", "a.jsonl"], "--out and --compare need --prompt or --prompts"),
        (["RUN", "--prompts", "q.jsonl", "--out", "q.jsonl"], "would overwrite the prompts"),
        (["RUN", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["RUN", "--prompts", "q.jsonl"], "q.jsonl, line 2: columns: of no known format"),
        (["RUN", "--temperature", "-1"], "temperature is -1.0"),
        (["RUN", "--temperature", "1e-320"], "temperature is 1e-320; it must be 0"),
        (["RUN", "--top-p", "0"], "top_p is 0.0"),
        (["RUN", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["RUN", "--seed", str(2**70)], "it must be below 2**63"),
        (["RUN", "--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "find_spec", lambda package: None)  # nothing is installed
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n{"note": "b"}\n')
    places = {"RUN": str(run), "q.jsonl": str(tmp_path / "q.jsonl")}
    assert run_main(chat.main, [places.get(flag, flag) for flag in flags], tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
