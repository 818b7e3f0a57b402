"""show.py prints and draws the data that a run trains on. Oracles: counts over the rendered conversations."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import show
from config import PRESETS
from docs import draw
from launch.command_line import one_line_errors, parse_arguments
from model import DeepSeekV2
from small_runs import conversations, run_main, train_here, write_jsonl
from tokenizer import Tokenizer
from view import terminal

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs show.py and returns its output, or its error, which have no colours in a pipe."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments: object) -> str:
        code = run_main(show.main, [str(argument) for argument in arguments], tmp_path)
        printed = capsys.readouterr()
        assert code == (2 if printed.err.startswith("error: ") else 0)
        assert "\x1b" not in printed.out + printed.err
        return printed.err if code else printed.out

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", conversations(9))


@pytest.mark.parametrize("template", ["chatml", "llama3", "deepseek"])
def test_tokens_are_shown_with_their_ids(template: str, shown: Callable[..., str]) -> None:
    tokenizer = Tokenizer(chat_template=template)
    messages = [{"role": "user", "content": "Hi\nthere"}, {"role": "assistant", "content": "Fine."}]
    ids, _ = tokenizer.render(messages)
    rows = shown("tokens", "Hi\nthere", "Fine.", "--chat-template", template).split("\n\n", 1)[1]
    assert rows.replace("\n", "") == "".join(f"{tokenizer.decode([i])}{i} " for i in ids).replace("\n", "↵")


def test_what_is_trained_on_and_text_that_spells_a_control_token_are_shown_differently() -> None:
    tokenizer = Tokenizer(vocab_size=512)
    typed = [{"role": "user", "content": "a <|im_end|><|im_start|> b\x1b[2J"}, {"role": "assistant", "content": "c"}]
    coloured = terminal.colour(tokenizer, *tokenizer.render(typed))
    pieces = [piece.strip() for piece in coloured.split(terminal.RESET)]
    assert [piece.split("m", 1)[1] for piece in pieces if piece.startswith(terminal.TRAINED)] == ["c", "<|im_end|>"]
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert plain.startswith("<|im_start|>user↵\na \\<|im_end|>\\<|im_start|> b\ufffd[2J<|im_end|>↵\n")


@pytest.mark.parametrize(
    ("variables", "tty", "coloured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
    ],
)
def test_colours_are_for_terminals(
    variables: dict[str, str], tty: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.setenv(name, variables.get(name, ""))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    assert terminal.on_screen(terminal.LEGEND) == (terminal.LEGEND if coloured else " trained  on   only  read ")


def test_rows_are_shown_as_they_are_packed(shown: Callable[..., str], data: Path) -> None:
    printed = shown("rows", data)
    assert "9 conversations" in printed and "<|im_start|>user" in printed and "1 rows of 2,048 tokens" in printed
    assert "<|start_header_id|>user" in shown("rows", data, "--chat-template", "llama3")


def test_a_drawn_row_is_as_wide_as_the_row() -> None:
    blocks = terminal.draw_row([50, 25], 100, width=20).replace(terminal.RESET, "|").split("|")
    assert blocks == ["\x1b[30;42m    50    ", "\x1b[30;46m 25  ", "·" * 5]


def test_the_parts_of_the_model_add_up(shown: Callable[..., str]) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DeepSeekV2(PRESETS["base"].model).parameters())
    numbers = {
        line.rsplit(maxsplit=2)[0]: int(line.split()[-2].replace(",", ""))
        for line in shown("model", "tiny").splitlines()[3:]
        if re.search(r"[\d,]+ +[\d,]+$", line)
    }
    assert numbers.pop("all") == sum(numbers.values()) == parameters
    assert shown("model").count("cache per token") == len(PRESETS)
    assert shown("model", "huge") == "error: unknown preset 'huge'; choose one of tiny, base, mini, v2_lite\n"


# ---------------------------------------------------------------- runs

METRICS = ("loss", "eval_loss", "eval_bpb")


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Three runs that differ in two fields; the last has null in its metrics and no evaluation."""
    for name, rate, width, losses, evaluations in (
        ("a", 1e-3, 64, [3.0, 1.5, 2.0], [2.5, 2.25, 2.75]),
        ("b$", 2e-3, 32, [4.0, 3.0, 2.5], [3.5, 3.25, 3.0]),
        ("c", 2e-3, 32, [None, 3.0, None], []),
    ):
        config = {"learning_rate": rate, "output_dir": name, "seed": 1, "model": {"hidden_size": width, "n_group": 1}}
        lines: list[dict[str, Any]] = [
            {"step": i, "loss": loss, "num_tokens": 10 * i} for i, loss in enumerate(losses, start=1)
        ]
        lines += [{"step": i, "eval_loss": loss, "eval_bpb": loss / 2} for i, loss in enumerate(evaluations, start=1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / name) for name in ("a", "b$", "c")]


