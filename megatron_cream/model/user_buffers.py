"""Default settings of Transformer Engine's user buffers (--tp-comm-overlap)."""

from pathlib import Path

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import read_yaml

MATRIX_PRODUCTS = {f"{layer}_{way}" for layer in ("qkv", "proj", "fc1", "fc2") for way in ("fprop", "dgrad", "wgrad")}
RING_CONFIG = Path(__file__).with_suffix(".yaml")
"""Settings for ring exchange, which sends with copy engines."""


def is_ring_faster(tensor_model_parallel_size: int, fp8: bool) -> bool:
    """Return whether ring exchange was measured to be faster than the default."""
    return tensor_model_parallel_size in (2, 4) and not fp8


def check_config(path: str) -> None:
    """Check that --tp-comm-overlap-cfg is a YAML mapping of matrix products to settings.

    Raises:
        UsageError: it is not.
    """
    flag = f"--tp-comm-overlap-cfg {path}"
    try:
        config = read_yaml(Path(path), "a YAML file") or {}
    except UsageError as error:
        raise UsageError(f"--tp-comm-overlap-cfg {error}") from error
    if not isinstance(config, dict) or not all(isinstance(settings, dict) for settings in config.values()):
        raise UsageError(f"{flag}: must map matrix products ({', '.join(sorted(MATRIX_PRODUCTS))}) to their settings")
    if unknown := [name for name in config if name not in MATRIX_PRODUCTS]:
        known = ", ".join(sorted(MATRIX_PRODUCTS))
        raise UsageError(f"{flag}: {unknown[0]}: no such matrix product; choose from {known}")
