"""Test a Hugging Face folder or a Megatron checkpoint on long contexts.

python tools/evaluate.py perplexity --model out/ --dataset books.jsonl --lengths 4096 8192 16384 32768
python tools/evaluate.py needle     --model out/ --min-length 1024 --max-length 32768
python tools/evaluate.py lines      --model out/ --lengths 4096 16384 32768
python tools/evaluate.py kv         --model out/ --keys 75 140
python tools/evaluate.py ruler      --model out/ --lengths 4096 8192 16384 32768
python tools/evaluate.py longbench  --model out/ --data LongBench/data/
python tools/evaluate.py harness    --model out/ --tasks arc_challenge,hellaswag
python tools/evaluate.py suite      short out/
python tools/evaluate.py compare    runs/evaluation/base runs/evaluation/out

Each prints a table and writes results.jsonl (one line per example, as they finish), summary.json and picture.png into
a folder (--output). After an interruption the same command resumes.
"""

import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_cream.commands import compare, suite
from megatron_cream.common import entry
from megatron_cream.common.cli import program_name
from megatron_cream.common.errors import NotAvailable, UsageError, is_out_of_memory, one_line
from megatron_cream.common.files import convert_disk_errors
from megatron_cream.evaluation import fit, harness, pictures, plans, ranks, report, sharing, sliding_window
from megatron_cream.evaluation.engine_flags import (
    check_chat,
    check_cuda_graphs,
    read_harness_settings,
    read_vllm_settings,
)
from megatron_cream.evaluation.flags import build_parser
from megatron_cream.evaluation.longppl import KeyTokenRule
from megatron_cream.evaluation.models import language_model
from megatron_cream.evaluation.models.vllm_model import VllmSettings
from megatron_cream.evaluation.results import PICTURE, RESULTS, SUMMARY, Results, open_results
from megatron_cream.evaluation.runner import (
    Generation,
    OutOfMemory,
    PerplexitySettings,
    Plan,
    find_key_tokens_by_model,
    run_perplexity,
    run_task,
    summarise_perplexity,
)
from megatron_cream.evaluation.tasks import needle
from megatron_cream.evaluation.tasks.filler import TooShort
from megatron_cream.evaluation.tasks.ruler import suite as ruler

UNKNOWN_WINDOW = 131072
"""The longest context without --lengths, in tokens, of a model whose configuration names no positions."""

LENGTH_FLAGS = {"needle": "--min-length", "longbench": "--length"}
"""{command: flag of the shortest context}; --lengths for all others."""


def main() -> int:
    return ranks.run(_main)


