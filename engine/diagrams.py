"""Pictures of the ideas, from the numbers that the code itself works with."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from config import PRESETS, ModelConfig
from datacollator import IGNORE, DataCollator
from engine.kernels import sort_by_expert
from engine.plots import CONTEXT, TRAINED, save
from tokenizer import Tokenizer

COLOURS = ("#a5d8ff", "#ffd8a8", "#d0bfff", "#b2f2bb", "#ffc9c9", "#ffec99")


def canvas(width: float, height: float) -> Axes:
    """Without axes; a unit is half an inch, and y goes down."""
    _, axis = plt.subplots(figsize=(width / 2, height / 2), layout="constrained")
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    return axis


def box(axis: Axes, x: float, y: float, width: float, text: str, colour: str = CONTEXT, height: float = 0.8) -> None:
    """(x, y) is its upper left corner."""
    axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="#868e96", linewidth=0.6))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#495057") -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 0.9})


def draw_labels(tokens: Sequence[str], labels: Sequence[str | None], out: str | Path) -> None:
    """Under each token the one that it has to predict; None: nothing is learned there."""
    texts = ["-100" if label is None else label for label in labels]
    widths = [max(1.0, 0.17 * max(len(token), len(text)) + 0.3) for token, text in zip(tokens, texts, strict=True)]
    axis = canvas(sum(widths) + 2, 2.4)
    for y, name in ((0.6, "input_ids"), (1.8, "labels")):
        axis.text(0, y, name, fontsize=8, va="center")
    x = 2.0
    for token, text, width in zip(tokens, texts, widths, strict=True):
        box(axis, x, 0.2, width, token)
        box(axis, x, 1.4, width, text, "white" if text == "-100" else TRAINED)
        arrow(axis, (x + width / 2, 1.02), (x + width / 2, 1.38))
        x += width
    save(axis.figure, out, dpi=110)  # type: ignore[arg-type]


def draw_attention(config: ModelConfig, out: str | Path) -> None:
    """Multi-head latent attention: expanded, as it is trained, and absorbed, as it generates; both give the same."""
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    nope, v = config.qk_nope_head_dim, config.v_head_dim
    columns = {
        "expanded (training, T tokens): every head's keys and values are rebuilt": [
            (f"latent (T, {rank}) and rotary key (T, {rope})", COLOURS[1]),
            (f"kv_b_proj: keys (T, {heads}, {nope} + {rope}), values (T, {heads}, {v})", COLOURS[0]),
            (f"queries (T, {heads}, {nope} + {rope}) meet the keys: softmax ({heads}, T, T)", COLOURS[2]),
            (f"weights · values: (T, {heads}, {v})", COLOURS[0]),
            (f"o_proj: (T, {config.hidden_size})", CONTEXT),
        ],
        "absorbed (generation, one new token, S in the cache): none is rebuilt": [
            (
                f"query (1, {heads}, {nope} + {rope}), by W_uk into the latent space: (1, {heads}, {rank} + {rope})",
                COLOURS[2],
            ),
            (f"meets the cache (S, {rank} + {rope}), one for all heads: softmax ({heads}, 1, S)", COLOURS[1]),
            (f"weights · latents: (1, {heads}, {rank})", COLOURS[1]),
            (f"W_uv makes values of them: (1, {heads}, {v})", COLOURS[0]),
            (f"o_proj: (1, {config.hidden_size})", CONTEXT),
        ],
    }
    axis = canvas(21.4, 6.8)
    for column, (title, steps) in enumerate(columns.items()):
        x = 10.8 * column
        axis.text(x, 0.5, title, fontsize=8, weight="bold", va="center")
        for i, (text, colour) in enumerate(steps):
            box(axis, x, 1 + 1.2 * i, 10.4, text, colour)
            if i:
                arrow(axis, (x + 5.2, 0.62 + 1.2 * i), (x + 5.2, 0.98 + 1.2 * i))
    save(axis.figure, out, dpi=110)  # type: ignore[arg-type]


def draw_experts(
    tokens: Sequence[str], experts: Sequence[Sequence[int]], places: Sequence[int], out: str | Path
) -> None:
    """The way of tokens to their experts and back. experts: of each token, K; places: where each of the N K rows stands
    among those sorted by expert."""
    chosen = len(experts[0])
    flat = [expert for row in experts for expert in row]
    axis = canvas(17, len(flat) * 0.9 + 1)
    titles = (
        (1.5, "tokens"),
        (5, "a row for each choice"),
        (9.2, "sorted by expert: one product"),
        (13.6, "back and summed"),
    )
    for x, title in titles:
        axis.text(x, 0.4, title, fontsize=8, ha="center", weight="bold")
    height = 0.9 * chosen
    for i, token in enumerate(tokens):
        top, colour = 0.9 + i * height, COLOURS[i % len(COLOURS)]
        box(axis, 0.5, top, 2, token, colour, height - 0.1)
        box(axis, 12.6, top, 2, token, colour, height - 0.1)
    for row, (expert, place) in enumerate(zip(flat, places, strict=True)):
        colour, y, there = COLOURS[row // chosen % len(COLOURS)], 0.9 + row * 0.9, 0.9 + place * 0.9
        box(axis, 4, y, 2, f"row {row}", colour)
        box(axis, 8, there, 2.4, f"expert {expert}, row {row}", colour)
        arrow(axis, (2.5, y + 0.4), (4, y + 0.4), "#adb5bd")
        arrow(axis, (6, y + 0.4), (8, there + 0.4))
        arrow(axis, (10.4, there + 0.4), (12.6, y + 0.4))
    save(axis.figure, out, dpi=110)  # type: ignore[arg-type]


def draw_ranks(rows: dict[tuple[int, int], range], out: str | Path) -> None:
    """Which rows of a step go where. rows: by micro-batch and rank."""
    micro_batches, ranks = (1 + max(place[i] for place in rows) for i in (0, 1))
    size = len(rows[0, 0])
    wide = 1.1 * size + 0.6
    axis = canvas(3 + wide * ranks, 1.2 + 1.2 * micro_batches)
    for (micro_batch, rank), mine in rows.items():
        x, y = 3 + wide * rank, 1.2 * (micro_batch + 1)
        axis.text(0, y + 0.4, f"micro-batch {micro_batch}", fontsize=8, va="center")
        axis.text(x + 0.55 * size, 0.7, f"rank {rank}", fontsize=8, ha="center", weight="bold")
        for i, row in enumerate(mine):
            box(axis, x + 1.1 * i, y, 1, str(row), COLOURS[rank % len(COLOURS)])
    save(axis.figure, out, dpi=110)  # type: ignore[arg-type]


# ---------------------------------------------------------------- small cases, computed by the code itself


def labels_of_a_conversation(out: str) -> None:
    tokenizer = Tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there!"}]
    ids, mask = tokenizer.render(messages)
    labels = DataCollator(len(ids), tokenizer.pad_token_id)([[(ids, mask)]])["labels"][0].tolist()

    def text(i: int) -> str:
        return tokenizer.decode([i]).replace("\n", "↵")

    draw_labels([text(i) for i in ids], [None if label == IGNORE else text(label) for label in labels], out)


def experts_of_three_tokens(out: str) -> None:
    experts = torch.tensor([[2, 0], [2, 0], [0, 2]])
    places, _ = sort_by_expert(experts.flatten(), 3)
    draw_experts(["I", "'m", "fine"], experts.tolist(), places.tolist(), out)


def rows_of_two_ranks(out: str) -> None:
    """As StepLoader (engine/prefetch.py) takes them."""
    ranks, micro_batches, size = 2, 3, 4
    starts = {(m, rank): (m * ranks + rank) * size for m in range(micro_batches) for rank in range(ranks)}
    draw_ranks({place: range(start, start + size) for place, start in starts.items()}, out)


IDEAS: dict[str, Callable[[str], None]] = {
    "labels": labels_of_a_conversation,
    "attention": lambda out: draw_attention(PRESETS["tiny"].model, out),
    "experts": experts_of_three_tokens,
    "ranks": rows_of_two_ranks,
}
