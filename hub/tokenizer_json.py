"""A tokenizer's files as transformers' AutoTokenizer reads them, with the chat template in Jinja."""

import json
from pathlib import Path

from files import write_json
from tokenizer import ChatTemplate, Tokenizer

# In Jinja: `content` as one text, whether it is given as text or as a list of text parts.
CONTENT = (
    "{% set content = message['content'] %}{% if content is not string %}"
    "{% for part in content if part['type'] != 'text' %}{{ raise_exception('not text: ' + part['type']) }}{% endfor %}"
    "{% set content = content | map(attribute='text') | join %}{% endif %}"
)


def jinja_template(template: ChatTemplate, mark_trained: bool = True) -> str:
    """Return the template in Jinja, for transformers' `apply_chat_template`.

    mark_trained: put `{% generation %}`, which some engines do not know, around what is trained on.
    """
    branches = ""
    for role, turn in template.turns.items():
        header, lead, end, footer = map(json.dumps, turn)
        content = "content | trim" if template.trim else "content"
        body = f"{{{{ {lead} + {content} + {end} }}}}"
        if role == "assistant" and mark_trained:
            body = f"{{% generation %}}{body}{{% endgeneration %}}"
        keyword = "elif" if branches else "if"
        branches += f"{{% {keyword} message['role'] == '{role}' %}}{{{{ {header} }}}}{body}{{{{ {footer} }}}}"
    branches += "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    prompt = json.dumps(template.turns["assistant"].header)
    return (
        f"{{{{ {json.dumps(template.start)} }}}}{{% for message in messages %}}{CONTENT}{branches}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


def save_tokenizer(directory: str | Path, tokenizer: Tokenizer, max_length: int | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `Tokenizer` reads too.

    max_length: the model's context in tokens.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": jinja_template(tokenizer.template),
        "chat_template_name": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "padding_side": "left",  # a batch is continued at its right end
        "clean_up_tokenization_spaces": False,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    if tokenizer.template.start:
        config["bos_token"] = tokenizer.template.start
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    write_json(Path(directory, "tokenizer_config.json"), config)
