"""The page in the browser (`python chat.py RUN --web`): a chat, and beside it what view/trace.py sees inside.

Made with Gradio, an optional requirement. What people and models write is shown as text: the chat, which would take it
for HTML, gets it escaped; the only HTML written here is made of numbers. Nothing leaves the machine: no analytics, no
share link, no fonts from afar.
"""

import html
import os
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from config import UserError
from generation import fit_into_context
from kernels import compute_dtype
from launch.cost import cache_entries
from model import DeepSeekV2
from tokenizer import Tokenizer
from view.trace import Seen, write

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
import gradio as gr

# ---------------------------------------------------------------- colours, and two pictures of numbers

# The least probability of a colour, its name and the colour.
BANDS = (
    (0.9, "over 90%", "#69db7c"),
    (0.5, "50 to 90%", "#c0eb75"),
    (0.1, "10 to 50%", "#ffd43b"),
    (0.01, "1 to 10%", "#ffa94d"),
    (0.0, "under 1%", "#ff8787"),
)
CHOSEN, OTHER = "#e8590c", "#4c6ef5"
# Tokens in a line as text, with a scroll bar; pictures below their titles.
CSS = """
.tokens .textfield { display: block; max-height: 300px; overflow-y: auto; line-height: 1.8; word-break: normal; }
.tokens .token { margin: 0 1px 0 0; padding: 1px 0; cursor: pointer; }
.tokens .token:focus { outline: 2px solid #e8590c; }
.experts, .cache { padding-top: 14px; }
"""


def band(probability: float) -> str:
    return next(name for least, name, _ in BANDS if probability >= least)


