"""Tests of transformers' tokenizers against their tokenizer.json, and of tokenizers without EOS."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_cream.common.errors import UsageError
from megatron_cream.data.tokenizers import TokenIdMismatch, load_tokenizer
from megatron_cream.evaluation.models.language_model import find_model
from megatron_cream.evaluation.models.tokenizer import open_tokenizer
from tests.data.test_preprocess import run_tool
from tests.evaluation_models import save_tokenizer
from tests.launch import torchrun
from tests.selection import slow_but


def set_class(folder: Path, name: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast"])
def test_byte_level_tokenizers_keep_spaces_whatever_their_class(tmp_path, name):
    """DeepSeek-R1-Distill-Llama's has class LlamaTokenizerFast: it keeps all spaces or is rejected."""
    save_tokenizer(tmp_path)
    set_class(tmp_path, name)
    try:
        tokenizer = open_tokenizer(tmp_path, flag="--tokenizer")
    except UsageError as error:
        assert "tokenizes text differently from its tokenizer.json" in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("a b  c\n d")).strip() == "a b  c\n d"


def test_differing_ids_are_reported_and_the_advice_works(tmp_path):
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    raw.train_from_iterator([Path(__file__).read_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    set_class(tmp_path, "LlamaTokenizerFast")
    with pytest.raises(
        TokenIdMismatch, match=f"^{tmp_path}: transformers 5.* tokenizes text differently from its tokenizer.json"
    ) as caught:
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=f"^--model {tmp_path}: transformers 5"):
        open_tokenizer(tmp_path, flag="--model")
    assert 'Set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json' in str(caught.value)
    set_class(tmp_path, "PreTrainedTokenizerFast")
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path).vocab_size == 200


def test_a_sentencepiece_model_alone_is_read_as_sentencepiece_reads_it(tmp_path):
    """Vicuna's and OpenLLaMA's folders have no tokenizer.json; one that merges spaces is read otherwise as a LlamaTokenizer."""
    text = Path(__file__).read_text()
    with (tmp_path / "tokenizer.model").open("wb") as writer:
        lines = iter(text.splitlines() * 2)
        SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=writer, vocab_size=600, model_type="bpe", minloglevel=9
        )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    set_class(tmp_path, "LlamaTokenizer")
    with pytest.raises(TokenIdMismatch, match="tokenizes text differently from its tokenizer.model: ") as caught:
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(UsageError, match=f"^--model {tmp_path}: transformers 5"):
        open_tokenizer(tmp_path, flag="--model")
    assert 'Set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json' in str(caught.value)
    set_class(tmp_path, "PreTrainedTokenizerFast")
    ids = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path).tokenize(text) == ids
    assert open_tokenizer(tmp_path, flag="--model").encode(text)[-len(ids) :] == ids


def test_a_class_that_transformers_insists_on_has_advice_of_its_own(tmp_path):
    """For model_type qwen2 transformers builds Qwen2Tokenizer, which splits digits and line feeds in its own way."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    raw.train_from_iterator([Path(__file__).read_text() * 2, "A quick brown fox,\n\n  12345\n\n  12345" * 50], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(TokenIdMismatch) as caught:
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
    said = str(caught.value)
    assert "It builds a Qwen2Tokenizer whatever tokenizer_class says" in said and "Set" not in said and "\n" not in said
    (tmp_path / "weights.bin").touch()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TokenIdMismatch):
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    advised = said.split("save it: ")[1].replace("FOLDER", repr(str(tmp_path)))
    exec(f"import transformers; {advised}")
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path).vocab_size >= 600


def without_eos(folder: Path) -> Path:
    save_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "eos_token"}
    file.write_text(json.dumps(kept | {"model_max_length": 8}))
    return folder


def sentencepiece_without_eos(file: Path) -> Path:
    with file.open("wb") as writer:
        SentencePieceTrainer.train(
            sentence_iterator=iter(Path(__file__).read_text().splitlines()),
            model_writer=writer,
            vocab_size=400,
            bos_id=1,
            eos_id=-1,
            byte_fallback=True,
            minloglevel=2,
        )
    return file


@pytest.mark.parametrize("kind", slow_but(["HuggingFaceTokenizer", "SentencePieceTokenizer"], "HuggingFaceTokenizer"))
def test_a_tokenizer_without_eos_works_from_data_to_evaluation(tmp_path, kind):
    """Follow the advice of preprocessing, train on its output, and decode with the checkpoint's tokenizer."""
    if kind == "HuggingFaceTokenizer":
        model = without_eos(tmp_path / "tokenizer")
    else:
        model = sentencepiece_without_eos(tmp_path / "tokenizer.model")
    flags = ["--tokenizer-type", kind, "--tokenizer-model", model]
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some words of a text " * 100}) + "\n")
    prepare = ["--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "x", *flags]
    refused = run_tool(*prepare)
    assert "do not append one (--no-append-eod)" in refused.stderr and refused.returncode == 2
    written = run_tool(*prepare, "--no-append-eod")
    assert written.returncode == 0, written.stderr
    assert "indexing errors" not in written.stderr, "transformers' warning of a document beyond model_max_length"
    shape = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 88 --num-attention-heads 4 --seq-length 64"
    shape += " --target-length 256 --rope-scaling-type linear --micro-batch-size 2 --global-batch-size 2 --fp32"
    shape += " --num-workers 0 --lr 1e-3 --train-iters 1 --eval-iters 0 --split 100,0,0"
    options = [*shape.split(), *flags, "--data-path", tmp_path / "x"]
    refused = torchrun(1, *options, "--eod-mask-loss")
    assert "has no end-of-document token; leave --eod-mask-loss out" in refused.stderr and refused.returncode
    trained = torchrun(1, *options, "--save", tmp_path / "save")
    assert trained.returncode == 0, trained.stderr[-3000:]
    tokenizer = find_model(str(tmp_path / "save")).tokenizer
    assert (
        tokenizer.stop_ids == frozenset() and tokenizer.decode(tokenizer.encode("some words")).strip() == "some words"
    )
    # A model with a padded vocabulary may generate ids that its tokenizer lacks.
    assert tokenizer.decode([*tokenizer.encode("some words"), 5000]).strip() == "some words"
