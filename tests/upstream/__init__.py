"""Reproductions of faults in unpatched Megatron, torch and tensorboard.

Each test states the right behaviour and is expected to fail. When a release fixes the fault, CI fails: then delete the
test, and the patch that `PATCHES` names for it. docs/upstream.md reports the faults.
"""

from typing import NamedTuple

import pytest


class Patch(NamedTuple):
    """The name that a patch replaces or works around, and the tests that fail without the patch."""

    target: str
    tests: tuple[str, ...]


PATCHES = {
    "state-before-loading": Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        ("test_distributed_optimizer.py::test_a_new_optimizer_says_what_it_loads",),
    ),
    "step-is-no-tensor": Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        (
            "test_distributed_optimizer.py::test_torch_adam_loads_what_it_saved",
            "test_distributed_optimizer.py::test_torch_adam_loads_its_count_of_steps",
        ),
    ),
    "own-steps": Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        ("test_distributed_optimizer.py::test_a_step_after_loading_counts_once",),
    ),
    "load-without-autograd": Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        ("test_distributed_optimizer.py::test_float32_weights_load_as_they_lie_on_the_ranks",),
    ),
    "half-optimizer-shards": Patch(
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.sharded_state_dict",
        ("test_distributed_optimizer.py::test_the_plain_optimizer_finds_the_weights_of_the_distributed",),
    ),
    "half-optimizer-state": Patch(
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.load_state_dict",
        ("test_distributed_optimizer.py::test_the_plain_optimizer_finds_the_weights_of_the_distributed",),
    ),
    "float32-optimizer-state": Patch(
        "megatron.core.optimizer.optimizer:FP32Optimizer.load_state_dict",
        ("test_distributed_optimizer.py::test_the_plain_float32_optimizer_loads_what_the_distributed_saved",),
    ),
    "load-checkpoint": Patch(
        "megatron.training.checkpointing:_load_base_checkpoint",
        ("test_distributed_optimizer.py::test_an_optimizer_loads_at_another_learning_rate",),
    ),
    "load-schedule": Patch(
        "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
        ("test_schedule.py::test_a_loaded_schedule_sets_the_weight_decay",),
    ),
    "tracker": Patch(
        "megatron.training.checkpointing:maybe_msc",
        ("test_checkpoints.py::test_a_save_that_is_killed_leaves_the_checkpoint_before",),
    ),
    "save-shards": Patch(
        "megatron.core.dist_checkpointing:save",
        (
            "test_checkpoints.py::test_all_ranks_fail_when_metadata_cannot_be_written",
            "test_checkpoints.py::test_all_ranks_fail_when_the_configuration_cannot_be_written",
        ),
    ),
    "save-config": Patch(
        "megatron.core.dist_checkpointing.serialization:save_config",
        ("test_checkpoints.py::test_all_ranks_fail_when_the_configuration_cannot_be_written",),
    ),
    "write-metadata": Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.finish",
        ("test_checkpoints.py::test_all_ranks_fail_when_metadata_cannot_be_written",),
    ),
    "write-shards": Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.get_save_function_and_args",
        (
            "test_checkpoints.py::test_a_writer_says_why_it_failed",
            "test_checkpoints.py::test_a_failing_writer_thread_reports_back",
        ),
    ),
    "results-queue": Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        (
            "test_checkpoints.py::test_a_save_without_async_save_starts_no_process",
            "test_signals.py::test_answers_of_the_writers_arrive_after_a_signal",
        ),
    ),
    "writer-process": Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller._get_process",
        (
            "test_signals.py::test_the_writer_writes_after_a_signal",
            "test_signals.py::test_handing_over_tensors_ends_when_the_writer_was_killed",
        ),
    ),
    "writer-loop": Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.async_loop",
        ("test_signals.py::test_the_writer_ends_with_its_rank",),
    ),
    "writer-is-done": Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.is_current_async_call_done",
        ("test_signals.py::test_a_save_ends_when_its_writer_was_killed",),
    ),
    "call-writer": Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.schedule_async_call",
        ("test_signals.py::test_the_save_after_that_gets_another_writer",),
    ),
    "read-metadata": Patch(
        "torch.distributed.checkpoint:FileSystemReader.read_metadata",
        ("test_checkpoints.py::test_reading_metadata_runs_nothing",),
    ),
    "load-bytes": Patch(
        "torch.distributed.checkpoint:DefaultLoadPlanner.load_bytes",
        ("test_checkpoints.py::test_reading_bytes_runs_nothing",),
    ),
    "blend-cache": Patch(
        "megatron.core.datasets.blended_dataset:BlendedDataset._build_indices",
        ("test_datasets.py::test_an_index_truncated_by_a_full_disk_is_rebuilt",),
    ),
    "compile-helpers": Patch(
        "megatron.core.datasets.utils:compile_helpers",
        ("test_datasets.py::test_compiled_helpers_of_the_wheel_are_used",),
    ),
    "eos-id": Patch(
        "megatron.core.tokenizers.text.libraries.huggingface_tokenizer:HuggingFaceTokenizer.eos_id",
        ("test_tokenizers.py::test_a_tokenizer_without_eos_has_no_id_of_one",),
    ),
    "graphs-in-training": Patch(
        "megatron.core.transformer:TransformerLayer._should_call_local_cudagraph",
        ("test_cuda_graphs.py::test_a_layer_runs_without_graphs_in_an_evaluation",),
    ),
    "tensorboard-events": Patch(
        "tensorboard.summary.writer.record_writer:RecordWriter.write",
        ("test_tensorboard.py::test_events_after_a_full_disk_are_written",),
    ),
    "rendezvous": Patch(
        "megatron.training.initialize:_initialize_distributed",
        ("test_signals.py::test_a_rank_that_waits_for_the_others_ends_at_sigterm",),
    ),
    "lost-batch": Patch(
        "multiprocessing.queues:Queue._on_queue_feeder_error",
        ("test_signals.py::test_a_data_loader_fails_when_a_batch_cannot_be_sent",),
    ),
    "command-line": Patch(
        "megatron.training.ft_integration:arguments",
        ("test_training.py::test_a_program_may_have_a_command_line_of_its_own",),
    ),
    "single-rank-and": Patch(
        "megatron.training.training:logical_and_across_model_parallel_group",
        ("test_training.py::test_one_rank_alone_calls_no_collective",),
    ),
    "single-rank-max": Patch(
        "megatron.training.training:reduce_max_stat_across_model_parallel_group",
        ("test_training.py::test_one_rank_alone_calls_no_collective",),
    ),
}
"""By the patch's name: those that correct a fault."""

