"""Cases of bad recipes, flags, data and tool inputs: the damage, the command line to run, the expected message.

More cases of .bin/.idx files are in config/test_bad_data.py, of flags in config/test_parse.py.
"""

import json
import os
import shutil

import numpy as np

from tests.bad_input_cases import (
    EVALUATE,
    EXPORT,
    IMPORT,
    KV,
    NEW,
    NEW_WITHOUT_DATA,
    PERPLEXITY,
    PLAN,
    PREPARE,
    START,
    VERIFY,
    evil,
)
from tests.bad_inputs import also, documents, put, remove

BASE = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 4\nseq_length: 96\nmicro_batch_size: 2\ntrain_iters: 2\n"
BASE += "lr: 1e-3\ntokenizer_type: NullTokenizer\nvocab_size: 100\nsplit: 8,2,0\neval_iters: 1\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
# name: (text of recipe.yaml, words that the error message must contain)
RECIPES = {
    "a tag that calls": ("lr: !!python/object/apply:os.system ['touch pwned']", ["not a YAML file", "python/object"]),
    "a tag that makes": ("lr: !!python/object/new:os.popen ['touch pwned']", ["not a YAML file", "python/object"]),
    "a tag that names": ("lr: !!python/name:os.system", ["python/name:os.system"]),
    "an unknown tag": ("lr: !mine 3", ["!mine"]),
    "a billion laughs": (LAUGHS, ["aliases are not allowed in recipes"]),
    "nested deep": ("[" * 20_000, ["not a YAML file"]),
    "a key twice": (BASE + "lr: 2", ["lr is set twice"]),
    "a key twice, spelled in two ways": (BASE + "train-iters: 3", ["train-iters: is set twice"]),
    "a list": ("- lr\n- 3\n", ["must map flag names to values"]),
    "text": ("train it", ["must map flag names to values"]),
    "nothing": ("", ["must map flag names to values"]),
    "not text": (b"\x80\x81\x00\xff", ["recipe.yaml: not a YAML recipe"]),
    "zeros": (b"\0" * 100, ["not a YAML file"]),
    "too long": (b"a" * (2 << 20), ["recipe.yaml: not a YAML recipe", "MB or more"]),
    "two documents": (BASE + "---\nlr: 1", ["not a YAML file"]),
    "a tab": ("lr:\t1\n\tx: 2", ["not a YAML file"]),
    "a date that is none": ("lr: 2001-13-45", ["not a YAML file"]),
    "a number of 5000 digits": (f"lr: {'9' * 5000}", ["not a YAML file"]),
    "a time for a number": (BASE.replace("lr: 1e-3", "lr: 1:30"), ["1:30", "base 60"]),
    "an octal number": (BASE.replace("train_iters: 2", "train_iters: 010"), ["010", "base 8"]),
    "an unknown key": (BASE + "learning_rate: 3", ["unknown key 'learning_rate'"]),
    "a key that is a number": (BASE + "3: 4", ["unknown key 3"]),
    "the recipe's own flag": (BASE + "config: other.yaml", ["unknown key 'config'"]),
    "text for a number": (BASE.replace("train_iters: 2", "train_iters: two"), ["train_iters: 'two'", "a whole number"]),
    "a fraction": (BASE.replace("train_iters: 2", "train_iters: 2.5"), ["train_iters: 2.5", "a whole number"]),
    "true for a number": (BASE.replace("train_iters: 2", "train_iters: yes"), ["train_iters: True", "a whole number"]),
    "a list for a number": (BASE.replace("lr: 1e-3", "lr: [1, 2]"), ["lr: [1, 2]", "must be a number"]),
    "a mapping for a number": (BASE.replace("lr: 1e-3", "lr: {a: 1}"), ["lr: {'a': 1}", "must be a number"]),
    "nothing for a number": (BASE + "adam_beta1: null", ["adam_beta1: None", "must be a number"]),
    "a number for a switch": (BASE + "sequence_parallel: 1", ["sequence_parallel: 1", "true or false"]),
    "text for a list": (BASE + "eval_lengths: many", ["eval_lengths: 'many'", "whole numbers"]),
    "not one of the choices": (BASE + "position_sampler: alibi", ["position_sampler", "choose from cream"]),
    "no number": (BASE.replace("lr: 1e-3", "lr: .nan"), ["--lr nan", "must be a finite number"]),
    "infinity": (BASE + "clip_grad: .inf", ["--clip-grad inf", "must be a finite number"]),
    "a negative number": (BASE + "weight_decay: -1", ["--weight-decay -1.0", "must not be negative"]),
    "zero steps": (BASE.replace("train_iters: 2", "train_iters: 0"), ["--train-iters 0", "must be above 0"]),
    "zero samples": (BASE.replace("micro_batch_size: 2", "micro_batch_size: 0"), ["--micro-batch-size 0"]),
    "a NUL in a path": (BASE + 'load: "a\\0b"', ["--load 'a\\x00b'", "NUL"]),
    "half a character in a path": (BASE + 'tensorboard_dir: "\\ud800"', ["--tensorboard-dir '\\ud800'", "cannot contain"]),
    "an empty path": (BASE + "load_hf: ''", ["--load-hf '': must not be empty"]),
    "a huge number": (BASE.replace("num_layers: 2", f"num_layers: {10**15}"), ["--num-layers", "at most 10000"]),
    "a number of 40 digits": (BASE + f"eval_interval: {10**40}", ["--eval-interval", "64 bits"]),
}  # fmt: skip