def draw_experts(token: Seen) -> str:
    """A row for each layer with experts, a column for each expert: darker the higher its score, orange where chosen."""
    if not token.routes:
        return "<p>The newest token: no layer has read it yet. (Without experts, there is nothing to see here.)</p>"
    experts = len(next(iter(token.routes.values())).scores)
    side = max(6, min(20, 280 // experts))
    cells = []
    for row, (layer, route) in enumerate(token.routes.items()):
        cells.append(f'<text x="46" y="{row * side + side * 0.7:.1f}" text-anchor="end">layer {layer}</text>')
        for expert, score in enumerate(route.scores):
            colour, least = (CHOSEN, 0.5) if expert in route.chosen else (OTHER, 0.1)
            cells.append(
                f'<rect x="{52 + expert * side}" y="{row * side}" width="{side - 2}" height="{side - 2}" rx="2" '
                f'fill="{colour}" fill-opacity="{least + (1 - least) * score:.2f}">'
                f"<title>layer {layer}, expert {expert}: {score:.1%}</title></rect>"
            )
    return svg(52 + experts * side, len(token.routes) * side, "".join(cells))


def draw_cache(per_token: tuple[int, int], tokens: int, planned: int) -> str:
    """Bytes over tokens: two lines that grow with the answer, towards the number of tokens that are planned."""
    width, height, drawing = 170, 80, []
    for name, size, colour in zip(("latent", "multi-head"), per_token, (CHOSEN, OTHER), strict=True):
        steep = height * size / max(per_token)  # of the line where the plan ends
        x, y, end = width * tokens / planned, height - steep * tokens / planned, height - steep
        drawing.append(
            f'<path d="M0 {height}L{width} {end:.1f}" stroke="{colour}" stroke-opacity="0.4" stroke-dasharray="3"/>'
            f'<path d="M0 {height}L{x:.1f} {y:.1f}" stroke="{colour}" stroke-width="3"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            f'<text x="{width + 8}" y="{min(end, height - 14) + 8:.1f}" fill="{colour}">{name}</text>'
            f'<text x="{width + 8}" y="{min(end, height - 14) + 22:.1f}" fill="{colour}">{size * tokens / 1024:,.1f} KB'
            "</text>"
        )
    drawing.append(f'<path d="M0 0V{height}H{width}" stroke="currentColor" stroke-opacity="0.4" fill="none"/>')
    drawing.append(f'<text y="{height + 16}">{tokens} of at most {planned} tokens</text>')
    return svg(width + 80, height + 20, "".join(drawing))


def svg(width: int, height: int, content: str) -> str:
    size = f'viewBox="-6 -6 {width + 12} {height + 12}" width="{width + 12}"'
    return f'<svg {size} style="max-width: 100%; font-size: 12px" fill="currentColor">{content}</svg>'


# ---------------------------------------------------------------- the page


class Talk(NamedTuple):
    """One checkpoint's conversation as far as the model still knows it, and what was seen of its newest answer."""

    messages: tuple[dict[str, str], ...] = ()
    forgotten: str = ""  # what is to be said of older messages
    seen: tuple[Seen, ...] = ()
    prompt_length: int = 0
    planned: int = 1  # tokens of the prompt and of the longest answer


class Panel(NamedTuple):
    """What the page has for one checkpoint, in the order of `Page.outputs`."""

    chat: gr.Chatbot
    tokens: gr.HighlightedText
    likeliest: gr.Label
    experts: gr.HTML
    cache: gr.HTML
    talk: gr.State


class Page:
    """One or two models that are asked the same. settings: what the fields hold at first, by chat.py's names."""

    PAUSE = 0.05  # seconds between two updates

    def __init__(
        self, models: Sequence[tuple[DeepSeekV2, Tokenizer]], names: Sequence[str], settings: dict[str, Any]
    ) -> None:
        self.models = models
        self.lock = threading.Lock()  # one answer at a time, whoever has the page open
        height = 440 if len(models) == 1 else 300
        with gr.Blocks(title="SFT from scratch", analytics_enabled=False, fill_width=True) as self.blocks:
            with gr.Row() if len(models) == 1 else gr.Column():
                with gr.Column():
                    with gr.Row():
                        chats = [
                            gr.Chatbot(
                                label=name, render_markdown=False, buttons=[], height=height, elem_classes="chat"
                            )
                            for name in names
                        ]
                    self.build_question()
                    self.build_settings(settings)
                with gr.Row():
                    whose = [f"{name} · " for name in names] if len(names) > 1 else [""]  # the chats may be far above
                    self.panels = [self.build_panel(*each) for each in zip(chats, whose, strict=True)]
            self.connect()

    def build_question(self) -> None:
        self.question = gr.Textbox(placeholder="Ask something", show_label=False, elem_id="question", autofocus=True)
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", min_width=60)
            self.stop = gr.Button("Stop", min_width=60, elem_id="stop")
            self.reset = gr.Button("Reset", min_width=60, elem_id="reset")

    def build_settings(self, settings: dict[str, Any]) -> None:
        longest = max(model.config.max_position_embeddings for model, _ in self.models)
        with gr.Accordion("Settings", open=False):
            self.continues = gr.Checkbox(
                label="Continue my text instead of answering it (for a base model)", elem_id="continues"
            )
            self.system = gr.Textbox(settings["system"] or "", label="System prompt")
            with gr.Row():
                self.temperature = gr.Slider(0, 2, settings["temperature"], label="Temperature (0: the likeliest)")
                self.top_p = gr.Slider(0.01, 1, settings["top_p"], label="Top-p")
            with gr.Row():
                self.top_k = gr.Number(settings["top_k"], label="Top-k (0: all)", precision=0, minimum=0, min_width=90)
                self.seed = gr.Number(settings["seed"], label="Seed", precision=0, min_width=90)
                self.max_new_tokens = gr.Number(
                    min(settings["max_new_tokens"], longest), label="New tokens", precision=0, minimum=1, min_width=90
                )

    def build_panel(self, chat: gr.Chatbot, whose: str) -> Panel:
        with gr.Column():
            tokens = gr.HighlightedText(
                label=f"{whose}The answer's tokens by the probability the model gave them: click on one",
                color_map={name: colour for _, name, colour in BANDS},
                show_legend=True,
                show_inline_category=False,
                interactive=False,
                elem_classes="tokens",
            )
            with gr.Row():
                likeliest = gr.Label(label=f"{whose}That token (▸), and the likeliest others there", show_heading=False)
                with gr.Column():
                    framed: dict[str, Any] = {"show_label": True, "container": True, "js_on_load": None}
                    experts = gr.HTML(label=f"{whose}Experts it was sent to", elem_classes="experts", **framed)
                    cached = f"{whose}The cache, and multi-head attention's"
                    cache = gr.HTML(label=cached, elem_classes="cache", **framed)
            return Panel(chat, tokens, likeliest, experts, cache, gr.State(Talk()))

    def connect(self) -> None:
        """What happens on a click."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.question, *(component for panel in self.panels for component in panel)]
        fields = {self.question, self.system, self.continues, self.temperature, self.top_p, self.top_k, self.seed}
        inputs = fields | {self.max_new_tokens, *(panel.talk for panel in self.panels)}
        asked = gr.on([self.send.click, self.question.submit], self.respond, inputs, outputs, **quiet)
        self.stop.click(None, cancels=asked, **quiet)
        emptied = [self.reset.click, *(panel.chat.clear for panel in self.panels)]
        gr.on(emptied, lambda: self.outputs([Talk()] * len(self.panels)), None, outputs, cancels=asked, **quiet)
        for panel in self.panels:
            panel.tokens.select(choose, panel.talk, [panel.likeliest, panel.experts], **quiet)

    def respond(self, fields: dict[Any, Any]) -> Iterator[list[Any]]:
        """The page's outputs again and again, while the models write side by side."""
        # An emptied number is None: then it is what it was at first.
        fields = {field: field.value if value is None else value for field, value in fields.items()}
        talks = [fields[panel.talk] for panel in self.panels]
        shown = 0.0
        with self.lock:
            answers = [self.answer(*each, fields) for each in zip(self.models, talks, strict=True)]
            try:
                for steps in zip_longest(*answers if fields[self.question] else ()):
                    talks = [step or talk for step, talk in zip(steps, talks, strict=True)]
                    if time.monotonic() > shown + self.PAUSE:
                        yield self.outputs(talks)
                        shown = time.monotonic()
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None
            yield self.outputs(talks)

    def answer(self, model_and_tokenizer: tuple[DeepSeekV2, Tokenizer], talk: Talk, fields: dict) -> Iterator[Talk]:
        """A model's conversation with its answer as it grows. A text to be continued stands alone."""
        model, tokenizer = model_and_tokenizer
        told = [{"role": "system", "content": fields[self.system]}] if fields[self.system] else []
        messages = [*told, *talk.messages, {"role": "user", "content": fields[self.question]}]
        forgotten = ""
        if fields[self.continues]:
            prompt = tokenizer.encode(fields[self.question])
        else:
            messages, forgotten = fit_into_context(model, tokenizer, messages, fields[self.max_new_tokens])
            prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
        sampling = {"temperature": fields[self.temperature], "top_p": fields[self.top_p], "top_k": fields[self.top_k]}
        longest = len(prompt) + fields[self.max_new_tokens]
        for text, seen in write(model, tokenizer, prompt, fields[self.max_new_tokens], fields[self.seed], **sampling):
            reply = {"role": "assistant", "content": text if fields[self.continues] else text.lstrip()}
            known = (*messages[len(told) :], reply)
            yield Talk(known, forgotten, seen, len(prompt), min(longest, model.config.max_position_embeddings))

    def outputs(self, talks: Sequence[Talk]) -> list[Any]:
        """An empty question box, and each Panel's values."""
        outputs: list[Any] = [""]
        for (model, _), talk in zip(self.models, talks, strict=True):
            messages: list[dict[str, Any]] = [
                message | {"content": as_text(message["content"])} for message in talk.messages
            ]
            if talk.forgotten:
                messages.insert(-1, {"role": "assistant", "content": "", "metadata": {"title": talk.forgotten}})
            tokens = [(seen.text.replace("\n", "↵\n"), band(seen.probability)) for seen in talk.seen]
            read = talk.prompt_length + max(len(talk.seen) - 1, 0)  # no layer has read the newest yet
            size = compute_dtype(model.output_weight).itemsize
            latent, heads = (entries * size for entries in cache_entries(model.config))
            look = look_at(talk, max(len(talk.seen) - 2, 0))
            outputs += [messages, tokens, *look, draw_cache((latent, heads), read, talk.planned), talk]
        return outputs


def as_text(content: str) -> list[dict[str, str]]:
    """For the chat, which shows HTML as HTML, and takes indentation off a plain string."""
    return [{"type": "text", "text": html.escape(content, quote=False)}]


def look_at(talk: Talk, index: int) -> tuple[dict[str, float], str]:
    """The likeliest, and the experts, of one token of the newest answer."""
    if not talk.seen:
        return {}, ""
    (token, probability), *others = talk.seen[index].likeliest
    return {f"▸ {token}": probability, **dict(others)}, draw_experts(talk.seen[index])


def choose(talk: Talk, event: gr.SelectData) -> tuple[dict[str, float], str]:
    """A token was clicked on."""
    return look_at(talk, event.index)


def launch(page: Page, host: str) -> str:
    """Answer on that address, which is returned; no history of what was said is kept in the browser."""
    quiet: dict[str, Any] = {"quiet": True, "share": False, "ssr_mode": False, "enable_monitoring": False}
    kept: dict[str, Any] = {"run_history": False, "footer_links": []}
    _, url, _ = page.blocks.launch(server_name=host, prevent_thread_lock=True, css=CSS, **quiet, **kept)
    return url


def serve(
    models: Sequence[tuple[DeepSeekV2, Tokenizer]], names: Sequence[str], host: str, settings: dict[str, Any]
) -> None:
    """Show the page until Ctrl-C."""
    page = Page(models, names, settings)
    print(f"open {launch(page, host)} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()
