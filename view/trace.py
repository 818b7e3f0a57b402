"""What went on inside a model while it wrote: each token's probability, what else was likely, which experts it passed.

Plain generation knows nothing of it: `generate` shows its logits to whoever observes, hooks on the routers do the rest.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from generation import generate, room_for_answer
from model import DeepSeekV2, MoE
from tokenizer import Tokenizer


class Route(NamedTuple):
    """What one layer's router did with one token."""

    scores: list[float]  # of each routed expert; they sum to one
    chosen: list[int]  # the experts it was sent to


class Seen(NamedTuple):
    """What is known of one token of an answer."""

    text: str
    probability: float  # the model's own, before temperature, top-k and top-p
    likeliest: list[tuple[str, float]]  # the token itself and the five likeliest others, with their probabilities
    routes: dict[int, Route]  # by number of the layer; nothing for the newest token, which no layer has read yet


class Trace:
    """Watches one answer being written: `generate` shows it the logits, hooks on the routers show it the experts."""

    ALTERNATIVES = 5

    def __init__(self, model: DeepSeekV2, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokens: list[Seen] = []
        self.passed: dict[int, Route] = {}
        self.probabilities = torch.empty(0)

    @contextlib.contextmanager
    def watching_routers(self) -> Iterator[None]:
        layers = enumerate(self.model.model.layers)
        routers = {number: layer.mlp.gate for number, layer in layers if isinstance(layer.mlp, MoE)}
        hooks = [gate.register_forward_hook(partial(self.see_route, number)) for number, gate in routers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def see_route(self, layer: int, router: nn.Module, x: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        scores, _, experts = output  # (N, E), (N, K), (N, K); the last of N tokens is the newest
        self.passed[layer] = Route(scores[-1].tolist(), experts[-1].tolist())

    def see_logits(self, logits: Tensor) -> None:
        """logits (1, V): the layers have just read the token before."""
        if self.tokens:
            self.tokens[-1] = self.tokens[-1]._replace(routes=dict(self.passed))
        self.probabilities = logits[0].softmax(dim=-1)

    def add(self, token: int) -> None:
        """The token that was drawn."""
        best = self.probabilities.topk(min(self.ALTERNATIVES + 1, len(self.probabilities))).indices.tolist()
        shown = [token, *[i for i in best if i != token][: self.ALTERNATIVES]]
        likeliest = [(visible(self.tokenizer, i), self.probabilities[i].item()) for i in shown]
        self.tokens.append(Seen(text_of(self.tokenizer, token), likeliest[0][1], likeliest, {}))


def write(
    model: DeepSeekV2, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int, seed: int, **sampling: Any
) -> Iterator[tuple[str, tuple[Seen, ...]]]:
    """Continue a prompt, yielding after each token the text so far and what was seen. Raises UserError if it doesn't
    fit."""
    trace, answer, stops = Trace(model, tokenizer), [], tokenizer.stop_ids
    generator = torch.Generator(model.output_weight.device).manual_seed(seed)
    room = room_for_answer(model, prompt, max_new_tokens)
    with trace.watching_routers():
        for (token,) in generate(
            model, [prompt], room, stops, **sampling, generator=generator, observe=trace.see_logits
        ):
            trace.add(token)
            answer += [] if token in stops else [token]
            yield tokenizer.decode(answer), tuple(trace.tokens)


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """As it stands in the text; the bytes of a character cut in two by name."""
    text = tokenizer.decode([token])
    return repr(tokenizer.tokens[token])[2:-1] if "\N{REPLACEMENT CHARACTER}" in text else text


def visible(tokenizer: Tokenizer, token: int) -> str:
    """With spaces and line breaks to be seen, and its number, since two tokens may look the same."""
    return f"{text_of(tokenizer, token).replace(' ', '␣').replace(chr(10), '↵')} · {token}"
