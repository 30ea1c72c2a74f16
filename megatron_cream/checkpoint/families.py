"""Describe the supported models, and convert between config.json and Megatron's flags."""

import json
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import window
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import read_json
from megatron_cream.model.rope_choice import ModelRope, count_served_positions
from megatron_cream.model.rotary import RotaryEmbedding


@dataclass(frozen=True)
class Family:
    """The differences of a transformers model type from Llama.

    architecture: class name in config.json.
    qkv_bias: query, key and value projections have a bias.
    qk_norm: each head's queries and keys are normalised (RMSNorm over head_dim) before the rotation.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),  # Llama 1, 2, 3.x, CodeLlama, TinyLlama, Vicuna, Yi ...
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}

# Keys of config.json that would change the model: (key, the only supported value, its other names).
_REQUIRED_VALUES = (
    ("hidden_act", "silu", "swish"),
    ("attention_bias", False),
    ("mlp_bias", False),
    ("use_sliding_window", False),
    ("partial_rotary_factor", 1.0),
    ("quantization_config", None),
)


_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 40,
}
"""Sizes in config.json, with upper limits that no model of these families reaches."""

_DTYPE_KEYS = ("dtype", "torch_dtype")  # ignored, because each tensor has its own dtype
_DTYPE_WORDS = (
    "auto",
    "float64",
    "double",
    "float32",
    "float",
    "bfloat16",
    "float16",
    "half",
    "float8_e4m3fn",
    "float8_e5m2",
)

_KINDS = (
    ("model_type", str, "text"),
    ("architectures", list, "a list"),
    ("rope_parameters", dict, "an object"),
    ("rope_scaling", dict, "an object"),
    ("tie_word_embeddings", bool, "true or false"),
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a Llama-like model, in Megatron's terms; sizes are numbers of elements.

    original_window: positions of pre-training, if config.json has them outside of the rope scaling.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied: bool
    norm_epsilon: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    original_window: int | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def rotary(self, *, by_length: bool = False) -> RotaryEmbedding:
        return RotaryEmbedding(
            by_length=by_length,
            head_dim=self.kv_channels,
            rope_theta=self.rope_theta,
            max_position_embeddings=self.max_position_embeddings,
            rope_scaling=self.rope_scaling,
        )

    def rope(self) -> ModelRope:
        """Return the model's rotary embedding settings."""
        return ModelRope(
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            positions=self.max_position_embeddings,
            original=self.original_window,
        )

    @property
    def window(self) -> int:
        """Positions that the model supports, after scaling."""
        return max(self.max_position_embeddings, count_served_positions(self.rope()))

    def megatron_args(self) -> dict[str, Any]:
        """Return the shape as values of Megatron's flags."""
        return dict(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            group_query_attention=self.num_query_groups != self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            vocab_size=self.vocab_size,
            untie_embeddings_and_output_weights=not self.tied,
            layernorm_epsilon=self.norm_epsilon,
            rotary_base=self.rope_theta,
            add_qkv_bias=self.family.qkv_bias,
            qk_layernorm=self.family.qk_norm,
        )

    def hf_config(self, base: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the config.json of this model.

        Args:
            base: the config.json it came from; its keys that do not describe the shape are kept.
        """
        config = dict(base) if base else {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
        config.pop("rope_parameters", None)  # new in transformers 5, which also reads the older keys
        config.pop("auto_map", None)  # refers to code files, which are not copied
        limits = {"max_position_embeddings", *window.OTHER_KEYS}
        if base and self._has_same_positions(base):
            limits = {key: config[key] for key in limits if key in config}
            if self.original_window and not limits.keys() & {"seq_length", "max_sequence_length"}:
                limits["original_max_position_embeddings"] = self.original_window  # it was inside rope_scaling
        else:
            config = {key: value for key, value in config.items() if key not in limits}
            limits = window.build_keys(self.max_position_embeddings, self.rope_scaling, self.original_window)
        rope = self.rotary().hf_config()
        if "factor" in (rope["rope_scaling"] or {}):  # vLLM rejects an integer here
            rope["rope_scaling"]["factor"] = float(rope["rope_scaling"]["factor"])
        return config | {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.norm_epsilon,
            **rope,
            **limits,
            **({"sliding_window": None} if self.model_type == "mistral" else {}),
        }

    def _has_same_positions(self, config: dict[str, Any]) -> bool:
        """Tell whether the rotary embedding and the window are those of another config.json."""
        other = shape_from_config(config, Path("config.json"))
        same_rope = (self.rope_theta, self.rope_scaling) == (other.rope_theta, other.rope_scaling)
        return same_rope and self.max_position_embeddings in (other.max_position_embeddings, other.window)


def read_config(folder: Path) -> tuple[dict[str, Any], ModelShape]:
    """Return config.json unchanged, and the shape that transformers derives from it.

    Raises:
        UsageError: the file is missing, unreadable or describes an unsupported model.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UsageError(f"{folder}: has no config.json. Give the folder of a Hugging Face model.")
    raw = read_json(path, "a readable model configuration")
    return raw, shape_from_config(raw, path)


def shape_from_config(raw: dict[str, Any], path: Path) -> ModelShape:
    """Return the shape that transformers derives from the contents of config.json.

    Args:
        raw: contents of config.json.
        path: the file, for messages.

    Raises:
        UsageError: as `read_config`.
    """
    from transformers import AutoConfig

    check_types(raw, path)
    raw = {key: value for key, value in raw.items() if key not in _DTYPE_KEYS}
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UsageError(f"{path}: model_type {_quote(model_type)}: only {', '.join(FAMILIES)} are supported")
    family = FAMILIES[model_type]
    for architecture in raw.get("architectures") or []:
        if not isinstance(architecture, str) or architecture.lower() != family.architecture.lower():  # LLaMAForCausalLM
            raise UsageError(f"{path}: architectures {_quote(architecture)}: only {family.architecture} is supported")
    for key, needed, *synonyms in _REQUIRED_VALUES:
        value = raw.get(key)
        if key in raw and value is not None and value not in (needed, *synonyms):
            shown = "" if isinstance(value, dict) else f" {one_line(json.dumps(value), 60)}"
            raise UsageError(f"{path}: {key}{shown}: not supported; only {json.dumps(needed)} is")
    for key in ("rope_parameters", "rope_scaling"):
        factor = (raw.get(key) or {}).get("partial_rotary_factor", 1.0)
        if factor != 1.0:
            raise UsageError(f"{path}: {key}: partial_rotary_factor {factor}: only 1.0 is supported")
    try:
        config = AutoConfig.for_model(**raw)
        config.standardize_rope_params()  # as in transformers: a window beside the rope dict overrides the one in it
        scaling = {k: v for k, v in (config.rope_parameters or {}).items() if k != "partial_rotary_factor"}
        theta = scaling.pop("rope_theta")
        original_window = _original_window(raw, scaling)
        if scaling.get("rope_type") == "dynamic":  # transformers uses only max_position_embeddings
            scaling["original_max_position_embeddings"] = config.max_position_embeddings
        heads = config.num_attention_heads
        shape = ModelShape(
            model_type=model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=heads,
            num_query_groups=config.num_key_value_heads or heads,
            kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            norm_epsilon=config.rms_norm_eps,
            rope_theta=float(theta),
            rope_scaling=None if scaling.get("rope_type", "default") == "default" else scaling,
            max_position_embeddings=config.max_position_embeddings,
            original_window=original_window,
        )
        shape = replace(shape, rope_scaling=shape.rotary().rope_scaling)
        _check_sizes(shape)
    except UsageError:
        raise
    except Exception as error:  # transformers' validation raises exceptions of many types
        raise UsageError(f"{path}: {one_line(error) or type(error).__name__}") from error
    if _has_sliding_window(config):
        sliding = getattr(config, "sliding_window", None)
        if sliding is None:  # no window, but layer_types has sliding layers
            raise UsageError(f"{path}: layer_types: only full_attention is supported")
        raise UsageError(
            f"{path}: sliding_window {sliding}: attention over a sliding window is not supported; "
            'only "sliding_window": null is'
        )
    return shape


def _original_window(raw: dict[str, Any], scaling: dict[str, Any]) -> int | None:
    """Return the window before a linear scaling, and remove it from `scaling`.

    None if config.json does not have it, or the scaling is not linear.
    FastChat's folders (Vicuna, LongChat) store the scaled window as max_sequence_length.
    """
    if scaling.get("rope_type") != "linear":
        return None
    window = scaling.pop("original_max_position_embeddings", None) or raw.get("original_max_position_embeddings")
    if window is None:
        window = raw.get("seq_length")  # the window before scaling: SGLang and vLLM multiply it by the factor
    if window is None and type(raw.get("max_sequence_length")) is int and scaling.get("factor"):
        window = round(raw["max_sequence_length"] / scaling["factor"])
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"original_max_position_embeddings {_quote(window)}: must be a whole number above 0")
    return window


