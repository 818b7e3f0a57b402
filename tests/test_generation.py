"""Decoding from the latent cache against full forward passes, and sampling against transformers' and a literal one."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import generation
from config import RopeScaling, UserError
from generation import LatentCache, generate, sample
from launch.cost import cache_entries
from model import DeepSeekV2
from small_models import relative_difference, small_model
from tokenizer import Tokenizer

YARN = RopeScaling(factor=40.0, original_max_position_embeddings=128, mscale=0.707, mscale_all_dim=0.707)
CASES = {
    "plain": {},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 5120},
    "compressed queries, groups": {
        "q_lora_rank": 18,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": True,
    },
}


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 112, (length,), generator=generator).tolist() for length in lengths]


def continuations(model: DeepSeekV2, prompts: list[list[int]], max_new_tokens: int, **options) -> list[list[int]]:
    """Return the new tokens of each prompt."""
    steps = list(generate(model, prompts, max_new_tokens, **options))
    return [list(tokens) for tokens in zip(*steps, strict=True)]


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_cached_logits_equal_a_full_forward_pass(changes: dict) -> None:
    model = small_model(**changes)
    tokens = torch.tensor(random_prompts(60, 60))
    full = model(tokens)
    cache = LatentCache(model, 2, 60)
    steps = [cache.prefill(tokens[:, :20], torch.tensor([20, 20]))]
    for i in range(20, 60):
        steps.append(cache.step(tokens[:, i], torch.full((2,), i), i + 1))
    assert relative_difference(torch.stack(steps, dim=1), full[:, 19:]) < 1e-4


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_greedy_tokens_equal_full_forward_passes(changes: dict) -> None:
    model = small_model(**changes)
    (prompt,) = random_prompts(30)
    (new,) = continuations(model, [prompt], 120)
    # If each token is the likeliest one after those before it, a greedy loop of full passes gives these tokens.
    logits = model(torch.tensor([prompt + new]))[0]
    assert new == logits.argmax(dim=-1)[29:-1].tolist()
    assert len(set(new)) > 10


def test_the_cache_holds_latent_and_rotary_key_and_nothing_else() -> None:
    model = small_model()
    cache = LatentCache(model, batch_size=2, length=50)
    latent, all_heads = cache_entries(model.config)  # per token, as show.py prints them
    assert (latent, all_heads) == (3 * (20 + 8), 3 * 3 * (14 + 8 + 10))  # 3 layers, 3 heads
    assert cache.latents.numel() == 2 * 50 * latent
    held = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert held == [cache.latents]


@torch.no_grad()
def test_prompts_of_different_lengths_equal_each_alone() -> None:
    model = small_model()
    prompts = random_prompts(3, 41, 1, 17)
    together = continuations(model, prompts, 40)
    assert together == [continuations(model, [prompt], 40)[0] for prompt in prompts]


def test_prompts_longer_than_a_chunk_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    prompts = random_prompts(5, 8, 23, 16)
    whole = continuations(model, prompts, 20)
    monkeypatch.setattr(LatentCache, "PREFILL", 8)
    assert continuations(model, prompts, 20) == whole


def test_a_prompt_stops_at_its_stop_token_and_the_others_continue() -> None:
    model = small_model()
    prompts = random_prompts(6, 9)
    free = continuations(model, prompts, 30)
    stop = free[0][4]
    after_stop = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
    stopped = continuations(model, prompts, 30, stop_token_ids=(stop,))
    for expected, tokens in zip(after_stop, stopped, strict=True):
        assert tokens[: len(expected)] == expected
        assert set(tokens[len(expected) :]) <= {stop}
    assert len(stopped[0]) == max(map(len, after_stop))


def test_bfloat16_weights_and_autocast_generate() -> None:
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(continuations(model, random_prompts(5), 10)[0]) == 10
    assert len(continuations(model.to(torch.bfloat16), random_prompts(5), 10)[0]) == 10


def test_each_prompt_of_a_batch_ends_with_the_context() -> None:
    """Oracle: each prompt alone. Shorter ones are not cut by the longest."""
    model = small_model(max_position_embeddings=64)
    prompts = random_prompts(63, 58, 54, 3)
    alone = [continuations(model, [prompt], 10)[0] for prompt in prompts]
    assert [len(tokens) for tokens in alone] == [1, 6, 10, 10]
    together = continuations(model, prompts, 10)
    assert [tokens[: len(expected)] for tokens, expected in zip(together, alone, strict=True)] == alone
    with pytest.raises(UserError, match=r"the conversation has 64 tokens, but the model's context is 64: shorten it"):
        next(generate(model, random_prompts(64), 10))
    with pytest.raises(UserError, match="a prompt is empty"):
        next(generate(model, [[1], []], 10))


# ---------------------------------------------------------------- sampling


def draws(logits: torch.Tensor, number: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Return the share of each token among `number` draws from one distribution (V,)."""
    generator = torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(number, -1), temperature, top_k, top_p, generator)
    return torch.bincount(tokens, minlength=len(logits)) / number


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.3, 6, 0.8), (0.7, 3, 0.95), (1.0, 50, 0.5)],
)
def test_sampling_draws_from_the_distribution_that_transformers_defines(
    temperature: float, top_k: int, top_p: float
) -> None:
    torch.manual_seed(1)
    logits = torch.randn(20) * 1.5
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    expected = TopPLogitsWarper(top_p)(None, scores)[0].softmax(dim=-1)
    shares = draws(logits, 40_000, temperature, top_k, top_p)
    assert shares[expected == 0].sum() == 0
    assert (shares[expected > 1e-3] > 0).all()
    assert (shares - expected).abs().max() < 0.01


