"""Tests of chat data: the written tokens, the loss mask, and its use in training."""

import itertools
import json

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_cream.data.chat import Llama2Chat
from megatron_cream.data.chat_records import extract_chat
from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig
from megatron_cream.data.indexed import loss_mask_prefix, read_index
from megatron_cream.data.packed_dataset import PackedDocumentDataset
from megatron_cream.data.preprocess import preprocess
from tests.data.chats import CHATML, CLEANED, save_tokenizer, share, talk
from tests.data.test_preprocess import ByteTokenizer, run_in_fork, run_tool, written
from tests.launch import train, write_documents


def test_llama2_turns_are_encoded_as_by_its_authors():
    system = {"role": "system", "content": "Be brief."}
    ids, mask = Llama2Chat(ByteTokenizer())([system, *talk(" q1\n", "a1 ", "q2", "a2")])
    first, second = b"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n q1 [/INST]", b"[INST] q2 [/INST]"
    assert ids == [256, *first, *b" a1 ", 257, 256, *second, *b" a2 ", 257]
    parts = [(1 + len(first), 0), (5, 1), (1 + len(second), 0), (5, 1)]
    assert mask.tolist() == [value for count, value in parts for _ in range(count)]


def test_a_token_across_the_edge_of_an_answer_belongs_to_it():
    class Merging(ByteTokenizer):
        def tokenize(self, text):  # "] " is one token
            return list(text.replace("] ", "\x01").encode())

    ids, mask = Llama2Chat(Merging())(talk("q", "a"))
    assert bytes(ids[1:-1]) == b"[INST\x01q [/INST\x01a "
    assert bytes(np.array(ids)[mask == 1][:-1].tolist()) == b"\x01a "


def test_llama2_needs_bos_and_eos():
    tokenizer = ByteTokenizer()
    tokenizer.bos = None
    with pytest.raises(ValueError, match="no BOS or no EOS"):
        Llama2Chat(tokenizer)


CHATS = [share(("human", f"question {i} ☃"), ("gpt", "answer " * (i % 7 + 1))) for i in range(40)]


def write_chats(folder, form):
    import datasets
    import pyarrow.parquet

    path = folder / f"chats.{form}"
    turns = [chat["conversations"] for chat in CHATS]
    if form == "json":
        path.write_text(json.dumps(CHATS, indent=1, ensure_ascii=False))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    elif form == "openai.jsonl":
        as_openai = [{"messages": [m | {"n": 1} for m in extract_chat(chat).messages]} for chat in CHATS]
        path.write_text("".join(json.dumps(chat) + "\n" for chat in as_openai))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(40), "conversations": turns}), path, row_group_size=7)
    else:
        datasets.Dataset.from_dict({"conversations": turns}).save_to_disk(path, num_shards=3)
    return path


@pytest.mark.parametrize("form", ["json", "jsonl", "openai.jsonl", "parquet", "folder"])
def test_every_form_of_input_gives_the_same_data_and_mask(tmp_path, form):
    expected = [Llama2Chat(ByteTokenizer())(extract_chat(chat).messages) for chat in CHATS]
    path = write_chats(tmp_path, form)
    report = preprocess(
        [path], tmp_path / "x", ByteTokenizer(), chat_format="llama2", workers=2, min_document_tokens=2, progress=False
    )
    data, mask = IndexedDataset(str(tmp_path / "x")), IndexedDataset(loss_mask_prefix(tmp_path / "x"))
    assert len(data) == len(mask) == len(expected) and mask.index.dtype is np.uint8
    for i, (ids, answer) in enumerate(expected):
        assert data[i].tolist() == ids and mask[i].tolist() == answer.tolist()
    assert report.loss_tokens == sum(int(answer.sum()) for _, answer in expected)


def test_a_file_with_both_columns_asks_for_a_choice(tmp_path):
    import pyarrow.parquet

    turns, others = (CHATS[0]["conversations"], extract_chat(CHATS[1]).messages)
    path = tmp_path / "both.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"conversations": [turns, None], "messages": [None, others]}), path)
    given = dict(chat_format="llama2", min_document_tokens=2, progress=False)
    with pytest.raises(ValueError, match="columns 'conversations' and 'messages'; choose one with --json-key"):
        preprocess([path], tmp_path / "x", ByteTokenizer(), **given)
    report = preprocess([path], tmp_path / "x", ByteTokenizer(), json_key="messages", **given)
    ids, _ = Llama2Chat(ByteTokenizer())(others)
    data = IndexedDataset(str(tmp_path / "x"))
    assert report.documents == len(data) == 1 and data[0].tolist() == ids


