"""Corrections to megatron-core 0.19, each with its reason. Delete what a newer release no longer needs."""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import weakref
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from multiprocessing.queues import JoinableQueue
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_cream.common import devices
from megatron_cream.common.files import replacing
from megatron_cream.common.processes import end_with_parent
from megatron_cream.data import blend_cache


def apply(args: Namespace) -> None:
    """Call before `pretrain`; again for another run in the same process."""
    _one_command_line(args)
    _alone_without_collectives()
    _tracker_replaced_at_once()
    wrap_method(BlendedDataset, "_build_indices", blend_cache.whole_or_none)
    _checkpoint_helpers_outlive_signals()
    _tokenizers_without_eos()
    _cuda_graphs_of_layers()
    if devices.has_cuda():
        _weight_gradients_without_apex()
    _distributed_optimizer_resumes_with_torch_adam()
    _distributed_optimizer_saves_padded_buckets()
    _distributed_optimizer_loads_float32_weights()


def _one_command_line(args: Namespace) -> None:
    """`pretrain` parses sys.argv once more for its fault tolerance, with a parser that knows no recipe."""
    from megatron.training import ft_integration

    ft_integration.arguments = SimpleNamespace(parse_args=lambda **_: args)


def _tracker_replaced_at_once() -> None:
    """Megatron empties the file that names the newest checkpoint, then writes it: a kill in between loses them all."""
    from megatron.training import checkpointing

    files = checkpointing.maybe_msc
    if not isinstance(files, _TrackerAtOnce):
        checkpointing.maybe_msc = _TrackerAtOnce(files)


def _tokenizers_without_eos() -> None:
    """Make `eos_id` None where a Hugging Face tokenizer has no EOS, as `bos_id` and `eod` are.

    megatron-core 0.19 asks for the id of the token None, a TypeError, whenever it builds a data set.
    """
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    HuggingFaceTokenizer.eos_id = property(lambda self: self.eod)


