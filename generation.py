"""Write text with a trained model: read the prompt once, then draw one token at a time and read it.

Attention needs little of the earlier tokens. Multi-head latent attention (DeepSeek-V2, section 2.1) caches one latent
and one rotary key per token and layer, and never rebuilds a head's keys or values (`model.Attention.attend_absorbed`).
Decoding from this cache gives what a full forward pass over the whole text gives:

    >>> from config import ModelConfig
    >>> model = DeepSeekV2(ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.2))
    >>> (new,) = zip(*generate(model, prompts=[[1, 2, 3]], max_new_tokens=4))
    >>> list(new) == model(torch.tensor([[1, 2, 3, *new]]))[0, 2:-1].argmax(-1).tolist()
    True
    >>> LatentCache(model, batch_size=1, length=7).latents.shape  # layers, prompts, tokens, latent + rotary key
    torch.Size([2, 1, 7, 576])
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from config import UserError
from kernels import compute_dtype
from model import Block, DeepSeekV2, LayerCache
from tokenizer import Tokenizer

# A conversation to be answered, or a text to be continued.
Prompt = list[dict[str, Any]] | str


# ---------------------------------------------------------------- answers


@dataclass
class Answer:
    """Text that a model has written after a prompt so far."""

    tokenizer: Tokenizer
    # Most tokens that it may have.
    room: int
    # What the chat template writes between header and content; the model writes it, but it is not part of the answer.
    lead: str = ""
    # All tokens, the stop token at the end included.
    tokens: list[int] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether it ends with a stop token: the end of a turn, or of a document."""
        return bool(self.tokens) and self.tokens[-1] in self.tokenizer.stop_ids

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.tokens[: len(self.tokens) - self.stopped]).removeprefix(self.lead)


def write(
    model: DeepSeekV2, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any
) -> Iterator[list[Answer]]:
    """Answer or continue each prompt, yielding all answers after every token; each ends with a stop token, after
    max_new_tokens or with the model's context. options: as in `generate`. Raises UserError."""
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    lead = tokenizer.template.turns["assistant"].lead
    answers = [
        Answer(tokenizer, room(model, tokens, max_new_tokens), "" if isinstance(prompt, str) else lead)
        for prompt, tokens in zip(prompts, ids, strict=True)
    ]
    for drawn in generate(model, ids, max_new_tokens, tokenizer.stop_ids, **options):
        for answer, token in zip(answers, drawn, strict=True):
            if not answer.stopped and len(answer.tokens) < answer.room:
                answer.tokens.append(token)
        yield answers


def answers(
    model: DeepSeekV2, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any
) -> list[Answer]:
    """Return the complete answers. Arguments and errors as in `write`."""
    *_, complete = write(model, tokenizer, prompts, max_new_tokens, **options)
    return complete


def encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return a prompt's ids: a conversation ends with the assistant's header, a text stands alone."""
    return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.render(prompt, True)[0]


def fit_into_context(
    model: DeepSeekV2, tokenizer: Tokenizer, messages: list[dict[str, Any]], max_new_tokens: int
) -> tuple[list[dict[str, Any]], str]:
    """Drop a conversation's oldest turns until there is room for an answer: max_new_tokens, or a quarter of the context
    if that is less. Keep the system message and the last turn.

    Return the conversation and a note about what was dropped ("": nothing).
    """
    context = model.config.max_position_embeddings
    needed = min(max_new_tokens, context // 4)
    start = int(messages[0]["role"] == "system")
    kept = list(messages)
    while len(kept) > start + 1 and len(encode(tokenizer, kept)) + needed > context:
        del kept[start : start + 2]
    dropped = len(messages) - len(kept)
    note = f"the context of {context:,} tokens is full: the oldest {dropped} messages are forgotten"
    return kept, note if dropped else ""


# ---------------------------------------------------------------- decoding


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
    """Continue prompts of any lengths, yielding one token per prompt and step, until each has stopped.

    A prompt stops at a stop token, after max_new_tokens, or where the model's context ends; from then on its last token
    is repeated. observe: called with each step's logits (B, V) before a token is drawn from them. Raises UserError for
    a prompt that is empty or fills the context, for logits that are not finite, and as `check_sampling`.
    """
    check_sampling(temperature, top_k, top_p)
    if not all(prompts):
        raise UserError("a prompt is empty; it needs at least one token")
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    steps = max(room(model, prompt, max_new_tokens) for prompt in prompts)
    device = model.output_weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    stops = torch.tensor(stop_token_ids, dtype=torch.int64, device=device)
    tokens = torch.zeros_like(lengths)
    stopped = torch.zeros_like(lengths, dtype=torch.bool)
    cache = LatentCache(model, len(prompts), min(longest + steps, context))
    logits = cache.prefill(padded, lengths)
    for step in range(steps):
        if observe:
            observe(logits)
        tokens = torch.where(stopped, tokens, sample(logits, temperature, top_k, top_p, generator))
        yield tokens.tolist()
        positions = lengths + step
        stopped |= torch.isin(tokens, stops) | (positions + 1 >= context)
        if stopped.all() or step == steps - 1:
            return
        logits = cache.step(tokens, positions.clamp(max=context - 1), min(longest + step + 1, context))


def room(model: DeepSeekV2, prompt: list[int], max_new_tokens: int, name: str = "the conversation") -> int:
    """Return how many tokens may follow a prompt: max_new_tokens, or as many as the context holds if that is less.
    Raises UserError if it holds none. name: what the error calls the prompt."""
    context = model.config.max_position_embeddings
    if len(prompt) >= context:
        raise UserError(
            f"{name} has {len(prompt):,} tokens, but the model's context is {context:,}: shorten it or start a new one"
        )
    return min(max_new_tokens, context - len(prompt))


class LatentCache:
    """Latent and rotary key of every token so far: kv_lora_rank + qk_rope_head_dim numbers per token and layer."""

    PREFILL = 512  # prompt tokens per pass: bounds the memory of the attention scores

    def __init__(self, model: DeepSeekV2, batch_size: int, length: int) -> None:
        config, weight = model.config, model.output_weight
        self.model = model
        shape = (config.num_hidden_layers, batch_size, length, config.kv_lora_rank + config.qk_rope_head_dim)
        self.latents = torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device)
        blocks = [layer for layer in model.model.layers if isinstance(layer, Block)]
        self.up_projections = [block.self_attn.up_projections() for block in blocks]

    def prefill(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """Read prompts (B, T), padded on the right, of lengths (B,); return the logits (B, V) of each one's last token.

        Padding writes entries that are in the future of every real token and are overwritten before they are read.
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
        """Read one token (B,) per prompt at positions (B,); return logits (B, V). end: 1 + the largest position."""
        return self.model.logits(self.hidden(tokens[:, None], positions[:, None], end)[:, 0]).float()

    def hidden(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        future = torch.arange(end, device=tokens.device) > positions[..., None]
        layers = zip(self.latents, self.up_projections, strict=True)
        contexts = [LayerCache(latents, *up, rows, positions, future) for latents, up in layers]
        hidden, _ = self.model.model(tokens.flatten(), positions.flatten(), contexts)
        return hidden.view(*tokens.shape, -1)


# ---------------------------------------------------------------- sampling

COLDEST = 1e-6  # the lowest temperature above 0; logits divided by less overflow


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int = 0) -> None:
    """Raise UserError for values that no token can be drawn with."""
    if temperature != 0 and not COLDEST <= temperature < float("inf"):
        raise UserError(
            f"temperature is {temperature}; it must be 0 (always the likeliest token) or at least {COLDEST}"
        )
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must not be negative")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if abs(seed) >= 2**63:
        raise UserError(f"seed is {seed}; it must be below 2**63")


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row of logits (B, V): the likeliest at temperature 0, else from the top_k likeliest (0: all)
    that together make up top_p of the probability. Raises UserError for logits that are not finite."""
    likeliest = logits.max(dim=-1)
    if not likeliest.values.isfinite().all():  # max returns NaN if there is one
        raise UserError("the model's logits are not finite: its weights are broken, or training has diverged")
    if temperature == 0:
        return likeliest.indices
    probabilities, ids = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if top_p < 1:  # at 1, rounding in cumsum would cut the tail
        probabilities[probabilities.cumsum(dim=-1) - probabilities >= top_p] = 0  # the first is always kept
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)
