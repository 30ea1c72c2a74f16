"""What --async-save writes is copied to shared memory while training goes on."""

import queue
from argparse import Namespace

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_cream.checkpoint import staging
from megatron_cream.config import values
from megatron_cream.patches import registry

TENSORS = {
    "float32": torch.arange(6.0).view(2, 3),
    "bf16, a view": torch.arange(12).to(torch.bfloat16)[3:8],
    "in another order": torch.arange(6.0).view(2, 3).T,
    "one value": torch.tensor(7),
    "empty": torch.empty(0, 3),
}


class Event:
    """Stands in for the event behind the copies from a GPU."""

    is_recorded = is_ready = False

    def query(self) -> bool:
        return self.is_ready

    def synchronize(self) -> None:
        self.is_ready = True


@pytest.fixture
def sent(monkeypatch):
    """Requests that the writer got, of a process without installed patches."""
    monkeypatch.setattr(staging, "_memory", None)
    monkeypatch.setattr(staging, "_handover", None)
    monkeypatch.setattr(staging, "_in_background", True)
    monkeypatch.setattr(staging, "_reserves_in_first_step", False)
    monkeypatch.setattr(registry, "install", lambda *_: None)
    staging.install(in_background=True, in_first_step=False)
    requests = []
    yield requests
    assert staging._handover is None


@pytest.fixture
def event(monkeypatch):
    """The event behind the copies; the tensors pass for those of a GPU until they are copied."""
    event, copy, reserve, has = Event(), staging._copy, staging._reserve, staging._has_gpu_tensors

    def copy_from_host(*args):
        with monkeypatch.context() as patches:
            patches.setattr(staging, "_has_gpu_tensors", has)
            copy(*args)
        event.is_recorded = True
        return event

    monkeypatch.setattr(staging, "_copy", copy_from_host)
    monkeypatch.setattr(staging, "_reserve", lambda size, pinned: reserve(size, pinned=False))
    monkeypatch.setattr(staging, "_has_gpu_tensors", lambda tensors: True)
    return event


def stage(sent: list, tensors: dict[str, torch.Tensor], alive: bool = True) -> Namespace:
    """Stage the tensors for a writer, and return Megatron's caller of it."""
    written: list[list] = []
    request = AsyncRequest(
        async_fn=lambda rank, buckets, results: results.append(buckets),
        async_fn_args=[
            0,
            [("path/__0_0.distcp", "__0_0.distcp", ([("item", "bytes")], list(tensors.items())))],
            written,
        ],
        finalize_fns=[],
        preload_fn=lambda: None,
    )
    caller = Namespace(process=Namespace(is_alive=lambda: alive))
    staging._stage(lambda self, request: sent.append(request), caller, request)
    return caller


def read(request: AsyncRequest) -> dict[str, torch.Tensor]:
    """Return the tensors that a writer writes."""
    assert request.preload_fn is None
    request.async_fn(*request.async_fn_args)
    ((path, name, (objects, tensors)),) = request.async_fn_args[2].pop()
    assert (path, name, objects) == ("path/__0_0.distcp", "__0_0.distcp", [("item", "bytes")])
    return dict(tensors)


def test_the_writer_gets_the_values_of_the_time_of_the_save(sent):
    for factor in (1, 2, 3):  # the memory is used again
        tensors = {name: tensor * factor for name, tensor in TENSORS.items()}
        stage(sent, tensors)
        for tensor in tensors.values():
            tensor.zero_()
        found = read(sent.pop())
        assert found.keys() == TENSORS.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, TENSORS[name] * factor) and tensor.dtype == TENSORS[name].dtype
            # torch saves the whole storage of a tensor.
            assert tensor.untyped_storage().size() == tensor.numel() * tensor.itemsize
    assert staging.has_memory()


def test_a_step_waits_for_the_copies(sent, event):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    stage(sent, TENSORS)
    assert not event.is_recorded  # Megatron's timers would wait for the copies
    seen = staging._begin_step(lambda value: (value, event.is_recorded, event.is_ready), "a step")
    assert seen == ("a step", True, False)
    weight.grad = torch.ones(2)  # forward and backward pass
    assert not sent and not event.is_ready
    optimizer.step()
    assert event.is_ready and read(sent.pop()).keys() == TENSORS.keys()
    optimizer.step()
    assert not sent


@pytest.mark.parametrize(
    "blocking, ready, alive, expected",
    [(False, False, True, 0), (True, False, True, 1), (False, True, True, 1), (False, False, False, 1)],
)
def test_what_is_waited_for_is_sent_first(sent, event, blocking, ready, alive, expected):
    """A check of the writer without waiting sends a save only when it is copied, or if the writer was killed."""
    caller = stage(sent, TENSORS, alive)
    if ready:
        staging._begin_step(lambda: None)
    event.is_ready = ready
    seen = staging._send_before_waiting(lambda *_: len(sent), caller, blocking)
    assert seen == expected
    staging._send()
    assert len(sent) == 1


