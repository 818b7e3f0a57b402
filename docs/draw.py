"""Draw the README's pictures into docs/, from numbers that the code itself computes:

    python docs/draw.py [mask labels packing attention experts nf4]

Two more need trained runs:

    python show.py runs runs/scratch runs/tiny --out docs/training.png    # cut to its panels loss and eval_bpb
    python chat.py runs/tiny --web --temperature 0      # docs/web.png: ask twice, click on a token, 900 pixels wide
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from checkpoint import iterate_weights, load_config
from config import PRESETS, DataConfig, ModelConfig
from datacollator import IGNORE, DataCollator, RowStream
from dataset import load_data
from kernels import sort_by_expert
from quantization import BLOCK, LEVELS, quantize
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TRAINED, CONTEXT = "#b7e4c7", "#e9ecef"
COLOURS = ("#a5d8ff", "#ffd8a8", "#d0bfff", "#b2f2bb", "#ffc9c9", "#ffec99")


def save(figure: Any, out: Path, **options: Any) -> None:
    figure.savefig(out, **options)
    plt.close(figure)


def canvas(width: float, height: float) -> Axes:
    """Return axes without ticks; a unit is half an inch, and y points down. 16 units fit a README's width."""
    _, axis = plt.subplots(figsize=(width / 2, height / 2), layout="constrained")
    axis.set(xlim=(-0.05, width + 0.05), ylim=(height, 0))
    axis.axis("off")
    return axis


def write(axis: Axes, x: float, y: float, text: str, **options: Any) -> None:
    axis.text(x, y, text, **{"fontsize": 10, "va": "center", **options})


def box(axis: Axes, x: float, y: float, width: float, text: str, colour: str = CONTEXT, height: float = 0.8) -> None:
    """Draw a box with text; (x, y) is its upper left corner."""
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="#868e96", linewidth=0.6))
    write(axis, x + width / 2, y + height / 2, text, ha="center")


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#495057") -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 0.9})


def draw_labels(tokens: Sequence[str], labels: Sequence[str | None], out: Path) -> None:
    """Draw each token above the one that it has to predict; None: not a target."""
    texts = ["-100" if label is None else label for label in labels]
    widths = [0.16 * max(len(token), len(text)) + 0.25 for token, text in zip(tokens, texts, strict=True)]
    axis = canvas(sum(widths) + 2.2, 2.4)
    for y, name in ((0.6, "input_ids  …"), (1.8, "labels  …")):
        write(axis, 2.1, y, name, ha="right")
    x = 2.2
    for token, text, width in zip(tokens, texts, widths, strict=True):
        box(axis, x, 0.2, width, token)
        box(axis, x, 1.4, width, text, "white" if text == "-100" else TRAINED)
        arrow(axis, (x + width / 2, 1.02), (x + width / 2, 1.38))
        x += width
    save(axis.figure, out, dpi=110)


def draw_attention(config: ModelConfig, out: Path) -> None:
    """Draw multi-head latent attention expanded, for training, and absorbed, for generation: both compute the same."""
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    nope, v = config.qk_nope_head_dim, config.v_head_dim
    shared, own, asks = COLOURS[1], COLOURS[0], COLOURS[2]
    columns = {
        "expanded: training, T tokens": [
            (f"latent (T, {rank}), rotary key (T, {rope})", shared),
            (f"times W_UK and W_UV\nkeys (T, {heads}, {nope} + {rope}), values (T, {heads}, {v})", own),
            (f"queries (T, {heads}, {nope} + {rope}) times keys\nsoftmax: ({heads}, T, T)", asks),
            (f"times values: (T, {heads}, {v})", own),
            (f"o_proj: (T, {config.hidden_size})", CONTEXT),
        ],
        "absorbed: generation, the newest of S tokens": [
            (f"query (1, {heads}, {nope} + {rope})", asks),
            (f"times W_UK: a query for latents\n(1, {heads}, {rank} + {rope})", asks),
            (f"times the cache (S, {rank} + {rope})\nsoftmax: ({heads}, 1, S)", shared),
            (f"times latents: (1, {heads}, {rank})\ntimes W_UV: values (1, {heads}, {v})", own),
            (f"o_proj: (1, {config.hidden_size})", CONTEXT),
        ],
    }
    meanings = {
        shared: "one for all heads, in the cache",
        own: "each head's keys and values",
        asks: "queries",
        CONTEXT: "output",
    }
    axis = canvas(16, 10.2)
    for column, (title, steps) in enumerate(columns.items()):
        x = 8.2 * column
        write(axis, x, 0.4, title, weight="bold")
        for i, (text, colour) in enumerate(steps):
            box(axis, x, 0.9 + 1.6 * i, 7.8, text, colour, 1.1)
            if i:
                arrow(axis, (x + 3.9, 0.42 + 1.6 * i), (x + 3.9, 0.88 + 1.6 * i))
    x = 0.0
    for colour, meaning in meanings.items():
        box(axis, x, 8.75, 0.4, "", colour, 0.4)
        write(axis, x + 0.55, 8.95, meaning)
        x += 0.14 * len(meaning) + 1.3
    write(axis, 0, 9.8, "W_UK and W_UV are the two parts of kv_b_proj: they make keys and values of latents.")
    save(axis.figure, out, dpi=110)


