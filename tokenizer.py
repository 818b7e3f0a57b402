"""Chat templates: render a conversation as token ids, with a mask of those to train on.

The control tokens (`<|im_start|>`, …) come from the tables below and from nowhere else: content is always encoded as
ordinary text, so a message that contains "<|im_end|>" cannot end a turn. The mask is made while rendering: where
headers are plain text ("Assistant:"), content could fool a search. ChatML is OpenAI's format
(https://github.com/openai/openai-python/blob/v0.28.1/chatml.md); the mask is 1 on what the model generates:

>>> tokenizer = Tokenizer()
>>> messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
>>> ids, mask = tokenizer.render(messages)
>>> [tokenizer.decode([i]) for i in ids]  # doctest: +NORMALIZE_WHITESPACE
['<|im_start|>', 'user', '\\n', 'Hi', '!', '<|im_end|>', '\\n',
 '<|im_start|>', 'assistant', '\\n', 'Hello', '.', '<|im_end|>', '\\n']
>>> mask
[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from files import read_json
from vocabulary import Vocabulary, load_cl100k, load_directory
from vocabulary import add_control_tokens as add_tokens

# Matches a control token in a template (never in content).
CONTROL_TOKEN = re.compile(r"(<[^<>\s]+>)")
# tiktoken and the tokenizers library fail on a million whitespace characters in a row.
LONG_BLANK = re.compile(r"(?<!\s)\s{500001}")
ROLES = ("system", "user", "assistant", "tool")


class Turn(NamedTuple):
    """Format of a role's turn: header, lead, content, end, footer."""

    # Opens the turn; never trained on. The assistant's is also the prompt for an answer.
    header: str = ""
    # Precedes the content, and is trained on if the content is.
    lead: str = ""
    # Closes the turn. The assistant's is trained on, and generation stops there: it must be one control token.
    end: str = ""
    # Follows every turn, the last too; never trained on.
    footer: str = ""


class ChatTemplate(NamedTuple):
    """A chat template as data."""

    # Opens a conversation: empty, or one control token.
    start: str
    # One entry per role.
    turns: dict[str, Turn]
    # Whether whitespace around content is removed, as in the authors' template.
    trim: bool = False

    @property
    def control_tokens(self) -> list[str]:
        """The control tokens of the template, in order of appearance."""
        texts = [self.start, *(text for turn in self.turns.values() for text in turn)]
        return list(dict.fromkeys(CONTROL_TOKEN.findall("".join(texts))))


CHAT_TEMPLATES = {
    # OpenAI's; Qwen and many others use it too.
    "chatml": ChatTemplate(
        start="",
        turns={role: Turn(header=f"<|im_start|>{role}\n", end="<|im_end|>", footer="\n") for role in ROLES},
    ),
    "llama3": ChatTemplate(
        start="<|begin_of_text|>",
        turns={
            role: Turn(header=f"<|start_header_id|>{role}<|end_header_id|>\n\n", end="<|eot_id|>") for role in ROLES
        },
        trim=True,
    ),
    # DeepSeek-V2-Chat's. Its prompt for an answer is "Assistant:", so the model writes the space after it. The
    # published template omits tool turns; here they are written like a user's.
    "deepseek": ChatTemplate(
        start="<｜begin▁of▁sentence｜>",
        turns={
            "system": Turn(end="\n\n"),
            "user": Turn(header="User:", lead=" ", end="\n\n"),
            "assistant": Turn(header="Assistant:", lead=" ", end="<｜end▁of▁sentence｜>"),
            "tool": Turn(header="Tool:", lead=" ", end="\n\n"),
        },
    ),
}


class RenderedTurn(NamedTuple):
    """A message as tokens."""

    ids: list[int]
    # 1: trained on.
    mask: list[int]
    # The header's ids, repeated where a long turn is continued in another row.
    header: list[int]


class EncodedTurn(NamedTuple):
    """A `Turn`, encoded except for its content: before + encode(lead + content + trail) + end + footer."""

    before: list[int]  # the header, up to the text that is encoded together with the content
    lead: str
    trail: str
    end: list[int]
    footer: list[int]
    header: list[int]  # all of it: the prompt for an answer