def _quote(value: Any) -> str:
    """Return a value of a file for a message; a damaged file may have thousands of characters there."""
    return one_line(repr(value), 60)


def check_types(raw: Any, path: Path) -> None:
    """Check types and sizes in config.json that transformers accepts unchecked.

    An example is a billion layers. The configuration of an unsupported family only has to be a JSON object.

    Raises:
        UsageError: a value has the wrong type or is out of range.
    """
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: not a readable model configuration: not a JSON object")

    def reject(name: str, right: str):
        raise UsageError(f"{path}: {name} {_quote(raw[name])}: must be {right}")

    given = {name for name, value in raw.items() if value is not None}
    if isinstance(raw.get("model_type"), str) and raw["model_type"] not in FAMILIES:
        return
    for name, most in _SIZES.items():
        if name in given and (type(raw[name]) is not int or not 1 <= raw[name] <= most):
            reject(name, f"a whole number from 1 to {most}")
    for name in _DTYPE_KEYS:
        if name in given and not (isinstance(raw[name], str) and raw[name].removeprefix("torch.") in _DTYPE_WORDS):
            reject(name, f"one of {', '.join(_DTYPE_WORDS)}")
    for name, kind, right in _KINDS:
        if name in given and not isinstance(raw[name], kind):
            reject(name, right)
    if "rms_norm_eps" in given and not (type(raw["rms_norm_eps"]) in (int, float) and 0 < raw["rms_norm_eps"] < 1):
        reject("rms_norm_eps", "a number between 0 and 1")


