"""What show.py prints and draws is what the code trains on."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import show
from config import PRESETS
from engine.cli import one_line_errors
from model import DeepSeekV2
from small_runs import conversations, run_main, write_jsonl
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG"


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, without its colours; an error as the line it is."""

    def run(*arguments: object) -> str:
        code = run_main(show.main, [str(argument) for argument in arguments], tmp_path)
        printed = capsys.readouterr()
        assert code == (2 if printed.err.startswith("error: ") else 0)
        return re.sub(r"\x1b\[[\d;]*m", "", printed.err if code else printed.out)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", conversations(9))


def test_tokens_are_shown_with_their_ids(shown: Callable[..., str], tmp_path: Path) -> None:
    tokenizer = Tokenizer()
    messages = [{"role": "user", "content": "Hi\nthere"}, {"role": "assistant", "content": "Fine."}]
    ids, _ = tokenizer.render(messages)
    rows = shown("tokens", "Hi\nthere", "Fine.").split("\n\n")[1]
    assert rows.replace("\n", "") == "".join(f"{tokenizer.decode([i])}{i} " for i in ids).replace("\n", "↵")
    assert shown("tokens", "Hi", "--out", tmp_path / "mask.png") == f"wrote {tmp_path}/mask.png\n"
    assert (tmp_path / "mask.png").read_bytes().startswith(PNG)


def test_colours_say_what_is_trained_on() -> None:
    tokenizer = Tokenizer(vocab_size=512)
    coloured = show.colour(tokenizer, *tokenizer.render([{"role": "assistant", "content": "a"}]))
    pieces = [piece.strip() for piece in coloured.split(show.RESET)]
    assert [piece.split("m", 1)[1] for piece in pieces if piece.startswith(show.TRAINED)] == ["a", "<|im_end|>"]


def test_rows_are_shown_as_they_are_packed(shown: Callable[..., str], data: Path, tmp_path: Path) -> None:
    printed = shown("rows", data)
    assert "9 conversations" in printed and "<|im_start|>user" in printed and "1 rows of 2,048 tokens" in printed
    shown("rows", data, "train", "--max-seq-len", 64, "--out", tmp_path / "packing.png")
    assert (tmp_path / "packing.png").read_bytes().startswith(PNG)
    assert shown("rows", data, "nope") == f"error: {data} has no split 'nope', only train (or parts: train[:95%])\n"


def test_a_drawn_row_is_as_wide_as_the_row() -> None:
    blocks = show.draw_row([50, 25], 100, width=20).replace(show.RESET, "|").split("|")
    assert blocks == ["\x1b[30;42m    50    ", "\x1b[30;46m 25  ", "·" * 5]


def test_the_models_table_adds_up(shown: Callable[..., str]) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DeepSeekV2(PRESETS["tiny"].model).parameters())
    numbers = {
        line.rsplit(maxsplit=2)[0]: int(line.split()[-2].replace(",", ""))
        for line in shown("model", "tiny").splitlines()[3:]
        if re.search(r"[\d,]+ +[\d,]+$", line)
    }
    assert numbers.pop("all") == sum(numbers.values()) == parameters
    assert shown("model").count("cache per token") == len(PRESETS)
    assert shown("model", "huge") == "error: unknown preset 'huge'; choose one of tiny, base, mini, v2_lite\n"


def test_runs_are_drawn_and_what_is_no_run_is_named(shown: Callable[..., str], tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in (1, 2)]
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show.Runs((str(tmp_path / "a"), str(tmp_path / "b")), str(tmp_path / "runs.png")).show()
    assert (tmp_path / "runs.png").read_bytes().startswith(PNG)
    assert shown("runs", tmp_path) == f"error: {tmp_path} is no run: it has no metrics.jsonl\n"
    assert shown("runs") == "error: name a run's directory, or several\n"


# ---------------------------------------------------------------- `| head`


@pytest.mark.parametrize("arguments", [["--help"], ["tokens", "word " * 1000]])
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    """What is printed is less than what Python writes at a time, and more."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, ROOT / "show.py", *arguments]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.stderr == ""
    assert result.returncode in (0, 141)


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        raise BrokenPipeError(32, "Broken pipe")
    assert (leaving.value.code, capsys.readouterr().err) == (2, "error: [Errno 32] Broken pipe\n")
