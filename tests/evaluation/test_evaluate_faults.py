"""tools/evaluate.py: errors before the model is loaded, and files that --overwrite keeps."""

import json
import re
import sys
from unittest.mock import Mock

import pytest
import torch

from megatron_cream.commands import evaluate as command
from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.models import language_model
from megatron_cream.evaluation.results import PICTURE, RESULTS, SUMMARY, open_results
from megatron_cream.evaluation.runner import Generation, run_task
from tests.evaluation.test_evaluate_runs import plan_of, some_examples
from tests.evaluation_models import Knows, save_llama, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def refused(monkeypatch, capsys, model, tmp_path):
    """Return a function that runs the tool, checks that it fails before loading, and returns its error line."""
    monkeypatch.setattr(language_model, "load", None)

    def run(*flags) -> str:
        given = map(str, [*flags, "--model", model, "--output", tmp_path / "out"])
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *given])
        assert command.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("evaluate.py: error: ")

    return run


def test_a_model_that_does_not_fit_is_not_called_damaged(monkeypatch, capsys, model, tmp_path):
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", Mock(side_effect=full))
    flags = ["lines", "--lengths", "700", "--samples", "1", "--model", str(model), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    assert command.main() == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("evaluate.py: error: out of memory: DefaultCPUAllocator: ") and "cannot load" not in line


def test_out_of_memory_outside_a_prompt_is_one_line(monkeypatch, capsys, model, tmp_path):
    """For example while the model is loaded, beside another process on the GPU."""

    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nGPU 0 has")

    monkeypatch.setitem(command.RUNS, "kv", load)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "kv", "--model", str(model), "--output", str(tmp_path / "out")])
    assert command.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: error: out of memory: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0")
    monkeypatch.setitem(command.RUNS, "kv", Mock(side_effect=MemoryError()))
    assert command.main() == 1
    assert "evaluate.py: error: out of memory: the host has too little; finished" in capsys.readouterr().err
    monkeypatch.setitem(command.RUNS, "kv", lambda _: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        command.main()


def test_flags_are_named(refused, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "some words of a text"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "texts.jsonl")
    perplexity = ["perplexity", "--dataset", tmp_path / "texts.jsonl"]
    short = ["--lengths", 2, "--stride", 1]
    for flags, words in [
        ([*perplexity, "--lengths", 1, "--stride", 1], "--lengths 1: must be 2 or more"),
        ([*perplexity, *short, "--min-tokens", 1], "--min-tokens 1: must be 2 or more"),
        ([*perplexity, tmp_path / "texts.jsonl", *short], f"--dataset {tmp_path / 'texts.jsonl'} {tmp_path}"),
        ([*perplexity, tmp_path / "link.jsonl", *short], f"--dataset {tmp_path / 'texts.jsonl'} {tmp_path}"),
        (["kv", "--keys", 1], "--keys 1: must be"),
        (["kv", "--keys", 5, "--gold", "-1"], "--gold -1: must be from 0 to 4"),
        (["lines", "--lines", 1], "--lines 1: must be"),
        (["needle", "--min-length", 1], "--min-length: context length 1: too short"),
        (["lines", "--lengths", 9], "--lengths: context length 9: too short"),
        (["needle", "--haystack", tmp_path / "none"], f"--haystack {tmp_path / 'none'}: no such folder"),
        (["longbench", "--data", tmp_path / "none"], f"--data {tmp_path / 'none'}: no such folder"),
    ]:
        assert refused(*flags).startswith(words), (flags, refused(*flags))
    assert not (tmp_path / "out").exists()


def test_numbers_given_twice_count_once(monkeypatch):
    args = command.build_parser("").parse_args("kv --model m --keys 7 4 7 --gold 3 0 3".split())
    assert args.keys == [4, 7] and args.gold == [0, 3]
    assert command.build_parser("").parse_args("lines --model m --lines 9 9".split()).lines == [9]


def test_a_foreign_picture_stays(refused, tmp_path):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / PICTURE).write_bytes(b"mine")
    assert f"--output {out}: its {PICTURE} was not written by an evaluation" in refused("kv", "--keys", 4)
    assert (out / PICTURE).read_bytes() == b"mine"


@pytest.mark.parametrize("name", [RESULTS, SUMMARY, PICTURE])
def test_overwrite_keeps_foreign_files(refused, tmp_path, name):
    """Files of other programs are kept; a folder named like a result file is rejected, with --overwrite too."""
    out = tmp_path / "out"
    out.mkdir()
    for text in ("precious", '{"name": "mine"}\n', "[" * 100_000):
        (out / name).write_text(text)
        assert f"--output {out}: its {name} was not written by an evaluation" in refused(
            "kv", "--keys", 4, "--overwrite"
        )
        assert [file.name for file in out.iterdir()] == [name] and (out / name).read_text() == text
    (out / name).unlink()
    (out / name).mkdir()
    for more in ([], ["--overwrite"]):
        assert refused("kv", "--keys", 4, *more).startswith(f"--output {out}: its {name} is not a file")


