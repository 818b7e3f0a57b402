"""What happens if a part of SFT is left out? `tiny`, trained once as it is and once with each textbook mistake.

    python benchmarks/ablations.py [--steps 60] [--seeds 1 2 3] [--variants NAME ...] [--folder runs/ablations]

A variant replaces one or two functions of this repository from outside; seed, data and steps stay the same. Each run
has a process of its own and appends a line to FOLDER/results.jsonl. Runs that are already there are skipped, so an
interrupted table can be continued; delete the file to start again. The Markdown table is printed at the end.

All variants are measured alike, by the unchanged code, on conversations that no run has trained on:

- bits per byte: of the assistant's words, without the token that ends its turn (chitchat; short: chatterbot); change:
  the difference from the plain run with the same seed;
- end: greedy answers to the first turns of 100 conversations that end within 64 tokens;
- whole: those of them that are whole sentences as well (`is_whole` in answers.py);
- distinct: different ones among the 100 answers;
- busiest expert: tokens that its router sends to it, over the mean of all experts.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from answers import first_turns, is_whole
from rivals import in_child  # first: sets the environment

import model as model_module
import train_sft
from checkpoint import load_model_and_tokenizer
from data.sources import open_split
from datacollator import Counts, DataCollator, MicroBatch, Piece, RowStream, Step, StepLoader, make_micro_batch
from generation import Prompt, answers
from launch.run_directory import read_metrics
from model import DeepSeekV2, LossOutput
from tokenizer import ROLES, EncodedTurn, RenderedTurn, Tokenizer
from trainer import Trainer

Replace = Callable[[Any, str, Any], None]  # owner, name, replacement
Message = dict[str, Any]
AS_IT_IS = "as it is"
QUESTION = "What did you do today?"

# ---------------------------------------------------------------- the mistakes


def nothing(replace: Replace) -> None:
    pass


def loss_on_all_tokens(replace: Replace) -> None:
    """The prompt is trained on as well. TRL: `assistant_only_loss=False`, its default."""
    join = Tokenizer.join

    def join_all(self: Tokenizer, turns: Sequence[RenderedTurn]) -> tuple[list[int], list[int], list[int]]:
        ids, mask, borders = join(self, turns)
        return ids, [1] * len(mask), borders

    replace(Tokenizer, "join", join_all)


def without_end(turn: RenderedTurn) -> RenderedTurn:
    """Return the turn with its last trained token masked, the one that ends it."""
    if 1 in turn.mask:
        turn.mask[len(turn.mask) - 1 - turn.mask[::-1].index(1)] = 0
    return turn


def end_not_trained(replace: Replace) -> None:
    """`<|im_end|>` is masked. transformers: `pad_token = eos_token` with
    DataCollatorForLanguageModeling (issue 23530)."""
    render_turn = Tokenizer.render_turn

    def render(self: Tokenizer, message: Message) -> RenderedTurn:
        return without_end(render_turn(self, message))

    replace(Tokenizer, "render_turn", render)


def header_trained(replace: Replace) -> None:
    """The newline after `<|im_start|>assistant` is trained on, although every prompt will contain it. TRL's former
    DataCollatorForCompletionOnlyLM with `response_template="<|im_start|>assistant"`."""
    render_turn = Tokenizer.render_turn

    def render(self: Tokenizer, message: Message) -> RenderedTurn:
        turn = render_turn(self, message)
        if 1 in turn.mask:
            turn.mask[turn.mask.index(1) - 1] = 1
        return turn

    replace(Tokenizer, "render_turn", render)


def packed_see_each_other(replace: Replace) -> None:
    """A row is one long text. nanoGPT; transformers' `run_clm.py` (`group_texts`)."""
    row, counts = RowStream.row, RowStream.counts

    def one_text(self: RowStream, i: int) -> list[Piece]:
        ids, masks = zip(*row(self, i), strict=True)
        return [(np.concatenate(ids), np.concatenate(masks))]

    def count(self: RowStream, rows: Sequence[int]) -> Counts:
        return counts(self, rows)._replace(documents=len(rows))

    replace(RowStream, "row", one_text)
    replace(RowStream, "counts", count)


