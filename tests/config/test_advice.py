"""Tests that the advice in error messages works: they cause each error that advises a flag, and follow the advice."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cream.common.errors import UsageError
from megatron_cream.config import parse
from tests import forked_commands
from tests.advice_cases import ADVICE, INSTEAD, NOT_FOLLOWED, with_
from tests.bad_inputs import TRAINER, Ended, free_port, start
from tests.config.test_bad_inputs import good, mains, world  # noqa: F401  (fixtures)
from tests.launch import ROOT

WORDS = re.compile(
    r"\b(above|add|append|choose|export|give|goes on|instead|leave|lists|names?|needs?|only with|or|prepend|takes?|use"
    r"|without|try|start again|move|put|delete|run|set)\b",
    re.IGNORECASE,
)
# A message that only states a relation between the values of two flags: "must divide --num-layers".
RELATION = re.compile(r"must (be (?!above)|divide)[^.;]*$")


def lines_that_advise_a_flag() -> dict[str, str]:
    """Return text -> place in the source, for each raised or returned message that advises a flag.

    The text has {} for each value.
    """
    found = {}
    for file in [*ROOT.glob("megatron_cream/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "pretrain_cream.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            said = {ast.Raise: "exc", ast.Return: "value"}.get(type(node))
            text = _text(getattr(node, said) or ast.Pass()) if said else ""
            flags, words = re.findall(r"[ (}]--[a-z]", text), WORDS.search(text)
            if flags and words and not RELATION.search(text.partition(": ")[2]):
                found[text] = f"{file.relative_to(ROOT)}:{node.lineno}"
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return "".join(_text(child) for child in ast.iter_child_nodes(node))


def test_every_message_that_advises_a_flag_has_a_case():
    lines = lines_that_advise_a_flag()
    pieces = [case.line for case in ADVICE] + list(NOT_FOLLOWED)
    missing = [f"{place}: {text}" for text, place in lines.items() if not any(piece in text for piece in pieces)]
    assert not missing, "\n".join(["add to tests/advice_cases.py how its advice is followed:", *missing])
    unused = [piece for piece in pieces if not any(piece in text for text in lines)]
    assert not unused, unused


def checks_alone(flags: list[str]) -> int:
    try:
        return parse.parse(flags) and 0
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


def run(mains, world: Path, command, ranks: int = 1, trains: bool = False):  # noqa: F811
    """Run a command and return the Ended of its first rank.

    The trainer only runs its checks, which is faster, unless it resumes, exports or `trains`.
    """
    name, *flags = [part.replace("{0}", str(world)) for part in command]
    checked = name == TRAINER and not trains and not {"--load", "--save-hf", "--help"} & set(flags)
    if name == TRAINER and not checked and ranks == 1:  # a fork after use of torch's threads may abort
        done = subprocess.run([*forked_commands.python(), ROOT / name, *flags], capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)
    main, port = (lambda: checks_alone(flags)) if checked else mains[name], free_port()
    waits = [start(main, name, *flags, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    return [wait() for wait in waits][0]


@pytest.mark.parametrize("case", ADVICE, ids=lambda case: case.line)
def test_advice_is_followed(mains, world, tmp_path, case):  # noqa: F811
    if case.before:
        assert run(mains, world, case.before, trains=True).code == 0
    case.damage(world)
    kept = shutil.copytree(world, tmp_path / "kept", symlinks=True)
    wrong = run(mains, world, case.wrong, case.ranks)
    said = re.escape(case.line).replace(r"\{\}", ".*")
    assert wrong.code == 2 and re.search(said, wrong.error), wrong.error[-3000:]
    for command in case.right:
        shutil.rmtree(world)
        shutil.copytree(kept, world, symlinks=True)
        ended = run(mains, world, command, case.ranks)
        assert ended.code == 0, f"{command}\n{ended.error[-3000:]}"


@pytest.mark.parametrize("name", INSTEAD)
def test_replacements_of_megatron_flags(mains, world, name):  # noqa: F811
    theirs, ours = INSTEAD[name]
    said = run(mains, world, with_(theirs)).error
    assert theirs.split()[0] in said and f"use {ours.split()[0]}" in said
    assert run(mains, world, with_(ours)).code == 0