def test_overwrite_replaces_damaged_results(tmp_path):
    """One intact file of the two is enough to identify the folder as an evaluation's."""
    options = dict(settings={}, model={}, model_path=tmp_path)
    good = {"name": "a", "score": 1.0, "part": "", "length": 9, "depth": None}
    for damaged in (RESULTS, SUMMARY):
        with open_results(tmp_path / damaged, **options, overwrite=True) as results:
            results.add(good)
        (tmp_path / damaged / damaged).write_text("{\n")
        with open_results(tmp_path / damaged, **options, overwrite=True) as results:
            assert results.records == {}


@pytest.mark.parametrize(("positions", "right"), [(None, True), (77, True), ("many", False), (True, False), (0, False)])
def test_positions_of_another_family(tmp_path, positions, right):
    """null counts as absent; a value that is not a number gives an error that names the file."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "max_position_embeddings": positions}))
    source = language_model.Source(tmp_path, None, None, "transformers", None)
    if right:
        assert source.max_positions == (positions or 1 << 40) and command.default_lengths(source)[0] in (77, 4096)
        return
    with pytest.raises(UsageError, match=r"config\.json: max_position_embeddings .*: must be a whole number"):
        command.default_lengths(source)


@pytest.mark.parametrize(
    ("positions", "length", "lengths"),
    [
        (262144, 262144, [4096, 8192, 16384, 32768, 65536, 131072, 262144]),
        (40960, 40960, [4096, 8192, 16384, 32768]),
        (4095, 4095, [4095]),
        (None, 131072, [4096, 8192, 16384, 32768, 65536, 131072]),
    ],
)
def test_the_default_length_is_the_models_positions(monkeypatch, tmp_path, positions, length, lengths):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "max_position_embeddings": positions}))
    source = language_model.Source(tmp_path, None, None, "transformers", None)
    monkeypatch.setattr(command, "find_model", lambda args: source)
    made = {}
    for flag, words in {
        "lengths": ["needle", "--length-steps", "2"],
        "length": ["longbench", "--data", "x"],
        "lines": ["lines"],
    }.items():
        plan = Mock(side_effect=UsageError("planned"))
        monkeypatch.setattr(command.plans, f"plan_{words[0]}", plan)
        given = [*words, "--model", str(tmp_path), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *given])
        assert command.main() == 2
        made[flag] = plan.call_args.kwargs["length" if flag == "length" else "lengths"]
    assert made == {"lengths": [1024, length], "length": length, "lines": lengths}


def test_sandwiches_of_one_prompt_are_not_resumed(monkeypatch, model, tmp_path):
    """Earlier versions gave all samples of a cell one prompt, and did not write that down."""
    seen = {}
    monkeypatch.setattr(command, "run_examples", lambda args, source, plan, options: seen.update(options))
    flags = ["needle", "--needle", "sandwich", "--max-length", "1024", "--depth-steps", "1"]
    for samples in ("1", "2"):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, "--samples", samples, "--model", str(model)])
        assert command.main() == 0
        assert seen.get("varied_filler") == (True if samples == "2" else None)
    options = dict(model={}, model_path=tmp_path, overwrite=False)
    with open_results(tmp_path / "old", settings={"samples": 2}, **options) as results:
        results.add({"name": "a", "score": 1.0, "part": "", "length": 9, "depth": None})
    with pytest.raises(UsageError, match="were made with varied_filler false, not true. Give another folder"):
        with open_results(tmp_path / "old", settings={"samples": 2, "varied_filler": True}, **options):
            pass


@pytest.mark.parametrize("text", ["[" * 100_000, '{"eos_token_id": [Infinity]}'])
def test_a_damaged_generation_config_prints_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"generation_config\.json: (not a configuration|cannot be read)"):
        language_model._read_stop_ids(language_model.Source(tmp_path, None, None, "transformers", None))


def test_a_batch_of_any_size(model, tmp_path):
    tokenizer, examples = language_model.open_tokenizer(model, flag=""), some_examples(3)
    knows = Knows(tokenizer, {example.prompt: " yes" for example in examples})
    with open_results(tmp_path / "out", settings={}, model={}, model_path=model, overwrite=False) as results:
        assert len(run_task(lambda: knows, plan_of(examples), Generation(batch_size=10**30), results)) == 3
    assert len(knows.batches) == 1


def test_prompts_beyond_the_window_always_print_a_warning(monkeypatch, capsys, model, tmp_path):
    monkeypatch.setattr(command, "load", lambda *_: (_ for _ in ()).throw(UsageError("is loaded")))
    for flags in (["kv", "--keys", 75], ["lines", "--lengths", 4096], ["lines", "--lines", 200]):
        given = [*flags, "--samples", 1, "--model", model, "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, given)])
        assert command.main() == 2
        words = capsys.readouterr().err
        assert re.search(r"\d\d\d\d tokens are more than the 2048 positions of", words) and "is loaded" in words, flags


def test_a_tokenizer_of_another_vocabulary_is_named(monkeypatch, capsys, model, tmp_path):
    save_tokenizer(tmp_path / "large", vocabulary=2600)
    flags = ["lines", "--lengths", 700, "--samples", 1, "--model", model, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--tokenizer", str(tmp_path / "large")])
    assert command.main() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"--model {model}: the tokenizer gives token id 2\d\d\d, but the model has 2048 ids", line), line
