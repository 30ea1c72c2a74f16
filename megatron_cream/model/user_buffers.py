"""How Transformer Engine's user buffers send (--tp-comm-overlap), where no --tp-comm-overlap-cfg says it."""

from argparse import Namespace
from pathlib import Path

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import read_yaml

PRODUCTS = {f"{layer}_{way}" for layer in ("qkv", "proj", "fc1", "fc2") for way in ("fprop", "dgrad", "wgrad")}
RINGS = Path(__file__).with_suffix(".yaml")


def rings_are_faster(tensor_model_parallel_size: int, fp8: bool) -> bool:
    """Than Transformer Engine's own default; where that was measured."""
    return tensor_model_parallel_size == 2 and not fp8


def sends_in_rings(args: Namespace) -> bool:
    own = args.tp_comm_overlap_cfg is not None
    return args.tp_comm_overlap and not own and rings_are_faster(args.tensor_model_parallel_size, bool(args.fp8))


def fill(args: Namespace) -> None:
    if sends_in_rings(args):
        args.tp_comm_overlap_cfg = str(RINGS)
        args.tp_comm_overlap_rs_dgrad = True  # the input's gradient is reduced beside its own product


def check(path: str) -> None:
    """What --tp-comm-overlap-cfg names: a YAML mapping of products to settings of Transformer Engine's.

    Raises:
        UsageError: it is none.
    """
    flag = f"--tp-comm-overlap-cfg {path}"
    try:
        config = read_yaml(Path(path), "a YAML file") or {}
    except UsageError as error:
        raise UsageError(f"--tp-comm-overlap-cfg {error}") from error
    if not isinstance(config, dict) or not all(isinstance(settings, dict) for settings in config.values()):
        raise UsageError(f"{flag}: must map products ({', '.join(sorted(PRODUCTS))}) to their settings")
    if unknown := [name for name in config if name not in PRODUCTS]:
        raise UsageError(f"{flag}: {unknown[0]}: no such product; choose from {', '.join(sorted(PRODUCTS))}")
