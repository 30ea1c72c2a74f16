"""Tasks from users' files: the published formats, and one-line errors for bad files."""

import gzip
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks import kv, lines, longbench, needle
from megatron_cream.evaluation.tasks.ruler import qa
from megatron_cream.evaluation.tasks.ruler import suite as ruler
from tests.task_tokenizers import NAMES, tokenizer

TOKENS = tokenizer("sentencepiece")


def write_lines(path: Path, records: list[dict]) -> Path:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# Haystacks


def test_haystack_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("Second file here. It ends.")
    (tmp_path / "a.txt").write_text("First   file\nhere. It goes on.")
    (tmp_path / "ignored.md").write_text("Nothing.")
    (example,) = needle.examples(TOKENS, lengths=[400], depths=[0], haystack=tmp_path)
    cycle = "First file here. It goes on. Second file here. It ends. "
    assert (cycle * 2).strip() in example.prompt and "Nothing" not in example.prompt
    (example,) = ruler.examples(TOKENS, lengths=[400], tasks=["niah_single_2"], haystack=tmp_path)
    assert "Second file here." in example.prompt


# LongEval's lines


def longeval(count: int = 4, index: int = 2) -> dict:
    record = [f"line odd-word{i}: REGISTER_CONTENT is <{100 + i}>\n" for i in range(count)]
    prompt = f"Memorize:\n\n{''.join(record)}\nWhat is the <REGISTER_CONTENT> in line odd-word{index}?"
    return {
        "random_idx": [f"odd-word{index}", index],
        "expected_number": 100 + index,
        "num_lines": count,
        "correct_line": record[index],
        "prompt": prompt,
    }


def test_published_lines(tmp_path):
    path = write_lines(tmp_path / "4_lines.jsonl", [longeval(), longeval(index=0), longeval(index=3)])
    made = list(lines.load(TOKENS, [path], most=2))
    assert [example.name for example in made] == ["lines/4_lines/0", "lines/4_lines/1"]
    assert [example.depth for example in made] == [pytest.approx(2 / 3), 0]
    assert made[0].prompt == longeval()["prompt"] and made[0].part == "4_lines"
    assert made[0].length == len(TOKENS.encode(made[0].prompt)) + made[0].max_new_tokens
    assert lines.score(made[0], "It is 102.") == 1 and lines.score(made[1], "It is 102.") == 0


# Lost in the Middle's pairs


def pairs_record(count: int = 5, asked: int = 1) -> dict:
    records = [[f"key{i}", f"Value{i}"] for i in range(count)]
    return {"ordered_kv_records": records, "key": f"key{asked}", "value": f"Value{asked}"}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_published_pairs(tmp_path, suffix):
    path = write_lines(tmp_path / f"kv-retrieval-5_keys{suffix}", [pairs_record(), pairs_record(asked=4)])
    made = list(kv.load(TOKENS, [path]))
    assert len(made) == 10 and len({example.name for example in made}) == 10
    assert {example.part for example in made} == {"5_keys"}
    for example in made:
        keys = re.findall(r'"(key\d)":', example.prompt)
        asked = re.search(r'Key: "(key\d)"', example.prompt).group(1)
        assert example.answers == (asked.replace("key", "Value"),)
        assert keys.index(asked) == round(example.depth * 4)
        rest = [key for key in keys if key != asked]
        assert rest == sorted(rest) and len(keys) == 5  # the others keep their order
        assert kv.score(example, f'"{asked.upper().replace("KEY", "VALUE")}"') == 1  # case-insensitive, as published
    assert [example.depth for example in kv.load(TOKENS, [path], gold=[0, 4], most=1)] == [0, 1]


# SQuAD and HotpotQA


