"""A page in the browser: chat with one model or two, and see how likely each token of the answers was, what else was
likely, and which experts the token went to (view/trace.py).

Drawn by Gradio, an optional requirement. Text from people and models is shown as text, never as HTML. Nothing leaves
the machine: no analytics, no share link, no remote fonts. Other websites, large requests and floods are refused.
"""

import html
import os
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from config import UserError
from generation import check_sampling, fit_into_context
from model import DeepSeekV2
from tokenizer import Tokenizer
from view.trace import Seen, trace

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

# The lowest probability of a band, its name and its colour.
BANDS = (
    (0.9, "over 90%", "#69db7c"),
    (0.5, "50 to 90%", "#c0eb75"),
    (0.1, "10 to 50%", "#ffd43b"),
    (0.01, "1 to 10%", "#ffa94d"),
    (0.0, "under 1%", "#ff8787"),
)
EXPERTS = 8  # shown per layer, the highest scores first
# Tokens flow like text and scroll.
CSS = """
.tokens .textfield { display: block; max-height: 300px; overflow-y: auto; line-height: 1.8; word-break: normal; }
.tokens .token { margin: 0 1px 0 0; padding: 1px 0; cursor: pointer; }
"""


class Talk(NamedTuple):
    """A model's conversation, as far as its context holds it, and what is known about its newest answer."""

    messages: tuple[dict[str, str], ...] = ()
    note: str = ""  # about messages that the context no longer holds
    seen: tuple[Seen, ...] = ()


class Panel(NamedTuple):
    """The components of one model, in the order of `Page.outputs`."""

    chat: gr.Chatbot
    tokens: gr.HighlightedText
    likeliest: gr.Label
    experts: gr.HighlightedText
    talk: gr.State