# Flags that contradict one another or are out of range: (flags, ranks, words).
FLAGS = {
    "tensor parallelism": ("--tensor-model-parallel-size 3", 3, ["--tensor-model-parallel-size 3", "heads 4"]),
    "ranks": ("--tensor-model-parallel-size 2", 1, ["1 ranks", "--tensor-model-parallel-size 2"]),
    "global batch": ("--global-batch-size 7", 1, ["--global-batch-size 7", "multiple"]),
    "global batch and two ranks": ("--global-batch-size 6", 2, ["--global-batch-size 6", "2 data-parallel ranks"]),
    "target": ("--target-length 100", 1, ["--target-length 100", "multiple of --seq-length 96"]),
    "target below": ("--target-length 48 --rope-scaling-type none", 1, ["--target-length 48"]),
    "sampler's own flags": ("--position-sampler pose --cream-sigma 2", 1, ["--cream-sigma 2.0", "pose"]),
    "chunks of another sampler": ("--pose-chunks 3", 1, ["--pose-chunks 3", "pose"]),
    "one chunk": ("--position-sampler pose --pose-chunks 1", 1, ["--position-sampler pose", "chunks 1", "2 or more"]),
    "sigma of an even middle": ("--cream-middle uniform --cream-sigma 2", 1, ["--cream-sigma 2.0", "gaussian"]),
    "middle": ("--cream-middle wide", 1, ["--cream-middle", "wide"]),
    "mixture beside a sampler": ("--position-sampler pi --position-mix cream=1", 1, ["--position-mix", "pi"]),
    "mixture of nothing": ("--position-sampler mix", 1, ["--position-sampler mix", "--position-mix"]),
    "mixture without shares": ("--position-mix cream,pose", 1, ["--position-mix cream,pose", "'cream'"]),
    "mixture of a name twice": ("--position-mix pi=1,pi=2", 1, ["--position-mix", "pi", "twice"]),
    "mixture with full": ("--position-mix cream=1,full=1", 1, ["--position-mix", "sampler full"]),
    "mixture with a share below 0": ("--position-mix cream=1,pi=-1", 1, ["--position-mix", "share -1.0 of pi"]),
    "own flag of none in a mixture": ("--position-mix pi=1,pose=1 --cream-sigma 2", 1, ["--cream-sigma 2.0", "pose"]),
    "sigma is zero": ("--cream-sigma 0", 1, ["sigma 0.0"]),
    "sigma is no number": ("--cream-sigma nan", 1, ["--cream-sigma nan", "finite"]),
    "sigma is text": ("--cream-sigma wide", 1, ["--cream-sigma", "wide"]),
    "factor below one": ("--rope-scaling-factor 0.5", 1, ["0.5"]),
    "factor without scaling": ("--rope-scaling-type none --rope-scaling-factor 2", 1, ["--rope-scaling-factor 2.0"]),
    "learning rate": ("--lr -1", 1, ["--lr -1.0", "above 0"]),
    "least learning rate": ("--min-lr 1", 1, ["--min-lr 1.0", "at most --lr 0.01"]),
    "warm-up": ("--lr-warmup-iters 5", 1, ["--lr-warmup-iters 5", "below --train-iters 2"]),
    "beta": ("--adam-beta2 1", 1, ["--adam-beta2 1.0", "below 1"]),
    "dropout": ("--hidden-dropout 2", 1, ["--hidden-dropout 2.0", "below 1"]),
    "seed": ("--seed -4", 1, ["--seed -4"]),
    "interval": ("--log-interval 0", 1, ["--log-interval 0", "above 0"]),
    "Megatron's assertion": ("--overlap-param-gather", 1, ["--overlap-grad-reduce"]),
    "Megatron's assertion on two ranks": ("--overlap-param-gather", 2, ["--overlap-grad-reduce"]),
    "Megatron's assertion without words": ("--start-weight-decay 0.1", 1, ["assert args.start_weight_decay is None"]),
    "account of the embedding": (
        "--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split", 2, ["must divide --num-layers"],
    ),
    "adapters of no rank": ("--lora-rank -1", 1, ["--lora-rank -1", "must not be negative"]),
    "adapters on random weights": ("--lora-rank 4", 1, ["--lora-rank 4", "give --load-hf MODEL"]),
    "adapters of an unknown projection": ("--lora-rank 4 --lora-targets q_proj,qkv", 1, ["qkv: choose from q_proj"]),
    "adapters with an unknown part": ("--lora-rank 4 --lora-train heads", 1, ["--lora-train heads", "embeddings, norms"]),
    "adapters that drop all": ("--lora-rank 4 --lora-dropout 1", 1, ["--lora-dropout 1.0", "below 1"]),
    "NF4 in other layers": (
        "--lora-rank 4 --lora-base-dtype nf4 --attention-backend te", 1, ["--attention-backend te", "use auto"],
    ),
    "NF4 without adapters": ("--lora-base-dtype nf4", 1, ["--lora-base-dtype nf4: only with --lora-rank"]),
    "weights that nothing makes": ("--no-initialization", 1, ["--no-initialization", "give --load-hf"]),
    "a profile without a GPU": ("--profile", 1, ["--profile", "add --use-pytorch-profiler"]),
    "a record of no GPU's memory": ("--record-memory-history", 1, ["--record-memory-history", "needs a GPU"]),
    "FP8 without Transformer Engine": ("--fp8-format hybrid", 1, ["--fp8-format hybrid", "needs Transformer Engine"]),
    "a package that Megatron imports": ("--enable-msc", 1, ["--enable-msc", "multi-storage-client"]),
    "Megatron's model configuration": ("--defer-embedding-wgrad-compute", 1, ["embedding wgrad"]),
    "Megatron's enum": ("--exit-signal SIGWHAT", 1, ["--exit-signal", "SIGWHAT"]),
    "recompute": ("--recompute-granularity full", 1, ["recompute"]),
    "graphs without a GPU": ("--cuda-graph-impl local --te-rng-tracker", 1, ["--cuda-graph-impl local: needs a GPU"]),
    "recompute in graphs": (
        "--cuda-graph-impl local --recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1,
        ["--recompute-granularity full: not with --cuda-graph-impl local", "leave one of them out"],
    ),
    "groups smaller than the pipeline": (
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8 "
        "--microbatch-group-size-per-virtual-pipeline-stage 1", 2,
        ["--microbatch-group-size-per-virtual-pipeline-stage 1", "from --pipeline-model-parallel-size 2 to the 4"],
    ),
    "a last group that is too small": (
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8 "
        "--microbatch-group-size-per-virtual-pipeline-stage 3", 2,
        ["--microbatch-group-size-per-virtual-pipeline-stage 3", "leaves 1 of the 4"],
    ),
    "micro-batches that interleaved stages cannot share": (
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 6", 2,
        ["--global-batch-size 6: its 3 micro-batches must be a multiple of --pipeline-model-parallel-size 2"],
    ),
    "groups of no micro-batch": (
        "--microbatch-group-size-per-virtual-pipeline-stage -1", 1,
        ["--microbatch-group-size-per-virtual-pipeline-stage -1: must not be negative"],
    ),
    "modules of another model": (
        "--recompute-granularity selective --recompute-modules moe", 1, ["--recompute-modules moe", "choose from core_attn"],
    ),
    "modules without recompute": (
        "--recompute-modules mlp", 1, ["--recompute-modules mlp: only with --recompute-granularity selective"],
    ),
    "an optimizer on the host without a GPU": ("--optimizer-cpu-offload", 1, ["--optimizer-cpu-offload", "needs a GPU"]),
    "activations on the host without Transformer Engine": (
        "--fine-grained-activation-offloading --offload-modules core_attn", 1,
        ["--fine-grained-activation-offloading True", "needs Transformer Engine", "use --recompute-granularity"],
    ),
    "FSDP": ("--use-megatron-fsdp", 1, ["--use-megatron-fsdp", "use --use-distributed-optimizer"]),
    "code of a tokenizer's": ("--trust-remote-code", 1, ["--trust-remote-code", "not supported here"]),
    "another format of checkpoints": ("--ckpt-format torch", 1, ["--ckpt-format torch", "--save writes only torch_dist"]),
    "another kind of checkpoints": ("--non-persistent-save-interval 5", 1, ["--save-interval"]),
    "stragglers without a GPU": ("--log-straggler", 1, ["--log-straggler", "nvidia-ml-py"]),
    "unknown flag": ("--no-such-flag 1", 1, ["--no-such-flag"]),
    "save is a file": ("--save {0}/data.bin", 1, ["--save", "data.bin is not a folder"]),
    "save below a file": ("--save {0}/data.bin/x", 1, ["--save", "data.bin is not a folder"]),
    "TensorBoard where no folder can be": (
        "--tensorboard-dir /proc/no/folder", 1, ["--tensorboard-dir /proc/no/folder", "No such file or directory"]
    ),
    "TensorBoard in a file": ("--tensorboard-dir {0}/data.bin", 1, ["--tensorboard-dir", "is not a folder"]),
    "wandb without a name": ("--wandb-project x", 1, ["--wandb-project x", "--wandb-exp-name"]),
    "evaluation longer than the text": ("--eval-lengths 5000", 1, ["--eval-lengths 5000", "no held-out document"]),
    "no recipe": ("--config {0}/none.yaml", 1, ["--config", "none.yaml: No such file"]),
    "recipe is a folder": ("--config {0}/hf", 1, ["--config", "hf: not a file"]),
    "weights of a blend": ("--data-path nan {0}/data", 1, ["weight nan"]),
    "half a blend": ("--data-path 1 {0}/data {0}/data {0}/data", 1, ["there is no 1.bin"]),
    "negative weight": ("--data-path -1 {0}/data 2 {0}/data", 1, ["-1"]),
    "share of short texts": (
        "--short-data-path {0}/data --short-share 1", 1, ["--short-share 1.0: must be at least 0 and below 1"],
    ),
    "share of no texts": ("--short-share 0.3", 1, ["--short-share 0.3", "--short-data-path"]),
    "short texts without a share": ("--short-data-path {0}/data", 1, ["--short-data-path", "data", "--short-share"]),
    "no short text": (
        "--short-data-path {0}/data --short-share 0.3 --seq-length 72 --target-length 288", 1,
        ["--short-data-path", "data", "none of its 20 documents has from 2 to 72 tokens"],
    ),
    "short texts that are not there": ("--short-data-path {0}/no --short-share 0.3", 1, ["--short-data-path", "no.bin"]),
    "long texts that are short": ("--long-min-tokens 50", 1, ["--long-min-tokens 50", "--seq-length 96"]),
    "no text is that long": ("--long-min-tokens 5000", 1, ["--data-path", "none of its 20 documents has 5000 tokens"]),
    "split leaves no training": ("--split 0,8,2", 1, ["--split 0,8,2", "nothing to train on"]),
    "split of negatives": ("--split 8,-2,0", 1, ["--split 8,-2,0"]),
    "split leaves no long test": ("--split 8,1.999,0.001", 1, ["--split 8,1.999,0.001", "for test"]),
    "vocabulary": ("--vocab-size 60", 1, ["contains token id", "has 60"]),
    "keep no checkpoint": ("--save {0}/new --most-recent-k 0", 1, ["--most-recent-k 0", "above 0"]),
    "keep in another format": (
        "--save {0}/new --most-recent-k 2 --ckpt-format torch", 1, ["--most-recent-k 2: needs --ckpt-format torch_dist"],
    ),
    "hook that is nowhere": (
        "--save {0}/new --save-interval 1 --save-hook no-such-program", 1, ["--save-hook no-such-program", "not found"],
    ),
    "hook that is no program": (
        "--save {0}/new --save-interval 1 --save-hook {0}/data.bin", 1, ["--save-hook", "data.bin", "not executable"],
    ),
    "hook's quotation": ("--save {0}/new --save-hook 'up", 1, ["--save-hook: No closing quotation"]),
    "time of no hook": ("--save {0}/new --save-hook-minutes 3", 1, ["--save-hook-minutes 3.0: only with --save-hook"]),
    "hook's time": (
        "--save {0}/new --save-hook true --save-hook-minutes 0", 1, ["--save-hook-minutes 0.0", "above 0"],
    ),
    "two lists of data": ("--valid-data-path {0}/data", 1, ["--valid-data-path with --data-path", "one of the two"]),
    "two precisions": ("--fp16", 1, ["--fp16 with --fp32"]),
    "a signal that no process hears": ("--exit-signal SIGKILL", 1, ["--exit-signal SIGKILL", "SIGTERM"]),
    "another data loader": ("--dataloader-type external", 1, ["--dataloader-type external"]),
    "steps and samples": ("--train-samples 64", 1, ["--train-samples 64 with --train-iters"]),
    "two schedules": (
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler", 1,
        ["--override-opt-param-scheduler", "give one of the two"],
    ),
    "an optimizer that is not installed": ("--optimizer lion", 1, ["--optimizer lion", "emerging-optimizers"]),
    "an optimizer without shards": ("--optimizer sgd", 1, ["--use-distributed-optimizer", "--optimizer sgd"]),
    "attention's dropout": ("--attention-dropout 0.1", 1, ["--attention-dropout 0.1", "sdpa", "use 0"]),
    "minutes without end": ("--timeout-minutes 1e300", 1, ["--timeout-minutes", "at most"]),
    "a long name to save": (f"--save {{0}}/{'x' * 300}", 1, ["--save", "File name too long"]),
    "a long name to load": (f"--load {{0}}/{'x' * 300}", 1, ["--load", "File name too long"]),
    "the same place twice": ("--save-hf {0}/new", 1, ["--save-hf", "--save"]),
    "an export among checkpoints": ("--save-hf {0}/new/iter_0000002", 1, ["--save-hf", "--save"]),
    "an export where the tokenizer will be": ("--save-hf {0}/new/hf", 1, ["--save-hf", "--save"]),
    "an export around checkpoints": ("--save {0}/up/new --save-hf {0}/up", 1, ["--save-hf", "--save"]),
    "keeping what is not saved": (
        "--most-recent-k 1 --save-interval 2 --save-retain-interval 3", 1, ["--save-retain-interval 3", "--save-interval 2"],
    ),
    "tokenizer is no model": (
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model {0}/data.bin", 1, ["--tokenizer-type", "data.bin"],
    ),
    "tokenizer folder is none": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {0}/ckpt/release", 1, ["--tokenizer-type", "release"],
    ),
}  # fmt: skip