def mean_of_means(replace: Replace) -> None:
    """The step's conversations, sorted by length, in 4 micro-batches whose mean losses are averaged. transformers'
    Trainer before 4.46 ("gradient accumulation issue", pull request 34191)."""
    forward = Trainer.forward

    def load(self: StepLoader, first_row: int) -> Step:
        rows = range(first_row, first_row + self.rows_per_step)
        ordered = sorted((c for i in rows for c in self.rows.row(i)), key=lambda conversation: len(conversation[0]))
        pad = DataCollator(self.rows.collator.max_seq_len, self.rows.collator.pad_token_id, packing=False)
        parts = [[[ordered[i]] for i in part] for part in np.array_split(np.arange(len(ordered)), 4)]
        micro_batches = [make_micro_batch(pad(part), self.world.device) for part in parts]
        return Step(micro_batches, self.rows.counts(rows)._replace(targets=len(parts)))

    def mean_loss(self: Trainer, micro_batch: MicroBatch) -> LossOutput:
        output = forward(self, micro_batch)
        return output._replace(loss_sum=output.loss_sum / output.num_targets)

    replace(StepLoader, "load", load)
    replace(Trainer, "forward", mean_loss)


def no_balance_loss(replace: Replace) -> None:
    """Nothing evens out the experts' load. transformers' DeepSeek-V2."""

    def zero(config: Any, scores: torch.Tensor, *_: Any) -> torch.Tensor:
        return scores.new_zeros(())

    replace(model_module, "balance_loss", zero)


def roles_as_words(replace: Replace) -> None:
    """`User: ...` and `Assistant: ...`, one line each, without control tokens. Vicuna v0 (`### Human: ...`)."""
    init = Tokenizer.__init__

    def init_with_words(self: Tokenizer, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        newline = self.encode("\n")
        for role in ROLES:
            header = self.encode(f"{role.title()}:")
            self._turns[role] = EncodedTurn(header, " ", "", newline, [], header)
        self.stop_ids = (newline[-1], self.pad_token_id)

    replace(Tokenizer, "__init__", init_with_words)


class Variant(NamedTuple):
    change: Callable[[Replace], None] = nothing
    flags: tuple[str, ...] = ()


VARIANTS = {
    AS_IT_IS: Variant(),
    "loss on all tokens": Variant(loss_on_all_tokens),
    "end token not trained on": Variant(end_not_trained),
    "header's last token trained on": Variant(header_trained),
    "packed conversations see each other": Variant(packed_see_each_other),
    "mean of micro-batch means": Variant(mean_of_means),
    # at its own best learning rate: tiny's is chosen for the base
    "random weights instead of the base": Variant(flags=("--init-from", "none", "--learning-rate", "4e-3")),
    "no balance loss": Variant(no_balance_loss),
    "no template, roles as words": Variant(roles_as_words),
}


@contextlib.contextmanager
def changed(name: str) -> Iterator[None]:
    """A context in which the variant's functions take the place of ours.

    Tokenised data is cached by the tokenizer's fingerprint and by files that a replacement does not change, so the
    variant's name becomes part of the fingerprint.
    """
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, attribute: str, new: Any) -> None:
            stack.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, new)

        fingerprint = Tokenizer.fingerprint
        replace(Tokenizer, "fingerprint", lambda self: f"{name}: {fingerprint(self)}")
        VARIANTS[name].change(replace)
        yield


# ---------------------------------------------------------------- one run


def train(name: str, run: Path, cache: Path, *flags: str) -> tuple[DeepSeekV2, Tokenizer]:
    """Train a variant of `tiny` into `run`. cache: a folder for its tokenised data alone.

    Return the model and the tokenizer with which it was trained.
    """
    arguments = ["train_sft.py", "tiny", "--output-dir", str(run), "--eval-steps", "0", "--sample-prompts"]
    with changed(name), contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "argv", sys.argv)
        stack.callback(setattr, datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
        sys.argv, datasets.config.HF_DATASETS_CACHE = [*arguments, *flags, *VARIANTS[name].flags], cache
        train_sft.main()
        return load_model_and_tokenizer(run)


def words_only(messages: Sequence[Message], tokenizer: Tokenizer) -> Piece:
    """Render a conversation whose targets are the assistant's words without the token that ends its turn."""
    ids, mask = list(tokenizer.start), [0] * len(tokenizer.start)
    for message in messages:
        turn = without_end(tokenizer.render_turn(message))
        ids += turn.ids
        mask += turn.mask
    return ids, mask


def held_out(source: str, number: int = 100, characters: int = 1500) -> list[list[Message]]:
    """Return the beginnings of a source's first held-out conversations, cut between turns."""
    conversations = []
    for row in open_split(source, f"test[:{number}]"):
        ends = np.cumsum([len(message["content"]) for message in row["messages"]])
        conversations.append(row["messages"][: max(2, int((ends <= characters).sum()))])
    return conversations


@torch.no_grad()
def bits_per_byte(
    model: DeepSeekV2, tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], batch_size: int = 8
) -> tuple[float, float]:
    """Return the bits per byte of the assistant's words, and the busiest expert's load over the mean load."""
    collate = DataCollator(model.config.max_position_embeddings, tokenizer.pad_token_id, packing=False)
    nats, experts = 0.0, torch.zeros(())
    for start in range(0, len(conversations), batch_size):
        rows = [[words_only(messages, tokenizer)] for messages in conversations[start : start + batch_size]]
        output = model(**collate(rows))
        nats, experts = nats + output.loss_sum.item(), experts + output.expert_counts
    spoken = [m["content"] for messages in conversations for m in messages if m["role"] == "assistant"]
    load = (experts.amax(dim=1) / experts.mean(dim=1)).mean().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in spoken), load


