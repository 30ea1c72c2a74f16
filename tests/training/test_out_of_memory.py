"""Tests of the line that ends a run without enough memory, and of its advice."""

import errno
import re
import resource
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch._utils import ExceptionWrapper

from megatron_cream.common.errors import is_out_of_memory
from megatron_cream.training import out_of_memory
from megatron_cream.training.out_of_memory import Memory, Place
from tests import forked_commands
from tests.launch import ROOT, write_documents

# Of a run on four H100s, as torch wrote it.
MESSAGE = (
    "CUDA out of memory. Tried to allocate 128.00 MiB. GPU 1 has a total capacity of 79.18 GiB of which 43.00 MiB is "
    "free. Including non-PyTorch memory, this process has 79.13 GiB memory in use. Of the allocated memory 70.52 GiB is "
    "allocated by PyTorch, and 2.90 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
)
HOST += "51539607552 bytes. Error code 12 (Cannot allocate memory)"
NUMPY = "Unable to allocate 977. MiB for an array with shape (1024000000,) and data type uint8"
FLAGS = (
    "--num-layers 2 --ffn-hidden-size 88 --num-attention-heads 4 --seq-length 96 --target-length 384 --lr 1e-3 --fp32 "
    "--rope-scaling-type linear --tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --train-iters 1"
).split()


def line(message: str = MESSAGE, place: str = "activations", has_gpu: bool = True, **changes) -> str:
    given = dict(micro_batch_size=1, recompute_granularity=None, world_size=4, optimizer_cpu_offload=False)
    given |= dict(global_batch_size=96, data_parallel_size=4, num_workers=0)
    memory = out_of_memory.read_message(message)
    where = Place("in step 2", place)
    return out_of_memory.format_line(3, message, memory, Namespace(**given | changes), where, has_gpu=has_gpu)


def test_the_line_says_what_holds_the_memory():
    assert line(micro_batch_size=6).startswith(
        "error: rank 3: out of memory in step 2 on GPU 1: of 79.2 GiB torch has 70.5 in tensors and 2.9 in unused "
        "pieces; 5.7 are outside torch (CUDA, NCCL, user buffers). Use --micro-batch-size 3 instead of 6; "
    )


@pytest.mark.parametrize(
    "advice, changes",
    [
        ("Use --micro-batch-size 1 instead of 2; ", dict(micro_batch_size=2)),
        ("Use --micro-batch-size 1 instead of 7; ", dict(micro_batch_size=7, recompute_granularity="full")),
        ("Add --recompute-granularity selective --recompute-modules mlp; ", {}),
        ("Use more GPUs or another layout: ", dict(recompute_granularity="full")),
        ("Use more GPUs or another layout: ", dict(micro_batch_size=2, place="state")),
        ("Evaluate at smaller lengths, or use more GPUs; ", dict(micro_batch_size=2, place="lengths")),
    ],
)
def test_the_advice_follows_the_flags(advice, changes):
    said = line(**changes)
    assert f". {advice}" in said and "\n" not in said
    assert re.search(
        r"plan(\.py)? --gpus 4 --gpu-memory 80 with the flags of this run lists the layouts that fit", said
    )


def test_messages_of_other_allocations():
    """CUDA graphs' own memory, other processes, containers that hide them, and memory of the host."""
    graphs = MESSAGE.replace("by PyTorch, and", "by PyTorch, with 3.00 GiB allocated in private pools, and")
    assert out_of_memory.read_message(graphs) == out_of_memory.read_message(MESSAGE)
    hidden = out_of_memory.read_message(re.sub("Including non.*?in use. ", "", MESSAGE))
    assert hidden and hidden.others == 0 and round(hidden.outside / 2**30, 1) == 5.7
    shared = MESSAGE.replace("this process has 79.13", "this process has 75.13")
    assert "1.7 are outside torch (CUDA, NCCL, user buffers), and other processes 4.0. Use" in line(
        shared, micro_batch_size=2
    )
    capped = out_of_memory.read_message(MESSAGE.replace("in use. Of", "in use. 74.00 GiB allowed; Of"))
    assert capped and capped.total == 74 * 2**30 and round(capped.outside / 2**30, 1) == 5.7
    assert out_of_memory.read_message(HOST) is None
    with_gpu = line(HOST, optimizer_cpu_offload=True)
    assert "out of memory in step 2 on the host: it could not give 48.0 GiB at once. Give the job more of" in with_gpu
    assert with_gpu.endswith("or start fewer ranks on this host, or leave --optimizer-cpu-offload out")
    assert "could not give 48.0 GiB at once. Use --micro-batch-size 1" in line(HOST, has_gpu=False, micro_batch_size=2)
    assert "could not give 1.0 GiB at once. Give the job" in line(NUMPY)
    no_args = out_of_memory.format_line(0, "", Memory(0, 2**36, 0, 0, 0), None, Place(), has_gpu=True)
    assert no_args.endswith("or says how many GPUs are enough")


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError(MESSAGE), True),
        (RuntimeError(HOST), True),
        (MemoryError(NUMPY), True),
        (torch.distributed.DistBackendError("NCCL error ... Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("NCCL error. Last error: Call to ibv_reg_mr failed with error Cannot allocate memory"), False),
    ],
)
def test_which_errors_are_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"


