"""Damaged files beside the weights are found before they are copied."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, GenerationConfig

from megatron_cream.checkpoint import carried, output
from megatron_cream.common.errors import UsageError
from tests import forked_commands
from tests.evaluation_models import save_tokenizer
from tests.launch import ROOT

TOOL_USE = "additional_chat_templates/tool_use.jinja"
WORDS = [{"name": "default", "template": "{{ messages }}"}, {"name": "rag", "template": "{{ documents }}"}]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_tokenizer(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1], "max_length": 512}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / TOOL_USE).parent.mkdir()
    (folder / TOOL_USE).write_text("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}")
    text = folder / "text"
    text.write_text("\n".join((ROOT / "megatron_cream" / "common" / "files.py").read_text().splitlines()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, minloglevel=2, hard_vocab_limit=False
    )
    text.unlink(), (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "folder")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def swap(file: Path) -> None:
    """Replace the file by one of another kind."""
    other = {"tokenizer_config.json": "config.json"}.get(file.name, "tokenizer_config.json")
    file.write_bytes((file.parent / other if (file.parent / other).exists() else file.parents[1] / other).read_bytes())


NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    TOOL_USE,
)
DAMAGES = [(name, damage) for name in NAMES for damage in (cut, empty, flip, swap, Path.unlink)]


def test_an_intact_folder_prints_nothing(folder, capsys):
    carried.check_files(folder, vocabulary=2048)
    output.write_manifest(folder, {})
    carried.check_files(folder, vocabulary=2048)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_damage_is_rejected_or_harmless(folder, name, damage):
    """Without checksums, an error names the file, or transformers can read the copy."""
    damage(folder / name)
    try:
        carried.check_files(folder)
    except UsageError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        assert name in str(error) or damage is Path.unlink
        return
    assert damage not in (cut, empty, swap), "a whole file was taken for another"
    copied = folder.parent / "copied"
    copied.mkdir()
    carried.copy_files(folder, copied)
    tokenizer = AutoTokenizer.from_pretrained(copied, local_files_only=True)
    assert tokenizer("a text").input_ids
    if (copied / "generation_config.json").exists():
        GenerationConfig.from_pretrained(copied)


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_checksums_find_every_change(folder, capsys, name, damage):
    """Users may edit these files: a readable edited file gives a warning, a missing one an error."""
    output.write_manifest(folder, {})
    damage(folder / name)
    try:
        carried.check_files(folder)
    except UsageError as error:
        assert name in str(error)
    else:
        assert damage is not Path.unlink
        warning = capsys.readouterr().err
        assert warning.startswith("warning: ") and name in warning and len(warning.splitlines()) == 1
    assert name in output.check_manifest(folder, include_texts=True)[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", {"chat_template": "{% for"}, "chat_template: not a readable chat template"),
        ("tokenizer_config.json", {"chat_template": WORDS + [{"name": "x"}]}, "chat_template[2]: must be text"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template: must be text"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id '</s>': must be a token id"),
        ("generation_config.json", {"max_length": "long"}, "max_length 'long': must be a whole number"),
        ("generation_config.json", {"max_new_tokens": -1}, "transformers cannot load it: `max_new_tokens`"),
        ("generation_config.json", [], "must be a JSON object"),
    ],
)
def test_values_that_every_reader_rejects(folder, name, content, message):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        carried.check_files(folder)
    assert f"{folder / name}: {message}" in str(error.value)


def test_a_list_of_templates_is_accepted(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": WORDS}))
    (folder / "chat_template.jinja").unlink()
    carried.check_files(folder)


def test_a_tokenizer_of_a_larger_vocabulary(folder, capsys):
    carried.check_files(folder, vocabulary=1000)
    assert "the tokenizer has token ids up to 1999, but the model's vocabulary is 1000" in capsys.readouterr().err
    carried.check_files(folder, vocabulary=1000, warn=False)
    assert capsys.readouterr().err == ""


def test_templates_are_not_executed(folder):
    """One template would run forever, and one tries to access Python's classes."""
    (folder / "chat_template.jinja").write_text(
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{{ i }}{% endfor %}{% endfor %}"
    )
    (folder / TOOL_USE).write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    carried.check_files(folder)


def test_copied_files(folder):
    for name in ("adapter_config.json", "params.json", "trainer_state.json", "modeling.py", "LICENSE.txt", "README.md"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "tokenizer.model").write_text("x")
    copied = folder.parent / "copied"
    copied.mkdir()
    carried.copy_files(folder, copied)
    found = {file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()}
    assert found == {*NAMES, "LICENSE.txt", "README.md"}


def test_checking_does_not_contact_the_hub(folder):
    """Run in a process without network: transformers would ask the Hub for missing files."""
    script = "import socket, sys\ndef none(*a): raise SystemExit('asked the network')\nsocket.socket.connect = none\n"
    script += "from pathlib import Path\nfrom megatron_cream.checkpoint import carried\ncarried.check_files(Path(sys.argv[1]))"
    command = [*forked_commands.python(), "-c", script, folder]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
