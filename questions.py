"""Questions from a file, answered in batches of like length into a file that an interrupted run goes on with.

A line of the answers holds the question as it stood, who answered it and how:
{"line": 3, "question": {"prompt": "Who are you?"}, "checkpoint": "runs/tiny/checkpoints/step-001000",
 "settings": {"temperature": 0.7, ...}, "answer": "I am ...", "cut": false}
"""

import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from config import UserError, check
from data import formats
from data.text_files import parse_line
from files import disk_errors, replace_file

if TYPE_CHECKING:
    from model import DeepSeekV2
    from tokenizer import Tokenizer

Record = dict[str, Any]


class Question(NamedTuple):
    """A line of a file of questions."""

    line: int
    # As it stands there.
    row: dict[str, Any]
    # A conversation that the assistant is to continue; or a text, which is continued without a template.
    asked: list[formats.Message] | str


class Prompt(NamedTuple):
    """A question as one checkpoint reads it."""

    question: Question
    ids: list[int]


# ---------------------------------------------------------------- reading them


def read_questions(path: Path, system: str | None = None) -> list[Question]:
    """A .txt file's lines; or a .jsonl file's rows, as data/formats.py reads them: a text is to be continued, all
    others are to be answered. Raises UserError with the place of what is none of these."""
    check(path.suffix in (".jsonl", ".txt"), f"{path}: questions are read from .jsonl or .txt")
    check(path.is_file(), f"there is no file {path}")
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                row = {"prompt": line.decode()} if path.suffix == ".txt" else parse_line({"json": line, "error": ""})
                questions.append(read_question(number, row, system))
            except (formats.RowError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    check(questions != [], f"{path} has no question")
    return questions


def read_question(line: int, row: dict[str, Any], system: str | None = None) -> Question:
    """Raises RowError for a row that asks nothing."""
    asked = formats.read_question(row)
    if isinstance(asked, list) and system and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": system}, *asked]
    return Question(line, row, asked)


def as_prompt(question: Question, tokenizer: "Tokenizer") -> Prompt:
    """A text stands alone; in a conversation the assistant is next."""
    if isinstance(question.asked, str):
        return Prompt(question, tokenizer.encode(question.asked))
    ids, _ = tokenizer.render(question.asked, add_generation_prompt=True)
    return Prompt(question, ids)


# ---------------------------------------------------------------- answering them


def batches(prompts: Sequence[Prompt], context: int, max_new_tokens: int, batch_size: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together, the longest first; those of a batch have the same room, so that each is answered
    as it would be alone."""

    def room(prompt: Prompt) -> int:
        return min(max_new_tokens, context - len(prompt.ids))

    ordered = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    for _, alike in itertools.groupby(ordered, room):
        group = list(alike)
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


class AnswerFile:
    """The answers that there are so far, by line and checkpoint; on disk, if there is a path, as they come."""

    def __init__(self, path: Path | None, questions: Sequence[Question], settings: dict[str, Any]) -> None:
        """Takes up what an interrupted run left. Raises UserError where that answers other questions, or was asked in
        another way."""
        self.path, self.settings = path, settings
        self.records: dict[tuple[int, str], Record] = {}
        self.questions = {question.line: question for question in questions}
        if path and path.exists():
            with path.open(encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]  # a crash may have left half a line
            for line in lines:
                self.take_up(line)
            self.rewrite()

    def take_up(self, line: str) -> None:
        other = f"; choose another --out than {self.path}"
        try:
            record = json.loads(line)
            number, checkpoint, row, settings = (
                record[name] for name in ("line", "checkpoint", "question", "settings")
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds something else than answers{other}") from error
        same = number in self.questions and self.questions[number].row == row
        check(same, f"what was answered as question {number} is another question now{other}")
        changed = [name for name, value in self.settings.items() if settings.get(name) != value]
        check(not changed, f"the answers so far were given with another {', '.join(changed)}{other}")
        self.records[number, checkpoint] = record

    def add(self, question: Question, checkpoint: str, answer: str, ended: bool) -> None:
        """Unless there is one already. Raises UserError where the disk refuses."""
        if (question.line, checkpoint) in self.records:
            return
        asked = {"line": question.line, "question": question.row, "checkpoint": checkpoint, "settings": self.settings}
        record = self.records[question.line, checkpoint] = asked | {"answer": answer, "cut": not ended}
        if self.path:
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(as_line(record))

    def rewrite(self) -> None:
        """In the order of the questions."""
        self.records = dict(sorted(self.records.items(), key=lambda item: item[0][0]))
        if self.path:
            replace_file(self.path, "".join(map(as_line, self.records.values())))

    def side_by_side(self, checkpoints: Sequence[str], width: int) -> str:
        """Each question with its answers in columns, `width` characters together."""
        blocks = []
        for line, question in self.questions.items():
            asked = question.asked if isinstance(question.asked, str) else question.asked[-1]["content"]
            records = [self.records[line, checkpoint] for checkpoint in checkpoints]
            texts = [record["answer"] + " (cut)" * record["cut"] for record in records]
            blocks.append(f"> {asked}\n\n{columns(checkpoints, texts, width)}\n")
        return "\n".join(blocks)


def answer_questions(
    file: AnswerFile, model: "DeepSeekV2", tokenizer: "Tokenizer", checkpoint: str, batch_size: int
) -> None:
    """Have the model answer what `checkpoint` has not answered yet. Draws depend on the seed and the batch alone, so
    that an interrupted run ends with the same answers. Raises UserError for a question that the context can't hold."""
    import torch
    from tqdm import tqdm

    from generation import continuations

    context, settings = model.config.max_position_embeddings, file.settings
    sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p")}
    prompts = [as_prompt(question, tokenizer) for question in file.questions.values()]
    for question, ids in prompts:
        fits = 0 < len(ids) < context
        check(fits, f"line {question.line} has {len(ids):,} tokens, but {checkpoint} a context of {context:,}")
    with tqdm(total=len(prompts), desc=checkpoint, unit="answer", disable=None) as bar:
        for number, batch in enumerate(batches(prompts, context, settings["max_new_tokens"], batch_size)):
            if any((prompt.question.line, checkpoint) not in file.records for prompt in batch):
                room = min(settings["max_new_tokens"], context - len(batch[0].ids))
                seed = hash((settings["seed"], number)) % 2**63
                generator = torch.Generator(model.output_weight.device).manual_seed(seed)
                inputs = [prompt.ids for prompt in batch]
                found = continuations(model, inputs, room, tokenizer.stop_ids, generator=generator, **sampling)
                for prompt, (tokens, ended) in zip(batch, found, strict=True):
                    file.add(prompt.question, checkpoint, as_answer(tokenizer.decode(tokens), prompt.question), ended)
            bar.update(len(batch))
    file.rewrite()


def as_answer(text: str, question: Question) -> str:
    """An answer does not begin with a space; what continues a text may."""
    return text if isinstance(question.asked, str) else text.lstrip()


def as_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- showing them


def columns(names: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Texts in columns under their names, `width` characters together."""
    column = max(10, width // len(texts) - 2)
    cells = [
        [*textwrap.wrap(name, column), "", *(part for line in text.split("\n") for part in textwrap.wrap(line, column))]
        for name, text in zip(names, texts, strict=True)
    ]
    rows = itertools.zip_longest(*cells, fillvalue="")
    return "\n".join("  ".join(f"{cell:{column}}" for cell in row).rstrip() for row in rows)