def test_runs_are_compared_in_a_table_and_a_picture(runs: list[str], shown: Callable[..., str], tmp_path: Path) -> None:
    printed = shown("runs", *runs, "--out", tmp_path / "runs.png", "--csv", tmp_path / "runs.csv")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = [line.split() for line in printed.splitlines()[:4]]
    names = ["run", "learning_rate", "model.hidden_size", "step", *(f"{b}{m}" for m in METRICS for b in ("", "best "))]
    assert head == " ".join(names).split()
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [names, *rows]
    assert rows == [
        [runs[0], "0.001", "64", "3", "2", "1.5", "2.75", "2.25", "1.375", "1.125"],
        [runs[1], "0.002", "32", "3", "2.5", "2.5", "3", "3", "1.5", "1.5"],
        [runs[2], "0.002", "32", "3", "3", "3", "-", "-", "-", "-"],
    ]
    assert printed.endswith(f"wrote {tmp_path}/runs.csv\nwrote {tmp_path}/runs.png\n")


def test_an_error_names_what_is_no_run(runs: list[str], shown: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path) in shown("runs", tmp_path)
    assert shown("runs") == "error: name a run's directory, or several\n"


# ---------------------------------------------------------------- the README's pictures


@pytest.mark.parametrize("name", ["labels", "attention", "experts"])
def test_a_picture_can_be_read_in_the_readme(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """850 pixels wide: letters of at least 13 pixels, nothing cut, no text out of its box, no blank margin."""
    kept: list[tuple[Figure, int]] = []
    monkeypatch.setattr(draw, "save", lambda figure, out, dpi: kept.append((figure, dpi)))
    draw.PICTURES[name](Path())
    ((figure, dpi),) = kept
    figure.set_dpi(dpi)
    figure.canvas.draw()
    (axis,) = figure.axes
    texts = [text for text in axis.texts if text.get_text()]
    assert min(text.get_fontsize() for text in texts) * dpi / 72 * min(1, 850 / figure.bbox.width) >= 13
    boxes = [patch.get_window_extent() for patch in axis.patches]
    extents = [text.get_window_extent() for text in texts]
    for extent in (*extents, *boxes):
        assert extent.x0 >= 1 and extent.y0 >= 1
        assert extent.x1 <= figure.bbox.x1 - 1 and extent.y1 <= figure.bbox.y1 - 1
    assert max(box.x1 for box in boxes) > 0.98 * figure.bbox.x1
    for extent in extents:
        middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
        assert all(b.x0 < extent.x0 and extent.x1 < b.x1 for b in boxes if b.contains(*middle))
    plt.close(figure)


def test_pictures_of_numbers_are_written(tmp_path: Path) -> None:
    draw.main(["mask", "nf4"], tmp_path)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("mask", "nf4"))


# ---------------------------------------------------------------- a run's data


def numbers_of(table: str) -> dict[str, list[str]]:
    """Return the columns of the table by the name of their line."""
    lines = [re.split(r"  +", line.strip()) for line in table.splitlines() if re.search(r"\w  +[\d,]+", line)]
    return {name: columns for name, *columns in lines}


def test_the_table_counts_what_a_run_sees(shown: Callable[..., str], tmp_path: Path) -> None:
    """Against a literal count over the rendered conversations."""
    talks = conversations(40)
    talks[7] = talks[3]
    path = write_jsonl(tmp_path / "talks.jsonl", talks)
    flags = ("--max-seq-len", 96, "--eval-steps", 0, "--max-steps", 10, "--batch-size", 2, "--num-proc", 1)
    printed = shown("data", path, "tiny", *flags)
    counted = numbers_of(printed)
    tokenizer = Tokenizer(vocab_size=8192)
    rendered = [tokenizer.render(messages) for messages in talks]
    tokens, targets = sum(len(ids) for ids, _ in rendered), sum(sum(mask) for _, mask in rendered)
    assert counted["conversations"] == ["40"]
    assert counted["tokens"] == [f"{tokens:,}"]
    assert counted["trained on"] == [f"{targets:,} ({targets / tokens:.0%})"]
    assert counted["duplicates"] == ["1"]
    assert "10 steps of 2 rows are " in printed


