"""What other packages of this project replace in Megatron and Python: places where Megatron offers no call-back.

Each package installs its own behaviour: `registry.install(hooks.SAVE_CHECKPOINT, _save)`.
"""

from megatron_cream.patches.registry import Patch

_TRAINING = "megatron.training.training:"
_CHECKPOINTING = "megatron.training.checkpointing:"
_OPTIMIZER = "megatron.core.optimizer.optimizer:"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:"
_SIGNALS = "megatron.training.dist_signal_handler:DistributedSignalHandler."
_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync."
_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller."

# Saving: checkpoint/saving.py

SAVE_CHECKPOINT = Patch(
    "save-checkpoint",
    _TRAINING + "save_checkpoint",
    "A rank that fails alone in a save leaves the others in a collective, and the run ends.",
    parameters="iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
    "checkpointing_context, pipeline_rank, expert_rank, tensor_rank, pipeline_parallel, expert_parallel, "
    "non_persistent_ckpt, train_data_iterator, preprocess_common_state_dict_fn, release, tp_group, pp_group, "
    "dp_cp_group, dp_group, expt_dp_group, rng_state_key_prefix",
)
FINALIZE_SAVE = Patch(
    "finalize-save",
    _TRAINING + "maybe_finalize_async_save",
    "The watchdog must know that a rank waits for a checkpoint.",
    parameters="blocking, terminate",
)
SCHEDULE_SAVE = Patch(
    "schedule-save",
    _CHECKPOINTING + "schedule_async_save",
    "An error at the end of an asynchronous save ends the run on one rank.",
    parameters="async_request",
)
SAVED_ARGS = Patch(
    "saved-args",
    _CHECKPOINTING + "generate_state_dict",
    "Megatron pickles the flags as objects of classes that another version may not have.",
    parameters="args, model, optimizer, opt_param_scheduler, rng_state, iteration, optim_sd_kwargs, model_sd_kwargs, "
    "rerun_state",
)
SAVE_SHARDS = Patch(
    "save-shards",
    "megatron.core.dist_checkpointing:save",
    "The tracker may name a step only when all ranks have written it.",
    parameters="sharded_state_dict, checkpoint_dir, sharded_strategy, validate_access_integrity, async_sharded_save, "
    "preprocess_common_before_consistancy_check, content_metadata, async_strategy, verify_integrity",
)
SAVE_CONFIG = Patch(
    "save-config",
    "megatron.core.dist_checkpointing.serialization:save_config",
    "The first rank writes metadata.json alone: if it fails, the others wait for it.",
    parameters="config, checkpoint_dir",
)
WRITE_METADATA = Patch(
    "write-metadata",
    _WRITER + "finish",
    "The first rank writes .metadata alone: if it fails, the others wait for it.",
    parameters="self, metadata, results",
    after=("collect-checksums",),
)
WRITE_SHARDS = Patch(
    "write-shards",
    _WRITER + "get_save_function_and_args",
    "Megatron reports the type of a failed write, without the reason.",
    parameters="self",
    after=("hash-shards",),
)
WRITE_BUCKET = Patch(
    "write-bucket",
    _WRITER + "write_preloaded_data",
    "The reason of a failed write is lost where a file is flushed.",
    parameters="transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs",
)
OPEN_SHARD = Patch(
    "open-shard",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:open",
    "An error inside torch's writer has crashed CPython 3.12.1: a shard's file keeps it instead.",
    parameters="file, mode, buffering, encoding, errors, newline, closefd, opener",
)
WRITER_IS_DONE = Patch(
    "writer-is-done",
    _CALLER + "is_current_async_call_done",
    "Megatron waits for ever for a checkpoint writer that was killed.",
    parameters="self, blocking, no_dist",
)
CALL_WRITER = Patch(
    "call-writer",
    _CALLER + "schedule_async_call",
    "Megatron gives the next save to a checkpoint writer that was killed.",
    parameters="self, async_req",
)

# Checksums: checkpoint/checksums.py

HASH_SHARDS = Patch(
    "hash-shards",
    _WRITER + "get_save_function_and_args",
    "The process that writes a shard hashes it, while it is in memory.",
    parameters="self",
)
COLLECT_CHECKSUMS = Patch(
    "collect-checksums",
    _WRITER + "finish",
    "The first rank writes the checksums of all ranks beside .metadata.",
    parameters="self, metadata, results",
)

# The best checkpoint: checkpoint/best.py

SAVE_ARGS = Patch(
    "save-args",
    _CHECKPOINTING + "get_args",
    "Megatron has one folder for checkpoints, and the best one goes to another.",
    parameters="",
)

# Resuming: checkpoint/schedule.py, checkpoint/optimizer_state.py

LOAD_CHECKPOINT = Patch(
    "load-checkpoint",
    _CHECKPOINTING + "_load_base_checkpoint",
    "Megatron finds saved parameter groups by their learning rates, and with others finds none.",
    parameters="load_dir, args, rank0, sharded_state_dict, checkpointing_context, dp_cp_group, expt_dp_group, "
    "gpt_compat_layer_maps",
)
LOAD_SCHEDULE = Patch(
    "load-schedule",
    "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
    "Megatron sets the learning rate before it has read all of the schedule.",
    parameters="self, state_dict",
)
HALF_OPTIMIZER_SHARDS = Patch(
    "half-optimizer-shards",
    _OPTIMIZER + "Float16OptimizerWithFloat16Params.sharded_state_dict",
    "Without the distributed optimizer, Megatron looks for master weights under another name.",
    parameters="self, model_sharded_state_dict, is_loading, metadata",
)
HALF_OPTIMIZER_STATE = Patch(
    "half-optimizer-state",
    _OPTIMIZER + "Float16OptimizerWithFloat16Params.load_state_dict",
    "The distributed optimizer counts steps in the parameter groups, torch's AdamW with each parameter.",
    parameters="self, state_dict",
)
FLOAT32_OPTIMIZER_STATE = Patch(
    "float32-optimizer-state",
    _OPTIMIZER + "FP32Optimizer.load_state_dict",
    "The distributed optimizer saves the parameter groups one level further in.",
    parameters="self, state_dict",
)

