"""Rotary position embedding by explicit position ids, for training and evaluation.

The configuration is the `rope_scaling` dict of a Hugging Face config.json, plus the type `ntk`,
which transformers has only in a dynamic form. The frequencies are bit-identical to those of
transformers, so a model is served with the frequencies that it was trained with. The angles are
more precise: transformers multiplies positions and frequencies in float32, which near position
262,143 has an error of up to 0.008 radians; here they are float64 until cos and sin are rounded.
"""

import math
from typing import Any

import torch
from torch import Tensor

ROPE_SCALING_TYPES = ("none", "linear", "ntk", "yarn", "llama3")
LENGTH_DEPENDENT_TYPES = ("dynamic", "longrope")
"""Types of loaded models whose frequencies transformers chooses for each call by its longest position."""

DEFAULT_ROPE_THETA = 10000.0  # Llama 2's, whose config.json does not have it

# The keys of each type's dict: (required, optional).
#   factor: target window / pre-trained window.
#   original_max_position_embeddings: pre-trained window in tokens.
#   beta_fast (32), beta_slow (1); high_freq_factor, low_freq_factor: rotations within the pre-trained
#     window. A dimension with more rotations than the first keeps its frequency; the frequency of one
#     with fewer rotations than the second is divided by factor.
#   truncate (true): round yarn's two bounds to whole dimensions.
#   attention_factor: multiplies cos and sin. If missing, it is computed from mscale and mscale_all_dim,
#     or from factor.
#   short_factor, long_factor: divisors of the frequencies for lengths within and beyond the pre-trained window.
_KEYS = {
    "none": ((), ()),
    "linear": (("factor",), ()),
    "ntk": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")),
}
_IGNORED_KEYS = ("finetuned",)  # in the models of YaRN's authors
_MAX_HEAD_DIM = 1 << 16  # a typing error must not allocate all memory
_MIN_VALUES = {"factor": 1, "mscale": 0, "mscale_all_dim": 0}  # every other number must be above 0
_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class RotaryEmbedding:
    """Rotary embedding: cos and sin for any position ids, for each sample.

    Not a torch.nn.Module on purpose: casts, default dtypes and devices, and checkpoints must not
    change the frequencies.

    Attributes:
        head_dim: dimensions of one attention head; all of them rotate.
        rope_theta: base of the frequencies, before any scaling.
        max_position_embeddings: position ids are in [0, max_position_embeddings).
        rope_scaling: checked dict without rope_theta, or None.
        inv_freq: float32 [head_dim / 2] on the CPU, radians per position.
        attention_factor: multiplies cos and sin; 1.0 except for yarn and longrope.

    Raises:
        ValueError: a setting is invalid. One line names it, its value and the valid values.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        rope_theta: float | None = None,
        max_position_embeddings: int,
        rope_scaling: dict[str, Any] | None = None,
        by_length: bool = False,
    ):
        """Compute the frequency of each dimension, with its scaling.

        Args:
            head_dim: dimensions of a head; even.
            rope_theta: base. None: rope_scaling's, as in transformers 5's `rope_parameters`, else 10000.
            max_position_embeddings: number of positions of the model.
            rope_scaling: `rope_type` (or the legacy `type`) and its keys; None for no scaling.
            by_length: for LENGTH_DEPENDENT_TYPES, choose the frequencies by the longest position of each call, as
                transformers does. Otherwise they are those of max_position_embeddings: in training all samples and
                ranks need the same frequencies.
        """
        scaling = _check_scaling(rope_scaling)
        rope_theta = _choose_theta(rope_theta, scaling.pop("rope_theta", None))
        rope_type = scaling["rope_type"]
        smallest = 4 if rope_type in ("ntk", "dynamic") else 2  # they have the exponent d / (d - 2)
        if head_dim < smallest or head_dim % 2:
            raise ValueError(f"head_dim {head_dim}: must be even and at least {smallest}")
        if head_dim > _MAX_HEAD_DIM:
            raise ValueError(f"head_dim {head_dim}: must be at most {_MAX_HEAD_DIM}")
        if max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings {max_position_embeddings}: must be at least 1")
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        if rope_type == "longrope":
            ratio = max_position_embeddings / scaling["original_max_position_embeddings"]
            scaling.setdefault("factor", max(ratio, 1.0))
            _check_divisors(scaling, head_dim // 2)
        self.rope_scaling = None if rope_type == "none" else scaling
        self.attention_factor = _compute_attention_factor(scaling)
        # ntk is a larger base, which divides the frequency of the slowest dimension by `factor`.
        stretch = scaling["factor"] ** (head_dim / (head_dim - 2)) if rope_type == "ntk" else 1.0
        self._scaled_theta = rope_theta * stretch
        self._by_length = by_length and rope_type in LENGTH_DEPENDENT_TYPES
        self.inv_freq = _compute_inv_freq(head_dim, self._scaled_theta, scaling, max_position_embeddings)
        self._inv_freq_float64: dict[torch.device, Tensor] = {}

    @property
    def depends_on_length(self) -> bool:
        """Whether `cos_sin` waits for the device to learn the longest position, and then computes frequencies."""
        return self._by_length

    def cos_sin(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the angles position * inv_freq, times the attention factor.

        Computed in float64 and rounded once. Only the first call on a device waits for it, to copy
        the frequencies.

        Args:
            position_ids: int64 [b, s], any order.

        Returns:
            Two float32 tensors [b, s, head_dim]; the second half of head_dim repeats the first.

        Raises:
            ValueError: position_ids are not integers, or (on the CPU) one is out of range.
            On a CUDA device an id out of range fails a device-side assertion, which is raised
            as a RuntimeError by a later call.
        """
        self._check_positions(position_ids)
        angles = position_ids[..., None] * self._frequencies(position_ids)
        cos = (angles.cos() * self.attention_factor).to(torch.float32)
        sin = (angles.sin() * self.attention_factor).to(torch.float32)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """Return the frequencies, float64 [head_dim / 2] on the device of position_ids."""
        device = position_ids.device
        if self._by_length and position_ids.numel():
            length = int(position_ids.max()) + 1
            inv_freq = _compute_inv_freq(self.head_dim, self._scaled_theta, self.rope_scaling, length)
            return inv_freq.to(device, torch.float64)
        if device not in self._inv_freq_float64:
            self._inv_freq_float64[device] = self.inv_freq.to(device, torch.float64)
        return self._inv_freq_float64[device]

    def hf_config(self) -> dict[str, Any]:
        """Return the keys of a config.json with which transformers computes this inv_freq.

        transformers 5 moves them into `rope_parameters`; older releases and other loaders read
        them as they are. `ntk` is written as the rope_theta that it is equivalent to.
        """
        scaling, positions = self.rope_scaling, self.max_position_embeddings
        if scaling is not None:
            # A copy, because transformers writes rope_theta into the dict that it gets.
            scaling = None if scaling["rope_type"] == "ntk" else dict(scaling)
        if scaling and scaling["rope_type"] == "dynamic":
            positions = scaling.pop("original_max_position_embeddings")  # called max_position_embeddings there
        return {"rope_theta": self._scaled_theta, "rope_scaling": scaling, "max_position_embeddings": positions}

    def _check_positions(self, position_ids: Tensor) -> None:
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise ValueError(f"position_ids of {position_ids.dtype}: must be integers (int64)")
        limit = self.max_position_embeddings
        if position_ids.device.type == "cpu" and position_ids.numel():
            low, high = (int(x) for x in position_ids.aminmax())
            if low < 0 or high >= limit:
                raise ValueError(
                    f"position_ids from {low} to {high}: must be in 0 .. {limit - 1} (max_position_embeddings {limit})"
                )
        elif position_ids.device.type == "cuda":
            within = ((position_ids >= 0) & (position_ids < limit)).all()
            torch._assert_async(within, f"position_ids out of range 0 .. {limit - 1}")