SHORT = documents("data", [[1] * 95, [2] * 40])
DATA = {
    "another's dtype": (
        also(documents("other", [[1] * 300], np.int32), lambda w: shutil.copy(w / "other.idx", w / "data.idx")),
        NEW, ["--data-path", "data.bin has"],
    ),
    "a short text outside the vocabulary": (
        documents("other", [[500] * 20]), (*NEW, "--short-data-path", "{0}/other", "--short-share", "0.3"),
        ["--short-data-path", "contains token id 500"],
    ),
    "all too short": (SHORT, NEW, ["none of its 2 documents has 96 tokens", "longest has 95"]),
    "pickle for data": (put("data.bin", b"\x80\x04cposix\nsystem\n."), NEW, ["--data-path", "data.bin has 17 bytes"]),
    "an index with a document too many": (
        lambda w: (w / "data.idx").write_bytes((w / "data.idx").read_bytes() + b"\0" * 8), NEW, ["data.idx has"],
    ),
    "cached blend cut": (
        put("cache/x-dataset_index.npy", b"\x93NUMPY"), (*NEW, "--data-cache-path", "{0}/cache"), ["x-dataset_index"],
    ),
    "cached blend runs code": (
        lambda w: ((w / "cache").mkdir(), np.save(w / "cache/x-dataset_index.npy", np.array([evil(w)], dtype=object))),
        (*NEW, "--data-cache-path", "{0}/cache"), ["x-dataset_index.npy is damaged"],
    ),
    "cached blend of another": (
        lambda w: ((w / "cache").mkdir(), np.save(w / "cache/x-dataset_sample_index.npy", np.zeros(3))),
        (*NEW, "--data-cache-path", "{0}/cache"), ["x-dataset_sample_index.npy is not an index of Megatron"],
    ),
    "list of data is empty": (put("list", ""), (*NEW_WITHOUT_DATA, "--data-args-path", "{0}/list"), ["--data-args"]),
    "list of data is none": (put("list", "{"), (*NEW_WITHOUT_DATA, "--per-split-data-args-path", "{0}/list"), ["list"]),
}  # fmt: skip

