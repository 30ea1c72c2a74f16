"""Tests that readers of user files, given any bytes, return a value or a one-line error within seconds."""

import json
import pickle
import shutil
from argparse import Namespace

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_cream.config import run_data
from megatron_cream.config.checks import data as data_checks
from megatron_cream.patches import platform

platform.setup()

from megatron_cream.checkpoint import hf_folder, opening, output
from megatron_cream.checkpoint.convert import import_hf
from megatron_cream.checkpoint.families import ModelShape, shape_from_config
from megatron_cream.checkpoint.hf_folder import HfFolder
from megatron_cream.common.errors import UsageError
from megatron_cream.config.checks import numbers as number_checks
from megatron_cream.config.parser import build_parser
from megatron_cream.config.recipe import read_recipe
from megatron_cream.data import indexed
from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig
from tests.hf_models import save_model

# No deadline per example: a hang, or gigabytes of allocation, would still be noticed.
SOON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PARSER = build_parser(recipe=False)
DEFAULTS = vars(PARSER.parse_args([]))
NAMES = sorted(flag[2:] for action in PARSER._actions for flag in action.option_strings if flag.startswith("--"))

NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -1, 0, 2**63])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)


def value_or_one_line(read):
    """Return read(), or None if it raises a one-line UsageError."""
    try:
        return read()
    except UsageError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return None


def mutated(data: bytes, edits: list[tuple[float, bytes]], keep: float | None) -> bytes:
    """Overwrite bytes at fractions of the length, then keep only the first fraction `keep`."""
    found = bytearray(data)
    for at, new in edits:
        begin = int(at * len(found))
        found[begin : begin + len(new)] = new
    return bytes(found if keep is None else found[: int(keep * len(found))])


EDITS = st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5)
KEEP = st.none() | st.floats(0, 1)


# ---------------------------------------------------------------- recipes


YAML = st.text(st.sampled_from("lr: -[]{}&*!?|>'\"#%@\n\t0x1.eN~<_"), max_size=60)
RECIPES = st.one_of(
    st.binary(max_size=80),
    YAML.map(str.encode),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), VALUES, max_size=5).map(
        lambda recipe: yaml.safe_dump(recipe).encode("utf-8", "surrogatepass")
    ),
)


@settings(max_examples=400, **SOON)
@given(RECIPES)
@example(b"? !!python/object/apply:os.getcwd []\n: 1")
@example(b"lr: 0b" + b"1" * 300_000)
@example(b"lr: 190:20:30:40")
def test_any_recipe(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    found = value_or_one_line(lambda: read_recipe(path, PARSER))
    assert found is None or found.keys() <= DEFAULTS.keys()


@settings(max_examples=300, **SOON)
@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), NUMBERS, max_size=4))
def test_any_numbers(values):
    args = Namespace(**DEFAULTS | values)
    before = dict(vars(args))
    value_or_one_line(lambda: number_checks.check(args, DEFAULTS))
    assert all(a is b for a, b in zip(vars(args).values(), before.values(), strict=True))


# ---------------------------------------------------------------- Hugging Face folders


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "hf"
    save_model(folder, "llama-mha")
    return folder


@settings(max_examples=200, **SOON)
@given(
    st.binary(max_size=60)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(max_size=5), st.text(max_size=8) | PLAIN, max_size=4).map(
        lambda found: json.dumps({"weight_map": found}).encode()
    )
)
@example(b'{"weight_map": {"a": "\\u0000"}}')
@example(b'{"weight_map": {"a": "//etc/passwd"}}')
@example(b"[" * 100_000)
def test_any_index_of_shards(hf, tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(content)
    (folder.parent / "outside.safetensors").write_bytes(b"")
    assert value_or_one_line(lambda: hf_folder._find_weights(folder) or True) is None  # the folder contains no shard


CONFIG_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "architectures",
    "hidden_act",
    "tie_word_embeddings",
    "max_position_embeddings",
    "sliding_window",
    "layer_types",
    "use_sliding_window",
    "attention_bias",
    "quantization_config",
    "partial_rotary_factor",
    "torch_dtype",
    "dtype",
)
ROPES = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast"]),
    PLAIN | st.sampled_from(["linear", "yarn", "llama3", "dynamic", "longrope", "default"]),
)


@settings(max_examples=300, **SOON)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]) | PLAIN,
    st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES | ROPES, max_size=4),
)
@example("qwen2", {"num_hidden_layers": 10**12})
@example("llama", {"head_dim": 2**60})
@example("llama", {"use_sliding_window": ["long" * 999]})
@example("long" * 999, {})
@example("llama", {"architectures": ["long" * 999]})
@example("llama", {"rope_scaling": {"rope_type": "linear", "factor": "long" * 999}})
@example("llama", {"max_position_embeddings": "long" * 999, "hidden_act": "long" * 999})
def test_any_configuration(hf, model_type, changes):
    raw = json.loads((hf / "config.json").read_text()) | {"model_type": model_type, "architectures": None} | changes
    raw = json.loads(json.dumps(raw))
    found = value_or_one_line(lambda: shape_from_config(raw, hf / "config.json"))
    assert found is None or isinstance(found, ModelShape)