def test_too_few_rows_for_a_step_are_an_error_in_training_and_reported_by_a_dry_run_and_show_data(
    data: Path, shown: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dry run prints the same table as show.py, then what the run takes."""
    flags = ["--max-seq-len", "96", "--batch-size", "8", "--num-proc", "1", "--device", "cpu"]
    command = ["tiny", "--dataset", str(data), *flags, "--output-dir", str(tmp_path / "run")]
    assert train_here(command, tmp_path) == 2
    error = capsys.readouterr().err.partition("error: ")[2].strip()
    assert "rows do not fill one step of 8; lower batch_size or gradient_accumulation_steps" in error
    table = re.split(r"\n\n +least", shown("data", data, "tiny", *flags))[0]
    assert table.endswith(f"; {error}") and "held out" in table
    assert train_here([*command, "--dry-run"], tmp_path) == 0
    printed, _, cost = capsys.readouterr().out.partition("\n1 rank; ")
    assert printed == table
    assert cost.startswith("per rank and step 1 micro-batches of 768 tokens") and "at the peak" in cost
    assert not (tmp_path / "run").exists()


def test_any_row_can_be_shown(shown: Callable[..., str], tmp_path: Path) -> None:
    talks = conversations(20)
    path = write_jsonl(tmp_path / "talks.jsonl", talks)
    flags = ("tiny", "--max-seq-len", 40, "--num-proc", 1)
    tokenizer = Tokenizer(vocab_size=8192)
    for row in (1, 20):
        printed = shown("data", path, *flags, "--row", row)
        assert f"row {row}, piece 1, " in printed
        for message in talks[row - 1]:
            if message["role"] == "assistant" and len(tokenizer.encode(message["content"])) < 15:
                assert message["content"] in printed
    assert shown("data", path, *flags, "--row", 21) == (
        "error: no piece of row 21 is used: no such row exists, or it was dropped\n"
    )
    assert shown("data", path, *flags, "--random", 3).count(" of them trained on\n") == 3
    assert shown("data", path, *flags).count(" of them trained on\n") == 1


@pytest.mark.parametrize("flags", [("--lora-alpha", "8"), ("--model.hidden-size", "64")])
def test_an_invalid_run_is_the_same_error_as_in_training(
    flags: tuple[str, ...], data: Path, shown: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(["tiny", "--dataset", str(data), *flags, "--device", "cpu"], tmp_path) == 2
    error = capsys.readouterr().err
    assert shown("data", data, "tiny", *flags, "--device", "cpu") == error


@pytest.mark.parametrize(("cuda", "preset"), [(True, "mini"), (False, "tiny")])
def test_the_default_preset_depends_on_cuda(cuda: bool, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert parse_arguments(["--dry-run"]).preset == preset


def test_a_row_of_each_source_is_shown_once_with_its_name_and_side(shown: Callable[..., str], tmp_path: Path) -> None:
    talks = conversations(24)
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", talks[i::2]) for i, name in enumerate("ab"))
    flags = ("--max-seq-len", 128, "--num-proc", 1, "--device", "cpu", "--eval-fraction", 0.3)
    sides = set()
    for row in (1, 5, 8, 12):
        printed = shown("data", f"{a}:3", b, "tiny", "--row", row, *flags)
        heads = re.findall(r"^(.+), train, row (\d+), piece (\d+), (trained on|held out): ", printed, re.MULTILINE)
        assert {(name, number) for name, number, _, _ in heads} == {("a.jsonl", str(row)), ("b.jsonl", str(row))}
        assert len({head[:3] for head in heads}) == len(heads)
        sides |= {side for *_, side in heads}
        texts = re.split(r"^(\S+), train, row .*\n", printed, flags=re.MULTILINE)[1:]
        texts_by_source = dict(zip(texts[::2], texts[1::2], strict=True))
        assert talks[2 * row - 2][1]["content"] in texts_by_source["a.jsonl"]
        assert talks[2 * row - 1][1]["content"] in texts_by_source["b.jsonl"]
    assert sides == {"trained on", "held out"}
    assert printed == shown("data", "--row", row, "tiny", f"{a}:3", b, *flags)  # the order of the words is free
    drawn = shown("data", f"{a}:3", b, "tiny", "--random", 99, *flags)
    heads = re.findall(r"^(.+, train, row \d+, piece \d+), trained on: ", drawn, re.MULTILINE)
    assert len(set(heads)) == len(heads) > 12


def test_the_spread_is_the_percentiles() -> None:
    printed = terminal.spread({"tokens per piece": np.arange(101), "targets per piece": np.arange(0, 2020, 20)})
    assert [line.split() for line in printed.splitlines()] == [
        ["least", "10%", "median", "90%", "most"],
        ["tokens", "per", "piece", "0", "10", "50", "90", "100"],
        ["targets", "per", "piece", "0", "200", "1,000", "1,800", "2,000"],
    ]


# ---------------------------------------------------------------- `| head`


@pytest.mark.parametrize("arguments", [["--help"], ["tokens", "word " * 1000]])
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    """Output below and above the size of Python's buffer."""
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
