"""The page in the browser, and what it shows of the inside. Oracles: full forward passes, chat.py.

What a person sees is tested in Debian's chromium, and skipped where that is not installed.
"""

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import chat
import model as model_module
from checkpoint import save_pretrained
from generation import LatentCache, generate
from launch.cost import cache_entries
from model import DeepSeekV2, MoE
from small_models import small_model
from small_runs import run_main
from tokenizer import Tokenizer
from view import page as web
from view import trace

SETTINGS = {"system": None, "max_new_tokens": 24, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
QUESTION = "Hello! How are you?"
HOSTILE = "<script>document.title = 'taken'</script><b>bold</b> &amp; <|im_end|>\n  *stars*"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(vocab_size=512)


def talkative_model(tokenizer: Tokenizer, seed: int = 0, context: int = 512) -> DeepSeekV2:
    """The likeliest is always a token of letters, so that answers can be compared by eye and never end early."""
    model = small_model(seed, vocab_size=512, max_position_embeddings=context).eval()
    unspoken = [i for i, token in enumerate(tokenizer.tokens) if not token.strip().isalpha()]
    with torch.no_grad():
        model.output_weight[unspoken] = 0
    return model


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> DeepSeekV2:
    return talkative_model(tokenizer)


def prompt_for(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0]


# ---------------------------------------------------------------- what is seen inside


def test_what_is_seen_is_what_a_full_pass_computes(model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    prompt = prompt_for(tokenizer, QUESTION)
    *_, (_, seen) = trace.write(model, tokenizer, prompt, 20, 0, temperature=1.5)
    generator = torch.Generator().manual_seed(0)
    tokens = [token for (token,) in generate(model, [prompt], 20, temperature=1.5, generator=generator)]
    routes: dict[int, tuple[torch.Tensor, ...]] = {}
    for number, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate.register_forward_hook(lambda gate, x, out, number=number: routes.update({number: out}))
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt + tokens]))[0].softmax(dim=-1)[len(prompt) - 1 : -1]
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate._forward_hooks.clear()
    assert len(seen) == 20
    for i, (token, expected, view) in enumerate(zip(tokens, probabilities, seen, strict=True)):
        others = [n for n in expected.argsort(descending=True).tolist() if n != token][:5]
        assert [name.rpartition(" ")[2] for name, _ in view.likeliest] == [str(n) for n in (token, *others)]
        seen_probabilities = [view.probability, *(share for _, share in view.likeliest)]
        assert seen_probabilities == pytest.approx(expected[[token, token, *others]].tolist(), rel=1e-3)
        if i < 19:
            assert list(view.routes) == [1, 2]
            for number, (scores, _, experts) in routes.items():
                assert view.routes[number].scores == pytest.approx(scores[len(prompt) + i].tolist(), rel=1e-3)
                assert view.routes[number].chosen == experts[len(prompt) + i].tolist()
    assert seen[-1].routes == {}  # no layer has read the last token


