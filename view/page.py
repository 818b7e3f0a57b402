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
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

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
.textfield { display: block; max-height: 300px; overflow-y: auto; line-height: 1.8; word-break: normal; }
.textfield .token { margin: 0 1px 0 0; padding: 1px 0; cursor: pointer; }
"""


class Talk(NamedTuple):
    """A model's conversation, as far as its context holds it, and what is known about its newest answer."""

    messages: tuple[dict[str, str], ...] = ()
    seen: tuple[Seen, ...] = ()


class Panel(NamedTuple):
    """The components of one model, in the order of `Page.outputs`."""

    chat: gr.Chatbot
    tokens: gr.HighlightedText
    likeliest: gr.Label
    experts: gr.HighlightedText
    talk: gr.State


def build_panel(name: str) -> Panel:
    plain: dict[str, Any] = {"show_inline_category": False, "interactive": False}
    with gr.Column():
        chat = gr.Chatbot(label=name, elem_classes="chat", render_markdown=False, buttons=[], height=300)
        label, colours = "The answer's tokens by their probability: click on one", {name: c for _, name, c in BANDS}
        tokens = gr.HighlightedText(label=label, color_map=colours, show_legend=True, elem_classes="answer", **plain)
        with gr.Row():
            label = "That token (▸) and the likeliest others"
            likeliest = gr.Label(label=label, show_heading=False, elem_classes="likeliest")
            label, colours = "Experts by the router's score; coloured: chosen", {"chosen": "#ffa94d"}
            experts = gr.HighlightedText(label=label, color_map=colours, elem_classes="experts", **plain)
    return Panel(chat, tokens, likeliest, experts, gr.State(Talk()))


def build_settings(settings: dict[str, Any]) -> dict[str, gr.components.Component]:
    number: dict[str, Any] = {"precision": 0, "min_width": 90}
    with gr.Accordion("Settings", open=False), gr.Row():
        return {
            "system": gr.Textbox(settings["system"] or "", label="System prompt"),
            "temperature": gr.Slider(0, 2, settings["temperature"], label="Temperature (0: the likeliest)"),
            "top_p": gr.Slider(0.01, 1, settings["top_p"], label="Top-p"),
            "top_k": gr.Number(settings["top_k"], label="Top-k (0: all)", minimum=0, **number),
            "seed": gr.Number(settings["seed"], label="Seed", **number),
            "max_new_tokens": gr.Number(settings["max_new_tokens"], label="New tokens", minimum=1, **number),
        }