def squad(articles: int = 3, paragraphs: int = 4) -> dict:
    def paragraph(a: int, p: int) -> dict:
        asked = [
            {"question": f"Who is {a}.{p}?", "answers": [{"text": f"Name {a}-{p}"}] * 2, "is_impossible": False},
            {"question": "Impossible?", "answers": [], "is_impossible": True},
        ]
        return {"context": f"Article {a}, paragraph {p}: this is Name {a}-{p}.", "qas": asked}

    return {"data": [{"paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]}


def hotpot(cases: int = 3) -> list[dict]:
    return [
        {
            "question": f"Question {i}?",
            "answer": f"yes{i}",
            "context": [[f"Title {i}-{d}", [f"Sentence of {i}-{d}.", " Another."]] for d in range(3)],
        }
        for i in range(cases)
    ]


def documents(prompt: str) -> list[str]:
    found = re.split(r"\n*Document \d+:\n", prompt.split("\n\nAnswer the question")[0])[1:]
    numbers = [int(number) for number in re.findall(r"Document (\d+):\n", prompt)]
    assert numbers == list(range(1, len(found) + 1))
    return found


@pytest.mark.parametrize("length", [320, 500, 4000])
def test_squad(tmp_path, length):
    """A question's paragraph is among others, its own article's first; paragraphs repeat when they run out."""
    path = write_json(tmp_path / "dev-v2.0.json", squad())
    made = list(ruler.examples(TOKENS, lengths=[length], tasks=["qa_1"], per_cell=12, squad=path))
    assert [example.answers for example in made[:5]] == [
        ("Name 0-0",),
        ("Name 0-1",),
        ("Name 0-2",),
        ("Name 0-3",),
        ("Name 1-0",),
    ]
    first_places = set()
    for i, example in enumerate(made):
        found = documents(example.prompt)
        article = f"Article {i // 4},"
        own = f"{article} paragraph {i % 4}:"
        assert sum(text.startswith(own) for text in found) == (
            1 if len(found) <= 12 else pytest.approx(len(found) / 12, abs=1)
        )
        related = sum(text.startswith(article) for text in found)
        if len(found) <= 12:
            assert related == min(4, len(found)) and len(set(found)) == len(found)
        else:
            assert len(set(found)) == 12
        first_places.add(next(k for k, text in enumerate(found) if text.startswith(own)))
        room = length - example.max_new_tokens - len(TOKENS.encode(example.prompt))
        assert 0 <= room < len(TOKENS.encode(f"\n\nDocument 100:\n{found[0]}")) + 5
        assert f"Question: Who is {i // 4}.{i % 4}? Answer:" in example.prompt
    assert len(first_places) > 1
    assert ruler.score(made[0], "it is name 0-0!") == 1 and ruler.score(made[0], "Name 0-1") == 0


def test_hotpotqa(tmp_path):
    path = write_json(tmp_path / "hotpot.json", hotpot())
    made = list(ruler.examples(TOKENS, lengths=[700], tasks=["qa_2"], per_cell=3, hotpotqa=path))
    for i, example in enumerate(made):
        found = documents(example.prompt)
        own = {f"Title {i}-{d}\nSentence of {i}-{d}. Another." for d in range(3)}
        assert own <= set(found) and len(found) > 3
        assert example.answers == (f"yes{i}",) and example.part == "qa_2"


def test_one_of_several_answers_is_enough(tmp_path):
    data = squad()
    data["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "one"}, {"text": "two"}]
    path = write_json(tmp_path / "squad.json", data)
    (example,) = ruler.examples(TOKENS, lengths=[400], tasks=["qa_1"], squad=path)
    assert ruler.score(example, "two") == 1


def test_all_tasks_whose_data_is_there(tmp_path):
    path = write_json(tmp_path / "squad.json", squad())
    made = list(ruler.examples(TOKENS, lengths=[1200], squad=path))
    assert [example.part for example in made] == [task for task in ruler.TASKS if task != "qa_2"]


# LongBench


def record(i: int = 0, **other) -> dict:
    return {
        "input": f"What is {i}?",
        "context": " ".join(f"Fact{i} number {n}." for n in range(100)),
        "answers": ["gold"],
        "length": 300,
        "dataset": "narrativeqa",
        "language": "en",
        "all_classes": None,
        "_id": f"id{i}",
    } | other


def test_longbench_folder_and_zip(tmp_path):
    records = [record(i) for i in range(3)]
    write_lines(tmp_path / "narrativeqa.jsonl", records)
    write_lines(tmp_path / "trec_e.jsonl", [record(7, all_classes=["A", "B"], answers=["B"])])
    write_lines(tmp_path / "notes.jsonl", [{}])
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("narrativeqa", "trec_e"):
            archive.write(tmp_path / f"{name}.jsonl", f"data/{name}.jsonl")
    made = list(longbench.examples(TOKENS, folder=tmp_path, length=4000))
    assert [example.name for example in made] == [
        "longbench/narrativeqa/id0",
        "longbench/narrativeqa/id1",
        "longbench/narrativeqa/id2",
        "longbench/trec_e/id7",
    ]
    assert made[3].part == "trec_e" and made[3].classes == ("A", "B") and made[3].max_new_tokens == 64
    assert records[1]["context"] in made[1].prompt and made[1].prompt.endswith("Question: What is 1?\n\nAnswer:")
    assert longbench.score(made[3], "B") == 1 and longbench.score(made[3], "A B") == 0.5
    assert list(longbench.examples(TOKENS, folder=tmp_path / "data.zip", length=4000)) == made
    few = longbench.examples(TOKENS, folder=tmp_path, length=4000, datasets=["narrativeqa"], most=2)
    assert list(few) == made[:2]


@pytest.mark.parametrize("name", longbench.DATASETS)
def test_every_longbench_prompt_holds_its_data(tmp_path, name):
    """Prompts contain context and input; braces in the data are kept."""
    write_lines(tmp_path / f"{name}.jsonl", [record(input="<{input}{>", context="<{context}{input}>")])
    (example,) = longbench.examples(TOKENS, folder=tmp_path, length=5000)
    assert example.prompt.count("<{context}{input}>") == 1
    without_input = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    assert example.prompt.count("<{input}{>") == (name not in without_input)
    assert example.prompt.startswith(longbench.DATASETS[name].prompt[:10])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [300, 301, 700])
def test_longbench_prompts_lose_their_middle(tmp_path, name, length):
    tokens = tokenizer(name)
    context = " ".join(f"wörd{n}☃" for n in range(2000))
    write_lines(tmp_path / "narrativeqa.jsonl", [record(context=context)])
    (example,) = longbench.examples(tokens, folder=tmp_path, length=length)
    (whole,) = longbench.examples(tokens, folder=tmp_path, length=10**6)
    room = length - example.max_new_tokens - len(tokens.encode(example.prompt))
    assert 0 <= room <= 8
    start = next(i for i, (a, b) in enumerate(zip(example.prompt, whole.prompt, strict=False)) if a != b)
    reverse = zip(example.prompt[::-1], whole.prompt[::-1], strict=False)
    end = next(i for i, (a, b) in enumerate(reverse) if a != b)
    assert start + end >= len(example.prompt) - 3
    sizes = [len(tokens.encode(part)) for part in (example.prompt[:start], example.prompt[start:])]
    assert abs(sizes[0] - sizes[1]) <= 12
    assert example.prompt.endswith("Answer:")


# Bad input


def bad(kind: str, tmp_path: Path):
    """Make a call that fails."""
    file = tmp_path / "file.jsonl"
    gzipped = tmp_path / "cut.jsonl.gz"
    gzipped.write_bytes(gzip.compress(json.dumps(pairs_record()).encode() * 50)[:-20])
    latin = tmp_path / "latin"
    latin.mkdir()
    (latin / "a.txt").write_bytes(b"caf\xe9")
    one = write_json(tmp_path / "squad.json", squad(1, 1))
    bench = tmp_path / "bench"
    bench.mkdir()
    write_lines(bench / "narrativeqa.jsonl", [record()])
    broken = tmp_path / "broken"
    broken.mkdir()
    write_lines(broken / "narrativeqa.jsonl", [record(answers="gold")])
    return {
        "needle kind": lambda: needle.examples(TOKENS, lengths=[900], depths=[0], needle="pin"),
        "needle depth": lambda: needle.examples(TOKENS, lengths=[900], depths=[50]),
        "needle length": lambda: needle.examples(TOKENS, lengths=[60], depths=[0]),
        "grid": lambda: needle.build_grid(5000, 1000, 3, 3),
        "no haystack": lambda: needle.examples(TOKENS, lengths=[900], depths=[0], haystack=tmp_path / "none"),
        "empty haystack": lambda: needle.examples(TOKENS, lengths=[900], depths=[0], haystack=bench),
        "haystack not UTF-8": lambda: needle.examples(TOKENS, lengths=[900], depths=[0], haystack=latin),
        "lines": lambda: lines.examples(TOKENS, lines=[1]),
        "lines length": lambda: lines.examples(TOKENS, lengths=[100]),
        "no file": lambda: lines.load(TOKENS, [file]),
        "not JSON": lambda: lines.load(TOKENS, [text_file(file, '{"a": 1}\n\n{"b"')]),
        "field": lambda: lines.load(TOKENS, [write_lines(file, [longeval(), {"prompt": "x"}])]),
        "not an object": lambda: lines.load(TOKENS, [text_file(file, "[1, 2]\n")]),
        "field's value": lambda: lines.load(TOKENS, [write_lines(file, [longeval() | {"expected_number": "x"}])]),
        "keys": lambda: kv.examples(TOKENS, keys=[1]),
        "gold": lambda: kv.examples(TOKENS, keys=[75], gold=[0, 75]),
        "cut gzip": lambda: kv.load(TOKENS, [gzipped]),
        "pairs": lambda: kv.load(TOKENS, [write_lines(file, [pairs_record() | {"value": "other"}])]),
        "ruler task": lambda: ruler.examples(TOKENS, lengths=[900], tasks=["niah_single_4"]),
        "ruler file": lambda: ruler.examples(TOKENS, lengths=[900], tasks=["qa_2"]),
        "ruler length": lambda: ruler.examples(TOKENS, lengths=[200], tasks=["cwe"]),
        "questions": lambda: ruler.examples(TOKENS, lengths=[900], tasks=["qa_1"], per_cell=2, squad=one),
        "squad": lambda: [qa.read_squad(write_json(tmp_path / "s.json", hotpot()))],
        "hotpotqa": lambda: [qa.read_hotpotqa(write_json(tmp_path / "h.json", squad()))],
        "no questions": lambda: [qa.read_squad(write_json(tmp_path / "e.json", {"data": []}))],
        "bench folder": lambda: longbench.examples(TOKENS, folder=tmp_path / "none", length=900),
        "bench zip": lambda: longbench.examples(TOKENS, folder=text_file(tmp_path / "data.zip", "no"), length=900),
        "bench empty": lambda: longbench.examples(TOKENS, folder=latin, length=900),
        "bench name": lambda: longbench.examples(TOKENS, folder=bench, length=900, datasets=["squad"]),
        "bench absent": lambda: longbench.examples(TOKENS, folder=bench, length=900, datasets=["trec"]),
        "bench length": lambda: longbench.examples(TOKENS, folder=bench, length=128),
        "bench answers": lambda: longbench.examples(TOKENS, folder=broken, length=900),
    }[kind]


def text_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("needle kind", "needle pin: must be one of number, sandwich"),
        ("needle depth", "depth 50: must be from 0 to 1"),
        ("needle length", r"context length 60: too short for needle, which takes \d+ tokens"),
        ("grid", "3 lengths from 5000 to 1000"),
        ("no haystack", "--haystack .*none: no such folder"),
        ("empty haystack", "--haystack .*bench: there is no text"),
        ("haystack not UTF-8", r"latin/a\.txt: not a text file in UTF-8"),
        ("lines", "--lines 1: must be 2 or more"),
        ("lines length", "context length 100: too short for lines"),
        ("no file", r"file\.jsonl: cannot be read"),
        ("not JSON", r"file\.jsonl, line 1: expected an object with expected_number, num_lines, prompt, random_idx"),
        ("field", r"file\.jsonl, line 2: expected an object with expected_number, num_lines, random_idx"),
        ("not an object", r"file\.jsonl, line 1: expected an object"),
        ("field's value", r"file\.jsonl, line 1: not one of LongEval's lines"),
        ("keys", "--keys 1: must be 2 or more"),
        ("gold", "--gold 75: must be from 0 to 74"),
        ("cut gzip", r"cut\.jsonl\.gz"),
        ("pairs", r"file\.jsonl, line 1: not an example of key-value retrieval"),
        ("ruler task", "--tasks niah_single_4: must be one of niah_single_1"),
        ("ruler file", "--hotpotqa is missing: --tasks qa_2 needs HotpotQA's"),
        ("ruler length", "context length 200: too short for cwe"),
        ("questions", r"squad\.json: has 1 questions, too few for 2"),
        ("squad", r"s\.json: not SQuAD's JSON"),
        ("hotpotqa", r"h\.json: not HotpotQA's JSON"),
        ("no questions", r"e\.json: there are no questions"),
        ("bench folder", "--data .*none: no such folder"),
        ("bench zip", r"data\.zip: cannot be read"),
        ("bench empty", "there is no NAME.jsonl"),
        ("bench name", "--datasets squad: must be one of narrativeqa"),
        ("bench absent", "--datasets trec: .* has only narrativeqa"),
        ("bench length", "context length 128: too short for narrativeqa"),
        ("bench answers", r"narrativeqa\.jsonl, line 1: answers must be a list, not 'gold'"),
    ],
)
def test_bad_input_prints_one_line(tmp_path, kind, told):
    call = bad(kind, tmp_path)
    with pytest.raises(UsageError, match=told) as error:
        list(call())
    assert "\n" not in str(error.value)


def test_a_package_that_grading_needs_is_missed_before_generation(tmp_path, monkeypatch):
    write_lines(tmp_path / "gov_report.jsonl", [record()])
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(UsageError, match="pip install rouge"):
        next(longbench.examples(TOKENS, folder=tmp_path, length=2000))