class Page:
    """A page that asks one or two models the same. settings: initial values of the fields, by chat.py's names."""

    PAUSE = 0.05  # seconds between two updates

    def __init__(
        self, models: Sequence[tuple[DeepSeekV2, Tokenizer]], names: Sequence[str], settings: dict[str, Any]
    ) -> None:
        self.models = models
        self.context = max(model.config.max_position_embeddings for model, _ in models)
        with gr.Blocks(title="SFT from scratch", analytics_enabled=False, fill_width=True) as self.blocks:
            with gr.Row():
                plain: dict[str, Any] = {"render_markdown": False, "buttons": [], "height": 300}
                chats = [gr.Chatbot(label=name, elem_classes="chat", **plain) for name in names]
            self.question = gr.Textbox(
                placeholder="Ask something", show_label=False, elem_id="question", autofocus=True
            )
            with gr.Row():
                self.send = gr.Button("Send", variant="primary", min_width=60)
                self.stop = gr.Button("Stop", min_width=60, elem_id="stop")
                self.reset = gr.Button("Reset", min_width=60, elem_id="reset")
            self.fields = self.build_settings(settings) | {"question": self.question}
            with gr.Row():
                labels = [f"{name} · " for name in names] if len(names) > 1 else [""]
                self.panels = [self.build_panel(*each) for each in zip(chats, labels, strict=True)]
            self.connect()

    def build_settings(self, settings: dict[str, Any]) -> dict[str, gr.components.Component]:
        number: dict[str, Any] = {"precision": 0, "min_width": 90}
        length = min(settings["max_new_tokens"], self.context)
        continues = "Continue my text instead of answering it (for a base model)"
        with gr.Accordion("Settings", open=False), gr.Row():
            return {
                "system": gr.Textbox(settings["system"] or "", label="System prompt"),
                "continues": gr.Checkbox(label=continues, elem_id="continues"),
                "temperature": gr.Slider(0, 2, settings["temperature"], label="Temperature (0: the likeliest)"),
                "top_p": gr.Slider(0.01, 1, settings["top_p"], label="Top-p"),
                "top_k": gr.Number(settings["top_k"], label="Top-k (0: all)", minimum=0, **number),
                "seed": gr.Number(settings["seed"], label="Seed", **number),
                "max_new_tokens": gr.Number(length, label="New tokens", minimum=1, **number),
            }

    def build_panel(self, chat: gr.Chatbot, name: str) -> Panel:
        def pieces(label: str, colours: dict[str, str], classes: list[str], legend: bool) -> gr.HighlightedText:
            plain: dict[str, Any] = {"show_inline_category": False, "interactive": False, "elem_classes": classes}
            return gr.HighlightedText(label=name + label, color_map=colours, show_legend=legend, **plain)

        with gr.Column():
            colours = {band: colour for _, band, colour in BANDS}
            answer = "The answer's tokens by their probability: click on one"
            tokens = pieces(answer, colours, ["tokens", "answer"], legend=True)
            with gr.Row():
                others = f"{name}That token (▸) and the likeliest others"
                likeliest = gr.Label(label=others, show_heading=False, elem_classes="likeliest")
                router = "Experts by the router's score; coloured: chosen"
                experts = pieces(router, {"chosen": "#ffa94d"}, ["tokens", "experts"], legend=False)
        return Panel(chat, tokens, likeliest, experts, gr.State(Talk()))

    def connect(self) -> None:
        """Bind the buttons. Gradio's queue runs one `respond` at a time."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.question, *(component for panel in self.panels for component in panel)]
        inputs = {*self.fields.values(), *(panel.talk for panel in self.panels)}
        asked = gr.on([self.send.click, self.question.submit], self.respond, inputs, outputs, **quiet)
        self.stop.click(None, cancels=asked, **quiet)
        emptied = [self.reset.click, *(panel.chat.clear for panel in self.panels)]
        gr.on(emptied, lambda: self.outputs([Talk()] * len(self.panels)), None, outputs, cancels=asked, **quiet)
        for panel in self.panels:
            panel.tokens.select(choose, panel.talk, [panel.likeliest, panel.experts], **quiet)

    def respond(self, inputs: dict[Any, Any]) -> Iterator[list[Any]]:
        """Yield the page's outputs while the models write side by side."""
        values = {name: inputs[field] for name, field in self.fields.items()}
        values |= {name: self.fields[name].value for name, value in values.items() if value is None}  # emptied
        talks = [inputs[panel.talk] for panel in self.panels]
        shown = 0.0
        try:
            for name in ("question", "system"):
                if len(values[name]) > 10 * self.context:  # a token has about four characters
                    raise UserError(f"the {name} has {len(values[name]):,} characters: shorten it")
            answers = [self.answer(*each, values) for each in zip(self.models, talks, strict=True)]
            for steps in zip_longest(*answers if values["question"] else ()):
                talks = [step or talk for step, talk in zip(steps, talks, strict=True)]
                if time.monotonic() > shown + self.PAUSE:
                    yield self.outputs(talks)
                    shown = time.monotonic()
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield self.outputs(talks)

    def answer(self, model_and_tokenizer: tuple[DeepSeekV2, Tokenizer], talk: Talk, values: dict) -> Iterator[Talk]:
        """Yield a model's conversation while its answer grows. A text to be continued stands alone."""
        model, tokenizer = model_and_tokenizer
        system = [{"role": "system", "content": values["system"]}] if values["system"] else []
        messages = [*system, *talk.messages, {"role": "user", "content": values["question"]}]
        note, prompt = "", values["question"]
        if not values["continues"]:
            messages, note = fit_into_context(model, tokenizer, messages, values["max_new_tokens"])
            prompt = messages
        sampling = {name: values[name] for name in ("temperature", "top_p", "top_k")}
        check_sampling(**sampling, seed=values["seed"])
        generator = torch.Generator(model.output_weight.device).manual_seed(values["seed"])
        for answer, seen in trace(model, tokenizer, prompt, values["max_new_tokens"], generator=generator, **sampling):
            reply = {"role": "assistant", "content": answer.text}
            yield Talk((*messages[len(system) :], reply), note, tuple(seen))

    def outputs(self, talks: Sequence[Talk]) -> list[Any]:
        """Return an empty question and the values of each Panel."""
        outputs: list[Any] = [""]
        for talk in talks:
            messages: list[dict[str, Any]] = [
                message | {"content": as_text(message["content"])} for message in talk.messages
            ]
            if talk.note:
                messages.insert(-1, {"role": "assistant", "content": "", "metadata": {"title": talk.note}})
            tokens = [(seen.text.replace("\n", "↵\n"), band(seen.probability)) for seen in talk.seen]
            outputs += [messages, tokens, *look_at(talk, max(len(talk.seen) - 2, 0)), talk]
        return outputs


