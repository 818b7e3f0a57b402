"""Answers from a trained model: a prompt is read once, then one token at a time is drawn and read.

The cache holds what attention needs of earlier tokens, and in multi-head latent attention that is little: one latent
and one rotary key a token and layer. No head's keys or values are ever rebuilt (`model.Attention.attend_absorbed`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from config import UserError, check
from kernels import compute_dtype, fast_decoding
from model import Block, DeepSeekV2, LayerCache
from tokenizer import Tokenizer


@torch.inference_mode()
def generate(
    model: DeepSeekV2,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Iterator[list[int]]:
    """Continue prompts of any lengths, yielding one token a prompt and step, until each has stopped.

    A prompt that has stopped goes on yielding its stop token. observe: is shown each step's logits (B, V), after the
    layers have read the tokens before and ahead of the draw. Raises UserError where a prompt and its continuation
    don't fit into max_position_embeddings.
    """
    longest, room = max(map(len, prompts)), model.config.max_position_embeddings
    if min(map(len, prompts)) == 0:
        raise UserError("generate: a prompt is empty; it needs at least one token")
    if longest + max_new_tokens > room:
        raise UserError(
            f"the prompt's {longest} tokens and {max_new_tokens} new ones exceed the model's context of {room}: "
            "shorten the prompt or lower --max-new-tokens"
        )
    device = model.output_weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    stops = torch.tensor(stop_token_ids, dtype=torch.int64, device=device)
    tokens = torch.zeros_like(lengths)
    stopped = torch.zeros_like(lengths, dtype=torch.bool)
    with fast_decoding(model):
        cache = LatentCache(model, len(prompts), longest + max_new_tokens)
        logits = cache.prefill(padded, lengths)
        for step in range(max_new_tokens):
            if observe:
                observe(logits)
            tokens = torch.where(stopped, tokens, sample(logits, temperature, top_k, top_p, generator))
            yield tokens.tolist()
            stopped |= torch.isin(tokens, stops)
            if stopped.all() or step == max_new_tokens - 1:
                return
            logits = cache.step(tokens, lengths + step, longest + step + 1)


def room_for_answer(model: DeepSeekV2, prompt: list[int], max_new_tokens: int) -> int:
    """How many new tokens the context has room for, at most max_new_tokens. Raises UserError where it has none."""
    context = model.config.max_position_embeddings
    check(
        len(prompt) < context,
        f"the conversation has {len(prompt)} tokens, but the model's context is {context}: "
        "shorten it or start a new one",
    )
    return min(max_new_tokens, context - len(prompt))


def fit_into_context(
    model: DeepSeekV2, tokenizer: Tokenizer, messages: list[dict[str, str]], max_new_tokens: int
) -> tuple[list[dict[str, str]], str]:
    """The conversation without its oldest turns, where they leave no room for an answer, and a line that says so, or
    "". The system message and the last turn are always kept."""
    context = model.config.max_position_embeddings
    room = min(max_new_tokens, context // 4)
    start = int(messages[0]["role"] == "system")
    kept = list(messages)
    while len(kept) > start + 1 and len(tokenizer.render(kept, add_generation_prompt=True)[0]) + room > context:
        del kept[start : start + 2]
    forgotten = len(messages) - len(kept)
    said = f"the context of {context:,} tokens is full: the oldest {forgotten} messages are forgotten"
    return kept, said if forgotten else ""


def continuations(
    model: DeepSeekV2, prompts: list[list[int]], max_new_tokens: int, stop_token_ids: tuple[int, ...], **options: Any
) -> list[tuple[list[int], bool]]:
    """What follows each prompt up to a stop token, and whether there was one. options: as for `generate`."""
    found = []
    for tokens in zip(*generate(model, prompts, max_new_tokens, stop_token_ids, **options), strict=True):
        end = next((i for i, token in enumerate(tokens) if token in stop_token_ids), len(tokens))
        found.append((list(tokens[:end]), end < len(tokens)))
    return found


def answers(
    model: DeepSeekV2, tokenizer: Tokenizer, questions: Sequence[str], max_new_tokens: int, **options: Any
) -> list[str]:
    """What the model replies to each question, cut where its context ends. options: as for `generate`."""
    prompts = [
        tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True)[0]
        for question in questions
    ]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    if room < 1:
        return [""] * len(questions)
    replies = continuations(model, prompts, min(max_new_tokens, room), tokenizer.stop_ids, **options)
    return [tokenizer.decode(tokens) for tokens, _ in replies]


class LatentCache:
    """Latent and rotary key of every token so far: kv_lora_rank + qk_rope_head_dim numbers a token and layer."""

    PREFILL = 512  # prompt tokens at a time, which bounds the memory that attention scores take

    def __init__(self, model: DeepSeekV2, batch_size: int, length: int) -> None:
        config, weight = model.config, model.output_weight
        self.model = model
        shape = (config.num_hidden_layers, batch_size, length, config.kv_lora_rank + config.qk_rope_head_dim)
        self.latents = torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device)
        blocks = [layer for layer in model.model.layers if isinstance(layer, Block)]
        self.up_projections = [block.self_attn.up_projections() for block in blocks]

    def prefill(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """prompts (B, T) padded on the right, lengths (B,) -> logits (B, V) of each prompt's last token.

        What padding writes into the cache lies in the future of every real token, and is overwritten in time.
        """
        positions = torch.arange(prompts.shape[1], device=prompts.device).expand_as(prompts)
        last = prompts.new_zeros(len(prompts), self.model.config.vocab_size, dtype=torch.float32)
        for start in range(0, prompts.shape[1], self.PREFILL):
            part = slice(start, start + self.PREFILL)
            end = min(start + self.PREFILL, prompts.shape[1])
            hidden = self.hidden(prompts[:, part], positions[:, part], end)
            ends_here = ((lengths > start) & (lengths <= end)).nonzero().squeeze(1)
            last[ends_here] = self.model.logits(hidden[ends_here, lengths[ends_here] - 1 - start]).float()
        return last

    def step(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        """tokens, positions (B,), end: 1 + the largest position -> logits (B, V)."""
        return self.model.logits(self.hidden(tokens[:, None], positions[:, None], end)[:, 0]).float()

    def hidden(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        future = torch.arange(end, device=tokens.device) > positions[..., None]
        layers = zip(self.latents, self.up_projections, strict=True)
        contexts = [LayerCache(latents, *up, rows, positions, future) for latents, up in layers]
        hidden, _ = self.model.model(tokens.flatten(), positions.flatten(), contexts)
        return hidden.view(*tokens.shape, -1)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row of logits (B, V): the likeliest at temperature 0, else drawn from the top_k likeliest (0: all)
    that together make up top_p of the probability."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0  # the first is always kept
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)
