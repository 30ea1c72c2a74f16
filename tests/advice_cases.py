"""Cases of advice in error messages: part of the message, the command that causes it, the commands it advises."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bad_input_cases import (
    EVALUATE,
    EVALUATE_CKPT,
    FROM_CKPT,
    FROM_CLASSIC,
    FROM_HF,
    GO_ON,
    IMPORT,
    NEW,
    NEW_WITHOUT_DATA,
    PERPLEXITY,
    PLAN,
    PREPARE,
    RECIPE,
    RESUME,
    SGD,
    STEP,
    TRAINER,
    untracked,
)
from tests.bad_inputs import also, entry, put, remove
from tests.evaluation_models import save_tokenizer

Command = tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """One error message and the commands that follow its advice.

    line: part of the message in the source code, with {} for a value.
    wrong: the command that fails with the message.
    right: the commands that the message advises.
    before: a command that must succeed before `wrong`.
    """

    line: str
    wrong: Command
    right: tuple[Command, ...]
    damage: Callable[[Path], object] = also()
    before: Command | None = None
    ranks: int = 1


def with_(flags: str, base: Command = NEW) -> Command:
    return (*base, *flags.split())


def without(flags: str, base: Command = NEW) -> Command:
    """Remove consecutive words from a command."""
    words = flags.split()
    at = next(i for i in range(len(base)) if list(base[i : i + len(words)]) == words)
    return (*base[:at], *base[at + len(words) :])


def trainer(line: str, wrong: str, *right: str, ranks: int = 1) -> Advice:
    return Advice(line, with_(wrong), tuple(with_(flags) for flags in right), ranks=ranks)


def common_args(**values):
    """Change the flags that a checkpoint was saved with."""

    def change(w: Path):
        from megatron_cream.checkpoint.opening import open_step

        common = open_step(w / STEP, "--load").common
        vars(common["args"]).update(values)
        return [common]

    return entry(STEP, "common_state", change)


named_template = also(
    remove("hf/chat_template.jinja"),
    put("texts.jsonl", json.dumps({"messages": [dict(role=r, content="a") for r in ("user", "assistant")]})),
    put("hf/additional_chat_templates/brief.jinja", "{% for m in messages %}[{{ m.content }}]{% endfor %}"),
)


def special_tokens_gone(w: Path) -> None:
    """Remove BOS and EOS from the tokenizer in hf/."""
    save_tokenizer(w / "hf", bos=False)
    file = w / "hf/tokenizer_config.json"
    settings = json.loads(file.read_text())
    kept = {key: value for key, value in settings.items() if key not in ("bos_token", "eos_token")}
    file.write_text(json.dumps(kept))
    (w / "hf/special_tokens_map.json").unlink(missing_ok=True)


def two_columns(w: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"title": ["a b c"] * 3, "body": ["a b c d e"] * 3}), w / "two.parquet")


def markdown(w: Path) -> None:
    (w / "books").mkdir()
    (w / "books" / "a.md").write_text("some words of a book")


LONGER = "--train-iters 3 --override-opt-param-scheduler"
PERPLEXITY_OF_LONG = with_("--lengths 64 --min-tokens 64", PERPLEXITY)
LONG_TEXTS = put("texts.jsonl", json.dumps({"text": "some words of a long text " * 60}) + "\n")
LONG_EVALUATION = "--long-eval-interval 1 --long-eval-tasks perplexity --long-eval-lengths 96 --long-eval-samples 1"
SHAPE = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --bf16"
PLANNED = with_(SHAPE, PLAN)
UNSAVED = without("--save {0}/new")
SHORT = "--short-data-path {0}/data --short-share 0.3"
NF4 = "--lora-rank 4 --lora-base-dtype nf4"

ADVICE = [
    # ------------------------------------------------ the trainer: combinations of flags
    trainer("with --embedded-data: give one of the two", "--embedded-data", ""),
    trainer("--fp16 with --fp32: give one of the two", "--fp16", ""),
    Advice(
        "with --train-iters: give one of the two", with_("--train-samples 16"),
        (with_("--train-samples 16", without("--train-iters 2")), NEW),
    ),
    trainer(
        "--override-opt-param-scheduler with --use-checkpoint-opt-param-scheduler: give one of the two",
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler",
    ),
    trainer("not with --optimizer sgd; use adam", "--optimizer sgd", "--optimizer adam"),
    Advice("mp_rank_XX files are loaded without this flag", with_("--ckpt-format torch", FROM_CLASSIC),
           (FROM_CLASSIC,)),
    trainer("only with --multiple-validation-sets", "--full-validation",
            "--full-validation --multiple-validation-sets"),
    trainer("not with --attention-backend {}; use 0", "--attention-dropout 0.1", "--attention-dropout 0"),
    trainer(
        "not with --attention-backend local; use auto", "--context-parallel-size 2 --attention-backend local",
        "--context-parallel-size 2 --attention-backend auto", ranks=2,
    ),
    trainer(
        "only with --position-sampler cream or pose", "--position-sampler randpos --mask-segment-starts",
        "--position-sampler pose --mask-segment-starts", "--position-sampler cream --mask-segment-starts",
    ),
    trainer(
        "only with --rope-scaling-type linear, ntk, yarn or llama3", "--rope-scaling-type none --rope-scaling-factor 2",
        *(f"--rope-scaling-factor 2 --rope-scaling-type {name}" for name in ("linear", "ntk", "yarn", "llama3")),
    ),
    trainer(
        "only with --rope-scaling-type linear, ntk, yarn or llama3",
        "--rope-scaling-type none --original-max-position-embeddings 96",
        *(f"--original-max-position-embeddings 96 --rope-scaling-type {name}" for name in ("yarn", "llama3")),
    ),
    Advice("add --group-query-attention", without("--group-query-attention"), (NEW,)),
    trainer("only with --cream-middle gaussian", "--cream-middle uniform --cream-sigma 2", "--cream-sigma 2"),
    trainer(
        "--position-mix with --position-sampler {}: give one of the two",
        "--position-mix cream=0.5,pi=0.5 --position-sampler pose", "--position-mix cream=0.5,pi=0.5",
    ),
    trainer(
        "needs --position-mix, such as cream=0.6,pose=0.4", "--position-sampler mix",
        "--position-sampler mix --position-mix cream=0.6,pose=0.4",
    ),
    trainer(
        "only with --position-sampler {}, not {}", "--position-sampler pi --cream-sigma 2",
        "--position-sampler cream --cream-sigma 2",
    ),
    trainer("needs --short-data-path with the short texts", "--short-share 0.3", SHORT),
    trainer("give its share of the samples, such as --short-share 0.3", "--short-data-path {0}/data", SHORT),
    trainer("the length of a sample; leave it out for that", "--long-min-tokens 50", "", "--long-min-tokens 96"),
    trainer("cannot keep documents apart; use auto", f"{SHORT} --attention-backend local", SHORT),
    trainer("give longer ones in --data-path", f"{SHORT} --seq-length 72 --target-length 288", SHORT),
    trainer("add --use-pytorch-profiler", "--profile", "--profile --use-pytorch-profiler"),
    Advice("give --load-hf, --pretrained-checkpoint or --load", with_("--no-initialization"),
           tuple(with_("--no-initialization", base) for base in (FROM_HF, FROM_CKPT, with_(LONGER, RESUME)))),
    Advice("only with --lora-rank; give its rank, such as 16", with_("--lora-alpha 3", FROM_HF),
           (with_("--lora-alpha 3 --lora-rank 16", FROM_HF),)),
    Advice("needs a model whose weights stay as they are; give --load-hf MODEL", with_("--lora-rank 4"),
           (with_("--lora-rank 4", FROM_HF),)),
    Advice("layers cannot hold NF4; use auto", with_(f"{NF4} --attention-backend te", FROM_HF), (with_(NF4, FROM_HF),)),
    Advice("not with --lora-base-dtype nf4; leave one of them out", with_(f"{NF4} --fp8-format hybrid", FROM_HF),
           (with_(NF4, FROM_HF),)),
    Advice("--adapter: only with --save-hf FOLDER", with_("--lora-rank 4 --adapter", FROM_HF),
           (with_("--lora-rank 4 --adapter --save-hf {0}/adapter", FROM_HF),)),
    Advice("To train adapters on them, give it with --pretrained-checkpoint", with_(f"--lora-rank 4 {LONGER}", RESUME),
           (with_("--lora-rank 4", FROM_CKPT),)),
    Advice("unknown key {}; --help lists every flag", RECIPE, ((TRAINER, "--help"),), put("recipe.yaml", "speed: 3\n")),
    # ------------------------------------------------ the trainer: data and evaluation
    Advice("writes one), or --embedded-data", NEW_WITHOUT_DATA, (NEW,)),
    trainer(
        "leaves nothing to validate on; give its second part a share, or --eval-iters 0", "--split 10,0,0",
        "--split 8,2,0", "--split 10,0,0 --eval-iters 0",
    ),
    trainer("leaves for {} has {} tokens; give {}", "--split 8,1.999,0.001", "--split 8,2,0"),
    trainer("give the tokenizer that the data was made with", "--vocab-size 60", ""),
    Advice(
        "{}, or --eval-iters 0",
        with_("--train-data-path {0}/data", NEW_WITHOUT_DATA),
        (
            with_("--train-data-path {0}/data --valid-data-path {0}/data", NEW_WITHOUT_DATA),
            with_("--train-data-path {0}/data --eval-iters 0", NEW_WITHOUT_DATA),
        ),
    ),
    Advice(
        "or --long-eval-best none", with_(LONG_EVALUATION, UNSAVED),
        (with_(f"{LONG_EVALUATION} --long-eval-best none", UNSAVED), with_(LONG_EVALUATION)),
    ),
    trainer(
        "or a larger --target-length or --max-position-embeddings",
        LONG_EVALUATION.replace("96", "400"), LONG_EVALUATION,
        LONG_EVALUATION.replace("96", "400") + " --max-position-embeddings 400",
        LONG_EVALUATION.replace("96", "400") + " --target-length 768",
    ),
    trainer("cannot encode text; use only perplexity", LONG_EVALUATION.replace("perplexity", "kv"), LONG_EVALUATION),
    trainer("{}: only with --long-eval-interval", "--long-eval-samples 1", LONG_EVALUATION),
    # ------------------------------------------------ the trainer: checkpoints
    Advice("{}: only with --save", with_("--most-recent-k 2", UNSAVED), (with_("--most-recent-k 2"),)),
    Advice("--async-save: only with --save", with_("--async-save", UNSAVED), (with_("--async-save"),)),
    trainer("needs --ckpt-format torch_dist", "--most-recent-k 2 --ckpt-format torch",
            "--most-recent-k 2 --ckpt-format torch_dist"),
    trainer("{}: only with --save-hook", "--save-hook-minutes 3", "--save-hook-minutes 3 --save-hook true"),
    Advice(
        "Add --load {} to resume from them, or give another folder", with_("--save {0}/run"),
        (with_(f"--save {{0}}/run --load {{0}}/run {LONGER}"), NEW),
    ),
    Advice(
        "To resume, give --rope-scaling-type {} --rotary-base {}", with_(f"--rotary-base 5e5 {LONGER}", RESUME),
        (with_(f"--rope-scaling-type linear --rope-scaling-factor 4 --rotary-base 10000 {LONGER}", RESUME),),
    ),
    Advice("Use --ckpt-step to resume from one of them", GO_ON, (with_(f"--ckpt-step 2 {LONGER}", GO_ON),), untracked),
    Advice(
        "was saved with --no-save-optim. To resume with the weights only, add --no-load-optim", with_("--train-iters 3", RESUME),
        (with_("--train-iters 3 --no-load-optim", RESUME),), common_args(no_save_optim=True),
    ),
    Advice("these flags set {}. To resume with the weights only, add --no-load-optim", SGD, (with_("--train-iters 3 --no-load-optim", SGD),)),
    Advice("Give {}--override-opt-param-scheduler{} for the schedule of these flags{}", with_("--train-iters 3", RESUME),
           (with_(LONGER, RESUME),)),
    Advice(
        "Give {}--override-opt-param-scheduler{} for the schedule of these flags{}", with_("--lr 1e-3", RESUME),
        tuple(with_(flags, RESUME) for flags in (
            "--lr 0.01", "--lr 1e-3 --override-opt-param-scheduler", "--lr 1e-3 --use-checkpoint-opt-param-scheduler",
        )),
    ),
    Advice(
        "For a longer extension from these weights, give --pretrained-checkpoint {} in place of",
        with_(f"--target-length 768 {LONGER}", RESUME),
        (with_(f"--target-length 384 {LONGER}", RESUME), with_("--target-length 768 --pretrained-checkpoint {0}/run")),
    ),
    Advice("To resume, give --target-length {}{}", with_(f"--target-length 192 --rotary-base 5e5 {LONGER}", RESUME),
           (with_(f"--target-length 384 --rotary-base 10000 {LONGER}", RESUME),)),
    Advice("keeps its files there; give a folder beside it", with_("--save-hf {0}/new/hf", FROM_HF),
           (with_("--save-hf {0}/beside", FROM_HF),)),
    Advice(
        "python tools/convert_hf.py export --checkpoint {} --hf-path {}",
        with_("--save-hf {0}/out", without("--save {0}/new", FROM_HF)),
        (("tools/convert_hf.py", "export", "--checkpoint", "{0}/.out.checkpoint", "--hf-path", "{0}/out"),),
        lambda w: (w / "new").rename(w / ".out.checkpoint"), FROM_HF,
    ),
    Advice("--load-hf {} with --pretrained-checkpoint: give one of the two",
           with_("--pretrained-checkpoint {0}/ckpt", FROM_HF), (FROM_HF,)),
    # ------------------------------------------------ the tools
    Advice("is not empty. Give a new folder, or --overwrite", with_("--output {0}/ckpt", IMPORT),
           (IMPORT, with_("--output {0}/ckpt --overwrite", IMPORT))),
    Advice("--overwrite replaces only files of a conversion", with_("--output {0}/ckpt --overwrite", IMPORT), (IMPORT,),
           put("ckpt/mine.txt", "mine")),
    Advice("only with --format torch", with_("--tensor-model-parallel-size 2", IMPORT),
           (with_("--tensor-model-parallel-size 2 --format torch", IMPORT),)),
    Advice("{}: only with --longppl", with_("--key-token-model {0}/hf --short-context 32", PERPLEXITY_OF_LONG)
           + ("--no-longppl",),
           (with_("--key-token-model {0}/hf --short-context 32 --longppl", PERPLEXITY_OF_LONG),), LONG_TEXTS),
    Advice("--longppl-bos: only with --longppl", with_("--longppl-bos --no-longppl", PERPLEXITY_OF_LONG),
           (with_("--longppl-bos --longppl --short-context 32", PERPLEXITY_OF_LONG),), LONG_TEXTS),
    Advice("puts no BOS before a text. Use --convention ours", with_("--convention pose", PERPLEXITY_OF_LONG),
           (with_("--convention ours", PERPLEXITY_OF_LONG),),
           also(LONG_TEXTS, lambda w: save_tokenizer(w / "hf", bos=False))),
    Advice("must be above --short-context", with_("--longppl", PERPLEXITY_OF_LONG),
           (with_("--longppl --short-context 32", PERPLEXITY_OF_LONG),), LONG_TEXTS),
    Advice("another folder, or --overwrite", with_("--seed 5", EVALUATE),
           (with_("--seed 5 --overwrite", EVALUATE),), before=EVALUATE),
    Advice("has no tokenizer{}. Give --tokenizer", EVALUATE_CKPT, (with_("--tokenizer {0}/hf", EVALUATE_CKPT),),
           also(remove("ckpt/hf/tokenizer.json"), remove("ckpt/hf/tokenizer_config.json"))),
    Advice("no tokenizer there. --tokenizer takes", with_("--tokenizer {0}/ckpt/release", EVALUATE),
           (with_("--tokenizer {0}/hf", EVALUATE),)),
    Advice("its columns are {}; choose one with --json-key", with_("--input {0}/two.parquet", PREPARE),
           (with_("--input {0}/two.parquet --json-key body", PREPARE),), two_columns),
    Advice("name others with --glob", with_("--input {0}/books", PREPARE),
           (with_("--input {0}/books --glob *.md", PREPARE),), markdown),
    Advice("give another --glob", with_("--input {0}/books --glob *.rst", PREPARE),
           (with_("--input {0}/books --glob *.md", PREPARE),), markdown),
    Advice("do not append one (--no-append-eod)", PREPARE, (with_("--no-append-eod", PREPARE),), special_tokens_gone),
    Advice("no BOS token to prepend (--no-prepend-bos)", with_("--prepend-bos --no-append-eod", PREPARE),
           (with_("--no-prepend-bos --no-append-eod", PREPARE),), special_tokens_gone),
    Advice("choose one with --chat-template: {}", with_("--chat-format tokenizer", PREPARE),
           (with_("--chat-format tokenizer --chat-template brief", PREPARE),), named_template),
    Advice("--chat-template: only with --chat-format tokenizer", with_("--chat-template brief", PREPARE),
           (with_("--chat-format tokenizer --chat-template brief", PREPARE),), named_template),
    Advice("give another prefix, or --overwrite", PREPARE,
           (with_("--overwrite", PREPARE), with_("--output-prefix {0}/other", PREPARE)), before=PREPARE),
    Advice("--vocab-size is missing: give the tokenizer's", with_("--tokenizer-type HuggingFaceTokenizer", PLANNED),
           (with_("--vocab-size 100", PLANNED), with_("--load-hf {0}/hf", PLAN))),
    Advice("give --recompute-method and --recompute-num-layers with it",
           with_("--vocab-size 100 --recompute-granularity full", PLANNED),
           (with_("--vocab-size 100 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
                  PLANNED),)),
    Advice("needs --transformer-impl transformer_engine",
           with_("--vocab-size 100 --transformer-impl local --attention-backend te", PLANNED),
           (with_("--vocab-size 100 --transformer-impl transformer_engine --attention-backend te", PLANNED),)),
    Advice("needs Transformer Engine; leave out --transformer-impl local",
           with_("--vocab-size 100 --transformer-impl local --fp8-format hybrid", PLANNED),
           (with_("--vocab-size 100 --fp8-format hybrid", PLANNED),)),
    Advice("--use-precision-aware-optimizer: needs --use-distributed-optimizer",
           with_("--vocab-size 100 --use-precision-aware-optimizer", PLANNED),
           (with_("--vocab-size 100 --use-precision-aware-optimizer --use-distributed-optimizer", PLANNED),)),
    Advice("only with --use-precision-aware-optimizer", with_("--vocab-size 100 --main-grads-dtype bf16", PLANNED),
           (with_("--vocab-size 100 --main-grads-dtype bf16 --use-precision-aware-optimizer "
                  "--use-distributed-optimizer", PLANNED),)),
    Advice("has no FP8; leave it out, or choose another --gpu",
           with_("--vocab-size 100 --fp8-format hybrid --gpu A100", PLANNED),
           (with_("--vocab-size 100 --fp8-format hybrid --gpu H100", PLANNED),
            with_("--vocab-size 100 --gpu A100", PLANNED))),
]  # fmt: skip

NOT_FOLLOWED = {
    "{}: needs {} ranks. Start torchrun": "evaluation/test_ranks.py starts so many",
    "ranks cannot be shared out. Use": "evaluation/test_ranks.py starts so many",
    "torchrun --nnodes: an evaluation": "evaluation/test_ranks.py starts them on one node",
    "rope scaling depends on the whole text": "evaluation/test_ranks.py uses --tensor-model-parallel-size",
    "torchrun --nproc_per_node {}: this machine": "needs a GPU",
    "needs --dtype bf16 or fp16 on a GPU": "needs a GPU",
    "Use --batch-size 1": "needs a full GPU; evaluation/test_ranks.py checks that it fits",
    "Use --kv-cache-dtype fp8": "needs a full GPU; evaluation/test_fp8.py checks that it fits",
    "not with --cuda-graph-impl local, which records single": "needs a GPU; config/test_bad_inputs.py has the line",
    "CUDA graphs, because the GPU would wait": "needs a GPU; training/test_gpu.py runs without graphs by that flag",
    "--cuda-graphs: only with --engine megatron": "needs a GPU; evaluation/test_cuda_graphs.py has the line",
    "--cuda-graphs: only for a Megatron checkpoint": "needs a GPU; evaluation/test_suites.py has the line",
    "--kv-cache-dtype fp8: lm_eval": "needs vLLM; evaluation/test_fp8.py has the line, and runs without the flag",
    "the attention kernel of this run needs": "about the environment; config/test_parse.py follows it",
    "has the columns {}; choose one with --json-key": "data/test_chat_data.py",
    "--tp-comm-overlap": "needs Transformer Engine and GPUs",
    "--offload-modules {}: only with": "needs Transformer Engine; config/test_memory_flags.py follows it",
    "--recompute-modules {}: only with": "config/test_memory_flags.py follows it",
    "--attention-backend flash: needs": "needs a GPU",
    "not with Transformer Engine's attention and --context-parallel-size": "needs Transformer Engine and GPUs",
    "which would replay the documents of the first": "needs a GPU",
    "attention bias needs": "Megatron's own layers, which no flag of this project's asks for",
    "give --wandb-exp-name too": "needs an account",
    "--tokenizer-model is missing": "needs a sentencepiece model; training/test_default_run.py trains with one",
    "torchrun --max-restarts on several nodes": "needs two nodes; tests/slurm has them",
    "--engine vllm": "needs vLLM; evaluation/test_vllm.py",
    "out of memory at {} tokens": "needs a full GPU; evaluation/test_evaluate.py has the line",
    "Use --micro-batch-size {} instead of": "training/test_out_of_memory.py follows it until the run trains",
    "Add --recompute-granularity selective --recompute-modules mlp": "needs a full GPU; training/test_gpu_memory.py",
    "use fewer --workers": "needs memory that runs out",
    "--tasks {} needs {}": "needs published data; evaluation/test_tasks_ruler.py has some",
    "contains an unfinished run with another": "data/test_resume_preprocess.py",
    "takes a chat template from a --tokenizer-type": "data/test_chat_templates.py",
    "Add --rope-scaling-type yarn (or ntk, linear)": "model/test_rope_choice.py",
    "If it is {}: --original-max-position-embeddings {}": "model/test_rope_choice.py",
    "leave --eod-mask-loss out": "needs a tokenizer without EOD; config/test_bad_inputs.py has the line",
    "Start again, with another --output-prefix": "needs a disk that is faulty",
    "use torchrun --nproc_per_node={} or less": "needs GPUs",
    "worker processes need space; use --workers 1": "needs a full /dev/shm; commands/test_no_room.py has the line",
    "Try --dtype fp32": "needs weights whose logits overflow in half precision alone",
    "free. --no-save-optim saves": "needs a full host; saving the weights alone needs none of this memory",
    "Make it larger, or save without --async-save": "needs a full /dev/shm; saving without it is the default",
    "no supported family has both --add-qkv-bias": "names no way on",
    "which --chat-format llama2 needs": "names no way on: another tokenizer",
    "which --chat-format tokenizer needs": "names no way on: another tokenizer",
    "which this layout needs": "names no way on: the layout is that of the files",
    "has no place for results": "needs a model card of an export; evaluation/test_comparison.py has the line",
    "Leave out --rope-scaling-factor for a factor that fits": "model/test_rope_choice.py",
    "A resumed run keeps its rotary embedding: give": "config/test_rope_runs.py",
    "Use --override-opt-param-scheduler{} for the schedule of these flags": "checkpoint/test_schedule.py",
    "the last {} steps train at the minimum rate": "checkpoint/test_schedule.py",
    "--rotary-interleaved: only models without it": "names no way on: Llama's rotary embedding is the other one",
    "the distributed optimizer resumes only at step": "needs a checkpoint of Megatron-LM; checkpoint/test_resume.py",
    "--use-rope-scaling. Give --rope-scaling-type llama3": "config/test_rope_runs.py",
    "--convention cream scores one window": "names no way on: CREAM's convention has no stride",
    "Give the model's own tokenizer with --tokenizer": "evaluation/test_evaluate_faults.py has the line",
    "or --long-eval-tasks without perplexity": "needs a tokenizer of text: evaluation/test_long_evaluation.py",
}
"""A piece of the line -> why its advice is not followed here."""

INSTEAD = {
    "use_rope_scaling": ("--use-rope-scaling", "--rope-scaling-type llama3"),
    "rotary_seq_len_interpolation_factor": ("--rotary-seq-len-interpolation-factor 2", "--rope-scaling-type linear"),
    "reset_position_ids": ("--reset-position-ids", "--position-sampler cream"),
    "spec": ("--spec a b", "--attention-backend auto"),
    "non_persistent_save_interval": ("--non-persistent-save-interval 1", "--save-interval 1"),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "--use-distributed-optimizer"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "--use-distributed-optimizer"),
    "enable_ft_package": ("--enable-ft-package", "--timeout-minutes 5"),
}
"""Megatron's name -> its flag, and this project's, of `flag_support.REJECTED`."""