def _checkpoint_helpers_outlive_signals() -> None:
    """Keep checkpoint helper processes alive through a cluster's signals, and end them with their rank.

    By itself the writer of --async-save dies of SIGTERM and SIGUSR1, so that the checkpoint that the signal asks for
    cannot be written (Slurm signals every process of a step). And it outlives a rank that is killed, with 0.7 GB, its
    fork server and a resource tracker, for ever. A fork server stands between it and the rank, so that the system
    cannot tell it of the rank's end: here the rank starts it without one.

    Where a rank writes by itself, without --async-save, Megatron started a process too at the first save, only to hand
    it a list and take it back: there a queue of its own does.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from torch.distributed.checkpoint.api import _wrap_exception

    def results_queue(mp_mode: str | None = None):
        """With `mp_mode` when the process that writes is made, without by every save."""
        found = filesystem_async._results_queue
        if found is None and mp_mode is None:
            return queue.Queue()
        if found is None or not found._manager._process.is_alive():  # the next save gets another
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode or "fork"))
            with _born_deaf():
                manager.start(end_with_parent, (signal.SIGKILL, os.getpid()))
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    def writer(original, rank: int, _mp_mode: str = "spawn", *args, **kwargs):
        PersistentAsyncCaller.async_loop = functools.partial(_write_for_the_rank, os.getpid())
        with _born_deaf():
            process = original(rank, "spawn", *args, **kwargs)
        process._popen.terminate = process._popen.kill  # as a failing rank ends it, on its own way out
        _join_while_alive(process, PersistentAsyncCaller._persistent_queue, PersistentAsyncCaller._persistent_preload_q)
        return process

    def results(original, self):
        """Raise nothing, as the other ranks are in a collective already; an error is an answer."""
        try:
            return original(self)
        except (OSError, EOFError):
            return _wrap_exception(RuntimeError("the process that keeps the results of --async-save was killed"))

    filesystem_async.get_write_results_queue = results_queue
    wrap_method(filesystem_async.FileSystemWriterAsync, "retrieve_write_results", results)
    wrap_method(PersistentAsyncCaller, "_get_process", writer)


def _join_while_alive(process: multiprocessing.Process, *queues: JoinableQueue) -> None:
    """Let the `join` of queues that `process` reads end with that process too.

    megatron-core 0.19 waits for the writer of --async-save in them: until it has taken the tensors, and at the end of
    a run. A writer that was killed never answers, and Python's own exit would wait until it has read what it was sent.
    """

    def join(tasks: JoinableQueue) -> None:
        # Without the queue's lock, which the killed process may have held.
        while process.is_alive() and not tasks._unfinished_tasks._semlock._is_zero():
            multiprocessing.connection.wait([process.sentinel], timeout=0.001)

    for tasks in queues:
        tasks.join = functools.partial(join, tasks)
        tasks.cancel_join_thread()


@contextlib.contextmanager
def _born_deaf() -> Iterator[None]:
    """What is started in the block never hears of a cluster's signals; here they wait for its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()  # deaf to SIGTERM by itself, which its start lets through again here
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # Ctrl-C, from a terminal
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_for_the_rank(rank_pid: int, *args) -> None:
    """What the writer of --async-save runs, in its own process."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with_parent(parent=rank_pid)
    try:
        PersistentAsyncCaller.async_loop(*args)
    except (OSError, EOFError):  # the process that keeps its results was killed; what a disk says is one of those
        os._exit(1)


def checkpoints_run_no_code() -> None:
    """torch's reader of distributed checkpoints unpickles the metadata, and each entry of bytes, whatever they name.

    `loading` looks at a checkpoint when a run starts; this holds whenever one is read.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint._nested_dict import set_element
    from torch.distributed.checkpoint.metadata import StorageMeta

    from megatron_cream.common.safe_pickle import declare_names_of_other_versions, load_metadata, refuse_code

    declare_names_of_other_versions()

    def read_metadata(original, self, *args, **kwargs):
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = load_metadata(file.read())
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(original, self, read_item, value):
        refuse_code(value)
        value.seek(0)
        plain, key = torch.load(value, weights_only=True), read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], plain)
        else:
            self.state_dict[key] = plain

    wrap_method(FileSystemReader, "read_metadata", read_metadata)
    wrap_method(DefaultLoadPlanner, "load_bytes", load_bytes)


