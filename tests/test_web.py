"""The page in the browser, and the trace of the model that it shows. Oracles: full forward passes, chat.py.

One test uses Debian's chromium and is skipped where that is not installed; the others call the page or its server.
"""

import asyncio
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import chat
import generation
from checkpoint import save_pretrained
from generation import generate
from model import DeepSeekV2, MoE
from small_models import small_model
from small_runs import run_main
from tokenizer import Tokenizer
from view import page as web
from view.trace import trace, visible

SETTINGS = {"system": None, "max_new_tokens": 24, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
QUESTION = "Hello! How are you?"
HOSTILE = "<b>x</b>&amp;<|im_end|>\n  *stars*<script>document.title = 'taken'</script>"


def talkative_model(tokenizer: Tokenizer, seed: int = 0, context: int = 512) -> DeepSeekV2:
    """Return a model whose likeliest token is always one of letters: its answers are readable and never end early."""
    model = small_model(seed, vocab_size=512, max_position_embeddings=context).eval()
    unspoken = [i for i, token in enumerate(tokenizer.tokens) if not token.strip().isalpha()]
    with torch.no_grad():
        model.output_weight[unspoken] = 0
    return model


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> DeepSeekV2:
    return talkative_model(tokenizer)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------- the trace


def test_the_trace_equals_a_full_forward_pass(model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    prompt, _ = tokenizer.render(user(QUESTION), add_generation_prompt=True)
    generator = torch.Generator().manual_seed(0)
    *_, (_, seen) = trace(model, tokenizer, user(QUESTION), 20, temperature=1.5, generator=generator)
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
                seen_scores, chosen = view.routes[number]
                assert seen_scores == pytest.approx(scores[len(prompt) + i].tolist(), rel=1e-3)
                assert chosen == experts[len(prompt) + i].tolist()
    assert seen[-1].routes == {}  # no layer has read the last token


def test_tracing_changes_nothing_and_leaves_no_hooks(model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    prompt, _ = tokenizer.render(user(QUESTION), add_generation_prompt=True)
    stream = trace(model, tokenizer, user(QUESTION), 20)
    texts = [next(stream)[0].text for _ in range(5)]
    stream.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert texts[-1] == tokenizer.decode([token for (token,) in generate(model, [prompt], 5)])
    assert all(longer.startswith(text[:-1]) for text, longer in itertools.pairwise(texts))


def test_the_stop_token_is_traced_but_not_part_of_the_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop in tokenizer.stop_ids:
        monkeypatch.setattr(generation, "generate", scripted([*tokenizer.encode("Yes é"), stop]))
        *_, (answer, seen) = trace(small_model(vocab_size=512), tokenizer, "Once", 20)
        assert answer.text == "Yes é"
        assert seen[-1].text == tokenizer.decode([stop])


def scripted(tokens: list[int]) -> Callable[..., Iterator[list[int]]]:
    def speak(*_: Any, observe: Callable, **__: Any) -> Iterator[list[int]]:
        for token in tokens:
            observe(torch.zeros(1, 512))
            yield [token]

    return speak


def test_every_token_has_its_own_name(tokenizer: Tokenizer) -> None:
    names = [visible(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == tokenizer.vocab_size
    assert not any(" · " not in name or "\n" in name or "\N{REPLACEMENT CHARACTER}" in name for name in names)
    (space_a,) = tokenizer.encode(" a")
    assert visible(tokenizer, space_a) == f"␣a · {space_a}"


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(model: DeepSeekV2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("web") / "model"
    save_pretrained(directory, model, tokenizer)
    return directory


def test_the_command_passes_its_flags_to_the_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(web, "serve", lambda *arguments: served.extend(arguments))
    flags = ["--compare", str(run), "--temperature", "0", "--port", "7999", "--host", "0.0.0.0", "--auth", "a:b"]
    assert run_main(chat.main, [str(run), "--web", *flags], tmp_path) == 0
    models, names, settings = served
    assert (len(models), names) == (2, [str(run)] * 2)
    assert [settings[name] for name in ("host", "port", "auth", "temperature")] == ["0.0.0.0", 7999, "a:b", 0]


# ---------------------------------------------------------------- the page, without a browser


def respond(page: web.Page, question: str, *talks: web.Talk, **typed: Any) -> list[Any]:
    """Return what the page shows in the end. typed: fields that no longer hold their first values."""
    values = {field: typed.get(name, field.value) for name, field in page.fields.items()}
    states = {
        panel.talk: talk for panel, talk in zip(page.panels, talks or [web.Talk()] * len(page.panels), strict=True)
    }
    *_, outputs = page.respond(values | {page.question: question} | states)
    return outputs


def printed(run: Path, text: str, directory: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return what chat.py answers at temperature 0."""
    arguments = [str(run), "--prompt", text, "--temperature", "0", "--max-new-tokens", "24", *flags]
    assert run_main(chat.main, arguments, directory) == 0
    return capsys.readouterr().out[:-1]


def test_two_checkpoints_answer_side_by_side_with_a_system_prompt(
    model: DeepSeekV2, tokenizer: Tokenizer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = talkative_model(tokenizer, seed=1)
    save_pretrained(tmp_path / "other", other, tokenizer)
    page = web.Page([(model, tokenizer), (other, tokenizer)], ["left", "right"], SETTINGS | {"system": "Be kind."})
    _, left, *views, right = (output for i, output in enumerate(respond(page, QUESTION)) if i not in (7, 8, 9, 10))
    texts = [messages[-1]["content"][0]["text"] for messages in (left, right)]
    flags = ("--system", "Be kind.")
    assert texts == [printed(place, QUESTION, tmp_path, capsys, *flags) for place in (run, tmp_path / "other")]
    assert texts[0] != texts[1]
    assert [panel.chat.label for panel in page.panels] == ["left", "right"]
    likeliest, experts = views[1], views[2]
    assert len(likeliest) == 6 and list(likeliest.values())[1:] == sorted(list(likeliest.values())[1:], reverse=True)
    assert [label for _, label in experts].count("chosen") == 2 * 3  # layers, experts per token


def test_a_full_context_forgets_the_oldest_turns_as_in_the_terminal(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = talkative_model(tokenizer, context=128)
    page = web.Page([(narrow, tokenizer)], ["narrow"], SETTINGS | {"system": "Be kind."})
    writer = chat.Writer(narrow, tokenizer, chat.ChatConfig("", **SETTINGS), torch.Generator())
    talk, messages, notes = web.Talk(), chat.opening("Be kind."), []
    monkeypatch.setattr(web.gr, "Info", notes.append)
    for question in ("One?", "Two?", "Three?", "Four?"):
        messages = chat.take_turn(writer, [*messages, *user(question)])
        *_, talk = respond(page, question, talk)
        assert list(talk.messages) == messages[1:]
    assert set(notes) == {"the context of 128 tokens is full: the oldest 2 messages are forgotten"}
    assert [line for line in capsys.readouterr().err.splitlines() if "forgotten" in line] == [f"({n})" for n in notes]


def test_an_emptied_number_has_its_first_value(model: DeepSeekV2, tokenizer: Tokenizer) -> None:
    first = {"seed": 5, "max_new_tokens": 7, "top_k": 3, "temperature": 1.5, "top_p": 0.8}
    page = web.Page([(model, tokenizer)], ["model"], SETTINGS | first)
    assert respond(page, QUESTION, **dict.fromkeys(first)) == respond(page, QUESTION)
    for name, other in {"seed": 6, "max_new_tokens": 8, "top_k": 1, "temperature": 0, "top_p": 0.01}.items():
        assert respond(page, QUESTION, **{name: other}) != respond(page, QUESTION)


@pytest.mark.parametrize(
    ("question", "typed", "message"),
    [
        (QUESTION, {"seed": 2**70}, "it must be below 2"),
        (QUESTION, {"temperature": 1e-320}, "temperature is 1e-320"),
        ("a " * 600, {}, "tokens, but the model's context is 512"),
        (QUESTION, {"system": "a " * 600}, "tokens, but the model's context is 512"),
        ("a" * 6000, {}, "the question has 6,000 characters: shorten it"),
        (QUESTION, {"system": "a" * 6000}, "the system has 6,000 characters: shorten it"),
    ],
)
def test_impossible_settings_and_long_prompts_are_errors(
    question: str, typed: dict[str, Any], message: str, model: DeepSeekV2, tokenizer: Tokenizer
) -> None:
    page = web.Page([(model, tokenizer)], ["model"], SETTINGS)
    with pytest.raises(web.gr.Error, match=message):
        respond(page, question, **typed)


# ---------------------------------------------------------------- its server


@pytest.fixture
def serve(model: DeepSeekV2, tokenizer: Tokenizer) -> Iterator[Callable[..., str]]:
    pages = []

    def start(*arguments: Any, **options: Any) -> str:
        pages.append(web.Page([(model, tokenizer)], ["model"], SETTINGS))
        return web.launch(pages[-1], "127.0.0.1", *arguments, **options)

    yield start
    for page in pages:
        page.blocks.close(verbose=False)


def test_other_websites_and_large_requests_are_refused(serve: Callable[..., str]) -> None:
    url = serve()
    port = httpx.URL(url).port
    own = f"127.0.0.1:{port}"
    cases = [
        ({"host": own}, 200),
        ({"host": f"localhost:{port}"}, 200),
        ({"host": own, "origin": f"http://{own}"}, 200),
        ({"host": own, "origin": "http://evil.example"}, 403),
        ({"host": own, "origin": "null"}, 403),
        ({"host": f"[::1]:{port}"}, 200),
        ({"host": f"evil.example:{port}"}, 400),  # DNS rebinding
        ({"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"}, 400),
    ]
    with httpx.Client() as client:
        assert [client.get(f"{url}config", headers=headers).status_code for headers, _ in cases] == [
            code for _, code in cases
        ]
        assert client.post(f"{url}gradio_api/upload", files={"files": b"x" * 2_000_000}).status_code == 413
        assert client.post(f"{url}gradio_api/queue/join", content=iter([b"x"])).status_code == 413  # of unknown length


def test_a_password_is_required(serve: Callable[..., str]) -> None:
    url = serve(auth="user:secret")
    with httpx.Client() as client:
        assert client.get(f"{url}config").status_code == 401
        assert client.post(f"{url}login", data={"username": "user", "password": "wrong"}).status_code == 400
        assert client.post(f"{url}login", data={"username": "user", "password": "secret"}).status_code == 200
        assert client.get(f"{url}config").status_code == 200


def test_a_flood_is_refused_and_everyone_in_the_queue_is_answered(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 requests arrive while an answer is written: the queue takes 20, the others get 503."""
    opened = threading.Event()

    def gated(*arguments: Any, **options: Any) -> Iterator[list[int]]:
        opened.wait(300)
        yield from itertools.islice(generate(*arguments, **options), 2)

    monkeypatch.setattr(generation, "generate", gated)
    url = serve()

    async def flood() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(
            base_url=url, timeout=300, limits=httpx.Limits(max_connections=None), headers={"connection": "close"}
        ) as client:
            config = (await client.get("config")).json()
            asked = next(each for each in config["dependencies"] if each["targets"][0][1] == "submit")
            values = {each["id"]: each["props"].get("value") for each in config["components"]}
            (question,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "question")
            data = [(values | {question: "Hi"})[i] for i in asked["inputs"]]
            bodies = [{"data": data, "fn_index": asked["id"], "session_hash": f"s{i}"} for i in range(80)]
            joined = await asyncio.gather(*(client.post("gradio_api/queue/join", json=body) for body in bodies))
            assert {response.status_code for response in joined} == {200, 503}
            opened.set()
            finished = []
            for body, response in zip(bodies, joined, strict=True):
                if response.status_code == 200:
                    stream = await client.get("gradio_api/queue/data", params={"session_hash": body["session_hash"]})
                    events = [json.loads(line[5:]) for line in stream.text.splitlines() if line.startswith("data:")]
                    finished += [event for event in events if event["msg"] == "process_completed"]
            return finished

    finished = asyncio.run(flood())
    assert len(finished) in (20, 21)  # one more if the first answer had left the queue
    assert all(event["success"] for event in finished)


# ---------------------------------------------------------------- in a real browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000"),
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Visitor:
    """A person in front of the page."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.find("#question textarea"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 180, 0.05).until(lambda _: condition())

    def find(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return self.browser.execute_script(script, selector)

    def click(self, selector: str) -> None:
        self.find(selector)[0].click()

    def ask(self, text: str) -> None:
        (box,) = self.find("#question textarea")
        for i, line in enumerate(text.split("\n")):
            box.send_keys(*(Keys.SHIFT, Keys.ENTER, Keys.NULL) if i else (), line)
        box.send_keys(Keys.ENTER)

    def clear(self) -> None:
        self.click(".chat [aria-label=Clear]")
        self.wait(lambda: not self.said("user") and not self.tokens())

    def said(self, who: str) -> list[str]:
        return self.texts(f".chat [data-testid={who}] .message-content")

    def tokens(self) -> list[str]:
        shown = self.texts(".answer .token .text")
        return [text.replace("↵\n", "\n").replace("↵", "\n") for text in shown]


def test_a_person_asks_looks_stops_and_resets(
    browser: webdriver.Chrome,
    serve: Callable[..., str],
    tokenizer: Tokenizer,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = Visitor(browser, serve())
    # what is typed stays text
    page.ask(HOSTILE)
    page.wait(lambda: len(page.tokens()) == 24)
    assert page.said("user") == [HOSTILE]
    assert page.said("bot") == [printed(run, HOSTILE, tmp_path, capsys)]
    # so does what a model says
    spoken = tokenizer.encode(f"    {HOSTILE}")[:24]  # leading spaces are part of an answer
    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", scripted(spoken))
        page.ask("Say it")
        page.wait(lambda: len(page.said("bot")) == 2 and len(page.tokens()) == 24)
    assert page.said("bot")[1] == "".join(page.tokens()) == tokenizer.decode(spoken)
    assert not page.find(".chat b, .chat script, .tokens b, .tokens script")
    assert browser.title == "SFT from scratch"
    # a click shows a token's alternatives and experts
    page.clear()
    page.ask(QUESTION)
    page.wait(lambda: len(page.tokens()) == 24)
    page.find(".answer .token")[3].click()
    page.wait(lambda: any(page.tokens()[3].strip() in text and "▸" in text for text in page.texts(".likeliest")))
    assert "layer 1:" in "".join(page.texts(".experts"))
    # Stop ends an answer, and the next question has the whole model again
    opened = threading.Event()

    def gated(*arguments: Any, **options: Any) -> Iterator[list[int]]:
        for i, tokens in enumerate(generate(*arguments, **options)):
            if i == 6:
                opened.wait(300)
            yield tokens

    page.clear()
    with monkeypatch.context() as patch:
        patch.setattr(web.Page, "PAUSE", 0)
        patch.setattr(generation, "generate", gated)
        page.ask("Why?")
        page.wait(lambda: len(page.tokens()) == 6)
        page.click("#question .stop-button")
        opened.set()
    page.ask(QUESTION)
    page.wait(lambda: len(page.tokens()) == 24 and len(page.said("bot")) == 2)
    page.clear()
    page.ask(QUESTION)
    page.wait(lambda: len(page.tokens()) == 24)
    assert page.said("bot") == [printed(run, QUESTION, tmp_path, capsys)]
    # a question that cannot be asked is still there
    box = page.find("#question textarea")[0]
    browser.execute_script("arguments[0].value = 'a '.repeat(600); arguments[0].dispatchEvent(new Event('input'))", box)
    box.send_keys(Keys.ENTER)
    page.wait(lambda: any("tokens, but the model's context is 512" in text for text in page.texts(".toast-body")))
    assert len(box.get_property("value")) == 1200
    # nothing leaves the machine
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith("http://127.0.0.1") for url in asked)
    assert not [url for url in asked if url.startswith("http") and not url.startswith("http://127.0.0.1:")]
    assert not web.gr.analytics.analytics_enabled()
