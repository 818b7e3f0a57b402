"""Do other programs give the same answers with our files? Greedy answers to seven prompts, 60 tokens each.

    python benchmarks/clients.py CHECKPOINT [--adapter ADAPTER]

Each installed client is tried on a checkpoint, on an adapter and on the adapter's merged model. llama.cpp needs
`llama-cpp-python` and lm-evaluation-harness needs `lm-eval`; neither is among the requirements.
"""

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch

from checkpoint import load_model_and_tokenizer, resolve_checkpoint, save_pretrained
from export import merge_adapter
from generation import generate
from hub.gguf import write_gguf
from model import DeepSeekV2
from tokenizer import Tokenizer

QUESTIONS = (
    *("Hello! How are you?", "What is AI?", "Tell me a joke", "Are you sentient?", "Do you like music?"),
    *("What language are you written in?", "I'm  in\nParis, 12345 café ☂ 漢字"),
)
NEW_TOKENS = 60
Chat = list[dict[str, str]]
CHATS: list[Chat] = [[{"role": "user", "content": question}] for question in QUESTIONS]


class Subject(NamedTuple):
    """A checkpoint or adapter with our own answers, to which a client's are compared."""

    directory: Path
    model: DeepSeekV2
    tokenizer: Tokenizer
    prompts: list[list[int]]
    answers: list[list[int]]  # ours, up to and including the end token


def read_subject(path: Path) -> Subject:
    model, tokenizer = load_model_and_tokenizer(path)
    model.eval()
    prompts = [tokenizer.render(chat, add_generation_prompt=True)[0] for chat in CHATS]
    answers = [[t for (t,) in generate(model, [p], NEW_TOKENS, (tokenizer.eos_token_id,))] for p in prompts]
    return Subject(path, model, tokenizer, prompts, answers)


