"""Several validation sets, each evaluated in full."""

import re

import pytest

from tests.launch import TINY, torchrun, write_documents


@pytest.mark.slow
def test_each_validation_set_has_its_own_loss(tmp_path):
    """Two equal sets have equal losses, and one set alone has the same."""
    train, valid = (write_documents(tmp_path / name, documents=n) for name, n in (("train", 60), ("valid", 20)))
    flags = [*TINY, "--fp32", "--train-iters", 2, "--eval-interval", 2, "--train-data-path", train]
    flags += ["--full-validation", "--multiple-validation-sets", "--valid-data-path", valid]

    def losses(*more) -> list[tuple[str, str]]:
        result = torchrun(1, *flags, *more)
        assert result.returncode == 0, result.stderr[-3000:]
        return re.findall(r"^ validation-?(\d*) loss at iteration 2 .*?lm loss value: (\S+)", result.stdout, re.M)

    one, two = losses(), losses(valid)
    assert {number for number, _ in two} == {"0", "1"} and len({loss for _, loss in two}) == 1
    assert {loss for _, loss in one} == {loss for _, loss in two}