def _main() -> int:
    args = build_parser(__doc__).parse_args()
    args.output = args.output or default_output(args)
    kept = "finished results are kept, and the same command resumes"
    if args.command == "compare":
        kept = "nothing was written"
    try:
        with convert_disk_errors(args.output, "--output", kept):
            args.ranks = ranks.find_ranks(args)
            RUNS[args.command](args)
        return 0
    except TooShort as error:
        print(f"{program_name()}: error: {LENGTH_FLAGS.get(args.command, '--lengths')}: {error}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    except (OutOfMemory, OSError) as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # While the model is loaded, for example; `runner` knows the lengths when a prompt is read.
        why = one_line(error, 120) or "the host has too little"
        words = f"out of memory: {why}; {kept}. Free memory of the GPU or host, or use more GPUs"
        print(f"{program_name()}: error: {words}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program_name()}: interrupted; {kept}", file=sys.stderr)
        return entry.INTERRUPTED


def run_needle(args) -> None:
    source = find_model(args)
    longest = args.max_length or default_length(source)
    if args.min_length > longest:
        raise UsageError(f"--min-length {args.min_length}: must be at most --max-length, which is {longest}")
    lengths, depths = needle.build_grid(args.min_length, longest, args.length_steps, args.depth_steps)
    options = dict(kind=args.needle, samples=args.samples, seed=args.seed, haystack=args.haystack)
    plan = plans.plan_needle(source.tokenizer, lengths=lengths, depths=depths, **options)
    # Earlier versions asked the sandwich several times with the same prompt.
    varied = {"varied_filler": True} if args.needle == "sandwich" and args.samples > 1 else {}
    run_examples(args, source, plan, {"lengths": lengths, "depths": depths, **options, **varied})


def run_lines(args) -> None:
    source = find_model(args)
    lengths = args.lengths or ([] if args.lines or args.data else default_lengths(source))
    options = dict(lengths=lengths, lines_counts=args.lines, files=args.data, samples=args.samples, seed=args.seed)
    run_examples(args, source, plans.plan_lines(source.tokenizer, **options), options)


def run_kv(args) -> None:
    source = find_model(args)
    keys = args.keys or ([] if args.lengths or args.data else [75, 140])
    options = dict(
        keys=keys, lengths=args.lengths, gold=args.gold, files=args.data, samples=args.samples, seed=args.seed
    )
    run_examples(args, source, plans.plan_kv(source.tokenizer, **options), options)


def run_ruler(args) -> None:
    source = find_model(args)
    options = dict(
        lengths=args.lengths or default_lengths(source),
        tasks=args.tasks,
        samples=args.samples,
        seed=args.seed,
        haystack=args.haystack,
        squad=args.squad,
        hotpotqa=args.hotpotqa,
    )
    plan = plans.plan_ruler(source.tokenizer, **options)
    given = set(args.tasks or ruler.list_default_tasks(args.squad, args.hotpotqa))
    if missing := [task for task in ruler.TASKS if task not in given]:
        print(
            f"{program_name()}: {len(given)} of RULER's {len(ruler.TASKS)} tasks are run, so no effective length is "
            f"reported; left out: {', '.join(missing)}",
            file=sys.stderr,
        )
    run_examples(args, source, plan, options | {"answers_stripped": True})


def run_longbench(args) -> None:
    source = find_model(args)
    length = args.length or default_length(source)
    options = dict(
        folder=args.data,
        length=length,
        datasets=args.datasets,
        samples=args.samples,
        code_similarity=args.code_similarity,
    )
    plan = plans.plan_longbench(source.tokenizer, **options)
    plain = sorted({example.part for example in plan.examples if args.chat and not example.chat})
    run_examples(args, source, plan, options | {"plain_datasets": plain})


def run_examples(args, source: language_model.Source, plan: Plan, options: dict) -> None:
    """Run the examples of a plan; `options` are the settings that identify its results."""
    check_cuda_graphs(args, source)
    check_chat(args, source)
    generation = Generation(args.batch_size, args.temperature, args.top_p, args.seed, args.chat)
    made = plan.examples if isinstance(plan.examples, list) else []  # their lengths may come from keys or files
    lengths = [*(options.get("lengths") or []), options.get("length", 0), *(example.length for example in made)]
    longest = max(lengths)
    vllm = read_vllm_settings(args, source, longest, len(source.tokenizer.encode_chat("")) if args.chat else 1)
    warn_beyond(source, longest)
    print_fit(args, source, longest, args.batch_size)
    settings = {"temperature": args.temperature, "top_p": args.top_p, "chat": args.chat, **options}
    with open_output(args, source, settings) as results:
        records = run_task(lambda: load(args, source, vllm), plan, generation, results, args.ranks)
        if args.ranks.is_first:
            finish(args, results, report.summarise(args.command, records))


def run_perplexity_command(args) -> None:
    source = find_model(args)
    lengths = args.lengths or default_lengths(source)
    if lengths[-1] < 2 or args.min_tokens == 1:
        flag = f"--lengths {lengths[-1]}" if lengths[-1] < 2 else f"--min-tokens {args.min_tokens}"
        raise UsageError(f"{flag}: must be 2 or more: the first token of a document is not scored")
    rule = KeyTokenRule(args.alpha, args.beta, args.short_context, args.short_block)
    with_longppl = lengths[-1] > rule.short_context if args.longppl is None else args.longppl
    if with_longppl and lengths[-1] <= rule.short_context:
        raise UsageError(f"--longppl: the longest of --lengths, {lengths[-1]}, must be above --short-context")
    if args.key_token_model and not with_longppl:
        raise UsageError(f"--key-token-model {args.key_token_model}: only with --longppl")
    if args.longppl_bos and not with_longppl:
        raise UsageError("--longppl-bos: only with --longppl")
    stride = args.stride or 256
    slides = with_longppl or args.convention != "cream"
    check_convention(args, source, lengths[0], stride, slides)
    key_source = find_model(args, args.key_token_model) if args.key_token_model else None
    for tokenizer in (source.tokenizer, key_source.tokenizer) if key_source else ():
        tokenizer.token_spans("")  # raises if the tokenizer has no offsets
    documents = sliding_window.select_long_documents(
        source.tokenizer,
        sliding_window.read_texts(args.dataset, args.json_key),
        minimum=args.min_tokens or lengths[-1],
        longest=lengths[-1],
        most=args.documents,
    )
    warn_beyond(source, lengths[-1])
    print_fit(args, source, lengths[-1], 1)
    settings = {
        "dataset": args.dataset,
        "json_key": args.json_key,
        "convention": args.convention,
        "lengths": lengths,
        "stride": stride if slides else None,
        "documents": args.documents,
        "min_tokens": args.min_tokens,
        "longppl": with_longppl and vars(rule),
        "key_token_model": key_source and key_source.identity(),
    }
    longppl_bos = args.longppl_bos and source.tokenizer.bos is not None
    if with_longppl and source.tokenizer.bos is not None:
        settings["longppl_bos"] = longppl_bos
    with open_output(args, source, settings) as results:
        key = {}
        if key_source:
            missing = [document for document in documents if document.name not in results.records]
            own = sharing.take_share(args.ranks, missing)
            key = find_key_tokens_by_model(lambda: load(args, key_source), own, source.tokenizer, rule)
        measured = PerplexitySettings(args.convention, lengths, stride, rule if with_longppl else None, longppl_bos)
        options = dict(settings=measured, key=key, results=results, ranks=args.ranks)
        records = run_perplexity(lambda: load(args, source), documents, **options)
        described = {"convention": args.convention} | ({"longppl_bos": longppl_bos} if with_longppl else {})
        if args.ranks.is_first:
            finish(args, results, {length: row | described for length, row in summarise_perplexity(records).items()})


def check_convention(args, source: language_model.Source, shortest: int, stride: int, slides: bool) -> None:
    """Raise UsageError where --convention does not go with --stride, --lengths or the tokenizer."""
    if args.stride and not slides:
        raise UsageError(f"--stride {stride}: --convention cream scores one window, which does not move")
    if args.convention == "ours" and stride > shortest:
        raise UsageError(f"--stride {stride}: must be at most the shortest of --lengths, {shortest}")
    if args.convention == "pose" and stride >= shortest:
        raise UsageError(f"--stride {stride}: must be less than the shortest of --lengths, {shortest}")
    if args.convention == "cream" and shortest < 2:
        raise UsageError(f"--lengths {shortest}: must be 2 or more: a document's first token is not scored")
    if args.convention != "ours" and source.tokenizer.bos is None:  # a suite leaves it out: its convention is fixed
        raise NotAvailable(
            f"--convention {args.convention}: the tokenizer of --model puts no BOS before a text. Use --convention ours"
        )


def run_harness(args) -> None:
    source = find_model(args)
    names = [name for name in args.tasks.split(",") if name]
    check_chat(args, source)
    vllm = read_harness_settings(args, source)
    manager = harness.find_tasks(
        names, args.include_path, harness.find_tokenizer(source, args.tokenizer) | args.metadata
    )
    options = dict(num_fewshot=args.num_fewshot, limit=args.limit, chat=args.chat, max_length=args.max_length)
    settings = {"tasks": names, "include_path": args.include_path and str(args.include_path), **options}
    settings["metadata"] = args.metadata
    with open_output(args, source, settings) as results:
        found = harness.run(
            source,
            names,
            manager,
            **options,
            batch_size=args.batch_size,
            tokenizer=args.tokenizer,
            vllm=vllm,
            results=results,
            overwrite=args.overwrite,
        )
        results.finish(found)
        print(f"Results: {results.folder / SUMMARY}   lm-eval's own: {harness.FULL_RESULTS} beside it")


def run_suite(args) -> None:
    source = find_model(args)
    suite.run_suite(
        args,
        source=source,
        lengths=default_lengths(source),
        parser=build_parser(__doc__),
        run=partial(run_part, args),
    )


def run_part(args, part) -> None:
    """Run one evaluation of a suite; `part` are its flags."""
    part.ranks = args.ranks
    RUNS[part.command](part)


def find_model(args, path: str | None = None) -> language_model.Source:
    """Find the model of --model, or of --key-token-model if its path is given."""
    options = dict(dtype=args.dtype, split=args.ranks.replica_size > 1, kv_cache_dtype=args.kv_cache_dtype)
    if path:
        return language_model.find_model(path, flag="--key-token-model", **options)
    return language_model.find_model(
        args.model,
        step=args.ckpt_step,
        tokenizer=args.tokenizer,
        engine=getattr(args, "engine", "auto"),
        **options,
    )


def load(args, source: language_model.Source, vllm: VllmSettings | None = None) -> language_model.LanguageModel:
    graphs = getattr(args, "cuda_graphs", None) is not False  # perplexity has no such flag
    options = dict(prefill_chunk=args.prefill_chunk, vllm=vllm, ranks=args.ranks, cuda_graphs=graphs)
    return language_model.load(source, **options)


def open_output(args, source: language_model.Source, settings: dict):
    """Open --output for these settings: results of the same settings are continued."""
    described = {"command": args.command, "tokenizer": args.tokenizer, **settings}
    opened = partial(
        open_results,
        args.output,
        settings={key: _plain(value) for key, value in described.items()},
        model=source.identity(),
        model_path=source.path,
        overwrite=args.overwrite,
        facts={"positions": source.max_positions, "tokenizer": source.tokenizer.fingerprint()},
    )
    return sharing.open_shared(args.ranks, opened)


def finish(args, results: Results, summary: dict) -> None:
    """Write the summary and the picture, and print the table and their paths."""
    results.finish(summary)
    pictures.draw(args.command, summary, results.folder / PICTURE)
    Console().print(report.build_table(args.command, summary))
    print(f"Picture: {results.folder / PICTURE}   numbers: {SUMMARY} and {RESULTS} beside it")


def default_output(args) -> Path:
    if args.command == "compare":
        return args.extended / (args.suite or "") / args.command
    name = args.suite if args.command == "suite" else args.command
    return suite.DEFAULT_OUTPUT / Path(args.model).resolve().name / name


def default_length(source: language_model.Source) -> int:
    """Return the model's positions."""
    return UNKNOWN_WINDOW if source.max_positions >= 1 << 40 else source.max_positions


def default_lengths(source: language_model.Source) -> list[int]:
    """Return powers of two from 4096 to the model's positions; if they are fewer, only these."""
    longest = default_length(source)
    return [1 << power for power in range(12, longest.bit_length())] or [longest]


def warn_beyond(source: language_model.Source, length: int) -> None:
    """Warn of a context longer than the model's positions."""
    if length > source.max_positions:
        problem = f"{length} tokens are more than the {source.max_positions} positions of {source.path}"
        print(f"{program_name()}: warning: {problem}", file=sys.stderr)


def print_fit(args, source: language_model.Source, length: int, batch: int) -> None:
    """Print what the weights and the longest batch take of a GPU, or raise UsageError if they cannot fit."""
    fit.check_split(source, args.ranks)
    if line := fit.describe_fit(source, args.ranks, tokens=length, batch=batch):
        print(f"{program_name()}: {line}", file=sys.stderr)


def _plain(value):
    """Return a value for JSON; paths come with their size in bytes, which shows changes."""
    if isinstance(value, Path):
        files = sorted(value.rglob("*")) if value.is_dir() else [value]
        return {str(value): sum(file.stat().st_size for file in files if file.is_file())}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


RUNS = {
    "perplexity": run_perplexity_command,
    "needle": run_needle,
    "lines": run_lines,
    "kv": run_kv,
    "ruler": run_ruler,
    "longbench": run_longbench,
    "harness": run_harness,
    "suite": run_suite,
    "compare": compare.run_compare,
}