def measure(model: DeepSeekV2, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the figures of the table for a trained model, with its answers."""
    model.eval()
    bits, load = bits_per_byte(model, tokenizer, held_out("chitchat"))
    short, _ = bits_per_byte(model, tokenizer, held_out("chatterbot"))
    questions: list[Prompt] = [[{"role": "user", "content": question}] for question in (QUESTION, *first_turns(100))]
    found = answers(model, tokenizer, questions, 64)
    ended = [answer.stopped for answer in found]
    replies = [answer.text.strip() for answer in found]
    whole = [end and is_whole(reply) for reply, end in zip(replies, ended, strict=True)]
    return {
        "bits_per_byte": bits,
        "short_bits_per_byte": short,
        "ended": sum(ended[1:]),
        "whole": sum(whole[1:]),
        "load": load,
        "sample": replies[0],
        "replies": replies[1:],
    }


def run(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train and measure a variant. Return its line of results.jsonl."""
    began = time.perf_counter()
    directory = folder / f"{list(VARIANTS).index(name)}-seed{seed}"
    flags = ("--seed", str(seed), "--max-steps", str(steps), "--save-steps", "0")
    model, tokenizer = train(name, directory, folder / "cache", *flags)
    loads = [line["expert_load"] for line in read_metrics(directory)]
    result = {"variant": name, "seed": seed, "steps": steps, **measure(model, tokenizer), "loads": loads}
    return result | {"seconds": time.perf_counter() - began}


# ---------------------------------------------------------------- the table

COLUMNS = {
    "bits_per_byte": ("bits per byte", 3),
    "change": ("change", 3),
    "short_bits_per_byte": ("short", 3),
    "ended": ("end", 0),
    "whole": ("whole", 0),
    "distinct": ("distinct", 0),
    "load": ("busiest expert", 2),
}


def cell(values: Sequence[float], digits: int) -> str:
    noise = f" ± {stdev(values):.{max(digits, 1)}f}" if len(values) > 1 else ""
    return f"{mean(values):z.{digits}f}{noise}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per variant: mean ± standard deviation over seeds, and the first seed's answer to QUESTION."""
    plain = {result["seed"]: result["bits_per_byte"] for result in results if result["variant"] == AS_IT_IS}
    for result in results:
        result["change"] = result["bits_per_byte"] - plain.get(result["seed"], math.nan)
        result["distinct"] = len(set(result["replies"]))
    titles = [title for title, _ in COLUMNS.values()]
    lines = [f"| variant | {' | '.join(titles)} | {QUESTION!r} |", "|---" * (len(titles) + 2) + "|"]
    for name in VARIANTS:
        found = [result for result in results if result["variant"] == name]
        if found:
            cells = [cell([result[key] for result in found], digits) for key, (_, digits) in COLUMNS.items()]
            lines.append(f"| {name} | {' | '.join(cells)} | {found[0]['sample']:.60} |")
    return "\n".join(lines)


def load_table(results: Sequence[dict[str, Any]], parts: int = 4) -> str:
    """Return a row per variant: the busiest expert's load in training, by quarters of the steps."""
    steps = results[0]["steps"]
    titles = [f"steps {part[0] + 1} to {part[-1] + 1}" for part in np.array_split(np.arange(steps), parts)]
    lines = [f"| busiest expert | {' | '.join(titles)} |", "|---" * (parts + 1) + "|"]
    for name in VARIANTS:
        found = [result["loads"] for result in results if result["variant"] == name]
        if found:
            means = [f"{part.mean():.2f}" for part in np.array_split(np.array(found), parts, axis=1)]
            lines.append(f"| {name} | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="where runs and results are kept")
    options = parser.parse_args()
    file = options.folder / "results.jsonl"
    options.folder.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    results = [result for result in results if result["steps"] == options.steps]
    done = {(result["variant"], result["seed"]) for result in results}
    for seed in options.seeds:
        for name in options.variants:
            if (name, seed) not in done:
                results.append(in_child(run, name, seed, options.steps, options.folder))
                with file.open("a") as lines:
                    lines.write(json.dumps(results[-1], ensure_ascii=False) + "\n")
    print(f"\n{options.steps} steps, {sum(result['seconds'] for result in results) / 60:.0f} minutes for all runs\n")
    print(table(results), load_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
