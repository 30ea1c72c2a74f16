"""Rotary position embedding by explicit position ids: one source of frequencies for every path.

The configuration is the `rope_scaling` dict of a Hugging Face config.json, plus one
type that transformers lacks as a static one, `ntk`. The frequencies are, bit for bit,
those that transformers computes, so that a model is served with what it was trained with.
The angles are better: transformers multiplies positions and frequencies in float32, which near
position 262,143 is off by up to 0.008 radians; here they stay float64 until the last rounding.
"""

import math
from typing import Any

import torch
from torch import Tensor

ROPE_SCALING_TYPES = ("none", "linear", "ntk", "yarn", "llama3")
FOLLOW_LENGTH = ("dynamic", "longrope")
"""Types of loaded models whose frequencies transformers chooses anew for each call, by its longest position."""

DEFAULT_ROPE_THETA = 10000.0  # Llama 2's, whose config.json does not name it

# The keys of each type's dict: (required, optional).
#   factor: target window / pre-trained window.  original_max_position_embeddings: the latter, in tokens.
#   beta_fast (32), beta_slow (1); high_freq_factor, low_freq_factor: a dimension that turns more often
#     than the first within the pre-trained window keeps its frequency, less often than the second, it is
#     divided by factor.  truncate (true): round yarn's two bounds to whole dimensions.
#   attention_factor: multiplies cos and sin; else mscale with mscale_all_dim give it, else factor alone.
#   short_factor, long_factor: divisors of each frequency, for positions within the pre-trained window and beyond.
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
_WITHOUT_EFFECT = ("finetuned",)  # in the folders of YaRN's authors
_MOST_HEAD_DIM = 1 << 16  # a slip of the keyboard would be asked of the memory
_AT_LEAST = {"factor": 1, "mscale": 0, "mscale_all_dim": 0}  # every other number must be above 0
_USUAL = {"beta_fast": 32, "beta_slow": 1, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class RotaryEmbedding:
    """cos and sin for any position ids, per sample.

    Not a torch.nn.Module on purpose: no cast, no default dtype or device and no checkpoint
    can reach the frequencies.

    Attributes:
        head_dim: dimensions of one attention head; all of them rotate.
        rope_theta: the base, before any scaling.
        max_position_embeddings: position ids lie in [0, max_position_embeddings).
        rope_scaling: the checked dict without rope_theta, or None.
        inv_freq: float32 [head_dim / 2] on the CPU, radians per position.
        attention_factor: multiplies cos and sin; 1.0 except for yarn and longrope.

    Raises:
        ValueError: one line naming the setting, its value and what would be right.
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
        """Compute the frequencies of each dimension, with their scaling.

        Args:
            head_dim: dimensions of a head; even.
            rope_theta: None takes rope_scaling's own, as in transformers 5's `rope_parameters`, else 10000.
            max_position_embeddings: positions that the model is for.
            rope_scaling: `rope_type` (or the legacy `type`) and its keys; None for no scaling.
            by_length: of FOLLOW_LENGTH, choose the frequencies by the longest position of each call, as transformers
                does; else once, for max_position_embeddings, as training needs, whose samples and ranks must agree.
        """
        scaling = _checked(rope_scaling)
        rope_theta = _one_theta(rope_theta, scaling.pop("rope_theta", None))
        rope_type = scaling["rope_type"]
        smallest = 4 if rope_type in ("ntk", "dynamic") else 2  # their exponent is d / (d - 2)
        if head_dim < smallest or head_dim % 2:
            raise ValueError(f"head_dim {head_dim}: must be even and at least {smallest}")
        if head_dim > _MOST_HEAD_DIM:
            raise ValueError(f"head_dim {head_dim}: must be at most {_MOST_HEAD_DIM}")
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
        self.attention_factor = _attention_factor(scaling)
        # ntk is another base: the one that stretches the slowest dimension by `factor`.
        stretch = scaling["factor"] ** (head_dim / (head_dim - 2)) if rope_type == "ntk" else 1.0
        self._served_theta = rope_theta * stretch
        self._by_length = by_length and rope_type in FOLLOW_LENGTH
        self.inv_freq = _inv_freq(head_dim, self._served_theta, scaling, max_position_embeddings)
        self._inv_freq_float64: dict[torch.device, Tensor] = {}

    def cos_sin(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles position * inv_freq, times the attention factor.

        Evaluated in float64 and rounded once. Waits for the device at its first call there only,
        to copy the frequencies.

        Args:
            position_ids: int64 [b, s], any order.

        Returns:
            Two float32 tensors [b, s, head_dim]; the second half of head_dim repeats the first.

        Raises:
            ValueError: position_ids are not integers, or (on the CPU) one is out of range.
            On a CUDA device an id out of range trips a device-side assertion, which surfaces
            as a RuntimeError at some later call.
        """
        self._check_positions(position_ids)
        angles = position_ids[..., None] * self._frequencies(position_ids)
        cos = (angles.cos() * self.attention_factor).to(torch.float32)
        sin = (angles.sin() * self.attention_factor).to(torch.float32)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """float64 [head_dim / 2] on the device of position_ids."""
        device = position_ids.device
        if self._by_length and position_ids.numel():
            length = int(position_ids.max()) + 1
            inv_freq = _inv_freq(self.head_dim, self._served_theta, self.rope_scaling, length)
            return inv_freq.to(device, torch.float64)
        if device not in self._inv_freq_float64:
            self._inv_freq_float64[device] = self.inv_freq.to(device, torch.float64)
        return self._inv_freq_float64[device]

    def hf_config(self) -> dict[str, Any]:
        """The keys of a Hugging Face config.json that make transformers compute the same inv_freq.

        transformers 5 folds them into `rope_parameters`; older releases and other loaders read
        them as they are. `ntk` becomes the rope_theta that it amounts to.
        """
        scaling, positions = self.rope_scaling, self.max_position_embeddings
        if scaling is not None:
            # A copy: transformers writes rope_theta into the dict it is given.
            scaling = None if scaling["rope_type"] == "ntk" else dict(scaling)
        if scaling and scaling["rope_type"] == "dynamic":
            positions = scaling.pop("original_max_position_embeddings")  # its name there
        return {"rope_theta": self._served_theta, "rope_scaling": scaling, "max_position_embeddings": positions}

    def _check_positions(self, position_ids: Tensor) -> None:
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise ValueError(f"position_ids of {position_ids.dtype}: must be integers (int64)")
        limit = self.max_position_embeddings
        if position_ids.device.type == "cpu" and position_ids.numel():
            low, high = (int(x) for x in position_ids.aminmax())
            if low < 0 or high >= limit:
                raise ValueError(
                    f"position_ids from {low} to {high}: must lie in 0 .. {limit - 1} (max_position_embeddings {limit})"
                )
        elif position_ids.device.type == "cuda":
            within = ((position_ids >= 0) & (position_ids < limit)).all()
            torch._assert_async(within, f"position_ids out of range 0 .. {limit - 1}")


def apply_rotary(x_SBHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head by its position's angle.

    Computed in float32 (float64 for float64 input), both ways, and rounded once to x's dtype.
    Autograd keeps cos and sin only, which all layers share, and nothing of x.

    Args:
        x_SBHD: queries or keys [s, b, n, head_dim].
        cos: float32 [b, s, head_dim] as `RotaryEmbedding.cos_sin` returns it; the first half is read.
        sin: as `cos`.

    Returns:
        [s, b, n, head_dim], of x's dtype.
    """
    half = x_SBHD.shape[-1] // 2
    cos_SB1H, sin_SB1H = (t[..., :half].transpose(0, 1).unsqueeze(2) for t in (cos, sin))
    # The cast comes first so that the two gradients of each element are summed in float32 as well.
    x1, x2 = x_SBHD.to(torch.promote_types(x_SBHD.dtype, torch.float32)).chunk(2, dim=-1)
    y1 = (x1 * cos_SB1H - x2 * sin_SB1H).to(x_SBHD.dtype)
    y2 = (x2 * cos_SB1H + x1 * sin_SB1H).to(x_SBHD.dtype)
    return torch.cat((y1, y2), dim=-1)


def rope_scaling_dict(
    rope_type: str, factor: float, original_max_position_embeddings: int | None = None, **extra: Any
) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json, with the values usual for its type.

    Args:
        rope_type: one of ROPE_SCALING_TYPES; `none` gives None.
        factor: target window / pre-trained window.
        original_max_position_embeddings: the pre-trained window; used by yarn and llama3.
        extra: further keys of the type, or other values for them; None leaves a key out.

    Raises:
        ValueError: one line naming the key, its value and what would be right.
    """
    if rope_type == "none":
        return None
    usual = {"rope_type": rope_type, "factor": factor}
    if rope_type in ("yarn", "llama3"):
        usual["original_max_position_embeddings"] = original_max_position_embeddings
        usual |= {key: value for key, value in _USUAL.items() if key in sum(_KEYS[rope_type], ())}
    if rope_type == "yarn":
        # Written out, for loaders that do not infer it.
        usual["attention_factor"] = yarn_attention_factor(_checked(usual | extra))
    return _checked(usual | extra)


def _checked(rope_scaling: dict[str, Any] | None) -> dict[str, Any]:
    """A copy with `rope_type` in place of the legacy `type`, and every value checked."""
    given = dict(rope_scaling or {"rope_type": "none"})
    legacy = given.pop("type", None)
    rope_type = given.pop("rope_type", legacy)
    rope_type = "none" if rope_type == "default" else rope_type  # transformers' name
    if rope_type not in _KEYS:
        raise ValueError(f"rope_scaling['rope_type'] {rope_type!r}: choose from {', '.join(_KEYS)}")
    # null in JSON means absent; for truncate alone transformers takes it as false, so it is refused below.
    values = {
        key: value
        for key, value in given.items()
        if (value is not None or key == "truncate") and key not in _WITHOUT_EFFECT
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
        below, above = ({**_USUAL, **values}[key] for key in (slow, fast))
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
    elif key in _AT_LEAST:
        ok, right = is_number and value >= _AT_LEAST[key], f"a number of at least {_AT_LEAST[key]}"
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


def _one_theta(argument: float | None, in_scaling: float | None) -> float:
    if None not in (argument, in_scaling) and argument != in_scaling:
        raise ValueError(f"rope_theta {argument}: rope_scaling['rope_theta'] says {in_scaling}; give one of them")
    theta = next((t for t in (argument, in_scaling) if t is not None), DEFAULT_ROPE_THETA)
    if not 1 < theta < math.inf:
        raise ValueError(f"rope_theta {theta}: must be a number above 1")
    return float(theta)


# The order of operations below decides the last bit; the tests hold it to transformers'.


def _inv_freq(head_dim: int, theta: float, scaling: dict[str, Any], length: int) -> Tensor:
    """float32 [head_dim / 2], always on the CPU; for `length` positions, where the type depends on that."""
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
            stretch = dynamic_as_ntk(scaling, length) ** (head_dim / (head_dim - 2))
            return 1.0 / (theta * stretch) ** exponents
        case "longrope":
            beyond = length > scaling["original_max_position_embeddings"]
            divisors = torch.tensor(scaling["long_factor" if beyond else "short_factor"], dtype=torch.float32)
            return 1.0 / (divisors * theta**exponents)
    return base_freq  # for ntk, theta is the scaled one


def _yarn_inv_freq(wavelengths: Tensor, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Fast dimensions as pre-trained, slow ones divided by factor, a linear ramp between.

    Source: Peng et al., "YaRN", arXiv 2309.00071, section 3.2. `wavelengths` [head_dim / 2] is
    in positions per radian.
    """
    head_dim = 2 * len(wavelengths)

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension that turns this often within the pre-trained window."""
        window = scaling["original_max_position_embeddings"]
        return (head_dim * math.log(window / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    start, end = (dimension_of(scaling.get(key, _USUAL[key])) for key in ("beta_fast", "beta_slow"))
    if scaling.get("truncate", True):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    end += 0.001 if start == end else 0  # a step rather than 0 / 0

    dimensions = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((dimensions - start) / (end - start)).clamp(0, 1)
    interpolated = 1.0 / (scaling["factor"] * wavelengths)
    return interpolated * (1 - kept) + (1.0 / wavelengths) * kept


def dynamic_as_ntk(scaling: dict[str, Any], length: int) -> float:
    """Return the factor by which dynamic scaling is ntk's at this many positions; 1 within the pre-trained window."""
    factor, window = scaling["factor"], scaling["original_max_position_embeddings"]
    return factor * max(length, window) / window - (factor - 1)


def _attention_factor(scaling: dict[str, Any]) -> float:
    match scaling["rope_type"]:
        case "yarn":
            return yarn_attention_factor(scaling)
        case "longrope" if "attention_factor" in scaling:
            return float(scaling["attention_factor"])
        case "longrope" if scaling["factor"] > 1:
            return math.sqrt(1 + math.log(scaling["factor"]) / math.log(scaling["original_max_position_embeddings"]))
    return 1.0


def yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """What multiplies cos and sin: as given, or 0.1 ln(factor) + 1, or a ratio of two such terms."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1)


def _llama3_inv_freq(base_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Like yarn's, with the ramp linear in rotations per window (Llama 3.1's own scaling)."""
    factor, window = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / base_freq  # in positions per turn
    kept = (window / wavelengths - low) / (high - low)
    ramp = (1 - kept) * base_freq / factor + kept * base_freq
    slow_or_ramp = torch.where(wavelengths > window / low, base_freq / factor, ramp)
    return torch.where(wavelengths < window / high, base_freq, slow_or_ramp)
