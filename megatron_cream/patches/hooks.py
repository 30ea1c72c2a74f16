"""Names of Megatron and Python that other packages of this project replace.

Megatron has no callbacks there. Each package installs its own behaviour, for example
`registry.install(hooks.SAVE_CHECKPOINT, _save)`.
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
    "If one rank fails in a save, the others hang in a collective, and the run ends.",
    parameters="iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
    "checkpointing_context, pipeline_rank, expert_rank, tensor_rank, pipeline_parallel, expert_parallel, "
    "non_persistent_ckpt, train_data_iterator, preprocess_common_state_dict_fn, release, tp_group, pp_group, "
    "dp_cp_group, dp_group, expt_dp_group, rng_state_key_prefix",
)
FINALIZE_SAVE = Patch(
    "finalize-save",
    _TRAINING + "maybe_finalize_async_save",
    "The watchdog must know that a rank is waiting for a checkpoint.",
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
    "Megatron pickles the flags as objects whose classes another version may not have.",
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
    "Only rank 0 writes metadata.json: if it fails, the others hang.",
    parameters="config, checkpoint_dir",
)
WRITE_METADATA = Patch(
    "write-metadata",
    _WRITER + "finish",
    "Only rank 0 writes .metadata: if it fails, the others hang.",
    parameters="self, metadata, results",
    after=("collect-checksums",),
)
WRITE_SHARDS = Patch(
    "write-shards",
    _WRITER + "get_save_function_and_args",
    "Megatron reports the exception type of a failed write without its message.",
    parameters="self",
    after=("hash-shards",),
)
WRITE_BUCKET = Patch(
    "write-bucket",
    _WRITER + "write_preloaded_data",
    "Megatron loses the error message of a failed flush.",
    parameters="transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs",
)
OPEN_SHARD = Patch(
    "open-shard",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:open",
    "An error raised inside torch's writer crashed CPython 3.12.1: the shard's file object records it instead.",
    parameters="file, mode, buffering, encoding, errors, newline, closefd, opener",
)
WRITER_IS_DONE = Patch(
    "writer-is-done",
    _CALLER + "is_current_async_call_done",
    "Megatron waits forever for a checkpoint writer that was killed.",
    parameters="self, blocking, no_dist",
)
CALL_WRITER = Patch(
    "call-writer",
    _CALLER + "schedule_async_call",
    "Megatron sends the next save to a checkpoint writer that was killed.",
    parameters="self, async_req",
)

# Copies for the writer of --async-save: checkpoint/staging.py

STAGE_TENSORS = Patch(
    "stage-tensors",
    _CALLER + "schedule_async_call",
    "Training waits while the writer copies the tensors from the GPU.",
    parameters="self, async_req",
    after=("call-writer",),
)
BEGIN_STEP = Patch(
    "begin-step",
    _TRAINING + "train_step",
    "Megatron's timers wait for the whole GPU at the end of a save, so the copies can begin with the next step only.",
    parameters="forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, "
    "forward_backward_func, iteration, pg_collection, p2p_communicator",
)
SEND_BEFORE_WAITING = Patch(
    "send-before-waiting",
    _CALLER + "is_current_async_call_done",
    "A save that is not yet sent to the writer must be sent before anything waits for it.",
    parameters="self, blocking, no_dist",
    after=("writer-is-done",),
)

# Checksums: checkpoint/checksums.py

HASH_SHARDS = Patch(
    "hash-shards",
    _WRITER + "get_save_function_and_args",
    "The process that writes a shard hashes it while it is in memory.",
    parameters="self",
)
COLLECT_CHECKSUMS = Patch(
    "collect-checksums",
    _WRITER + "finish",
    "Rank 0 writes the checksums of all ranks next to .metadata.",
    parameters="self, metadata, results",
)

# The best checkpoint: checkpoint/best.py

SAVE_ARGS = Patch(
    "save-args",
    _CHECKPOINTING + "get_args",
    "Megatron has one folder for checkpoints, and the best checkpoint goes to another one.",
    parameters="",
)

# Resuming: checkpoint/schedule.py, checkpoint/optimizer_state.py

LOAD_CHECKPOINT = Patch(
    "load-checkpoint",
    _CHECKPOINTING + "_load_base_checkpoint",
    "Megatron matches saved parameter groups by learning rate: with another rate it finds none.",
    parameters="load_dir, args, rank0, sharded_state_dict, checkpointing_context, dp_cp_group, expt_dp_group, "
    "gpt_compat_layer_maps",
)
LOAD_SCHEDULE = Patch(
    "load-schedule",
    "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
    "Megatron sets learning rate and weight decay before it has read the whole schedule.",
    parameters="self, state_dict",
)
HALF_OPTIMIZER_SHARDS = Patch(
    "half-optimizer-shards",
    _OPTIMIZER + "Float16OptimizerWithFloat16Params.sharded_state_dict",
    "Megatron's plain optimizer looks for master weights under another name than the distributed one saves.",
    parameters="self, model_sharded_state_dict, is_loading, metadata",
)
HALF_OPTIMIZER_STATE = Patch(
    "half-optimizer-state",
    _OPTIMIZER + "Float16OptimizerWithFloat16Params.load_state_dict",
    "The distributed optimizer saves the step count in the parameter groups, torch's AdamW with each parameter.",
    parameters="self, state_dict",
)
FLOAT32_OPTIMIZER_STATE = Patch(
    "float32-optimizer-state",
    _OPTIMIZER + "FP32Optimizer.load_state_dict",
    "The distributed optimizer saves the parameter groups one level deeper.",
    parameters="self, state_dict",
)

# The distributed optimizer in a checkpoint: checkpoint/optimizer_shards.py

OPTIMIZER_SLICES = Patch(
    "optimizer-slices",
    _DISTRIBUTED_OPTIMIZER + "DistributedOptimizer.sharded_param_state_fully_reshardable",
    "Megatron gathers the whole optimizer on each rank while training waits.",
    parameters="self, model_sharded_state_dict, is_loading, metadata",
)
LOAD_OPTIMIZER_SLICES = Patch(
    "load-optimizer-slices",
    _DISTRIBUTED_OPTIMIZER + "DistributedOptimizer.load_parameter_state_from_fully_reshardable",
    "Megatron loads the whole optimizer on each rank and keeps a part of it.",
    parameters="self, state_dict",
)

# The optimizer step: optimizer/one_pass.py, optimizer/finite.py, optimizer/lora_plus.py

ADAM = Patch(
    "adam",
    "megatron.core.optimizer:Adam",
    "Megatron uses the AdamW that it can import, and has no setting to choose another.",
    value_type="type | ABCMeta",
)
PYTORCH_ADAM = Patch(
    "pytorch-adam",
    "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
    "Megatron passes other arguments to torch's AdamW than to Transformer Engine's.",
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
    "Dividing by the number of tokens takes another pass over the gradients: it is deferred.",
    parameters="model, num_tokens, pg_collection, force_all_reduce",
)
GRADIENT_NORM = Patch(
    "gradient-norm",
    _OPTIMIZER + "get_grad_norm_fp32",
    "The norm must include the deferred division by the number of tokens.",
    parameters="grads_for_norm, norm_type, grad_stats_parallel_group",
)
CLIP_GRADIENTS = Patch(
    "clip-gradients",
    _OPTIMIZER + "clip_grad_by_total_norm_fp32",
    "Clipping takes another pass over the gradients: FusedAdamW clips as it reads them.",
    parameters="parameters, max_norm, total_norm, use_decoupled_grad",
)
OPTIMIZER_UPDATE = Patch(
    "optimizer-update",
    _OPTIMIZER + "ChainedOptimizer.step_with_ready_grads",
    "FusedAdamW needs the factor of division and clipping, which it applies as it reads the gradients.",
    parameters="self",
)
OPTIMIZER_SHARDS = Patch(
    "optimizer-shards",
    _DISTRIBUTED_OPTIMIZER + "DistributedOptimizer.__init__",
    "FusedAdamW writes the bf16 weights, and needs to know where they are.",
    parameters="self, optimizer, config, grad_scaler, init_state_fn, model_chunks, per_model_buffers, "
    "data_parallel_group, data_parallel_group_gloo, data_parallel_group_idx, distributed_optimizer_instance_id",
)
COPY_WEIGHTS = Patch(
    "copy-weights",
    _DISTRIBUTED_OPTIMIZER + "DistributedOptimizer._copy_main_params_to_model_params",
    "FusedAdamW has already written the bf16 weights.",
    parameters="self",
)
PARAMETER_GROUPS = Patch(
    "parameter-groups",
    _TRAINING + "get_standard_config_overrides",
    "Megatron's flags give no parameters but embeddings and output layer a learning rate of their own.",
    parameters="config",
)
CHECK_NORM = Patch(
    "check-norm",
    _OPTIMIZER + "ChainedOptimizer.get_grad_norm",
    "Megatron raises only on the rank that has a NaN, while the others hang.",
    parameters="self",
)
SKIP_STEP = Patch(
    "skip-step",
    _OPTIMIZER + "ChainedOptimizer.step",
    "Megatron cannot skip a step with non-finite gradients unless it uses a loss scale.",
    parameters="self",
)

# The run: training/progress.py, training/watch.py, training/signals.py

TRAINING_LOG = Patch(
    "training-log",
    _TRAINING + "training_log",
    "Megatron has no callback that receives the loss.",
    parameters="loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, "
    "grad_norm, params_norm, num_zeros_in_grad, max_attention_logit, pg_collection, is_first_iteration, "
    "seqlen_squared_sum_in_batch, total_real_tokens_in_batch",
)
END_OF_STEP = Patch(
    "end-of-step",
    _TRAINING + "checkpoint_and_decide_exit",
    "Megatron's evaluation callback has its own interval and receives no optimizer to save.",
    parameters="model, optimizer, opt_param_scheduler, iteration, num_floating_point_operations_so_far, "
    "checkpointing_context, train_data_iterator",
)
MODEL_SETUP = Patch(
    "model-setup",
    _TRAINING + "setup_model_and_optimizer",
    "With --skip-train there is no training step whose end could start an evaluation.",
    parameters="model_type, model_provider_func, checkpointing_context, *, cfg_container, pg_collection",
)
SIGNAL_HANDLER = Patch(
    "signal-handler",
    _SIGNALS + "__enter__",
    "Megatron handles a single signal, and clusters send SIGTERM and SIGUSR1.",
    parameters="self",
)
SIGNALS_RECEIVED = Patch(
    "signals-received",
    _SIGNALS + "signals_received",
    "The last log line of a run names the signal that ended it.",
    parameters="self",
)
RENDEZVOUS = Patch(
    "rendezvous",
    "megatron.training.initialize:_initialize_distributed",
    "A rank that waits in C++ for its peers runs no Python signal handler.",
    parameters="get_embedding_ranks, get_position_embedding_ranks, store, skip_model_parallel_init",
)
LOST_BATCH = Patch(
    "lost-batch",
    "multiprocessing.queues:Queue._on_queue_feeder_error",
    "A data loader worker drops a batch that it cannot send, and its rank waits for it forever.",
    parameters="e, obj",
    written_for="Python 3.12 to 3.14",
)