def as_text(content: str) -> list[dict[str, str]]:
    """Escape text for the chat, which shows HTML as HTML, and as a list, since it strips a plain string."""
    return [{"type": "text", "text": html.escape(content, quote=False)}]


def band(probability: float) -> str:
    return next(name for least, name, _ in BANDS if probability >= least)


def look_at(talk: Talk, index: int) -> tuple[dict[str, float], list[tuple[str, str | None]]]:
    """Return the likeliest tokens, and the experts, at one token of the newest answer."""
    if not talk.seen:
        return {}, []
    (token, probability), *others = talk.seen[index].likeliest
    experts: list[tuple[str, str | None]] = []
    for layer, route in talk.seen[index].routes.items():
        experts.append((f"layer {layer}:", None))
        best = sorted(range(len(route.scores)), key=route.scores.__getitem__, reverse=True)[:EXPERTS]
        experts += [(f" {i} ({route.scores[i]:.0%}) ", "chosen" if i in route.chosen else None) for i in best]
        experts.append(("\n", None))
    return {f"▸ {token}": probability, **dict(others)}, experts


def choose(talk: Talk, event: gr.SelectData) -> tuple[dict[str, float], list[tuple[str, str | None]]]:
    """Show the token that was clicked on."""
    return look_at(talk, event.index)


# ---------------------------------------------------------------- serving it

LOCAL = ("127.0.0.1", "localhost", "::1")
LONGEST_REQUEST = 1_000_000  # bytes


class Guard:
    """ASGI middleware that refuses requests from other websites (Origin, and Host against DNS rebinding) and large
    ones. hosts: names that the page may be called by; empty: any."""

    def __init__(self, app: Any, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            known = not self.hosts or urlsplit(f"//{host}").hostname in self.hosts
            if not known or urlsplit(headers.get("origin", f"//{host}")).netloc != host:
                return await PlainTextResponse("another website's request", 403)(scope, receive, send)
            if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > LONGEST_REQUEST:
                return await PlainTextResponse("the request is too large", 413)(scope, receive, send)
        await self.app(scope, receive, send)


def launch(page: Page, host: str, port: int | None = None, auth: str | None = None) -> str:
    """Serve the page and return its address. The browser keeps no history of what was said."""
    page.blocks.queue(api_open=False, max_size=20)
    guard = Middleware(Guard, hosts=LOCAL if host in LOCAL else ())
    user, _, password = (auth or "").partition(":")
    _, url, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        auth=(user, password) if auth else None,
        app_kwargs={"middleware": [guard]},
        max_file_size=LONGEST_REQUEST,
        state_session_capacity=100,
        css=CSS,
        prevent_thread_lock=True,
        **{"quiet": True, "share": False, "ssr_mode": False, "enable_monitoring": False},
        **{"run_history": False, "footer_links": []},
    )
    return url


def serve(models: Sequence[tuple[DeepSeekV2, Tokenizer]], names: Sequence[str], settings: dict[str, Any]) -> None:
    """Show the page until Ctrl-C. settings: chat.py's flags."""
    page = Page(models, names, settings)
    url = launch(page, settings["host"], settings["port"], settings["auth"])
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()