def tensorboard_outlives_a_full_disk() -> None:
    """A line of events that cannot be written ends its writer's thread, and the next one the training.

    It is left out here, and said once; what a disk took of it is taken back, as no reader goes past half a line.
    """
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(original, self, data):
        path = Path(os.fsdecode(self._writer.filename))
        size = path.stat().st_size if path.exists() else 0
        try:
            original(self, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            if not getattr(self, "_events_are_missing", False):
                self._events_are_missing = True
                print(f"warning: {path}: events are missing: {error.strerror or error}", file=sys.stderr, flush=True)

    wrap_method(RecordWriter, "write", write)


_graphs_of_layers = weakref.WeakSet()


def _cuda_graphs_of_layers() -> None:
    """Megatron's own (--cuda-graph-impl local) have the training's shapes, and would be replayed in evaluations too,
    which have others: an assertion fails. And it keeps them for good, in no list (`end_cuda_graphs`)."""
    from megatron.core.transformer import TransformerLayer
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    def in_training(original, self, *args, **kwargs):
        return self.training and original(self, *args, **kwargs)

    def known(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        _graphs_of_layers.add(self)

    wrap_method(TransformerLayer, "_should_call_local_cudagraph", in_training)
    wrap_method(_CudaGraphRunner, "__init__", known)


def end_cuda_graphs() -> None:
    """Call before process groups are destroyed: NCCL waits until no graph holds its collectives, which with tensor
    parallelism every layer's do; the ranks of a finished run would never end."""
    for runner in _graphs_of_layers:
        for graph in (runner.fwd_graph, runner.bwd_graph):
            if graph is not None:
                graph.reset()


class _TrackerAtOnce:
    """Megatron's file functions, but that a tracker opened for writing takes its place when it is whole."""

    def __init__(self, files):
        self._files = files

    def __getattr__(self, name: str):
        return getattr(self._files, name)

    def open(self, path, mode: str = "r", *args, **kwargs):
        if mode == "w" and Path(path).name == "latest_checkpointed_iteration.txt" and Path(path).parent.is_dir():
            return replacing(Path(path))
        return self._files.open(path, mode, *args, **kwargs)


def _weight_gradients_without_apex() -> None:
    """Megatron's linear layers add weight gradients to float32 in the GEMM only with an extension of apex's."""
    from megatron.core.tensor_parallel import layers

    from megatron_cream.model.kernels import weight_gradient

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = weight_gradient
        layers._grad_accum_fusion_available = True


def _alone_without_collectives() -> None:
    """At the end of each step the trainer asks the model-parallel ranks for two numbers; one rank waits for itself."""
    from megatron.training import training

    def alone(original, value, group=None):
        if group is None or group.size() > 1:
            return original(value, group=group)
        return value.item() if isinstance(value, torch.Tensor) else value

    for name in ("logical_and_across_model_parallel_group", "reduce_max_stat_across_model_parallel_group"):
        wrap_method(training, name, alone)


def _distributed_optimizer_resumes_with_torch_adam() -> None:
    """Resuming with the distributed optimizer and torch's Adam (no Transformer Engine, no apex).

    Their Adam counts steps once for a parameter group; torch's keeps a `step` in the state of
    each parameter, and four places of the loading path do not reckon with that:
    the count is asked for before there is one (an assertion fails); the tensors to set are
    looked up by every key of the state, `step` among them, which a checkpoint does not hold
    (KeyError); and all parameters are given one and the same tensor as their count, so
    that each later step would count once for every parameter. Where the state was saved with
    --no-dist-ckpt-optim-fully-reshardable, a count does stand among the tensors: the new state's
    own, 1, which would silently take the saved one's place.
    """
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    def state_first(original, self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    def step_apart(original, self, model_param, tensors):
        return original(self, model_param, {**tensors, "step": None})

    def a_step_each(original, self, state_dict):
        original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    wrap_method(cls, "sharded_state_dict", state_first)
    wrap_method(cls, "_set_main_param_and_optimizer_states", step_apart)
    wrap_method(cls, "load_state_dict", a_step_each)


def _distributed_optimizer_loads_float32_weights() -> None:
    """Resume from an optimizer that was saved with --no-dist-ckpt-optim-fully-reshardable in float32.

    The weights that it holds are then views of the model's own parameters. Megatron's two other formats are loaded
    without autograd; this one is not (0.19.2), and torch refuses to write into a parameter that has a gradient.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def without_autograd(original, self, *args, **kwargs):
        with torch.no_grad():
            return original(self, *args, **kwargs)

    wrap_method(DistributedOptimizer, "load_parameter_state_from_dp_reshardable", without_autograd)


def _distributed_optimizer_saves_padded_buckets() -> None:
    """A fully reshardable checkpoint of several buckets, as overlap makes them, holds the wrong optimizer state.

    What the ranks have is joined without the padding at each bucket's end, and then cut at places that count it: every
    parameter behind a padded bucket gets its neighbours' moments and master weights.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def places_without_padding(buffer) -> dict:
        begins, total = [], 0
        for bucket in buffer.buckets:
            begins.append(total - bucket.offset)
            total += bucket.numel_unpadded
        return {
            param: (start + begins[bucket], end + begins[bucket], bucket)
            for param, (start, end, bucket) in buffer.param_index_map.items()
        }

    def joined(original, self, *args, **kwargs):
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = places_without_padding(buffer)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    wrap_method(DistributedOptimizer, "sharded_param_state_fully_reshardable", joined)


def wrap_method(cls, name: str, wrapper) -> None:
    """Replace method `name` of a class, or function of a module, by `wrapper`, which is given the original first.

    Once: a second call with the same wrapper changes nothing.
    """
    original, mark = getattr(cls, name), (wrapper.__module__, wrapper.__qualname__)
    if mark in getattr(original, "_replaced", ()):
        return

    @functools.wraps(original)
    def method(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    method._replaced = (*getattr(original, "_replaced", ()), mark)
    setattr(cls, name, method)