def test_a_stale_mask_is_removed(tmp_path):
    path = write_chats(tmp_path, "jsonl")
    preprocess([path], tmp_path / "x", ByteTokenizer(), chat_format="llama2", progress=False)
    text = tmp_path / "a.txt"
    text.write_text("no chat")
    with pytest.raises(FileExistsError):
        preprocess([text], tmp_path / "x", ByteTokenizer(), progress=False)
    preprocess([text], tmp_path / "x", ByteTokenizer(), overwrite=True, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "chats.jsonl", "x.bin", "x.idx"]


def test_cut_and_dropped_chats_are_counted_and_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    odd = [record for record, *_ in CLEANED]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in [*CHATS, *odd, share(("human", "q"))]))
    flags = ["--input", path, "--output-prefix", tmp_path / "x", "--chat-format", "tokenizer"]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", save_tokenizer(tmp_path / "hf", CHATML)]
    done = run_tool(*flags)
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): cells[2].strip() for row in done.stdout.splitlines() if len(cells := row.split("│")) > 2}
    mask = IndexedDataset(loss_mask_prefix(tmp_path / "x"))
    documents = int(rows["documents"])
    assert int(rows["tokens of the assistant"].replace(",", "")) == sum(int(mask[i].sum()) for i in range(documents))
    assert rows["dropped: chat with an empty turn"] == "2" and rows["cut: all from an empty turn on"] == "1"
    assert rows["dropped: chat with tool calls, which the template does not show"] == "2"
    assert rows["cut: answers before the first question"] == "2"
    assert rows["cut: the field 'tools', which the template does not show"] == "1"
    assert f"first cut: all from an empty turn on: {path}:55\n" in done.stdout
    dropped = sum(int(count) for reason, count in rows.items() if reason.startswith("dropped"))
    assert dropped + documents == len(CHATS) + len(odd) + 1
    before = written(tmp_path / "x")

    done = run_in_fork(*flags, "--overwrite", "--no-append-eod")
    assert done.code == 2 and "--append-eod: cannot be used with --chat-format" in done.error
    (tmp_path / "b.txt").write_text("text")
    done = run_in_fork(*flags, "--overwrite", "--input", tmp_path / "b.txt")
    assert done.code == 2 and "b.txt: a chat is a JSON object or a row" in done.error
    assert written(tmp_path / "x") == before


N = 96


def write_masked(prefix, documents: int = 30, marks=lambda d, length: np.arange(length) // 7 % 2):
    """Write documents in which token i of document d is 1000 d + i, with the loss mask marks(d, length)."""
    rng = np.random.default_rng(0)
    builders = [
        IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32),
        IndexedDatasetBuilder(f"{loss_mask_prefix(prefix)}.bin", dtype=np.uint8),
    ]
    for d, length in enumerate(rng.integers(N, 900, size=documents)):
        for builder, values in zip(builders, (1000 * d + np.arange(length), marks(d, length))):
            builder.add_document(torch.from_numpy(values), [int(length)])
    builders[0].finalize(f"{prefix}.idx")
    builders[1].finalize(f"{loss_mask_prefix(prefix)}.idx")
    return str(prefix)