def apply_rotary(x_SBHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head by the angle of its position.

    Forward and backward compute in float32 (float64 for float64 input) and round once to x's dtype.
    Autograd keeps only cos and sin, which all layers share.

    Args:
        x_SBHD: queries or keys [s, b, n, head_dim].
        cos: float32 [b, s, head_dim] as returned by `RotaryEmbedding.cos_sin`; only the first half is read.
        sin: like `cos`.

    Returns:
        [s, b, n, head_dim], of x's dtype.
    """
    half = x_SBHD.shape[-1] // 2
    cos_SB1H, sin_SB1H = (t[..., :half].transpose(0, 1).unsqueeze(2) for t in (cos, sin))
    # Cast first, so that autograd sums the two gradients of each element in float32, too.
    x1, x2 = x_SBHD.to(torch.promote_types(x_SBHD.dtype, torch.float32)).chunk(2, dim=-1)
    y1 = (x1 * cos_SB1H - x2 * sin_SB1H).to(x_SBHD.dtype)
    y2 = (x2 * cos_SB1H + x1 * sin_SB1H).to(x_SBHD.dtype)
    return torch.cat((y1, y2), dim=-1)


def build_rope_scaling(
    rope_type: str, factor: float, original_max_position_embeddings: int | None = None, **extra: Any
) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a config.json, with the default values of its type.

    Args:
        rope_type: one of ROPE_SCALING_TYPES; `none` returns None.
        factor: target window / pre-trained window.
        original_max_position_embeddings: pre-trained window in tokens; used by yarn and llama3.
        extra: further keys of the type, or other values for them; None omits a key.

    Raises:
        ValueError: a key or value is invalid. One line names the key, its value and the valid values.
    """
    if rope_type == "none":
        return None
    scaling = {"rope_type": rope_type, "factor": factor}
    if rope_type in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = original_max_position_embeddings
        scaling |= {key: value for key, value in _DEFAULTS.items() if key in sum(_KEYS[rope_type], ())}
    if rope_type == "yarn":
        # Written explicitly for loaders that do not compute it.
        scaling["attention_factor"] = compute_yarn_attention_factor(_check_scaling(scaling | extra))
    return _check_scaling(scaling | extra)


def _check_scaling(rope_scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Check every value, and return a copy with `rope_type` instead of the legacy `type`."""
    given = dict(rope_scaling or {"rope_type": "none"})
    legacy = given.pop("type", None)
    rope_type = given.pop("rope_type", legacy)
    rope_type = "none" if rope_type == "default" else rope_type  # transformers' name
    if rope_type not in _KEYS:
        raise ValueError(f"rope_scaling['rope_type'] {rope_type!r}: choose from {', '.join(_KEYS)}")
    # null in JSON means absent, except for truncate, where transformers reads it as false: rejected below.
    values = {
        key: value
        for key, value in given.items()
        if (value is not None or key == "truncate") and key not in _IGNORED_KEYS
    }

    required, optional = _KEYS[rope_type]
    for key in required:
        if key not in values:
            raise ValueError(f"rope_scaling[{key!r}] is missing: {rope_type!r} needs {', '.join(required)}")
    for key, value in values.items():
        if key not in (*required, *optional, "rope_theta"):
            known = ", ".join((*required, *optional)) or "no further key"
            raise ValueError(f"rope_scaling[{key!r}] {value!r}: {rope_type!r} takes {known}")
        _check_value(key, value)
    for slow, fast in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        below, above = ({**_DEFAULTS, **values}[key] for key in (slow, fast))
        if not below < above:
            raise ValueError(f"rope_scaling[{slow!r}] {below}: must be below rope_scaling[{fast!r}], {above}")
    return {"rope_type": rope_type, **values}


def _check_value(key: str, value: Any) -> None:
    is_number = _is_number(value)
    if key == "truncate":
        ok, right = isinstance(value, bool), "true or false"
    elif key == "original_max_position_embeddings":
        ok, right = is_number and isinstance(value, int) and value > 0, "a whole number of tokens above 0"
    elif key in ("short_factor", "long_factor"):
        ok, right = isinstance(value, list) and all(_is_number(x) and x > 0 for x in value), "a list of numbers above 0"
    elif key in _MIN_VALUES:
        ok, right = is_number and value >= _MIN_VALUES[key], f"a number of at least {_MIN_VALUES[key]}"
    else:
        ok, right = is_number and value > 0, "a number above 0"
    if not ok:
        raise ValueError(f"rope_scaling[{key!r}] {value!r}: must be {right}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_divisors(scaling: dict[str, Any], needed: int) -> None:
    for key in ("short_factor", "long_factor"):
        if len(scaling[key]) != needed:
            raise ValueError(f"rope_scaling[{key!r}] has {len(scaling[key])} numbers: must be {needed}, head_dim / 2")


def _choose_theta(argument: float | None, in_scaling: float | None) -> float:
    if None not in (argument, in_scaling) and argument != in_scaling:
        raise ValueError(f"rope_theta {argument}: rope_scaling['rope_theta'] is {in_scaling}; give one of them")
    theta = next((t for t in (argument, in_scaling) if t is not None), DEFAULT_ROPE_THETA)
    if not 1 < theta < math.inf:
        raise ValueError(f"rope_theta {theta}: must be a number above 1")
    return float(theta)


# The order of operations below determines the last bit. Tests compare it with transformers.


def _compute_inv_freq(head_dim: int, theta: float, scaling: dict[str, Any], length: int) -> Tensor:
    """Return the frequencies for `length` positions, float32 [head_dim / 2] on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    base_freq = 1.0 / theta**exponents
    match scaling["rope_type"]:
        case "linear":
            return base_freq / scaling["factor"]
        case "yarn":
            return _yarn_inv_freq(theta**exponents, theta, scaling)
        case "llama3":
            return _llama3_inv_freq(base_freq, scaling)
        case "dynamic":
            stretch = compute_ntk_factor(scaling, length) ** (head_dim / (head_dim - 2))
            return 1.0 / (theta * stretch) ** exponents
        case "longrope":
            beyond = length > scaling["original_max_position_embeddings"]
            divisors = torch.tensor(scaling["long_factor" if beyond else "short_factor"], dtype=torch.float32)
            return 1.0 / (divisors * theta**exponents)
    return base_freq  # for ntk, theta is already scaled


def _yarn_inv_freq(wavelengths: Tensor, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Return YaRN's frequencies, float32 [head_dim / 2].

    Fast dimensions stay as pre-trained, slow ones are divided by factor, with a linear ramp between.
    Source: Peng et al., "YaRN", arXiv 2309.00071, section 3.2. `wavelengths` [head_dim / 2] is
    in positions per radian.
    """
    head_dim = 2 * len(wavelengths)

    def find_dimension(rotations: float) -> float:
        """Return the (fractional) dimension with this many rotations in the window."""
        window = scaling["original_max_position_embeddings"]
        return (head_dim * math.log(window / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    start, end = (find_dimension(scaling.get(key, _DEFAULTS[key])) for key in ("beta_fast", "beta_slow"))
    if scaling.get("truncate", True):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    end += 0.001 if start == end else 0  # a step, to avoid 0 / 0

    dimensions = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((dimensions - start) / (end - start)).clamp(0, 1)
    interpolated = 1.0 / (scaling["factor"] * wavelengths)
    return interpolated * (1 - kept) + (1.0 / wavelengths) * kept


def compute_ntk_factor(scaling: dict[str, Any], length: int) -> float:
    """Return the ntk factor of dynamic scaling at `length` positions.

    It is 1 within the pre-trained window.
    """
    factor, window = scaling["factor"], scaling["original_max_position_embeddings"]
    return factor * max(length, window) / window - (factor - 1)


def _compute_attention_factor(scaling: dict[str, Any]) -> float:
    match scaling["rope_type"]:
        case "yarn":
            return compute_yarn_attention_factor(scaling)
        case "longrope" if "attention_factor" in scaling:
            return float(scaling["attention_factor"])
        case "longrope" if scaling["factor"] > 1:
            return math.sqrt(1 + math.log(scaling["factor"]) / math.log(scaling["original_max_position_embeddings"]))
    return 1.0


def compute_yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """Return the multiplier of cos and sin.

    It is `attention_factor` if given, else 0.1 ln(factor) + 1, or with mscale and mscale_all_dim a ratio of two such
    terms.
    """
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1)


def _llama3_inv_freq(base_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Return Llama 3.1's frequencies: YaRN's with a ramp linear in rotations per window."""
    factor, window = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / base_freq  # positions per rotation
    kept = (window / wavelengths - low) / (high - low)
    ramp = (1 - kept) * base_freq / factor + kept * base_freq
    slow_or_ramp = torch.where(wavelengths > window / low, base_freq / factor, ramp)
    return torch.where(wavelengths < window / high, base_freq, slow_or_ramp)
