"""What happens inside a model while it writes: each token's probability, the likeliest others, the experts it visits.

`generate` passes its logits to an observer, and forward hooks read the routers; neither changes what is written.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from files import printable
from generation import Answer, Prompt, write
from model import DeepSeekV2, MoE
from tokenizer import Tokenizer

ALTERNATIVES = 5


class Seen(NamedTuple):
    """A token of an answer, and what is known about it."""

    text: str
    # The token itself and the likeliest others, with their probabilities before temperature, top-k and top-p.
    likeliest: list[tuple[str, float]]
    # By layer: the router's score of each expert, which sum to one, and the experts that the token was sent to. Empty
    # for the newest token, which no layer has read yet.
    routes: dict[int, tuple[list[float], list[int]]]

    @property
    def probability(self) -> float:
        return self.likeliest[0][1]


def trace(
    model: DeepSeekV2, tokenizer: Tokenizer, prompt: Prompt, max_new_tokens: int, **options: Any
) -> Iterator[tuple[Answer, list[Seen]]]:
    """Answer a prompt, yielding after each token the answer so far and what is known about its tokens. options and
    errors: as in `generation.write`."""
    seen: list[Seen] = []
    routes: dict[int, tuple[list[float], list[int]]] = {}
    probabilities = torch.empty(0)

    def see_route(layer: int, router: Any, x: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        scores, _, experts = output  # (N, E), (N, K), (N, K); the last of N tokens is the newest
        routes[layer] = scores[-1].tolist(), experts[-1].tolist()

    def see_logits(logits: Tensor) -> None:  # (1, V); the layers have just read the previous token
        nonlocal probabilities
        probabilities = logits[0].softmax(dim=-1)
        if seen:
            seen[-1].routes.update(routes)

    layers = [(i, layer.mlp.gate) for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MoE)]
    hooks = [gate.register_forward_hook(partial(see_route, i)) for i, gate in layers]
    try:
        for (answer,) in write(model, tokenizer, [prompt], max_new_tokens, observe=see_logits, **options):
            token = answer.tokens[-1]
            best = probabilities.topk(min(ALTERNATIVES + 1, len(probabilities))).indices.tolist()
            shown = [token, *[i for i in best if i != token][:ALTERNATIVES]]
            likeliest = [(visible(tokenizer, i), probabilities[i].item()) for i in shown]
            seen.append(Seen(text_of(tokenizer, token), likeliest, {}))
            yield answer, seen
    finally:
        for hook in hooks:
            hook.remove()


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; for part of a character and for control characters, its bytes in hexadecimal."""
    text = printable(tokenizer.decode([token]))
    return repr(tokenizer.tokens[token])[2:-1] if "\N{REPLACEMENT CHARACTER}" in text else text


def visible(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text with visible spaces and line breaks, and its id, since two tokens may look the same."""
    return f"{text_of(tokenizer, token).replace(' ', '␣').replace(chr(10), '↵')} · {token}"