def test_a_graph_of_the_step_cannot_wait(sent, event):
    staging.install(in_background=False, in_first_step=False)
    stage(sent, TENSORS)
    assert event.is_ready and len(sent) == 1


def test_another_request_does_not_overtake_a_save(sent, event):
    stage(sent, TENSORS)
    other = AsyncRequest(print, (), [])
    staging._stage(lambda self, request: sent.append(request), Namespace(), other)
    assert len(sent) == 2 and sent[1] is other


@pytest.mark.parametrize("said_free", [100, 1 << 60])
def test_too_little_shared_memory_leaves_the_copies_to_the_writer(sent, monkeypatch, capsys, said_free):
    """Whether the system says so before, or another process takes the memory meanwhile."""

    def fail(size):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Namespace(free=said_free))
    monkeypatch.setattr(staging, "_count_host_bytes", lambda tensors: 0)  # as if on a GPU
    monkeypatch.setattr(staging.torch.UntypedStorage, "_new_shared", fail)
    stage(sent, TENSORS)
    assert sent[0].preload_fn and sent[0].async_fn_args[1][0][2][1] == list(TENSORS.items())
    assert "warning: --async-save: " in capsys.readouterr().err


def test_tensors_of_the_host_are_written_here_if_shared_memory_is_too_small(sent, monkeypatch):
    """The writer could not get them: torch's queue would drop the save, and the rank wait for ever."""
    done = queue.Queue()
    monkeypatch.setattr(staging.PersistentAsyncCaller, "_persistent_comp_q", done)
    monkeypatch.setattr(staging, "_reserve", lambda size, pinned: None)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Namespace(free=100))
    written = []
    request = AsyncRequest(
        async_fn=lambda rank, tensors, results: written.append((rank, tensors)),
        async_fn_args=[0, [("path", "name", ([], list(TENSORS.items())))], []],
        finalize_fns=[],
        preload_fn=lambda: "loaded",
        call_idx=7,
    )
    staging._stage(lambda self, request: sent.append(request), Namespace(process=Namespace()), request)
    assert written == [(0, "loaded")] and done.get_nowait() == 7 and not sent


@pytest.mark.parametrize(
    "at_start, room, expected", [(4, 4, True), (3.9, 3.9, False), (4, 1, True), (4, 0.9, False), (3.9, 1, False)]
)
def test_the_last_of_four_ranks_needs_no_room_for_those_before_it(sent, monkeypatch, at_start, room, expected):
    """There was room for `at_start` of them when the run began, and there is for `room` now."""
    size = 1 << 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(staging, "_free_at_start", int(at_start * size))
    monkeypatch.setattr(staging, "_find_free", lambda: int(room * size))
    assert (staging._reserve(size, pinned=False) is not None) is expected


class OnGpu:
    """Stands in for a weight on a GPU."""

    is_cuda = True

    def numel(self) -> int:
        return 1000


@pytest.mark.parametrize("asked, expected", [(True, 1), (False, 0)])
def test_memory_is_reserved_in_the_first_step_if_asked(sent, monkeypatch, asked, expected):
    """For all that the rank will save, so that the first save waits for no memory."""
    reserved = []
    monkeypatch.setattr(staging, "_reserve", lambda size, pinned: reserved.append((size, pinned)))
    staging.install(in_background=True, in_first_step=asked)
    for _ in range(2):
        staging._before_step(Namespace(param_groups=[{"params": [OnGpu()]}, {"params": [OnGpu(), OnGpu()]}]))
    assert len(reserved) == expected
    for size, pinned in reserved:
        assert pinned and 3000 * 14 < size < 3000 * 17


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"async_save": False}, False),  # no save of the run uses the memory
        ({"use_distributed_optimizer": False}, False),  # each rank has all state, and saves its share
        ({"no_save_optim": True}, False),
        ({"optimizer_cpu_offload": True}, False),  # the state is not allocated yet
        ({"optimizer_cuda_graph": True}, False),  # a capture must not register memory
    ],
)
def test_memory_is_reserved_early_only_for_runs_whose_saves_use_it(changes, expected):
    run = dict(
        async_save=True,
        use_distributed_optimizer=True,
        no_save_optim=None,
        optimizer_cpu_offload=False,
        optimizer_cuda_graph=False,
    )
    assert values.is_async_save_size_known(Namespace(**run | changes)) is expected


def test_no_memory_is_reserved_for_weights_on_the_host(sent, monkeypatch):
    monkeypatch.setattr(staging, "_reserve", None)
    staging.install(in_background=True, in_first_step=True)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    torch.optim.SGD([weight], lr=1.0).step()
    assert not staging.has_memory()
