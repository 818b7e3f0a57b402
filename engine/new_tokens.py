"""Control tokens for a base model that has none for a chat template: entries of its tokenizer, rows of its weights."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from engine.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def add_control_tokens(vocabulary: Vocabulary, names: Sequence[str]) -> Vocabulary:
    """With these names as control tokens, whose ids follow the last one."""
    first = len(vocabulary.tokens)
    new = {name: first + i for i, name in enumerate(names)}

    def to_json() -> str:
        spec, plain = (
            json.loads(vocabulary.to_json()),
            dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        )
        spec["added_tokens"] += [{"id": i, "content": name, **plain, "special": True} for name, i in new.items()]
        return json.dumps(spec, ensure_ascii=False)

    tokens = vocabulary.tokens + [name.encode() for name in names]
    return Vocabulary(vocabulary.encode, tokens, vocabulary.control_ids | new, to_json)


def with_new_rows(
    weights: Iterable[tuple[str, "Tensor"]], vocab_size: int, new_ids: Sequence[int]
) -> Iterator[tuple[str, "Tensor"]]:
    """Embedding and head with `vocab_size` rows, of which those of new tokens are the mean of all tokens' before: so a
    new token begins as nothing in particular, and no more or less likely than the others on average."""
    for name, tensor in weights:
        if name in ROWS:
            mean = tensor[: min(new_ids)].float().mean(dim=0).to(tensor.dtype)
            rows = tensor.new_empty(vocab_size, tensor.shape[1])
            rows[: len(tensor)] = tensor
            rows[list(new_ids)] = mean
            tensor = rows
        yield name, tensor
