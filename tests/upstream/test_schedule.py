"""Faults of Megatron's schedules for the learning rate, the weight decay and the evaluations."""

from argparse import Namespace

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

from tests.upstream import upstream_fault
from tests.upstream.unpatched import unpatched


@upstream_fault(
    "load-schedule",
    "the optimizer is given learning rate and weight decay before the saved weight decay is read",
)
def test_a_loaded_schedule_sets_the_weight_decay():
    assert unpatched(_loaded_weight_decay) == 0.3


def _loaded_weight_decay() -> float:
    _, saved = _schedule(weight_decay=0.3)
    optimizer, schedule = _schedule(weight_decay=0.1)
    schedule.load_state_dict(saved.state_dict())
    return optimizer.param_groups[0]["weight_decay"]


def _schedule(weight_decay: float) -> tuple[Namespace, OptimizerParamScheduler]:
    optimizer = Namespace(param_groups=[{"params": [], "lr": 0.0, "weight_decay": 0.0}])
    return optimizer, OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=10,
        lr_decay_style="constant",
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=10,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
        override_opt_param_scheduler=False,
    )


@upstream_fault(
    "evaluation-at-its-first-step",
    "the evaluation at --start-eval-at-iter itself is made, and not counted where the samples are",
)
def test_validation_samples_suffice_for_the_evaluation_at_its_first_step():
    evaluations = ["at step 2", "at step 4", "at the end"]
    assert unpatched(_validation_samples) == len(evaluations)


def _validation_samples() -> int:
    args = Namespace(
        train_samples=None,
        train_iters=4,
        global_batch_size=1,
        full_validation=False,
        skip_train=False,
        eval_interval=2,
        start_eval_at_iter=2,
        eval_iters=1,
        phase_transition_iterations=None,
    )
    training.get_args = lambda: args
    return training.get_train_valid_test_num_samples()[1]