class Page:
    """A page that asks one or two models the same. settings: initial values of the fields, by chat.py's names."""

    PAUSE = 0.05  # seconds between two updates

    def __init__(
        self, models: Sequence[tuple[DeepSeekV2, Tokenizer]], names: Sequence[str], settings: dict[str, Any]
    ) -> None:
        self.models = models
        with gr.Blocks(title="SFT from scratch", fill_width=True) as self.blocks:
            buttons: dict[str, Any] = {"submit_btn": "Send", "stop_btn": "Stop"}
            self.question = gr.Textbox(
                placeholder="Ask something", show_label=False, autofocus=True, elem_id="question", **buttons
            )
            self.fields = build_settings(settings) | {"question": self.question}
            with gr.Row():
                self.panels = [build_panel(name) for name in names]
            self.connect()

    def connect(self) -> None:
        """Bind the buttons. Gradio's queue runs one `respond` at a time."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.question, *(component for panel in self.panels for component in panel)]
        inputs: set[Any] = {*self.fields.values(), *(panel.talk for panel in self.panels)}
        asked = self.question.submit(self.respond, inputs, outputs, **quiet)
        self.question.stop(None, cancels=asked, **quiet)
        cleared = [panel.chat.clear for panel in self.panels]
        gr.on(cleared, lambda: self.outputs([Talk()] * len(self.panels)), None, outputs, cancels=asked, **quiet)
        for panel in self.panels:
            panel.tokens.select(choose, panel.talk, [panel.likeliest, panel.experts], **quiet)

    def respond(self, inputs: dict[Any, Any]) -> Iterator[list[Any]]:
        """Yield the page's outputs while the models write side by side."""
        values = {name: inputs[field] for name, field in self.fields.items()}
        values |= {name: self.fields[name].value for name, value in values.items() if value is None}  # emptied
        talks = [inputs[panel.talk] for panel in self.panels]
        shown = 0.0
        longest = 10 * max(model.config.max_position_embeddings for model, _ in self.models)
        try:
            for name in ("question", "system"):
                if len(values[name] or "") > longest:  # a token has about four characters
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
        """Yield a model's conversation while its answer grows."""
        model, tokenizer = model_and_tokenizer
        system = [{"role": "system", "content": values["system"]}] if values["system"] else []
        asked = [*system, *talk.messages, {"role": "user", "content": values["question"]}]
        messages, note = fit_into_context(model, tokenizer, asked, values["max_new_tokens"])
        if note:
            gr.Info(note)
        sampling = {name: values[name] for name in ("temperature", "top_p", "top_k")}
        check_sampling(**sampling, seed=values["seed"])
        generator = torch.Generator(model.output_weight.device).manual_seed(values["seed"])
        options = sampling | {"generator": generator}
        for answer, seen in trace(model, tokenizer, messages, values["max_new_tokens"], **options):
            reply = {"role": "assistant", "content": answer.text}
            yield Talk((*messages[len(system) :], reply), tuple(seen))

    def outputs(self, talks: Sequence[Talk]) -> list[Any]:
        """Return an empty question and the values of each Panel."""
        outputs: list[Any] = [""]
        for talk in talks:
            messages = [message | {"content": as_text(message["content"])} for message in talk.messages]
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
    for layer, (scores, chosen) in talk.seen[index].routes.items():
        experts.append((f"layer {layer}:", None))
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:EXPERTS]
        experts += [(f" {i} ({scores[i]:.0%}) ", "chosen" if i in chosen else None) for i in best]
        experts.append(("\n", None))
    return {f"▸ {token}": probability, **dict(others)}, experts


def choose(talk: Talk, event: gr.SelectData) -> tuple[dict[str, float], list[tuple[str, str | None]]]:
    """Show the token that was clicked on."""
    return look_at(talk, event.index)


# ---------------------------------------------------------------- serving it

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
LONGEST_REQUEST = 1_000_000  # bytes


async def guard(request: Request, respond: RequestResponseEndpoint) -> Response:
    """Refuse requests from other websites, and large ones."""
    host = request.headers.get("host", "")
    if urlsplit(request.headers.get("origin", f"//{host}")).netloc != host:
        return PlainTextResponse("another website's request", 403)
    if "transfer-encoding" in request.headers or int(request.headers.get("content-length", 0)) > LONGEST_REQUEST:
        return PlainTextResponse("the request is too large", 413)
    return await respond(request)


def launch(page: Page, host: str, port: int | None = None, auth: str | None = None) -> str:
    """Serve the page and return its address. The browser keeps no history of what was said."""
    page.blocks.queue(api_open=False, max_size=20)
    # Against DNS rebinding: another website's name that leads here.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL if host in LOCAL else ["*"])
    user, _, password = (auth or "").partition(":")
    _, url, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        auth=(user, password) if auth else None,
        app_kwargs={"middleware": [hosts, Middleware(BaseHTTPMiddleware, dispatch=guard)]},
        state_session_capacity=100,
        css=CSS,
        prevent_thread_lock=True,
        **{"quiet": True, "share": False, "enable_monitoring": False, "run_history": False, "footer_links": []},
    )
    return url


def serve(models: Sequence[tuple[DeepSeekV2, Tokenizer]], names: Sequence[str], settings: dict[str, Any]) -> None:
    """Show the page until Ctrl-C. settings: chat.py's flags."""
    page = Page(models, names, settings)
    url = launch(page, settings["host"], settings["port"], settings["auth"])
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()
