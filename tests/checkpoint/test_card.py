"""The model card of an exported run: front matter for the Hub, and sections from the run's records."""

import hashlib
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from megatron_cream.checkpoint import card, output
from megatron_cream.checkpoint.families import ModelShape

SHAPE = ModelShape(
    model_type="llama", num_layers=2, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2,
    kv_channels=16, vocab_size=515, tied=False, norm_epsilon=1e-5, rope_theta=10000.0,
    rope_scaling={"rope_type": "linear", "factor": 8.0}, max_position_embeddings=32768,
)  # fmt: skip
BASE_CARD = """---
license: other
license_name: bespoke
license_link: LICENSE
language: [en, de]
base_model: somebody/else
tags: [chat]
---

# Base
"""


@pytest.fixture
def run(tmp_path):
    """Return an exported folder without a card and its run, as `export_hf` passes them."""
    save, folder = tmp_path / "run", tmp_path / "exported"
    (save / "runs").mkdir(parents=True)
    folder.mkdir()
    (tmp_path / "books.bin").write_bytes(b"tokens")
    (tmp_path / "books.idx").write_bytes(b"lengths")
    cached = "/home/me/.cache/huggingface/hub/models--owner--base-7b/snapshots/0123"
    settings = dict(load_hf="owner/base-7b", lr=2e-5, model_folder=cached)
    record = dict(
        command=["pretrain_cream.py", "--load-hf", "owner/base-7b", "--data-path", "/home/me/books", "--save=/home/me/x"],
        versions={"python": "3.12.1", "torch": "2.14.1"}, commit={"id": "0123abcd", "changed": True},
        machine={"gpu": "NVIDIA H100", "ranks": 2}, settings=settings,
    )  # fmt: skip
    (save / "runs" / "20261126-120000.yaml").write_text(yaml.safe_dump(record))
    (save / "runs" / "20261126-130000.yaml").write_text(yaml.safe_dump(record | {"settings": {"load_hf": None}}))
    args = Namespace(
        position_sampler="cream", seq_length=4096, target_length=32768, lr=2e-5, train_iters=1000, bf16=True, fp8=None,
        consumed_train_samples=32000, data_path=["0.3", str(tmp_path / "books"), "0.7", "/gone/pile"], seed=1234,
        load_hf=None, pretrained_checkpoint=None, mask_segment_starts=False, cream_sigma=3.0, weight_decay=0.0,
    )  # fmt: skip
    return folder, SimpleNamespace(path=save, step=1000, args=args, shape=SHAPE, config={"model_type": "llama"})


def test_the_hub_reads_the_front_matter(run):
    folder, source = run
    (folder / "README.md").write_text(BASE_CARD)
    card.write_card(folder, source, "base-7b-32k")
    read = ModelCard.load(folder / "README.md")
    assert read.data.base_model == "owner/base-7b" and read.data.library_name == "transformers"
    assert read.data.pipeline_tag == "text-generation" and {"megatron_cream", "cream"} <= set(read.data.tags)
    assert (read.data.license, read.data.license_name, read.data.license_link) == ("other", "bespoke", "LICENSE")
    assert read.data.language == ["en", "de"] and "chat" not in read.data.tags
    assert (folder / "README_BASE.md").read_text() == BASE_CARD and "](README_BASE.md)" in read.text


def test_the_card_says_what_was_recorded(run, tmp_path):
    folder, source = run
    card.write_card(folder, source, "base-7b-32k")
    text = (folder / "README.md").read_text()
    for words in (
        "# base-7b-32k", "context window of 32,768 tokens on samples of 4,096", "| steps | 1,000 |", "NeurIPS 2024",
        f"| tokens | {32000 * 4096:,} |", "rope\\_type linear, factor 8", "| --lr | 2e-05 |",
        "| --cream-sigma | 3 |", "| --weight-decay | 0 |", "| torch | 2.14.1 |", "commit 0123abcd and changes", "NVIDIA H100", "Not measured yet",
        f"| books.bin | 6 | `{hashlib.sha256(b'tokens').hexdigest()}` |",
        f"| books.idx | 7 | `{hashlib.sha256(b'lengths').hexdigest()}` |", "| pile.bin |  | not there when this was",
        "pretrain_cream.py --load-hf owner/base-7b --data-path books --save=x",
    ):  # fmt: skip
        assert words in text, words
    assert "/home/me" not in text and str(tmp_path) not in text and "README_BASE" not in text
    assert "--mask-segment-starts" not in text