class Tokenizer:
    """A vocabulary with a chat template.

    name: "cl100k_base", or a directory with a byte-level `tokenizer.json`.
    vocab_size: number of ids. For cl100k_base, a smaller number keeps the first merges and puts the control tokens
        last; a larger one leaves ids unused. None: as many as the vocabulary has.
    chat_template: a key of `CHAT_TEMPLATES`. None: the directory's own, or chatml for cl100k_base.
    add_control_tokens: add the control tokens that a directory's tokenizer lacks for the template; see `new_ids`.
    Raises UserError if the arguments are incompatible.

    System, user and tool turns get the ids of transformers' `apply_chat_template`: text between two control tokens is
    encoded in one call. The assistant's header and content are encoded separately, because generation starts
    after the header; so where its content starts with whitespace, ids differ from `apply_chat_template` (for chatml,
    "\\n" + "\\n" instead of "\\n\\n"). In DeepSeek's template no control token ends a user's turn, so a system turn
    that follows and starts with whitespace differs, too.
    """

    def __init__(
        self,
        name: str = "cl100k_base",
        vocab_size: int | None = None,
        chat_template: str | None = None,
        add_control_tokens: bool = False,
    ):
        vocabulary, chat_template, missing = resolve_vocabulary(name, vocab_size, chat_template, add_control_tokens)
        self.name, self.chat_template, self.template = name, chat_template, CHAT_TEMPLATES[chat_template]
        self._arguments = (name, vocab_size, chat_template, add_control_tokens)
        self.tokens, self.control_ids, self.to_json = vocabulary.tokens, vocabulary.control_ids, vocabulary.to_json
        self.vocab_size = len(self.tokens)
        # Ids of the control tokens that were added: their rows of the embedding and the head are new.
        self.new_ids = [self.control_ids[token] for token in missing]
        self.eos_token = self.template.turns["assistant"].end
        self.eos_token_id = self.control_ids[self.eos_token]
        # The collator masks padding, so any id will do.
        self.pad_token = "<|endoftext|>" if "<|endoftext|>" in self.control_ids else self.eos_token
        self.pad_token_id = self.control_ids[self.pad_token]
        # Generation stops at the end of the assistant's turn, or at <|endoftext|>, which base models write.
        self.stop_ids = (self.eos_token_id, self.pad_token_id)
        control = set(self.control_ids.values())
        self.token_num_bytes = [0 if i in control else len(token) for i, token in enumerate(self.tokens)]
        self._encode = vocabulary.encode
        # Ids that open every conversation.
        self.start = self._encode_template([self.template.start])
        self._turns = {role: self._encode_turn(role, turn) for role, turn in self.template.turns.items()}

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text; the ids contain no control token. Raises UserError for more than 500,000 whitespace
        characters in a row."""
        if len(text) > 500_000 and LONG_BLANK.search(text):
            raise UserError("more than 500,000 whitespace characters in a row cannot be encoded")
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids: control tokens by name, unused ids as nothing, an incomplete character as U+FFFD."""
        return b"".join([self.tokens[i] for i in ids if i < self.vocab_size]).decode("utf-8", errors="replace")

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Render a conversation as (ids, mask) of equal length; mask is 1 on the tokens that the assistant produces.

        messages: dicts with a role (system, user, assistant, tool) and a content. An assistant's message with a weight
        of 0 is not trained on.
        add_generation_prompt: end with the assistant's header, so that a model answers.
        Raises UserError for other roles.
        """
        ids, mask, _ = self.join(map(self.render_turn, messages))
        if add_generation_prompt:
            header = self._turns["assistant"].header
            ids += header
            mask += [0] * len(header)
        return ids, mask

    def join(self, turns: Iterable[RenderedTurn]) -> tuple[list[int], list[int], list[int]]:
        """Concatenate turns into (ids, mask, offsets); turn i is ids[offsets[i]:offsets[i + 1]]."""
        ids, mask, offsets = list(self.start), [0] * len(self.start), [len(self.start)]
        for turn in turns:
            ids += turn.ids
            mask += turn.mask
            offsets.append(len(ids))
        return ids, mask, offsets

    def render_turn(self, message: Mapping[str, Any]) -> RenderedTurn:
        """Render one message of a conversation. Raises UserError for an unknown role."""
        role = message["role"]
        if role not in self._turns:
            raise UserError(f"role {role!r} is unknown; use one of {', '.join(self._turns)}")
        before, lead, trail, end, footer, header = self._turns[role]
        content = message["content"].strip() if self.template.trim else message["content"]
        body = self.encode(lead + content + trail) + end
        trained = int(role == "assistant" and bool(message.get("weight", 1)))
        mask = [0] * len(before) + [trained] * len(body) + [0] * len(footer)
        return RenderedTurn(before + body + footer, mask, header)

    def fingerprint(self) -> str:
        """Return a key for caches, which changes whenever ids could."""
        return hashlib.sha256(repr((self.to_json(), self.vocab_size, self.template)).encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return Tokenizer, self._arguments  # for other processes; the encoder itself cannot be pickled

    def _encode_template(self, parts: Iterable[str]) -> list[int]:
        """Encode parts of a template, of which some are control tokens."""
        ids: list[int] = []
        for part in parts:
            ids += [self.control_ids[part]] if CONTROL_TOKEN.fullmatch(part) else self.encode(part)
        return ids

    def _encode_turn(self, role: str, turn: Turn) -> EncodedTurn:
        # split keeps control tokens, since the pattern has a group; text outside the outer ones, maybe "", is encoded
        # together with the content
        *before, lead = CONTROL_TOKEN.split(turn.header)
        trail, *end = CONTROL_TOKEN.split(turn.end)
        if role == "assistant":  # its header is a prompt, which is encoded before the content exists
            before, lead = [*before, lead], ""
        parts = (before, end, [turn.footer], CONTROL_TOKEN.split(turn.header))
        before_ids, end_ids, footer, header = map(self._encode_template, parts)
        return EncodedTurn(before_ids, lead + turn.lead, trail, end_ids, footer, header)


def resolve_vocabulary(
    name: str, vocab_size: int | None, chat_template: str | None, add_control_tokens: bool
) -> tuple[Vocabulary, str, list[str]]:
    """Return the vocabulary and the chat template that `Tokenizer` asks for, and the control tokens that were added."""
    config = Path(name, "tokenizer_config.json")
    if chat_template is None and config.is_file():
        chat_template = read_json(config).get("chat_template_name")
    if chat_template not in (None, *CHAT_TEMPLATES):
        names = "|".join(CHAT_TEMPLATES)
        raise UserError(f"{name}: chat template {chat_template!r} is unknown; pass --chat-template {names}")
    if name == "cl100k_base":
        chat_template = chat_template or "chatml"
        vocabulary = load_cl100k(CHAT_TEMPLATES[chat_template].control_tokens, vocab_size)
    else:
        vocabulary = load_directory(Path(name), vocab_size)
    known = vocabulary.control_ids.keys()
    fitting = [key for key, template in CHAT_TEMPLATES.items() if known >= set(template.control_tokens)]
    chat_template = chat_template or next(iter(fitting), "chatml")
    template = CHAT_TEMPLATES[chat_template]
    missing = [token for token in template.control_tokens if token not in known]
    if missing and not add_control_tokens:
        raise UserError(
            f"{name} lacks {', '.join(missing)}, which chat template {chat_template} needs: pass --chat-template "
            f"({', '.join(fitting) or 'none fits'}), or --add-control-tokens to add rows of the embedding and the head"
        )
    if stripping := vocabulary.stripping.intersection(template.control_tokens):
        raise UserError(f"{name} drops whitespace next to {', '.join(sorted(stripping))}, which alters messages")
    if template.turns["assistant"].end not in template.control_tokens:
        raise UserError(f"chat template {chat_template} does not end the assistant's turn with one control token")
    return add_tokens(vocabulary, missing) if missing else vocabulary, chat_template, missing
