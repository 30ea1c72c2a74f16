"""EleutherAI's lm-evaluation-harness, to check that a longer window does not cost quality on short texts."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_cream.common import devices
from megatron_cream.common.errors import NotAvailable, UsageError, one_line
from megatron_cream.common.files import atomic_write, read_json, to_json
from megatron_cream.evaluation.models.language_model import Source, non_finite_error, provide_hf_folder
from megatron_cream.evaluation.models.vllm_model import VllmSettings, is_finite, prepare_start
from megatron_cream.evaluation.results import Results

FULL_RESULTS = "harness.json"
_CACHE = "requests"  # lm_eval adds _rank0.db
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "em", "mc2")
"""Scores of a question, the one to compare first."""
_FIRST_PROMPT = "The capital of France is"


def find_tasks(names: Sequence[str], include: Path | None, metadata: dict[str, Any]) -> Any:
    """Check that lm_eval knows `names` and finds their data; return its task manager.

    Args:
        names: names of tasks or task groups.
        include: a folder with more tasks, as YAML files.
        metadata: values for tasks that generate or choose data by length, such as max_seq_lengths and tokenizer.

    Raises:
        UsageError: lm_eval is not installed, a task does not exist, or its data cannot be loaded.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401  (needs accelerate)
        from lm_eval.tasks import get_task_dict
    except ImportError as error:
        raise NotAvailable(f"harness: {error}: pip install lm_eval accelerate") from error
    check_include_path(include)
    manager = _index_tasks(None if include is None else str(include), json.dumps(metadata))
    for name in names:
        if not manager.match_tasks([name]):
            raise UsageError(f"--tasks {name}: lm_eval has no such task. `lm_eval ls tasks` lists them.")
    try:
        get_task_dict(list(names), manager)
    except Exception as error:  # many types: no network, a data set that moved, a missing package
        reason = one_line(error)
        raise NotAvailable(f"--tasks {','.join(names)}: lm_eval cannot set it up: {reason}") from error
    return manager


def check_include_path(folder: Path | None) -> None:
    """Raise UsageError if the folder of the user's own tasks does not exist."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--include-path {folder}: no such folder. Give a folder with tasks in YAML files.")


@lru_cache(maxsize=1)
def _index_tasks(include: str | None, metadata: str) -> Any:
    """Return a TaskManager, which takes seconds to read thousands of YAML files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, metadata=json.loads(metadata))


def run(
    source: Source,
    names: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    chat: bool,
    max_length: int | None,
    tokenizer: Path | None,
    vllm: VllmSettings | None,
    results: Results,
    overwrite: bool,
) -> dict[str, dict[str, Any]]:
    """Run lm_eval.simple_evaluate with its backend for transformers or vLLM.

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
        max_length: maximum tokens of a prompt and its answer; longer prompts lose their beginning. None takes the
            model's number of positions.
        tokenizer: a Hugging Face folder whose tokenizer replaces the model's own.
        vllm: settings of vLLM, if the source's engine is vllm.
        results: the results of this evaluation; their folder holds harness.json and the cache.
        overwrite: whether to remove the answers that an earlier run cached.

    Returns: {task: {metric: value}}.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    options = dict(tokenizer=None if tokenizer is None else str(tokenizer))
    with provide_hf_folder(source) as folder:
        if vllm:  # has the batch size and the maximum length
            model = _open_in_vllm(source, folder, vllm, options)
        else:
            model = _open_in_transformers(source, folder, options | dict(batch_size=batch_size, max_length=max_length))
    with torch.inference_mode():
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


def _open_in_transformers(source: Source, folder: Path, options: dict[str, Any]) -> Any:
    """Open the folder with lm_eval's backend for transformers, and check that the model's logits are finite."""
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if devices.has_cuda() else "cpu"
    model = HFLM(pretrained=str(folder), dtype=source.dtype, device=device, **options)
    prompt = torch.tensor([source.tokenizer.encode_prompt(_FIRST_PROMPT)], device=model.device)
    with torch.inference_mode():
        if not model.model(prompt).logits.isfinite().all():
            raise non_finite_error(source, model.model.named_parameters())
    return model


def _open_in_vllm(source: Source, folder: Path, vllm: VllmSettings, options: dict[str, Any]) -> Any:
    """Open the folder with lm_eval's backend for vLLM, and check that the model's logits are finite."""
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise UsageError(f"--engine vllm: lm_eval cannot use this vLLM: {one_line(error)}. Leave it out.") from error
    with prepare_start():
        dtype = str(source.dtype).removeprefix("torch.")
        engine = vllm.engine_arguments(source.max_positions, prefill_chunk=None)
        model = VLLM(pretrained=str(folder), dtype=dtype, batch_size="auto", **engine, **options)
    if not is_finite(model.model, source.tokenizer.encode_prompt(_FIRST_PROMPT)):
        raise non_finite_error(source, ())
    return model


def find_tokenizer(source: Source, tokenizer: Path | None) -> dict[str, str]:
    """Return {"tokenizer": path}, with which lm_eval's tasks count tokens; empty if loading it could run code."""
    folder = tokenizer or (source.checkpoint.hf_folder if source.checkpoint else source.path)
    if folder is None or not folder.is_dir():
        return {}
    for name in ("config.json", "tokenizer_config.json"):
        # lm_eval's tasks open the tokenizer with trust_remote_code=True.
        if (folder / name).is_file() and "auto_map" in read_json(folder / name, "a configuration in JSON"):
            return {}
    return {"tokenizer": str(folder)}


def sample_records(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a record for each question that has a score from 0 to 1, which `evaluate.py compare` pairs.

    Args:
        samples: {task: samples}, as lm_eval logs them.
    """
    for task, some in samples.items():
        for sample in some:
            metrics = sample.get("metrics", ())
            metric = next((name for name in _METRICS if name in metrics), None)
            # RULER's metrics are named by length, and are -1 at the lengths that the sample does not have.
            length = next((name for name in metrics if name.isdecimal() and sample[name] >= 0), None)
            metric = metric or length
            score = sample[metric] if metric else None
            if not isinstance(score, int | float) or not 0 <= score <= 1:
                continue
            suffix = "" if sample["filter"] == "none" else f"/{sample['filter']}"
            yield {
                "name": f"{task}/{sample['doc_id']}{suffix}",
                "part": f"{task}{suffix}",
                "length": int(length or 0),
                "depth": None,
                "prompt": sample["prompt_hash"],
                "metric": metric,
                "score": float(score),
            }
