"""Text to token ids and back, chat templates, and which tokens are trained on.

A chat template turns a conversation into one sequence of tokens. Its control tokens (`<|im_start|>`, ...) come from the
tables below and from nowhere else: what people write is always encoded as ordinary text, so a message that contains
"<|im_end|>" cannot end a turn. The renderer knows whose tokens it writes, so it returns the training mask as well.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import TrainConfig, UserError, check
from files import read_json
from vocabulary import add_control_tokens as add_tokens
from vocabulary import load_cl100k, load_directory


class Turn(NamedTuple):
    """How one role's turn is written: header, lead + content + trail, end, footer."""

    # Opens the turn; never trained on. The assistant's is also the prompt for an answer.
    header: str = ""
    # Glued to the content before it is encoded, where the tokenizer would merge across the border.
    lead: str = ""
    trail: str = ""
    # Closes the turn; the assistant's is trained on, since generation stops there. It must be one control token.
    end: str = ""
    # Between this turn and the next; never trained on.
    footer: str = ""


class RenderedTurn(NamedTuple):
    """A message as tokens, in the order in which they stand."""

    header: list[int]
    # Content and end; the only part that may be trained on.
    body: list[int]
    footer: list[int]
    trained: int


class ChatTemplate(NamedTuple):
    """A chat template as data; `CHAT_TEMPLATES` holds one for each name."""

    # Tokens that mean themselves in start, header, end and footer, and never in content.
    control_tokens: tuple[str, ...]
    # Opens a conversation: nothing or one control token.
    start: str
    # One entry for each role.
    turns: dict[str, Turn]
    # Whether white space around content is cut off, as the template's authors do.
    trim: bool = False


ROLES = ("system", "user", "assistant", "tool")

CHAT_TEMPLATES = {
    # OpenAI's, also Qwen's and many others'.
    "chatml": ChatTemplate(
        control_tokens=("<|im_start|>", "<|im_end|>"),
        start="",
        turns={role: Turn(header=f"<|im_start|>{role}\n", end="<|im_end|>", footer="\n") for role in ROLES},
    ),
    "llama3": ChatTemplate(
        control_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        start="<|begin_of_text|>",
        turns={
            role: Turn(header=f"<|start_header_id|>{role}<|end_header_id|>\n\n", end="<|eot_id|>") for role in ROLES
        },
        trim=True,
    ),
    # DeepSeek-V2-Chat's. It asks for an answer with "Assistant:", so the space after it is the model's to write. Theirs
    # leaves the turns of tools out; here they are written like a user's.
    "deepseek": ChatTemplate(
        control_tokens=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        start="<｜begin▁of▁sentence｜>",
        turns={
            "system": Turn(trail="\n\n"),
            "user": Turn(header="User:", lead=" ", trail="\n\n"),
            "assistant": Turn(header="Assistant:", lead=" ", end="<｜end▁of▁sentence｜>"),
            "tool": Turn(header="Tool:", lead=" ", trail="\n\n"),
        },
    ),
}


