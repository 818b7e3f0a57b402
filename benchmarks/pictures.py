"""The README's pictures: python benchmarks/pictures.py [RUN]   (default: runs/tiny; writes into docs/)"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS
from datacollator import DataCollator, RowStream
from dataset import load_dataset_split
from engine.cli import one_line_errors
from engine.run_directory import read_metrics
from tokenizer import Tokenizer

TRAINED, GIVEN = "#b7e4c7", "#e9ecef"
CONVERSATION = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I'm fine, thank you!"},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def draw_mask(out: Path) -> None:
    """A conversation as its tokens, coloured by what is trained on."""
    tokenizer = Tokenizer()
    ids, mask = tokenizer.render(CONVERSATION)
    figure, axis = plt.subplots(figsize=(9, 1.7))
    x, line, width = 0.0, 0, 88
    for token, trained in zip(ids, mask, strict=True):
        text = tokenizer.decode([token]).replace("\n", "↵").replace(" ", "·")
        if x + len(text) > width:
            x, line = 0.0, line + 1
        box = {"facecolor": TRAINED if trained else GIVEN, "edgecolor": "white", "boxstyle": "square,pad=0.25"}
        axis.text(x, -line, text, family="monospace", fontsize=9, bbox=box)
        x += len(text) + 1.2
    axis.set(xlim=(0, width), ylim=(-line - 0.5, 1))
    axis.set_title("green: trained on; grey: given", fontsize=9, loc="left")
    axis.axis("off")
    figure.savefig(out / "mask.png", dpi=150, bbox_inches="tight")


def draw_packing(out: Path) -> None:
    """A packed row, and which token attends to which."""
    tokenizer = Tokenizer()
    config = PRESETS["tiny"]
    data, _ = load_dataset_split("chitchat", "test", tokenizer, config.data.max_seq_len)
    rows = RowStream(data, DataCollator(config.data.max_seq_len, tokenizer.pad_token_id), seed=0)
    index = max(range(rows.rows_per_epoch), key=lambda i: len(rows.row_indices(i)))
    batch = {name: tensor[0].numpy() for name, tensor in rows.batch([index]).items()}
    documents = batch["sequence_ids"]
    same = (documents[:, None] == documents[None, :]) & (documents[:, None] > 0)
    attended = same & np.tril(np.ones_like(same))
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.5, 6), height_ratios=(1, 10), layout="constrained", sharex=True
    )
    shades = ListedColormap([GIVEN, "#adb5bd", TRAINED, "#52b788", "white"])
    kinds = np.where(documents > 0, documents % 2 + 2 * (batch["labels"] >= 0), 4)
    top.imshow(kinds[None], aspect="auto", cmap=shades, vmin=0, vmax=4, interpolation="nearest")
    top.set(yticks=[], title="a row of conversations; green: trained on")
    bottom.imshow(attended, aspect="auto", cmap="Greens", interpolation="nearest")
    bottom.set(title="who attends to whom", xlabel="key position", ylabel="query position")
    figure.savefig(out / "packing.png", dpi=110)


def draw_training(run: str, out: Path) -> None:
    """Loss and expert load of a run."""
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_bpb" in line]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.8, label="training")
    left.plot(
        [line["step"] for line in evaluations], [line["eval_loss"] for line in evaluations], "o-", label="held out"
    )
    left.set(title="loss (nats per target token)", xlabel="step")
    left.legend()
    middle.plot([line["step"] for line in evaluations], [line["eval_bpb"] for line in evaluations], "o-", color="C1")
    middle.set(title="held-out bits per byte", xlabel="step")
    right.plot([line["step"] for line in steps], [line["expert_load"] for line in steps], linewidth=0.8, color="C2")
    right.axhline(1, color="grey", linestyle=":")
    right.set(title="expert load (largest over mean; 1: balanced)", xlabel="step")
    figure.savefig(out / "training.png", dpi=110)


if __name__ == "__main__":
    with one_line_errors():
        directory = Path("docs")
        directory.mkdir(exist_ok=True)
        draw_mask(directory)
        draw_packing(directory)
        draw_training(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny", directory)
        print("wrote docs/mask.png, docs/packing.png, docs/training.png")
