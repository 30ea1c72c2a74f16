"""A small Llama with its tokenizer, and a model that knows every answer, for the evaluation tests."""

import json
import sys
import sysconfig
from functools import cache
from pathlib import Path

import matplotlib.image
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_cream.data.embedded import source_files
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer, open_tokenizer
from megatron_cream.evaluation.results import RESULTS
from tests.hf_models import save_model

CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
POSITIONS = 2048


def save_tokenizer(folder: Path, *, bos: bool = True, vocabulary: int = 2000) -> None:
    """Train a byte-level BPE with <s> and </s>, and save it as tokenizer.json."""
    model = ByteLevelBPETokenizer(add_prefix_space=True)
    model.train_from_iterator(_texts(), vocab_size=vocabulary, show_progress=False, special_tokens=["<s>", "</s>"])
    if bos:
        model._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


@cache
def _texts() -> list[str]:
    files = source_files(Path(sysconfig.get_path("stdlib")))[:20]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def save_llama(folder: Path, name: str = "llama-mha", *, seed_change: int = 0, bos: bool = True) -> Path:
    """Save a random Llama of 2,048 positions with that tokenizer. Returns its folder."""
    options = dict(vocab_size=2048, max_position_embeddings=POSITIONS, num_hidden_layers=2)
    model = save_model(folder, name, **options)
    if seed_change:
        model.lm_head.weight.data += 0.1 * seed_change
        model.save_pretrained(folder)
    save_tokenizer(folder, bos=bos)
    return folder


def run_evaluate(monkeypatch, *flags) -> int:
    """Run tools/evaluate.py in this process and return its exit code."""
    from megatron_cream.commands import evaluate  # imports every task

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    try:
        return evaluate.main()
    except SystemExit as stop:  # raised by argparse
        return stop.code


class Knows:
    """A LanguageModel that gives the known answer to each prompt, and records batches and seeds.

    Args:
        tokenizer: encodes prompts and answers.
        answers: prompt -> answer.
        fails_at: length in tokens from which a prompt raises torch's out-of-memory error.
    """

    max_positions = 1 << 20

    def __init__(self, tokenizer: ModelTokenizer, answers: dict[str, str], fails_at: int = 1 << 40):
        self.tokenizer, self._fails_at = tokenizer, fails_at
        self._answers = {
            tuple(tokenizer.encode_prompt(prompt)): tokenizer.encode(answer) for prompt, answer in answers.items()
        }
        self.batches: list[list[int]] = []
        self.seeds: dict[tuple[int, ...], int] = {}

    def generate(self, prompts, max_new_tokens, *, temperature, top_p, seeds):
        if max(map(len, prompts)) >= self._fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        self.batches.append([len(prompt) for prompt in prompts])
        self.seeds |= dict(zip(map(tuple, prompts), seeds, strict=True))
        return [self._answers[tuple(prompt)][:max_new_tokens] for prompt in prompts]


def small_tokenizer(folder: Path) -> ModelTokenizer:
    save_tokenizer(folder)
    return open_tokenizer(folder, flag="--tokenizer")


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def is_picture(file: Path) -> bool:
    return matplotlib.image.imread(file).shape == (675, 1200, 4)


def save_own_task(folder: Path, name: str = "own") -> Path:
    """Save a task for lm_eval with ten questions, as a YAML file and its data. Returns the folder."""
    lines = (json.dumps({"q": f"{i}", "gold": i % 2}) + "\n" for i in range(10))
    (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {folder / f'{name}.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}} is'\ndoc_to_target: gold\n"
        "doc_to_choice: ['even', 'odd']\nmetric_list:\n  - metric: acc\n"
    )
    return folder
