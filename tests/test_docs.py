"""Tests of README and docs: their commands run as written, and the flags and files that they name exist.

Shell blocks without a title are run, on a tiny model, in forks (tests/forked_commands.py); tests/end_to_end runs the
same chain in fresh processes. Other blocks have a title that says what they need.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_cream.common import devices
from megatron_cream.config.parser import build_parser
from tests.forked_commands import shims
from tests.processes import ROOT, ending_with_test

PAGES = sorted((ROOT / "docs").glob("*.md"))
HAND_WRITTEN = [ROOT / "README.md", *(page for page in PAGES if page.name != "flags.md")]
TITLES = ("Needs ", "Run by ", "Settings")
# Flags of other programs: torchrun, sbatch, scancel, docker, kubectl, pip, pytest, mkdocs, hf, vllm.
FOREIGN = """
nnodes nproc_per_node rdzv_id rdzv_backend rdzv_endpoint rdzv_conf max-restarts max_restarts local_addr standalone
gpus-per-node array cpus-per-task signal file tag gpus ipc ulimit volume network shm-size
nodes no-build-isolation local-dir strict max-model-len flag
""".split()

MAKE_MODEL = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.evaluation_models import save_llama
config = save_llama(Path(sys.argv[2])) / "config.json"
config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
"""
MODEL = "SmolLM2-135M-Instruct"
"""The pretrained model of the tutorial, replaced by a tiny one."""

TINY = dict(MODEL=MODEL, WINDOW="512", TARGET="1024", STEPS="4", BATCH="2", LR="1e-4", GPUS="1")
"""Values that replace the tutorial's settings."""

TINY_README = {
    "8192": "512",
    "65536": "1024",
    "--train-iters 115": "--train-iters 2",
    "batch-size 32": "batch-size 4",
    "warmup-iters 10": "warmup-iters 1",
    "--length-steps 4": "--length-steps 2 --samples 1",
}


def blocks(page: Path, language: str = "bash") -> list[tuple[str, str]]:
    """Return (title, text) of each code block in this language."""
    pattern = rf'^```{language}(?: title="([^"]*)")?\n(.*?)^```$'
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


def make_folder(folder: Path) -> Path:
    """Make a folder like a checkout of the repository, with a model and long texts."""
    folder.mkdir()
    for name in ("pretrain_cream.py", "tools", "examples", "docs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", MAKE_MODEL, str(ROOT), folder / MODEL], check=True, timeout=300)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]
    text = "".join(source.read_text(encoding="utf-8", errors="replace") for source in sources)
    (folder / "books").mkdir()
    for number in range(40):
        (folder / "books" / f"{number}.txt").write_text(text[number * 9000 : number * 9000 + 9000])
    return folder


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    return inherited | TINY | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_block(folder: Path, text: str, programs: Path | None = None) -> str:
    """Run a shell block, check that it succeeds, and return its output.

    Args:
        programs: folder of the `python` and `torchrun` to use; None: of this Python.
    """
    command, variables = ["bash", "-euo", "pipefail", "-c", text], environment()
    if programs:
        variables["PATH"] = f"{programs}{os.pathsep}{variables['PATH']}"
    log = folder / "log.txt"
    with open(log, "w") as out:
        code = subprocess.run(
            ending_with_test(command), cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT, timeout=900
        ).returncode
    said = log.read_text(errors="replace")
    assert code == 0, f"{text}\n{said[-6000:]}"
    return said