def describe(error: Exception, monkeypatch, *frames: tuple[str, str], **changes) -> str:
    """Return the line of a rank with a GPU for an error that passes through `frames`, (file, function)."""
    given = dict(micro_batch_size=4, recompute_granularity=None, world_size=1, optimizer_cpu_offload=False)
    given |= dict(global_batch_size=96, data_parallel_size=1, num_workers=2, curr_iteration=0)
    monkeypatch.setattr("megatron.training.get_args", lambda: Namespace(**given | changes))
    monkeypatch.setattr(out_of_memory.devices, "has_cuda", lambda: True)
    monkeypatch.setattr(out_of_memory, "_read_gpu", lambda: Memory(0, 80 << 30, 10 << 30, 0, 0))

    def fail():
        raise error

    call = fail
    for file, function in frames:
        space = {"call": call}
        exec(compile(f"def {function}(): call()", file, "exec"), space)
        call = space[function]
    with pytest.raises(type(error)) as caught:
        call()
    return out_of_memory.describe(caught.value, 0)


STEP, DATA = ("training/training.py", "train_step"), ("training/training.py", "build_train_valid_test_data_iterators")


def test_an_error_without_figures_is_quoted(monkeypatch):
    """A reader can then see that the GPU was not full, as where cuBLAS reports another error so."""
    said = describe(RuntimeError(NCCL), monkeypatch, STEP)
    assert " in step 1 on GPU 0 (NCCL error in: NCCLUtils.cpp:94, unhandled cuda error Last error: Cuda" in said
    assert "'out of memory'): of 80.0 GiB torch has 10.0 in tensors" in said and ". Use --micro-batch-size 2" in said
    failed = out_of_memory.format_line(0, NCCL, None, None, Place(), has_gpu=True)
    assert failed.startswith("error: rank 0: out of memory (NCCL error in: ") and "the host" not in failed
    assert "(" not in line(HOST).replace("plan.py", "") and "(CUDA out" not in line()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError(NUMPY)])
@pytest.mark.parametrize(
    "frame, place", [(DATA, " while building the data on the host"), (("x.py", "f"), " on the host")]
)
def test_memory_of_the_host_for_the_data(monkeypatch, error, frame, place):
    """A smaller micro-batch does not help, without a GPU neither."""
    said = describe(error, monkeypatch, frame)
    assert place in said and said.endswith("Give the job more of the host's memory, or use fewer --num-workers than 2")
    monkeypatch.setattr(out_of_memory.devices, "has_cuda", lambda: False)
    where, given = out_of_memory.find_place(error, None), dict(world_size=2, num_workers=0, optimizer_cpu_offload=False)
    without = out_of_memory.format_line(0, str(error), None, Namespace(**given), where, has_gpu=False)
    assert without.endswith("Give the job more of the host's memory, or start fewer ranks on this host")


@pytest.mark.parametrize("cause", [RuntimeError(HOST), MemoryError()])
def test_a_data_loader_worker_without_memory(monkeypatch, cause):
    try:
        raise cause
    except type(cause):
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(type(cause)) as caught:
        wrapped.reraise()
    said = describe(caught.value, monkeypatch, STEP)
    assert (
        said.startswith("error: rank 0: out of memory in a data loader worker on the host") and "Traceback" not in said
    )
    assert said.endswith("or use fewer --num-workers than 2")


def test_the_advised_micro_batch_keeps_the_global_batch():
    """Without --global-batch-size it is that of one micro-batch of each rank."""
    said = line(micro_batch_size=4, global_batch_size=16)
    assert "Use --micro-batch-size 2 instead of 4; --global-batch-size 16 keeps the batch; " in said
    assert "--global-batch-size" not in line(micro_batch_size=4, global_batch_size=32)