@pytest.mark.parametrize("base_card", [
    None, "no front matter", "---\nlicense: [1, 2]\n---\n", "---\nlicense: !!python/object:os.system x\n---\n",
    "---\nlicense: {a: b}\nbroken", b"\xff\xfe", "---\n- a list\n---\n",
])  # fmt: skip
def test_a_base_without_a_name_on_the_hub_or_a_license(run, base_card):
    """The front matter has neither (a local folder is not a Hub name), and any base card is kept unchanged."""
    folder, source = run
    for file in (source.path / "runs").iterdir():
        file.unlink()
    source.args.load_hf, source.args.model_folder = "local/base", "local/base"
    data = base_card.encode() if isinstance(base_card, str) else base_card
    if data is not None:
        (folder / "README.md").write_bytes(data)
    card.write_card(folder, source, "x")
    read = ModelCard.load(folder / "README.md")
    assert read.data.base_model is None and read.data.license is None and "| base model | base |" in read.text
    assert "# base_model: OWNER/base " in (folder / "README.md").read_text()
    assert data is None or (folder / "README_BASE.md").read_bytes() == data


@pytest.mark.parametrize("config, words", [
    (None, "A model trained from random weights for a context"),
    ({"model_type": "llama"}, "A model whose name was not recorded, fine-tuned for a context"),
])  # fmt: skip
def test_a_base_that_no_record_names(run, config, words):
    folder, source = run
    for file in (source.path / "runs").iterdir():
        file.unlink()
    source.config = config
    card.write_card(folder, source, "x")
    assert words in (folder / "README.md").read_text()


def test_cards_of_earlier_bases_are_kept(run):
    """Extending an extended model keeps the cards of both bases."""
    folder, source = run
    (folder / "README.md").write_text("first extension")
    (folder / "README_BASE.md").write_text("the base")
    card.write_card(folder, source, "x")
    assert (folder / "README_BASE.md").read_text() == "the base"
    assert (folder / "README_BASE_2.md").read_text() == "first extension"
    assert "](README_BASE_2.md)" in (folder / "README.md").read_text()


def test_results_go_between_the_two_lines(run):
    """Results can be filled in twice; the user's text is kept and the folder still passes its checksums."""
    folder, source = run
    assert not card.has_place_for_results(folder)
    card.write_card(folder, source, "x")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    output.write_manifest(folder, {})
    manifest = (folder / output.MANIFEST).read_bytes()
    before, after = re.split(rf"{card.BEGIN}.*{card.END}", (folder / "README.md").read_text(), flags=re.DOTALL)
    for results in ("### Gain\n\none \\1", "two"):
        assert card.has_place_for_results(folder)
        card.fill_in_results(folder, results)
        assert (folder / "README.md").read_text() == f"{before}{card.BEGIN}\n\n{results}\n\n{card.END}{after}"
    assert (
        output.check_manifest(folder, include_texts=True) == [] and (folder / output.MANIFEST).read_bytes() == manifest
    )


def test_a_checkpoint_under_adapters_is_the_base_model(run):
    folder, source = run
    for file in (source.path / "runs").iterdir():
        file.unlink()
    source.args.lora_base = {"name": "/home/me/ckpt", "step": "release"}
    card.write_card(folder, source, "extended")
    assert "| base model | ckpt |" in (folder / "README.md").read_text()