def test_watching_changes_nothing_and_ends(model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    prompt = prompt_for(tokenizer, QUESTION)
    stream = trace.write(model, tokenizer, prompt, 20, 0)
    texts = [next(stream)[0] for _ in range(5)]
    stream.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert texts[-1] == tokenizer.decode([token for (token,) in generate(model, [prompt], 5)])
    assert all(longer.startswith(text[:-1]) for text, longer in itertools.pairwise(texts))


def test_an_answer_ends_with_its_turn_or_its_document(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that ends it is seen, but is no text."""
    for stop in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        model = small_model(vocab_size=512)
        spoken = [*tokenizer.encode("Yes é"), stop]

        def speak(model: Any, prompts: Any, most: int, stops: tuple[int, ...], observe: Any, spoken=spoken, **_: Any):
            assert stops == tokenizer.stop_ids
            for token in spoken:
                observe(torch.zeros(1, 512))
                yield [token]

        monkeypatch.setattr(trace, "generate", speak)
        *_, (text, seen) = trace.write(model, tokenizer, [1], 20, 0)
        assert text == "Yes é"
        assert seen[-1].text == tokenizer.decode([stop])


def test_every_token_can_be_told_apart(tokenizer: Tokenizer) -> None:
    names = [trace.visible(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == tokenizer.vocab_size
    assert not any(" · " not in name or "\n" in name or "\N{REPLACEMENT CHARACTER}" in name for name in names)
    (space_a,) = tokenizer.encode(" a")
    assert trace.visible(tokenizer, space_a) == f"␣a · {space_a}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caches_size_is_that_of_the_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cache itself, and of the keys and values that training rebuilds for every head."""
    model = small_model().to(dtype)
    latent, multi_head = (entries * dtype.itemsize for entries in cache_entries(model.config))
    assert LatentCache(model, 1, 50).latents.nbytes == 50 * latent
    rebuilt = []
    attention = model_module.document_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        rebuilt.append(k.nbytes + v.nbytes)
        return attention(q, k, v, *rest)

    monkeypatch.setattr(model_module, "document_attention", attend)
    model(torch.arange(50)[None])
    assert sum(rebuilt) == 50 * multi_head


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(model: DeepSeekV2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_pretrained(tmp_path_factory.mktemp("web") / "model", model, tokenizer)
    return tmp_path_factory.getbasetemp() / "web0" / "model"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["RUN", "RUN"], "2 checkpoints are named; two need --web"),
        (["RUN", "RUN", "RUN", "--web"], "3 checkpoints are named; two are the most"),
        (["--web"], "name a CHECKPOINT"),
        (["RUN", "--web", "--prompt", "Hi"], "--prompt and --web exclude each other"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(chat.main, [str(run) if flag == "RUN" else flag for flag in flags], tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_gradio_the_error_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "find_spec", lambda name: None)
    assert run_main(chat.main, [str(run), "--web"], tmp_path) == 2
    assert capsys.readouterr().err == "error: --web needs Gradio: pip install -r requirements-web.txt\n"


def test_the_command_serves_this_machine_only(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(web, "serve", lambda *arguments: served.append(arguments))
    assert run_main(chat.main, [str(run), str(run), "--web", "--temperature", "0"], tmp_path) == 0
    assert run_main(chat.main, [str(run), "--web", "--host", "0.0.0.0"], tmp_path) == 0
    (models, names, host, settings), (_, _, asked_for, _) = served
    assert (len(models), list(names), host, asked_for) == (2, [str(run)] * 2, "127.0.0.1", "0.0.0.0")
    assert settings["temperature"] == 0


# ---------------------------------------------------------------- the page, without a browser


def respond(page: web.Page, question: str, *talks: web.Talk, **typed: Any) -> list[Any]:
    """What the page shows in the end; typed: fields that no longer hold what they held at first."""
    names = ("system", "continues", "temperature", "top_p", "top_k", "seed", "max_new_tokens")
    fields = {getattr(page, name): typed.get(name, getattr(page, name).value) for name in names}
    states = {panel.talk: talk for panel, talk in zip(page.panels, talks or (web.Talk(),), strict=True)}
    *_, outputs = page.respond({page.question: question} | fields | states)
    return outputs


def test_a_full_context_forgets_the_oldest_turns_as_in_the_terminal(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = talkative_model(tokenizer, context=128)
    page = web.Page([(narrow, tokenizer)], ["narrow"], SETTINGS | {"system": "Be kind."})
    writer = chat.Writer(narrow, tokenizer, chat.ChatConfig(("",), **SETTINGS), torch.Generator())
    talk, messages, forgotten = web.Talk(), chat.first_messages("Be kind."), []
    for question in ("One?", "Two?", "Three?", "Four?"):
        messages = chat.take_turn(writer, [*messages, {"role": "user", "content": question}])
        _, shown, *_, talk = respond(page, question, talk)
        assert list(talk.messages) == messages[1:]
        notes = [line for line in capsys.readouterr().err.splitlines() if "forgotten" in line]
        assert notes == [f"({message['metadata']['title']})" for message in shown if "metadata" in message]
        forgotten += notes
    assert forgotten == ["(the context of 128 tokens is full: the oldest 2 messages are forgotten)"] * len(forgotten)
    assert forgotten


def test_each_view_of_two_checkpoints_says_whose_it_is(model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    names = ["runs/left", "runs/right"]
    two = web.Page([(model, tokenizer)] * 2, names, SETTINGS)
    one = web.Page([(model, tokenizer)], names[:1], SETTINGS)
    for name, panel in zip(names, two.panels, strict=True):
        assert [view.label.partition(" · ")[0] for view in panel[1:5]] == [name] * 4
        assert [view.label.partition(" · ")[2] for view in panel[1:5]] == [view.label for view in one.panels[0][1:5]]


@pytest.mark.parametrize("name", ["seed", "max_new_tokens", "top_k", "temperature", "top_p"])
def test_an_emptied_number_is_what_it_was_at_first(name: str, model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    settings = SETTINGS | {"seed": 5, "max_new_tokens": 7, "top_k": 3, "temperature": 1.5, "top_p": 0.8}
    page = web.Page([(model, tokenizer)], ["model"], settings)
    assert respond(page, QUESTION, **{name: None}) == respond(page, QUESTION)


# ---------------------------------------------------------------- what a person sees

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no browser here: apt-get install chromium chromium-driver",
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser: webdriver.Chrome) -> Iterator[Callable[..., webdriver.Chrome]]:
    """Serve a page and open it."""
    pages = []

    def open_(*models: tuple[DeepSeekV2, Tokenizer], **settings: Any) -> webdriver.Chrome:
        pages.append(web.Page(models, ["left", "right"][: len(models)], SETTINGS | settings))
        browser.get(web.launch(pages[-1], "127.0.0.1"))
        wait(browser, lambda: find(browser, "#question textarea"))
        return browser

    yield open_
    for page in pages:
        page.blocks.close(verbose=False)


def wait(browser: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, 30, 0.05).until(lambda _: condition())


def find(browser: webdriver.Chrome, selector: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """What stands there, as text, spaces and all."""
    script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
    return browser.execute_script(script, selector)


def ask(browser: webdriver.Chrome, text: str) -> None:
    (box,) = find(browser, "#question textarea")
    for i, line in enumerate(text.split("\n")):
        box.send_keys(*(Keys.SHIFT, Keys.ENTER, Keys.NULL) if i else (), line)
    box.send_keys(Keys.ENTER)


def said(browser: webdriver.Chrome, who: str) -> list[str]:
    return texts(browser, f".chat [data-testid={who}] .message-content")


def shown_tokens(browser: webdriver.Chrome) -> list[str]:
    return [text.replace("↵\n", "\n").replace("↵", "\n") for text in texts(browser, ".tokens .token .text")]


def printed(run: Path, text: str, directory: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What chat.py answers at temperature 0."""
    arguments = [str(run), "--prompt", text, "--temperature", "0", "--max-new-tokens", "24", *flags]
    assert run_main(chat.main, arguments, directory) == 0
    return capsys.readouterr().out[:-1]


class Gate:
    """Lets a few tokens of an answer pass, and the others when it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.opened = threading.Event()
        monkeypatch.setattr(web.Page, "PAUSE", 0)
        monkeypatch.setattr(trace, "generate", self.generate)
        self.tokens = tokens

    def generate(self, *arguments: Any, **options: Any) -> Iterator[list[int]]:
        for i, tokens in enumerate(generate(*arguments, **options)):
            if i == self.tokens:
                assert self.opened.wait(60)
            yield tokens


@needs_chromium
def test_an_answer_streams_in_and_is_that_of_the_terminal(
    open_page: Callable[..., webdriver.Chrome],
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = printed(run, QUESTION, tmp_path, capsys)
    gate = Gate(monkeypatch, tokens=6)
    page = open_page((model, tokenizer))
    ask(page, QUESTION)
    wait(page, lambda: len(shown_tokens(page)) == 6)
    (part,) = said(page, "bot")
    assert 0 < len(part) < len(whole)
    gate.opened.set()
    wait(page, lambda: len(shown_tokens(page)) == 24)
    assert said(page, "bot") == [whole]
    # the view inside: its tokens, and on a click those that were likely and the experts
    assert "".join(shown_tokens(page)).lstrip() == whole
    *_, (_, seen) = trace.write(model, tokenizer, prompt_for(tokenizer, QUESTION), 24, 0)
    find(page, ".tokens .token")[3].click()
    (token, share), *others = seen[3].likeliest
    likeliest = sorted([(f"▸ {token}", share), *others], key=lambda entry: -entry[1])
    wait(page, lambda: sorted(texts(page, ".label dt")) == sorted(name for name, _ in likeliest))
    chosen = [f"layer {layer}, expert {expert}:" for layer, route in seen[3].routes.items() for expert in route.chosen]
    orange = wait(page, lambda: texts(page, f".experts rect[fill='{web.CHOSEN}'] title"))
    assert {title.rpartition(" ")[0] for title in orange} == set(chosen)
    read = len(prompt_for(tokenizer, QUESTION)) + 23
    (latent, multi_head) = (f"{4 * entries * read / 1024:,.1f} KB" for entries in cache_entries(model.config))
    assert {latent, multi_head} <= set(texts(page, ".cache text"))


@needs_chromium
def test_what_is_typed_stays_text(
    open_page: Callable[..., webdriver.Chrome],
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A question, and the same as an answer."""
    page = open_page((model, tokenizer))
    ask(page, HOSTILE)
    wait(page, lambda: len(shown_tokens(page)) == 24)
    assert said(page, "user") == [HOSTILE]
    assert said(page, "bot") == [printed(run, HOSTILE, tmp_path, capsys)]
    spoken = [*tokenizer.encode(HOSTILE), tokenizer.eos_token_id]

    def speak(*_: Any, observe: Callable, **__: Any) -> Iterator[list[int]]:
        for token in spoken:
            observe(torch.zeros(1, tokenizer.vocab_size))
            yield [token]

    monkeypatch.setattr(trace, "generate", speak)
    ask(page, "Say it")
    wait(page, lambda: len(shown_tokens(page)) == len(spoken))
    assert said(page, "bot")[1] == HOSTILE
    assert "".join(shown_tokens(page)) == HOSTILE + "<|im_end|>"
    assert page.title == "SFT from scratch"
    assert not find(page, ".chat b, .chat script, .tokens b, .tokens script")


@needs_chromium
def test_stop_and_reset(
    open_page: Callable[..., webdriver.Chrome],
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gate = Gate(monkeypatch, tokens=6)
    page = open_page((model, tokenizer))
    ask(page, "Why?")
    wait(page, lambda: len(shown_tokens(page)) == 6)
    find(page, "#stop")[0].click()
    gate.opened.set()
    ask(page, QUESTION)  # the next question has the whole model again, and the stopped answer in its history
    wait(page, lambda: len(shown_tokens(page)) == 24)
    stopped, _ = said(page, "bot")
    assert len(stopped) < 24
    find(page, "#reset")[0].click()
    wait(page, lambda: not said(page, "user"))
    assert not shown_tokens(page)
    ask(page, QUESTION)
    wait(page, lambda: len(shown_tokens(page)) == 24)
    assert said(page, "bot") == [printed(run, QUESTION, tmp_path, capsys)]


@needs_chromium
def test_two_checkpoints_side_by_side_and_a_system_prompt(
    open_page: Callable[..., webdriver.Chrome],
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = talkative_model(tokenizer, seed=1)
    save_pretrained(tmp_path / "other", other, tokenizer)
    page = open_page((model, tokenizer), (other, tokenizer), system="Be kind.")
    ask(page, QUESTION)
    wait(page, lambda: len(shown_tokens(page)) == 48)
    told = ("--system", "Be kind.")
    expected = [printed(place, QUESTION, tmp_path, capsys, *told) for place in (run, tmp_path / "other")]
    assert said(page, "bot") == expected
    assert expected[0] != expected[1]


@needs_chromium
def test_a_base_model_continues_and_nothing_leaves_the_machine(
    open_page: Callable[..., webdriver.Chrome], model: DeepSeekV2, tokenizer: Tokenizer
) -> None:
    page = open_page((model, tokenizer))
    find(page, "button.label-wrap")[0].click()  # the settings
    wait(page, lambda: find(page, "#continues input"))[0].click()
    ask(page, "Once upon a time")
    wait(page, lambda: len(shown_tokens(page)) == 24)
    prompt = tokenizer.encode("Once upon a time")
    continuation = tokenizer.decode([token for (token,) in generate(model, [prompt], 24)])
    assert "".join(shown_tokens(page)) == continuation
    assert said(page, "bot") == [continuation]
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith("http://127.0.0.1") for url in asked)
    assert not [url for url in asked if url.startswith("http") and not url.startswith("http://127.0.0.1:")]
    assert not web.gr.analytics.analytics_enabled()