def _has_sliding_window(config) -> bool:
    if getattr(config, "layer_types", None):
        return any(kind != "full_attention" for kind in config.layer_types)
    return getattr(config, "sliding_window", None) is not None


def _check_sizes(shape: ModelShape) -> None:
    for name, value in vars(shape).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{name} {value}: must be 1 or more")
    if shape.num_attention_heads % shape.num_query_groups:
        raise ValueError(
            f"num_key_value_heads {shape.num_query_groups}: must divide num_attention_heads {shape.num_attention_heads}"
        )


def shape_from_args(args: Namespace, original: ModelShape | None) -> ModelShape:
    """Return the model's shape from the flags saved in a checkpoint of this project.

    Args:
        args: the saved flags.
        original: shape of the Hugging Face model that training started from, if any.

    Raises:
        AttributeError: a flag is missing.
        ValueError: no supported family has these flags.
    """
    bias_and_norm = (args.add_qkv_bias, args.qk_layernorm)
    model_type = original.model_type if original else "llama"
    if bias_and_norm != (FAMILIES[model_type].qkv_bias, FAMILIES[model_type].qk_norm):
        families = {(family.qkv_bias, family.qk_norm): name for name, family in FAMILIES.items() if name != "mistral"}
        if bias_and_norm not in families:
            raise ValueError("no supported family has both --add-qkv-bias and --qk-layernorm")
        model_type = families[bias_and_norm]
    shape = ModelShape(
        model_type=model_type,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        vocab_size=original.vocab_size if original else args.vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
        norm_epsilon=args.layernorm_epsilon,
        rope_theta=float(args.rotary_base),
        rope_scaling=args.rope_scaling_config,
        max_position_embeddings=args.target_length,
        original_window=getattr(args, "rope_window", None),
    )
    same_rope = original and (shape.rope_theta, shape.rope_scaling) == (original.rope_theta, original.rope_scaling)
    if same_rope and original.window > shape.max_position_embeddings:  # trained at a shorter length: keep the window
        return replace(shape, max_position_embeddings=original.window, original_window=original.original_window)
    return shape