def until_end(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens[: tokens.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in tokens else tokens


# ---------------------------------------------------------------- clients: each returns its number of equal answers


def try_transformers(subject: Subject) -> int:
    """One prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(subject.directory)
    model: Any = AutoModelForCausalLM.from_pretrained(subject.directory)
    same = 0
    for chat, ours in zip(CHATS, subject.answers, strict=True):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        same += until_end(output[0, inputs["input_ids"].shape[1] :].tolist(), subject.tokenizer) == ours
    return same


def try_pipeline(subject: Subject) -> int:
    """One batch, padded on the tokenizer's own side."""
    from transformers import pipeline

    pipe = pipeline("text-generation", str(subject.directory))
    outputs = pipe(CHATS, batch_size=len(CHATS), max_new_tokens=NEW_TOKENS, do_sample=False)
    theirs = [output[0]["generated_text"][-1]["content"] for output in outputs]
    return sum(text == spoken(subject, ours) for text, ours in zip(theirs, subject.answers, strict=True))


def try_peft(subject: Subject) -> int:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(subject.directory)
    outputs = [
        model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        for prompt in subject.prompts
    ]
    new = [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, subject.prompts, strict=True)]
    return sum(until_end(n, subject.tokenizer) == o for n, o in zip(new, subject.answers, strict=True))


def try_trl(subject: Subject) -> int:
    """Compare TRL's labels of conversations with these answers to ours; nothing is generated."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    full = [
        [*chat, {"role": "assistant", "content": spoken(subject, ours)}]
        for chat, ours in zip(CHATS, subject.answers, strict=True)
    ]
    with tempfile.TemporaryDirectory() as directory:
        options = SFTConfig(directory, assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False)
        rows: Any = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(subject.directory),
            options,
            train_dataset=datasets.Dataset.from_list([{"messages": messages} for messages in full]),
            processing_class=AutoTokenizer.from_pretrained(subject.directory),
        ).train_dataset
    same = 0
    for row, messages in zip(rows, full, strict=True):
        ids, mask = subject.tokenizer.render(messages)
        same += row["labels"] == [i if trained else -100 for i, trained in zip(ids, mask, strict=True)]
    return same


def try_lm_eval(subject: Subject) -> int:
    """Run a local task whose prompts are the rendered chats and whose targets are our answers."""
    import lm_eval

    with tempfile.TemporaryDirectory() as directory:
        rows = [
            {"prompt": subject.tokenizer.decode(prompt), "answer": spoken(subject, ours)}
            for prompt, ours in zip(subject.prompts, subject.answers, strict=True)
        ]
        file = Path(directory, "rows.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        end = subject.tokenizer.eos_token
        task = {
            "task": "chats",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "output_type": "generate_until",
            "generation_kwargs": {"until": [end], "max_gen_toks": NEW_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        found = lm_eval.simple_evaluate(
            "hf", model_args={"pretrained": str(subject.directory), "dtype": "float32"}, tasks=[task], device="cpu"
        )
    return round(found["results"]["chats"]["exact_match,none"] * len(CHATS))


def try_llama_cpp(subject: Subject) -> int:
    """Export to GGUF and decode with an fp32 cache, like ours (llama.cpp's default is fp16)."""
    from llama_cpp import GGML_TYPE_F32, Llama

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.gguf")
        write_gguf(file, subject.model, subject.tokenizer, "model")
        llama = Llama(str(file), n_ctx=512, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
        same = 0
        for prompt, question, ours in zip(subject.prompts, QUESTIONS, subject.answers, strict=True):
            assert llama.tokenize(question.encode(), add_bos=False) == subject.tokenizer.encode(question)
            stream = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
            new = [token for token, _ in zip(stream, range(len(ours)), strict=False)]
            same += new == ours
    return same


def try_vllm(subject: Subject) -> int:
    from vllm import LLM, SamplingParams

    model = LLM(str(subject.directory), dtype="float32", max_model_len=512, enforce_eager=True)
    outputs = model.generate(
        [{"prompt_token_ids": prompt} for prompt in subject.prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop_token_ids=[subject.tokenizer.eos_token_id]),
    )
    theirs = [until_end(list(output.outputs[0].token_ids), subject.tokenizer) for output in outputs]
    return sum(new == ours for new, ours in zip(theirs, subject.answers, strict=True))


def spoken(subject: Subject, answer: list[int]) -> str:
    return subject.tokenizer.decode(token for token in answer if token != subject.tokenizer.eos_token_id)


# ---------------------------------------------------------------- the table

MODEL_CLIENTS: dict[str, tuple[str, Callable[[Subject], int]]] = {
    "transformers, generate": ("transformers", try_transformers),
    "transformers, pipeline, a batch of 7": ("transformers", try_pipeline),
    "TRL, labels of SFTTrainer": ("trl", try_trl),
    "lm-evaluation-harness, a local task": ("lm-eval", try_lm_eval),
    "llama.cpp, GGUF": ("llama-cpp-python", try_llama_cpp),
    "vLLM": ("vllm", try_vllm),
}


def attempt(what: str, name: str, package: str, client: Callable[[Subject], int], subject: Subject) -> str:
    """Try a client and return its row of the table."""
    try:
        number = version(package)
    except PackageNotFoundError:
        return f"| {what} | {name} | not installed | not tried | |"
    try:
        return f"| {what} | {name} | {number} | yes | {client(subject)} of {len(CHATS)} |"
    except Exception as error:
        traceback.print_exc()
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"| {what} | {name} | {number} | no: {first_line:.200} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--adapter", type=Path)
    options = parser.parse_args()
    rows = ["| of | client | version | works | same |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as directory:
        subject = read_subject(resolve_checkpoint(options.checkpoint))
        export = Path(directory, "export")  # an older checkpoint's tokenizer files may differ
        save_pretrained(export, subject.model, subject.tokenizer)
        subject = subject._replace(directory=export)
        rows += [attempt("checkpoint", name, *client, subject) for name, client in MODEL_CLIENTS.items()]
        if options.adapter:
            adapter = read_subject(resolve_checkpoint(options.adapter))
            rows.append(attempt("adapter", "PEFT, generate", "peft", try_peft, adapter))
            merge_adapter(options.adapter, Path(directory, "merged"))
            merged = read_subject(Path(directory, "merged"))
            for name in ("transformers, generate", "llama.cpp, GGUF"):
                rows.append(attempt("merged adapter", name, *MODEL_CLIENTS[name], merged))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