def test_top_p_of_one_keeps_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding makes the cumulative sum reach 1 before the last of many tokens."""
    logits = 2 * torch.randn(1, 70_000, generator=torch.Generator().manual_seed(70_000))
    probabilities = logits.softmax(dim=-1).sort(descending=True).values
    assert (probabilities.cumsum(dim=-1) - probabilities >= 1).sum() > 10
    drawn_from: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: drawn_from.append(p) or p.argmax(-1, keepdim=True))
    sample(logits, 1.0, 0, 1.0, None)
    assert (drawn_from[0] > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_reported(bad: float, temperature: float) -> None:
    model = small_model()
    with torch.no_grad():
        model.output_weight[5] = bad
    with pytest.raises(UserError, match="the model's logits are not finite"):
        continuations(model, random_prompts(6), 4, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1e-38}, "temperature is 1e-38; it must be 0"),
        ({"temperature": 1e-320}, "it must be 0 .* or at least 1e-06"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_impossible_sampling_options_are_errors(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        continuations(small_model(), random_prompts(6), 4, **options)


# ---------------------------------------------------------------- answers


def test_an_answer_is_the_text_between_the_templates_header_and_a_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading spaces are part of it, but not the space that deepseek's template puts before every answer."""
    for name, spoken, expected in (
        ("chatml", "    return x + 1", "    return x + 1"),
        ("deepseek", " Hello", "Hello"),
        ("deepseek", "   indented", "  indented"),
    ):
        tokenizer = Tokenizer(vocab_size=512, chat_template=name)
        for stop in tokenizer.stop_ids:
            script = [*tokenizer.encode(spoken), stop, *tokenizer.encode("more")]
            monkeypatch.setattr(generation, "generate", lambda *_, script=script, **__: ([token] for token in script))
            model = small_model(vocab_size=512)
            (answer,) = generation.answers(model, tokenizer, [[{"role": "user", "content": "?"}]], 100)
            assert (answer.text, answer.stopped) == (expected, True)
            (continued,) = generation.answers(model, tokenizer, ["def f(x):"], 100)
            assert continued.text == spoken
            (cut,) = generation.answers(model, tokenizer, ["def f(x):"], 2)
            assert (cut.text, cut.stopped) == (tokenizer.decode(script[:2]), script[1] == stop)