# The optimizer step: optimizer/one_pass.py, optimizer/finite.py

ADAM = Patch(
    "adam",
    "megatron.core.optimizer:Adam",
    "Megatron chooses its AdamW by what it can import, and offers no other choice.",
    value_type="type | ABCMeta",
)
PYTORCH_ADAM = Patch(
    "pytorch-adam",
    "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
    "Megatron builds torch's AdamW with other arguments than Transformer Engine's.",
    value_type="bool",
)
APEX_OR_TE_ADAM = Patch(
    "apex-or-te-adam",
    _DISTRIBUTED_OPTIMIZER + "HAVE_APEX_OR_TE",
    "FusedAdamW counts steps in the parameter group, as Transformer Engine's AdamW does.",
    value_type="bool",
)
TE_ADAM = Patch(
    "te-adam",
    _DISTRIBUTED_OPTIMIZER + "USING_TE_OPTIMIZER",
    "FusedAdamW counts steps in the parameter group, as Transformer Engine's AdamW does.",
    value_type="bool",
)
FINALIZE_GRADIENTS = Patch(
    "finalize-gradients",
    _TRAINING + "finalize_model_grads",
    "Dividing by the number of tokens is one more pass over the gradients.",
    parameters="model, num_tokens, pg_collection, force_all_reduce",
)
GRADIENT_NORM = Patch(
    "gradient-norm",
    _OPTIMIZER + "get_grad_norm_fp32",
    "The norm must count the division that was put off.",
    parameters="grads_for_norm, norm_type, grad_stats_parallel_group",
)
CLIP_GRADIENTS = Patch(
    "clip-gradients",
    _OPTIMIZER + "clip_grad_by_total_norm_fp32",
    "Clipping is one more pass over the gradients.",
    parameters="parameters, max_norm, total_norm, use_decoupled_grad",
)
OPTIMIZER_UPDATE = Patch(
    "optimizer-update",
    _OPTIMIZER + "ChainedOptimizer.step_with_ready_grads",
    "FusedAdamW applies the division and the clipping as it reads the gradients.",
    parameters="self",
)
OPTIMIZER_SHARDS = Patch(
    "optimizer-shards",
    _DISTRIBUTED_OPTIMIZER + "DistributedOptimizer.__init__",
    "FusedAdamW writes the bf16 weights, and must know where they are.",
    parameters="self, optimizer, config, grad_scaler, init_state_fn, model_chunks, per_model_buffers, "
    "data_parallel_group, data_parallel_group_gloo, data_parallel_group_idx, distributed_optimizer_instance_id",
)
COPY_WEIGHTS = Patch(
    "copy-weights",
    _DISTRIBUTED_OPTIMIZER + "DistributedOptimizer._copy_main_params_to_model_params",
    "FusedAdamW has written the bf16 weights already.",
    parameters="self",
)
CHECK_NORM = Patch(
    "check-norm",
    _OPTIMIZER + "ChainedOptimizer.get_grad_norm",
    "Megatron raises on the rank that has a NaN, while the others hang.",
    parameters="self",
)
SKIP_STEP = Patch(
    "skip-step",
    _OPTIMIZER + "ChainedOptimizer.step",
    "Megatron cannot leave out a step with non-finite gradients without a loss scale.",
    parameters="self",
)

# The run: training/progress.py, training/watch.py, training/signals.py

TRAINING_LOG = Patch(
    "training-log",
    _TRAINING + "training_log",
    "Megatron has no call-back that is given the loss.",
    parameters="loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, "
    "grad_norm, params_norm, num_zeros_in_grad, max_attention_logit, pg_collection, is_first_iteration, "
    "seqlen_squared_sum_in_batch, total_real_tokens_in_batch",
)
END_OF_STEP = Patch(
    "end-of-step",
    _TRAINING + "checkpoint_and_decide_exit",
    "Megatron's call-back for evaluations has its own interval and gets no optimizer to save.",
    parameters="model, optimizer, opt_param_scheduler, iteration, num_floating_point_operations_so_far, "
    "checkpointing_context, train_data_iterator",
)
MODEL_SETUP = Patch(
    "model-setup",
    _TRAINING + "setup_model_and_optimizer",
    "With --skip-train Megatron reaches no end of a step.",
    parameters="model_type, model_provider_func, checkpointing_context, *, cfg_container, pg_collection",
)
SIGNAL_HANDLER = Patch(
    "signal-handler",
    _SIGNALS + "__enter__",
    "Megatron handles one signal, and clusters send SIGTERM and SIGUSR1.",
    parameters="self",
)
SIGNALS_RECEIVED = Patch(
    "signals-received",
    _SIGNALS + "signals_received",
    "The last line of a run names the signal that ended it.",
    parameters="self",
)
RENDEZVOUS = Patch(
    "rendezvous",
    "megatron.training.initialize:_initialize_distributed",
    "A rank that waits for others in C++ runs no Python signal handler.",
    parameters="get_embedding_ranks, get_position_embedding_ranks, store, skip_model_parallel_init",
)
LOST_BATCH = Patch(
    "lost-batch",
    "multiprocessing.queues:Queue._on_queue_feeder_error",
    "A data loader worker drops a batch that it cannot send, and the rank waits for it for ever.",
    parameters="e, obj",
    written_for="Python 3.12 to 3.14",
)