def build(prefixes, samples=60, **options):
    sampler = dict(name="cream", window=N, target=4 * N, sigma=3.0, variant="paper")
    config = LongDocumentDatasetConfig(
        random_seed=5, sequence_length=N, blend=(prefixes, None), split="100,0,0", sampler=sampler, **options
    )
    return BlendedMegatronDatasetBuilder(LongDocumentDataset, [samples, 0, 0], lambda: True, config).build()[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loss_covers_assistant_labels_only(tmp_path, workers, caplog):
    prefix = write_masked(tmp_path / "x")
    with caplog.at_level("INFO"):
        dataset = build([prefix])
    assert f"loss on the tokens marked in {prefix}_loss_mask.bin" in caplog.text
    seen = 0
    for item in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers):
        labels, mask = item["labels"].numpy(), item["loss_mask"].numpy()
        np.testing.assert_array_equal(mask[:-1], labels[:-1] % 1000 // 7 % 2)  # the label encodes its mask
        assert mask[-1] == 0 and mask.dtype == np.float32
        seen += mask.sum()
    assert 0.4 < seen / (len(dataset) * N) < 0.6


def test_packed_chats_have_loss_on_their_answers(tmp_path):
    """Chats shorter than a sample are packed whole, with the mask of each."""
    path = write_chats(tmp_path, "jsonl")
    tokenizer = ByteTokenizer()
    preprocess([path], tmp_path / "x", tokenizer, chat_format="llama2", progress=False)
    for chat_loss in ("answers", "all"):
        config = LongDocumentDatasetConfig(
            random_seed=5, sequence_length=256, blend=([str(tmp_path / "x")], None), split="100,0,0",
            sampler=dict(name="cream", window=256, target=1024), chat_loss=chat_loss,
        )  # fmt: skip
        data = BlendedMegatronDatasetBuilder(PackedDocumentDataset, [12, 0, 0], lambda: True, config).build()[0]
        found = set()
        for sample in (data[i] for i in range(12)):
            starts = [*np.flatnonzero(sample["document_starts"]), 256]
            for begin, end in itertools.pairwise(starts):
                ids, mask = sample["tokens"][begin:end], sample["loss_mask"][begin : end - 1]
                if not ids.any():
                    continue  # padding
                text = bytes(id for id in ids if id < 256).decode()
                found.add(text)
                answer = text.partition("[/INST]")[2].encode()
                learned = [*answer, tokenizer.eod] if chat_loss == "answers" else ids[1:].tolist()
                assert sample["labels"][begin : end - 1][mask == 1].tolist() == learned
        assert len(found) == len(CHATS)


def test_the_loss_covers_all_tokens_if_asked(tmp_path, caplog):
    prefix = write_masked(tmp_path / "x")
    with caplog.at_level("INFO"):
        dataset = build([prefix], chat_loss="all")
    assert f"--chat-loss all ignores {prefix}_loss_mask.bin" in caplog.text
    assert all((dataset[i]["loss_mask"] == np.append(np.ones(N - 1), 0)).all() for i in range(5))
    # The samples are the same: only their loss differs.
    assert (dataset[0]["tokens"] == build([prefix])[0]["tokens"]).all()


def test_masks_in_a_blend_and_under_the_other_masks(tmp_path):
    chats, text = write_masked(tmp_path / "chats"), tmp_path / "text"
    builder = IndexedDatasetBuilder(f"{text}.bin", dtype=np.int32)
    for d in range(20):
        builder.add_document(torch.arange(10**6, 10**6 + 300), [300])
    builder.finalize(f"{text}.idx")
    dataset = build([chats, str(text)], samples=40, mask_segment_starts=True)
    kinds = set()
    for i in range(40):
        item = dataset[i]
        is_text = bool(item["tokens"][0] >= 10**6)
        kinds.add(is_text)
        marked = np.ones(N - 1) if is_text else item["labels"][:-1] % 1000 // 7 % 2
        assert (item["loss_mask"][:-1] <= marked).all()
        assert (item["loss_mask"][:-1] != marked).sum() <= 2  # the two segment starts
    assert kinds == {True, False}


def test_training_continues_over_fully_masked_samples(tmp_path):
    """Samples of odd documents have no marked token. They change neither the loss nor the weights."""
    prefix = write_documents(tmp_path / "x", documents=20, shortest=100)
    builder = IndexedDatasetBuilder(f"{loss_mask_prefix(prefix)}.bin", dtype=np.uint8)
    for d, length in enumerate(read_index(prefix).lengths):
        builder.add_document(torch.full((int(length),), d % 2 == 0), [int(length)])
    builder.finalize(f"{loss_mask_prefix(prefix)}.idx")
    flags = ["--data-path", prefix, "--split", "100,0,0", "--eval-iters", 0, "--train-iters", 6]
    losses = train(1, tmp_path / "tb", *flags)
    assert len(losses) == 6 and all(np.isfinite(loss) and loss > 0.5 for loss in losses.values())
    # A mean that included the unmarked samples would be about half.
    assert losses[1] == pytest.approx(np.log(100), rel=0.1)
