"""What --async-save writes is copied to shared memory while training goes on."""

from argparse import Namespace

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_cream.checkpoint import staging
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

    is_ready = False

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
    monkeypatch.setattr(staging, "_is_prepared", False)
    monkeypatch.setattr(registry, "install", lambda *_: None)
    staging.install(in_background=True, reserve=True)
    requests = []
    yield requests
    assert staging._handover is None


@pytest.fixture
def event(monkeypatch):
    event, copy = Event(), staging._copy
    monkeypatch.setattr(staging, "_copy", lambda *args: (copy(*args)[0], event))
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
    event.is_ready = ready
    seen = staging._send_before_waiting(lambda *_: len(sent), caller, blocking)
    assert seen == expected
    staging._send()
    assert len(sent) == 1


def test_a_graph_of_the_step_cannot_wait(sent, event):
    staging.install(in_background=False, reserve=True)
    stage(sent, TENSORS)
    assert event.is_ready and len(sent) == 1


def test_another_request_does_not_overtake_a_save(sent, event):
    stage(sent, TENSORS)
    other = AsyncRequest(print, (), [])
    staging._stage(lambda self, request: sent.append(request), Namespace(), other)
    assert len(sent) == 2 and sent[1] is other


def test_too_little_shared_memory_leaves_the_copies_to_the_writer(sent, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Namespace(free=100))
    stage(sent, TENSORS)
    assert sent[0].preload_fn and sent[0].async_fn_args[1][0][2][1] == list(TENSORS.items())


@pytest.mark.parametrize("optimizer, least", [(True, 14), (False, 2)])
def test_memory_is_reserved_in_the_first_step(sent, monkeypatch, optimizer, least):
    """On a GPU, for all that the rank will save, so that the first save waits for no memory."""
    staging.install(in_background=True, reserve=True, optimizer=optimizer)
    started = []
    monkeypatch.setattr(staging.PersistentAsyncCaller, "_get_process", started.append)
    monkeypatch.setattr(staging.torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(staging, "_reserve", lambda size, pinned: started.append((size, pinned)))
    weights = [Namespace(is_cuda=True, numel=lambda: 1000), Namespace(is_cuda=True, numel=lambda: 2000)]
    optimizer = Namespace(param_groups=[{"params": weights[:1]}, {"params": weights[1:]}])
    for _ in range(2):
        staging._before_step(optimizer)
    (size, pinned), rank = started
    assert pinned and rank == 3 and 3000 * least < size < 3000 * (least + 3)


def test_no_memory_is_reserved_for_weights_on_the_host(sent, monkeypatch):
    monkeypatch.setattr(staging, "_reserve", None)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    torch.optim.SGD([weight], lr=1.0).step()
    assert not staging.has_memory()


def test_no_memory_is_reserved_without_asynchronous_saves(sent, monkeypatch):
    monkeypatch.setattr(staging, "_prepare", None)
    staging.install(in_background=True, reserve=False)
    staging._before_step(Namespace(param_groups=[{"params": [Namespace(is_cuda=True, numel=lambda: 1000)]}]))