def test_numpy_names_any_size():
    asked = "Unable to allocate 7.45 EiB for an array with shape (1073741824, 1000000000) and data type float64"
    assert "on the host: it could not give 8000000000.0 GiB" in line(asked.replace("7.45", "7.450580596923828"))


def test_the_frames_that_tell_the_place_exist():
    """Megatron's files and functions have these names; a run would otherwise not say where it was."""
    import megatron.core.optimizer.optimizer
    import megatron.training.checkpointing
    import megatron.training.initialize
    import megatron.training.training

    from megatron_cream.training import evaluations, watch

    sources = [megatron.core.optimizer, megatron.core.optimizer.optimizer, evaluations, watch]
    sources += [megatron.training.training, megatron.training.checkpointing, megatron.training.initialize]
    texts = {module.__file__: Path(module.__file__).read_text() for module in sources}
    for end, function, _, _ in out_of_memory._PLACES:
        assert any(file.endswith(end) and f"def {function}(" in text for file, text in texts.items()), (end, function)


def run(ranks: int, *flags, limit: int | None = None) -> subprocess.CompletedProcess:
    """Train in fresh processes without a GPU, each with at most `limit` bytes of memory."""

    def limit_memory():
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [*forked_commands.FRESH_TORCHRUN, f"--nproc_per_node={ranks}", ROOT / "pretrain_cream.py", *FLAGS, *flags]
    environment = forked_commands.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    words = [str(word) for word in command]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=600, preexec_fn=limit_memory, cwd=ROOT
    )


def lines_of(ended: subprocess.CompletedProcess, ranks: int) -> list[str]:
    """Return the lines of the ranks that failed, at most one each, and check that nothing else is said."""
    assert ended.returncode == 1, ended.stdout[-2000:] + ended.stderr[-5000:]
    lines = [line for line in ended.stderr.splitlines() if line.startswith("pretrain_cream.py: ")]
    assert ended.stderr.count("Traceback (most recent call last)") == 1, "torchrun's"
    assert "Traceback" not in ended.stdout and "can't allocate memory" not in ended.stderr
    who = [re.match(r"pretrain_cream.py: error: rank (\d+): out of memory ", line) for line in lines]
    assert who and all(who) and len({match[1] for match in who}) == len(who) <= ranks, lines
    return lines


def plan(said: str, *flags) -> subprocess.CompletedProcess:
    """Run the command of tools/plan.py that a line names, with the flags of the run."""
    script, gpus = re.search(r"python (\S+plan\.py) --gpus (\d+) with the flags of this run lists", said).groups()
    command = [*forked_commands.python(), script, "--gpus", gpus, *FLAGS, *flags]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_micro_batch_as_advised_trains(tmp_path, ranks):
    """The logits of the first micro-batch are larger than the limit; the advice is followed until the run trains."""
    size = ["--hidden-size", 32, "--vocab-size", 131071]
    flags = [*size, "--data-path", write_documents(tmp_path / "documents", documents=20), "--global-batch-size", 128]
    tried, micro_batch = [], 64
    while (ended := run(ranks, *flags, "--micro-batch-size", micro_batch, limit=25 * 10**8)).returncode:
        for said in lines_of(ended, ranks):
            advised = re.search(r" in step 1 on the host: .*\. Use --micro-batch-size (\d+) instead of (\d+); ", said)
            assert int(advised[2]) == micro_batch == 2 * int(advised[1])
        tried.append(micro_batch)
        planned = plan(said, *flags, "--micro-batch-size", micro_batch)
        micro_batch //= 2
    assert tried and "step 1/1 | loss" in ended.stdout and "out of memory" not in ended.stderr
    assert planned.returncode == 0 and "flags to add for each layout" in planned.stdout


def test_a_model_that_does_not_fit(tmp_path):
    """Its embedding is larger than any host's memory. A smaller micro-batch is not advised; the planner says why."""
    flags = ["--hidden-size", 16384, "--vocab-size", 67108863, "--micro-batch-size", 2, "--global-batch-size", 4]
    flags += ["--data-path", write_documents(tmp_path / "documents", documents=20)]
    said = lines_of(run(2, *flags), 2)[-1]
    assert " while building the model on the host: it could not give 4096.0 GiB at once. Use more GPUs or" in said
    planned = plan(said, *flags)
    assert planned.returncode == 1 and "no layout fits into" in planned.stderr and "GPUs are not" in planned.stderr