def draw_experts(
    tokens: Sequence[str],
    experts: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    places: Sequence[int],
    out: Path,
) -> None:
    """Draw how tokens reach their experts and return. experts, weights: K per token. places: the index of each of the
    N K rows after sorting by expert."""
    chosen = len(experts[0])
    flat = [
        (expert, weight) for each in zip(experts, weights, strict=True) for expert, weight in zip(*each, strict=True)
    ]
    axis = canvas(16, len(flat) * 0.9 + 1)
    titles = (
        (0.7, "tokens"),
        (4.25, "a row for each choice"),
        (9.3, "sorted by expert: one product"),
        (14.05, "weighted and summed"),
    )
    for x, title in titles:
        write(axis, x, 0.4, title, ha="center", weight="bold")
    height = 0.9 * chosen
    for i, token in enumerate(tokens):
        top, colour = 0.9 + i * height, COLOURS[i % len(COLOURS)]
        box(axis, 0, top, 1.4, token, colour, height - 0.1)
        rows = range(i * chosen, (i + 1) * chosen)
        terms = " + ".join(f"{flat[row][1]:.1f} · row {row}" for row in rows)
        box(axis, 12.1, top, 3.9, terms, colour, height - 0.1)
    for row, ((expert, weight), place) in enumerate(zip(flat, places, strict=True)):
        colour, y, there = COLOURS[row // chosen % len(COLOURS)], 0.9 + row * 0.9, 0.9 + place * 0.9
        box(axis, 2.1, y, 4.3, f"row {row}: expert {expert}, weight {weight:.1f}", colour)
        box(axis, 8, there, 2.6, f"expert {expert}: row {row}", colour)
        arrow(axis, (1.4, y + 0.4), (2.1, y + 0.4), "#adb5bd")
        arrow(axis, (6.4, y + 0.4), (8, there + 0.4))
        arrow(axis, (10.6, there + 0.4), (12.1, y + 0.4))
    save(axis.figure, out, dpi=110)


def draw_tokens(tokens: Sequence[str], mask: Sequence[int], out: Path, width: int = 88) -> None:
    """Draw a conversation as its tokens, coloured by what is trained on (mask 1), in lines of `width` characters."""
    figure, axis = plt.subplots(figsize=(9, 1.7))
    x, line = 0.0, 0
    for token, trained in zip(tokens, mask, strict=True):
        if x + len(token) > width:
            x, line = 0.0, line + 1
        box = {"facecolor": TRAINED if trained else CONTEXT, "edgecolor": "white", "boxstyle": "square,pad=0.25"}
        axis.text(x, -line, token.replace(" ", "·"), family="monospace", fontsize=9, bbox=box)
        x += len(token) + 1.2
    axis.set(xlim=(0, width), ylim=(-line - 0.5, 1))
    axis.set_title("green: trained on; grey: given", fontsize=9, loc="left")
    axis.axis("off")
    save(figure, out, dpi=150, bbox_inches="tight")


def draw_levels(numbers: np.ndarray, levels: Sequence[float], shares: np.ndarray, name: str, out: Path) -> None:
    """Draw a weight's numbers in [-1, 1], the levels that they are rounded to, and the share at each level."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True)
    top.hist(numbers, bins=201, range=(-1, 1), color=CONTEXT, edgecolor="#adb5bd", linewidth=0.3)
    for level in levels:
        top.axvline(level, color="#52b788", linewidth=1)
    over = "numbers over the largest of their block of 64, which itself sits at ±1; green: the 16 levels"
    top.set_title(f"{name}\n{over}", fontsize=11)
    top.set(yticks=[])
    edges = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    starts, ends = np.array([-1, *edges]), np.array([*edges, 1])
    bottom.bar(starts, shares, width=ends - starts, align="edge", color=TRAINED, edgecolor="white")
    bottom.axhline(1 / len(levels), color="#52b788", linewidth=1, linestyle="--")
    bottom.set_title("share of numbers that go to each level; dashed: equally many", fontsize=11)
    bottom.set(xlabel="number / absmax")
    bottom.yaxis.set_major_formatter("{x:.0%}")
    save(figure, out, dpi=110)


def draw_packing(sequence_ids: np.ndarray, labels: np.ndarray, out: Path) -> None:
    """Draw a packed row and which token attends to which; both arrays (T,), as in a Batch."""
    same = (sequence_ids[:, None] == sequence_ids[None, :]) & (sequence_ids[:, None] > 0)
    attended = np.tril(same)  # (T, T): query, key
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.5, 6), height_ratios=(1, 10), layout="constrained", sharex=True
    )
    shades = ListedColormap([CONTEXT, "#adb5bd", TRAINED, "#52b788", "white"])
    kinds = np.where(sequence_ids > 0, sequence_ids % 2 + 2 * (labels >= 0), 4)
    top.imshow(kinds[None], aspect="auto", cmap=shades, vmin=0, vmax=4, interpolation="nearest")
    top.set(yticks=[], title="a row of conversations; green: trained on")
    bottom.imshow(attended, aspect="auto", cmap="Greens", interpolation="nearest")
    bottom.set(title="who attends to whom", xlabel="key position", ylabel="query position")
    save(figure, out, dpi=110)


# ---------------------------------------------------------------- small cases, computed by the code itself


def labels_of_a_conversation(out: Path) -> None:
    tokenizer = Tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    ids, mask = tokenizer.render(messages)
    labels = DataCollator(len(ids), tokenizer.pad_token_id)([[(ids, mask)]])["labels"][0].tolist()

    def text(i: int) -> str:
        return tokenizer.decode([i]).replace("\n", "↵")

    start = ids.index(*tokenizer.encode("Hi"))  # the header before it is not a target either
    shown = [None if label == IGNORE else text(label) for label in labels]
    draw_labels([text(i) for i in ids[start:]], shown[start:], out)


def experts_of_three_tokens(out: Path) -> None:
    scores = torch.tensor([[0.3, 0.1, 0.6], [0.4, 0.1, 0.5], [0.7, 0.1, 0.2]])
    weights, experts = scores.topk(2)
    places, _ = sort_by_expert(experts.flatten(), 3)
    draw_experts(["I", "'m", "fine"], experts.tolist(), weights.tolist(), places.tolist(), out)


def tokens_of_a_conversation(out: Path) -> None:
    """Draw two exchanges as their tokens."""
    tokenizer = Tokenizer()
    texts = ("Hello, how are you?", "I'm fine, thank you!", "What is the capital of France?", "Paris.")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    ids, mask = tokenizer.render(messages)
    draw_tokens([tokenizer.decode([i]).replace("\n", "↵") for i in ids], mask, out)


def fullest_row(out: Path) -> None:
    """Draw the row with the most conversations of chitchat's test split."""
    tokenizer = Tokenizer()
    options = DataConfig(("chitchat",), train_split="test", max_seq_len=512, long_conversations="truncate")
    data = load_data(options, tokenizer, seed=0, want_eval=False).train
    rows = RowStream(data, DataCollator(512, tokenizer.pad_token_id))
    batch = rows.batch([max(range(rows.rows_per_epoch), key=lambda i: len(rows.row_indices(i)))])
    draw_packing(batch["sequence_ids"][0].numpy(), batch["labels"][0].numpy(), out)


def levels_of_a_weight(out: Path, weight: str = "model.layers.1.mlp.experts.gate_up_proj") -> None:
    """Draw the numbers of one of base's weights, and the levels that NF4 rounds them to."""
    tensor = dict(iterate_weights(ROOT / "base", load_config(ROOT / "base")))[weight]
    codes, absmax = quantize(tensor)
    scaled = tensor.float().view(-1, BLOCK) / absmax.clamp(min=1e-38)[:, None]
    shares = (codes >> 4).bincount(minlength=16) + (codes & 15).bincount(minlength=16)
    draw_levels(scaled.flatten().numpy(), LEVELS, (shares / shares.sum()).numpy(), weight, out)


PICTURES: dict[str, Callable[[Path], None]] = {
    "mask": tokens_of_a_conversation,
    "labels": labels_of_a_conversation,
    "packing": fullest_row,
    "attention": lambda out: draw_attention(PRESETS["base"].model, out),
    "experts": experts_of_three_tokens,
    "nf4": levels_of_a_weight,
}


def main(names: Sequence[str], directory: Path = ROOT / "docs") -> None:
    for name in names or PICTURES:
        PICTURES[name](directory / f"{name}.png")
        print(f"wrote {directory / name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