def untitled(page: Path) -> list[str]:
    return [text for title, text in blocks(page) if not title]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of a `python` and a `torchrun` that start fast; None on a machine with a GPU."""
    return None if devices.has_cuda() else shims(tmp_path_factory.mktemp("docs") / "bin", environment())


def run_page(folder: Path, page: Path, programs: Path | None) -> list[str]:
    return [run_block(folder, text, programs) for text in untitled(page)]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory, programs):
    """(folder in which the tutorial ran, output of each of its blocks)."""
    folder = make_folder(tmp_path_factory.mktemp("docs") / "checkout")
    return folder, run_page(folder, ROOT / "docs" / "tutorial.md", programs)


@pytest.mark.slow
def test_tutorial(tutorial):
    folder, said = tutorial
    assert (folder / "extended" / "model.safetensors").is_file()
    assert "equal" in said[-2] and "window: 1024" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [page.name for page in PAGES if page.name != "tutorial.md" and untitled(page)])
def test_commands_of_page(tutorial, programs, name):
    folder, _ = tutorial
    run_page(folder, ROOT / "docs" / name, programs)


@pytest.mark.slow
def test_code_of_api():
    for _, code in blocks(ROOT / "docs" / "api.md", "python"):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_own_model_of_readme(tmp_path, programs):
    folder = make_folder(tmp_path / "checkout")
    (text,) = [text for _, text in blocks(ROOT / "README.md") if "--load-hf" in text]
    for written, tiny in TINY_README.items():
        assert written in text, "the README's command has changed"
        text = text.replace(written, tiny)
    run_block(folder, text, programs)
    assert (folder / "SmolLM2-64k" / "config.json").is_file()


def test_readme_starts_with_commands_of_ci():
    first = blocks(ROOT / "README.md")[0][1].splitlines()
    stages = re.findall(r'^stage "(.*?)"', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    for command in " && ".join(first).split(" && "):
        assert command in stages
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_page(page):
    for title, _ in blocks(page) if page.name != "README.md" else []:
        assert not title or title.startswith(TITLES), f"{title}: say what the block needs, or leave the title out"
    text = page.read_text()
    unknown = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - known_flags() - set(FOREIGN)
    assert not unknown, f"no such flags: {sorted(unknown)}"
    named = re.findall(r"(?<![\w/.])((?:tests|tools|examples|benchmarks|docs|megatron_cream)/[\w/.-]*\w\.\w+)", text)
    missing = {path for path in named if not (ROOT / path).exists()}
    tests = set(re.findall(r"`(?!tests/)((?:\w+/)*test_\w+\.py)`", text))
    missing |= {name for name in tests if not list(ROOT.glob(f"tests/**/{name}"))}
    assert not missing, f"no such files: {sorted(missing)}"


def known_flags() -> set[str]:
    trainer = {name for action in build_parser(recipe=False)._actions for name in action.option_strings}
    folders = ("megatron_cream/commands", "megatron_cream/evaluation", "benchmarks", "tests/faults")
    sources = [source for folder in folders for source in (ROOT / folder).glob("*.py")]
    tools = {flag for source in sources for flag in re.findall(r'"(--[\w-]+)"', source.read_text())}
    given = {name.removeprefix("--") for name in trainer | tools}
    return given | {f"no-{name}" for name in given} | {"help", "config"}


def test_troubleshooting_quotes_messages():
    """Every message quoted on the page appears in the source code."""
    sources = [ROOT / "pretrain_cream.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "megatron_cream").rglob("*.py")]
    joined = [re.sub(r'"\s*\n\s*f?"', "", source.read_text()) for source in sources]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \|", page.split("## Clusters")[0], re.MULTILINE)
    assert len(rows) > 30
    missing = [words for row in rows for words in re.findall("`([^`]+)`", row) if not any(words in s for s in joined)]
    assert not missing, f"no message says: {missing}"


def test_pictures_are_drawn_from_what_the_repository_has(tmp_path):
    """One of them is of the results of examples/study_real, which grow."""
    drawn = subprocess.run(
        [sys.executable, ROOT / "docs" / "draw_pictures.py", tmp_path], capture_output=True, text=True
    )
    assert drawn.returncode == 0, drawn.stderr
    names = {file.name for file in tmp_path.iterdir()}
    assert "scalings.png" in names and names <= {file.name for file in (ROOT / "docs" / "pictures").iterdir()}