WORKAROUNDS = {
    "unpadded-buckets": Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable",
        (
            "test_distributed_optimizer.py::test_each_weight_is_saved_with_its_own_moments",
            "test_distributed_optimizer.py::test_the_script_of_the_report_passes",
        ),
    ),
    "evaluation-at-its-first-step": Patch(
        "megatron.training.training:get_train_valid_test_num_samples",
        ("test_schedule.py::test_validation_samples_suffice_for_the_evaluation_at_its_first_step",),
    ),
    "help-without-percent": Patch(
        "megatron.training.arguments:add_megatron_arguments",
        ("test_training.py::test_help_is_printed",),
    ),
}
"""Faults that this project's own code makes up for; no name is replaced."""

HOOKS = {
    "save-checkpoint": "a save that fails is a line, and training continues",
    "finalize-save": "the watchdog knows that a save is waited for",
    "schedule-save": "as `save-checkpoint`, with --async-save",
    "saved-args": "flags are saved as plain values",
    "save-args": "the best checkpoint has a folder of its own",
    "hash-shards": "checksums",
    "collect-checksums": "checksums",
    "write-bucket": "with `write-shards`: it remembers the errors of the writes",
    "open-shard": "with `write-shards`: it remembers the errors of the writes",
    "writer-results": "with `results-queue`: an answer of a rank whose process for results was killed",
    "forget-process": "with `call-writer`: the class forgets a writer that died",
    "forget-queue": "with `call-writer`: the class forgets a writer that died",
    "forget-preload-queue": "with `call-writer`: the class forgets a writer that died",
    "forget-results": "with `call-writer`: the class forgets a writer that died",
    "optimizer-slices": "each rank saves its part of the optimizer, which nothing gathers",
    "load-optimizer-slices": "as `optimizer-slices`, for loading",
    "stage-tensors": "training goes on while the tensors are copied from the GPU",
    "begin-step": "with `stage-tensors`: the copies run beside the next step",
    "send-before-waiting": "with `stage-tensors`: what is waited for must have been sent",
    "known-graphs": "a list of the graphs, which NCCL waits for when its groups are destroyed: this takes two GPUs to show",
    "rng-states": "a checkpoint is the same with CUDA graphs as without: this takes a GPU to show",
    "adam": "AdamW in one pass",
    "pytorch-adam": "AdamW in one pass",
    "apex-or-te-adam": "AdamW in one pass",
    "te-adam": "AdamW in one pass",
    "finalize-gradients": "AdamW in one pass",
    "gradient-norm": "AdamW in one pass",
    "clip-gradients": "AdamW in one pass",
    "optimizer-update": "AdamW in one pass",
    "optimizer-shards": "AdamW in one pass",
    "copy-weights": "AdamW in one pass",
    "check-norm": "--nan-policy",
    "parameter-groups": "--lora-plus-ratio",
    "skip-step": "--nan-policy",
    "training-log": "the line of each step",
    "end-of-step": "the evaluation at long contexts",
    "model-setup": "the evaluation at long contexts",
    "signal-handler": "SIGUSR1 too, and workers that load data",
    "signals-received": "which signal it was, for a message",
    "weight-gradient-kernels": "our kernel in the place of apex's",
    "weight-gradients-available": "our kernel in the place of apex's",
}
"""Patches without a test here: what each adds, or why its fault cannot be shown."""


def upstream_fault(patches: str, reason: str, raises: type[BaseException] = AssertionError) -> pytest.MarkDecorator:
    """Mark a test as expected to fail while upstream has the fault that the patches correct.

    Args:
        patches: names of the patches, separated by spaces.
        reason: description of the fault.
        raises: the expected exception; any other exception fails the test.
    """
    assert set(patches.split()) <= {*PATCHES, *WORKAROUNDS}
    return pytest.mark.xfail(strict=True, raises=raises, reason=f"{patches}: {reason}")