class Tokenizer:
    """A vocabulary with a chat template.

    name: "cl100k_base", or a directory with a byte-level `tokenizer.json`.
    vocab_size: number of ids. Of cl100k_base, a smaller one keeps the first merges and has the control tokens last; a
        larger one than needed leaves ids unused. None: as many as there are.
    chat_template: a key of `CHAT_TEMPLATES`. None: the directory's own, or chatml for cl100k_base.
    add_control_tokens: give a directory's tokenizer those that it lacks for the template; `new_ids` has them.
    Raises UserError where one of these cannot be had.
    """

    def __init__(
        self,
        name: str = "cl100k_base",
        vocab_size: int | None = None,
        chat_template: str | None = None,
        add_control_tokens: bool = False,
    ):
        if chat_template is not None and chat_template not in CHAT_TEMPLATES:
            raise UserError(f"chat template {chat_template!r} is unknown; use one of {', '.join(CHAT_TEMPLATES)}")
        if name == "cl100k_base":
            chat_template = chat_template or "chatml"
            vocabulary = load_cl100k(CHAT_TEMPLATES[chat_template].control_tokens, vocab_size)
        else:
            vocabulary = load_directory(Path(name), vocab_size)
            chat_template = choose_template(Path(name), vocabulary.control_ids, chat_template, add_control_tokens)
        missing = missing_tokens(chat_template, vocabulary.control_ids)
        nothing = f"add_control_tokens: {name} has all that chat template {chat_template} needs"
        check(bool(missing) or not add_control_tokens, nothing)
        vocabulary = add_tokens(vocabulary, missing) if missing else vocabulary
        self.name = name
        self._arguments = (name, vocab_size, chat_template, add_control_tokens)
        self.new_ids = [vocabulary.control_ids[token] for token in missing]
        self.chat_template = chat_template
        self.template = CHAT_TEMPLATES[chat_template]
        self.tokens = vocabulary.tokens
        self.control_ids = vocabulary.control_ids
        self.vocab_size = len(self.tokens)
        check_control_tokens(chat_template, self.template, self.control_ids)
        self.eos_token = self.template.turns["assistant"].end
        self.eos_token_id = self.control_ids[self.eos_token]
        # The collator masks padding, so any id will do.
        self.pad_token = "<|endoftext|>" if "<|endoftext|>" in self.control_ids else self.eos_token
        self.pad_token_id = self.control_ids[self.pad_token]
        # What ends whatever a model writes: the assistant's turn, or a document, as a base model has it.
        self.stop_ids = (self.eos_token_id, self.pad_token_id)
        control = set(self.control_ids.values())
        self.token_num_bytes = [0 if i in control else len(token) for i, token in enumerate(self.tokens)]
        self.max_token_bytes = max(self.token_num_bytes)
        self._encode = vocabulary.encode
        self.to_json = vocabulary.to_json
        # Ids that open every conversation.
        self.start = self._encode_control(self.template.start)
        self._turns = {role: self._encode_turn(role) for role in self.template.turns}

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids; never a control token."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: control tokens by name, unused ids as nothing, a character cut in two as U+FFFD."""
        return b"".join([self.tokens[i] for i in ids if i < self.vocab_size]).decode("utf-8", errors="replace")

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """A conversation to (ids, mask) of equal length; mask is 1 on the tokens that the assistant has to produce.

        messages: dicts with a role (system, user, assistant, tool) and a content; the assistant's may have a weight of
        0, and are then only read.
        add_generation_prompt: end with the assistant's header, so that a model answers.
        Raises UserError for another role.
        """
        ids, mask, _ = self.join(map(self.render_turn, messages))
        if add_generation_prompt:
            header = self._turns["assistant"][0]
            ids += header
            mask += [0] * len(header)
        return ids, mask

    def join(self, turns: Iterable[RenderedTurn]) -> tuple[list[int], list[int], list[int]]:
        """Turns one after another: (ids, mask, borders); borders are where each turn begins and where the last ends."""
        ids, mask, borders = list(self.start), [0] * len(self.start), [len(self.start)]
        for header, body, footer, trained in turns:
            ids += header
            ids += body
            ids += footer
            mask += [0] * len(header)
            mask += [trained] * len(body)
            mask += [0] * len(footer)
            borders.append(len(ids))
        return ids, mask, borders

    def render_turn(self, message: Mapping[str, Any]) -> RenderedTurn:
        """One message of a conversation. Raises UserError for an unknown role."""
        if message["role"] not in self._turns:
            raise UserError(f"role {message['role']!r} is unknown; use one of {', '.join(self._turns)}")
        header, lead, trail, end, footer, trained = self._turns[message["role"]]
        content = message["content"].strip() if self.template.trim else message["content"]
        body = self.encode(lead + content + trail) + end
        return RenderedTurn(header, body, footer, int(trained and message.get("weight", 1)))

    def fingerprint(self) -> str:
        """Changes when ids could: a key for caches."""
        return hashlib.sha256(repr((self.to_json(), self.vocab_size, self.template)).encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return Tokenizer, self._arguments  # so that other processes can have one

    def _encode_control(self, text: str) -> list[int]:
        """Encode a piece of the template, in which control tokens mean themselves."""
        names = "|".join(map(re.escape, self.template.control_tokens))
        pieces = re.split(f"({names})", text)
        return [
            i for p in pieces for i in ([self.control_ids[p]] if p in self.template.control_tokens else self.encode(p))
        ]

    def _encode_turn(self, role: str) -> tuple[list[int], str, str, list[int], list[int], int]:
        turn = self.template.turns[role]
        header, end, footer = map(self._encode_control, (turn.header, turn.end, turn.footer))
        return header, turn.lead, turn.trail, end, footer, int(role == "assistant")


def check_control_tokens(name: str, template: ChatTemplate, known: Collection[str]) -> None:
    """A token that the template uses and does not list would be encoded as ordinary text. Raises UserError."""
    texts = [template.start, *(part for turn in template.turns.values() for part in turn)]
    alone = [template.start, *(turn.end for turn in template.turns.values())]  # each nothing, or one control token
    used = [token for token in known if len(token) > 1 and any(token in text for text in texts)] + [
        token for token in alone if token
    ]
    unlisted = ", ".join(dict.fromkeys(token for token in used if token not in template.control_tokens))
    check(not unlisted, f"chat template {name} uses {unlisted} and does not list it in its control_tokens")
    ends = template.turns["assistant"].end != ""
    check(ends, f"chat template {name} ends the assistant's turn with no token, so that no answer would ever end")


def choose_template(directory: Path, control_tokens: Collection[str], chat_template: str | None, add: bool) -> str:
    """For a directory: the template asked for, else the one that `save_tokenizer` noted, else the first whose control
    tokens exist; with `add`, which adds what is missing, else chatml. Raises UserError."""
    config = directory / "tokenizer_config.json"
    noted = read_json(config).get("chat_template_name") if config.is_file() else None
    fitting = [name for name, template in CHAT_TEMPLATES.items() if set(template.control_tokens) <= set(control_tokens)]
    name = chat_template or (noted if noted in CHAT_TEMPLATES else next(iter(fitting), "chatml"))
    if missing_tokens(name, control_tokens) and not add:
        fits = f"it fits {', '.join(fitting)} (--chat-template)" if fitting else "it fits no template"
        raise UserError(
            f"{directory} lacks {', '.join(missing_tokens(name, control_tokens))}, which chat template {name} needs; "
            f"{fits}; --add-control-tokens adds them, with new rows of the embedding and the head"
        )
    return name


def missing_tokens(chat_template: str, control_tokens: Collection[str]) -> list[str]:
    return [token for token in CHAT_TEMPLATES[chat_template].control_tokens if token not in control_tokens]


def load_tokenizer(config: TrainConfig, source: Path | None, goes_on: bool = False) -> Tokenizer:
    """A run's: that of `source`, the checkpoint that it starts from; else the configured one. goes_on: the run's own
    checkpoint has the new control tokens already. Raises UserError."""
    name = str(source or config.data.tokenizer)
    vocab_size = config.model.vocab_size if name == "cl100k_base" else None
    add_control_tokens = config.data.add_control_tokens and not goes_on
    return Tokenizer(name, vocab_size, config.data.chat_template, add_control_tokens)
