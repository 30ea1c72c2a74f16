"""Megatron's warnings: those about the flags of a run are printed, the others are not."""

from tests.launch import TINY, torchrun, write_documents


def test_a_flag_that_megatron_turns_off_is_named(tmp_path):
    data = write_documents(tmp_path / "data", documents=20)
    flags = [*TINY, "--fp32", "--data-path", data, "--split", "8,2,0", "--train-iters", 1, "--sequence-parallel"]
    ended = torchrun(1, *flags, "--use-distributed-optimizer", "--save", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "warning" in line.lower()]
    assert lines == ["warning: Disabling sequence parallelism because tensor model parallelism is disabled"]