@settings(max_examples=150, **SOON)
@given(EDITS, KEEP)
def test_any_damage_to_the_head_of_weights(hf, edits, keep):
    """The reader trusts only the header of a safetensors file."""
    data = (hf / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    folder = hf.with_name("damaged")
    shutil.copytree(hf, folder, dirs_exist_ok=True)
    body = data[head:] if keep is None else data[head:][: int(keep * len(data))]
    (folder / "model.safetensors").write_bytes(mutated(data[:head], edits, None) + body)
    value_or_one_line(lambda: HfFolder(folder))


# ---------------------------------------------------------------- Megatron checkpoints


@pytest.fixture(scope="module")
def checkpoint(hf):
    import_hf(HfFolder(hf), hf.with_name("ckpt"))
    return hf.with_name("ckpt")


@settings(max_examples=200, **SOON)
@given(st.binary(max_size=30) | st.integers().map(lambda n: str(n).encode()) | st.sampled_from([b"release", b" 7\n"]))
@example("٣".encode())
@example(b"1_000")
def test_any_tracker(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "tracker"
    folder.mkdir(exist_ok=True)
    (folder / output.TRACKER).write_bytes(content)
    found = value_or_one_line(lambda: opening.read_newest_step(folder, "--load"))
    assert found is None or found == "release" or found >= 0
    if content.strip().isdigit() and len(content) < 10:
        assert found == int(content)


@settings(max_examples=300, **SOON)
@given(EDITS, KEEP)
@example([(0.5, b"r\xff\xff\xff\xff")], None)  # a memo of 64 GB in pickle's C code
@example([(0.02, b"\x8d" + b"\xff" * 8)], None)
def test_any_damage_to_the_metadata(checkpoint, edits, keep):
    folder = checkpoint.with_name("damaged_metadata") / "release"
    if not folder.is_dir():
        shutil.copytree(checkpoint / "release", folder)
    (folder / ".metadata").write_bytes(mutated((checkpoint / "release" / ".metadata").read_bytes(), edits, keep))
    step = value_or_one_line(lambda: opening.open_step(folder, "--load"))
    assert step is None or step.args.num_layers == 3


@settings(max_examples=150, **SOON)
@given(st.binary(max_size=200) | VALUES.map(pickle.dumps))
def test_any_metadata(checkpoint, content):
    folder = checkpoint.with_name("other_metadata") / "release"
    if not folder.is_dir():
        shutil.copytree(checkpoint / "release", folder)
    (folder / ".metadata").write_bytes(content)
    assert value_or_one_line(lambda: opening.open_step(folder, "--load")) is None


@settings(max_examples=200, **SOON)
@given(EDITS)
def test_any_damage_to_the_common_state(checkpoint, edits):
    folder = checkpoint.with_name("damaged_state") / "release"
    if not folder.is_dir():
        shutil.copytree(checkpoint / "release", folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn.startswith("common_state"))
    data = (checkpoint / "release" / info.relative_path).read_bytes()
    entry = mutated(data[info.offset : info.offset + info.length], edits, None)[: info.length].ljust(info.length)
    (folder / info.relative_path).write_bytes(data[: info.offset] + entry + data[info.offset + info.length :])

    def read() -> opening.Step:
        step = opening.open_step(folder, "--load")
        opening.check_pickles(step, "--load", keys=step.pickled_keys())
        return step

    step = value_or_one_line(read)
    assert step is None or isinstance(step.args, Namespace)


# ---------------------------------------------------------------- the document filter


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([10, 95, 96, 200]), min_size=1, max_size=12),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    st.booleans(),
)
def test_short_documents_are_rejected_as_the_data_set_does(tmp_path_factory, lengths, split, evaluated):
    """The check at start-up agrees with the result of Megatron's dataset builder."""
    prefix = tmp_path_factory.mktemp("split") / "x"
    np.ones(sum(lengths), dtype=np.uint16).tofile(f"{prefix}.bin")
    indexed.write_index(prefix.with_suffix(".idx"), np.array(lengths, dtype=np.int32), np.uint16)
    flags = ["--data-path", prefix, "--split", ",".join(map(str, split)), "--seq-length", "96"]
    args = PARSER.parse_args([str(flag) for flag in [*flags, "--eval-iters", int(evaluated)]])
    config = LongDocumentDatasetConfig(
        random_seed=5,
        sequence_length=96,
        blend=([str(prefix)], None),
        split=args.split,
        sampler=dict(name="cream", window=96, target=384, sigma=3.0, variant="paper"),
    )
    samples = [4, 4 * evaluated, 4 * evaluated]
    try:
        built = BlendedMegatronDatasetBuilder(LongDocumentDataset, samples, lambda: True, config).build()
        right = built[0] is not None and (not evaluated or built[1] is not None)
    except UsageError:
        right = False

    def check() -> bool:
        data = run_data.read(args)
        data_checks.check(args, data)
        data_checks.check_splits(args, data)
        return True

    assert (value_or_one_line(check) is not None) == right