TOOL_CASES = {
    "preprocess: no input": (also(), ("tools/preprocess_data.py", *PREPARE[1:2], "{0}/none", *PREPARE[3:]), ["none"]),
    "preprocess: empty input": (put("texts.jsonl", ""), PREPARE, ["--input", "empty"]),
    "preprocess: no JSON": (put("texts.jsonl", "{\n"), (*PREPARE, "--strict"), ["texts.jsonl:1"]),
    "preprocess: a pipe": (
        lambda w: os.mkfifo(w / "pipe.jsonl"), (*PREPARE, "--input", "{0}/pipe.jsonl"), ["pipe.jsonl: not a file"],
    ),
    "preprocess: no such key": (put("texts.jsonl", '{"body": "x"}\n'), PREPARE, ["text"]),
    "preprocess: a chat template that fails": (
        also(
            put("texts.jsonl", json.dumps({"messages": [dict(role=r, content="a") for r in ("user", "assistant")]})),
            put("hf/chat_template.jinja", "{% for i in range(10**9) %}{{ i }}{% endfor %}"),
        ),
        (*PREPARE, "--chat-format", "tokenizer"), ["--input", "chat that the chat template rejects: 1"],
    ),
    "preprocess: workers": (also(), (*PREPARE, "--workers", "0"), ["--workers 0"]),
    "preprocess: glob": (also(), (*PREPARE, "--glob", "/etc/*", "--input", "{0}/hf"), ["--input", "--glob"]),
    "preprocess: output below a file": (
        also(), (*PREPARE, "--output-prefix", "{0}/texts.jsonl/x"), ["--output-prefix", "texts.jsonl"],
    ),
    "preprocess: damaged gzip": (
        put("texts.jsonl.gz", b"\x1f\x8b\x08\0garbage"), (*PREPARE, "--input", "{0}/texts.jsonl.gz"), ["jsonl.gz"],
    ),
    "preprocess: damaged parquet": (
        put("texts.parquet", b"PAR1xxxxPAR1"), (*PREPARE, "--input", "{0}/texts.parquet"), ["texts.parquet"],
    ),
    "preprocess: tokenizer is no model": (
        also(), (*PREPARE, "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "{0}/data.bin"),
        ["--tokenizer-model", "data.bin"],
    ),
    "import: output below a file": (also(), (*IMPORT[:-1], "{0}/data.bin/x"), ["--output", "data.bin"]),
    "import: vocabulary divisor": (
        also(), (*IMPORT, "--make-vocab-size-divisible-by", "99999999999"), ["--make-vocab-size-divisible-by", "67108864 or less"],
    ),
    "export: step is text": (also(), (*EXPORT, "--ckpt-step", "last"), ["--ckpt-step", "last"]),
    "export: step is negative": (also(), (*EXPORT, "--ckpt-step", "-3"), ["--checkpoint", "-000003"]),
    "export: shards of nothing": (also(), (*EXPORT, "--max-shard-size", "0"), ["--max-shard-size"]),
    "verify: no text": (also(), (*VERIFY, "--text-file", "{0}/none.txt"), ["none.txt: No such file"]),
    "verify: text is none": (put("x.txt", b"\xff"), (*VERIFY, "--text-file", "{0}/x.txt"), ["x.txt: not a text"]),
    "evaluate: no text": (remove("texts.jsonl"), PERPLEXITY, ["texts.jsonl"]),
    "evaluate: texts too short": (also(), PERPLEXITY, ["--dataset", "the longest has 3"]),
    "evaluate: no JSON": (put("texts.jsonl", "{\n"), PERPLEXITY, ["texts.jsonl"]),
    "evaluate: output is a file": (also(), (*EVALUATE, "--output", "{0}/data.bin"), ["--output", "data.bin"]),
    "evaluate: length": (also(), (*PERPLEXITY, "--lengths", "-5"), ["--lengths", "-5"]),
    "evaluate: step of no checkpoint": (also(), (*EVALUATE, "--ckpt-step", "2"), ["--ckpt-step 2"]),
    "evaluate: neither kind": (also(), (*KV, "{0}/run/iter_0000002"), ["neither a Hugging Face folder"]),
    "plan: a bad recipe": (
        put("recipe.yaml", "lr: !!python/name:os.system"), (*PLAN, "--config", "{0}/recipe.yaml"), ["python/name"],
    ),
    "plan: GPUs": (also(), (*PLAN, "--gpus", "-1"), ["--gpus", "-1"]),
    "plan: memory": (also(), (*PLAN, "--gpu-memory", "nan"), ["--gpu-memory", "nan"]),
    "plan: a target below the window": (
        also(), (*PLAN, *"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --target-length 100".split()), ["--target-length 100", "a multiple of --seq-length"],
    ),
    "plan: a shape": (also(), (*PLAN, "--num-layers", "-2"), ["--num-layers -2"]),
}  # fmt: skip

# Empty paths, as an unset shell variable leaves them.
_PATHS = {
    NEW: "save load load-hf save-hf pretrained-checkpoint data-path data-cache-path tensorboard-dir config",
    START: "tokenizer-model",
    PREPARE: "input output-prefix tokenizer-model",
    IMPORT: "hf-path output",
    EXPORT: "checkpoint hf-path",
    VERIFY: "text-file",
    EVALUATE: "model output tokenizer",
    PERPLEXITY: "dataset key-token-model",
    PLAN: "picture config load-hf",
    ("tools/plot_positions.py",): "output",
}
EMPTY_PATHS = {
    f"empty path: {command[0]} --{name}": (also(), (*command, f"--{name}", ""), [f"--{name}", "'': must not be empty"])
    for command, names in _PATHS.items()
    for name in names.split()
}
