"""EleutherAI's lm-evaluation-harness, to check that a longer window does not cost quality on short texts."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import atomic_write, to_json
from megatron_cream.evaluation.models.language_model import Source, non_finite_error, provide_hf_folder
from megatron_cream.evaluation.results import Results

FULL_RESULTS = "harness.json"
_CACHE = "requests"  # lm_eval adds _rank0.db
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "em", "mc2")
"""Scores of a question, the one to compare first."""


def find_tasks(names: Sequence[str], include: Path | None) -> Any:
    """Check that lm_eval knows `names` and finds their data; return its task manager.

    Args:
        names: names of tasks or task groups.
        include: a folder with more tasks, as YAML files.

    Raises:
        UsageError: lm_eval is not installed, a task does not exist, or its data cannot be loaded.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401  (needs accelerate)
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise UsageError(f"harness: {error}: pip install lm_eval accelerate") from error
    if include is not None and not include.is_dir():
        raise UsageError(f"--include-path {include}: no such folder. Give a folder with tasks in YAML files.")
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if not manager.match_tasks([name]):
            raise UsageError(f"--tasks {name}: lm_eval has no such task. `lm_eval ls tasks` lists them.")
    try:
        get_task_dict(list(names), manager)
    except Exception as error:  # many types: no network, a data set that moved, a missing package
        reason = one_line(error)
        raise UsageError(f"--tasks {','.join(names)}: lm_eval cannot set it up: {reason}") from error
    return manager


def run(
    source: Source,
    names: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    chat: bool,
    tokenizer: Path | None,
    results: Results,
    overwrite: bool,
) -> dict[str, dict[str, Any]]:
    """Run lm_eval.simple_evaluate with its transformers backend.

    A Megatron checkpoint is exported to a temporary folder. Everything that lm_eval returns except the samples
    is written to harness.json, and each question's score to results.jsonl. Answers are cached in the results' folder,
    and an interrupted run resumes from the cache.

    Args:
        source: the model.
        names: names of the tasks.
        manager: the task manager that `find_tasks` returned.
        num_fewshot: examples with answers in each prompt; None takes each task's own number.
        limit: maximum examples per task; None takes all.
        batch_size: requests per batch.
        chat: whether to put prompts into the chat template.
        tokenizer: a Hugging Face folder whose tokenizer replaces the model's own.
        results: the results of this evaluation; their folder holds harness.json and the cache.
        overwrite: whether to remove the answers that an earlier run cached.

    Returns: {task: {metric: value}}.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable, make_table

    with provide_hf_folder(source) as folder:
        model = HFLM(
            pretrained=str(folder),
            tokenizer=None if tokenizer is None else str(tokenizer),
            dtype=source.dtype,
            batch_size=batch_size,
            device="cuda" if devices.has_cuda() else "cpu",
        )
    with torch.inference_mode():
        text = source.tokenizer.encode_prompt("The capital of France is")
        if not model.model(torch.tensor([text], device=model.device)).logits.isfinite().all():
            raise non_finite_error(source, model.model.named_parameters())
        results.begin()
        if overwrite:
            for file in results.folder.glob(f"{_CACHE}_rank*.db"):
                file.unlink()
        full = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            use_cache=str(results.folder / _CACHE),
            log_samples=True,
        )
    for record in sample_records(full.pop("samples", None) or {}):
        if record["name"] not in results.records:
            results.add(record)
    text = to_json(full, indent=2, ensure_ascii=False, default=handle_non_serializable)
    with atomic_write(results.folder / FULL_RESULTS) as file:
        file.write(text + "\n")
    print(make_table(full))
    return json.loads(text)["results"]


def sample_records(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a record for each question that has a score from 0 to 1, which `evaluate.py compare` pairs.

    Args:
        samples: {task: samples}, as lm_eval logs them.
    """
    for task, some in samples.items():
        for sample in some:
            metric = next((name for name in _METRICS if name in sample.get("metrics", ())), None)
            score = sample[metric] if metric else None
            if not isinstance(score, int | float) or not 0 <= score <= 1:
                continue
            suffix = "" if sample["filter"] == "none" else f"/{sample['filter']}"
            yield {
                "name": f"{task}/{sample['doc_id']}{suffix}",
                "part": f"{task}{suffix}",
                "length": 0,
                "depth": None,
                "prompt": sample["prompt_hash"],
                "metric": metric,
                "score": float(score),
            }
