"""What ranks tell each other of faults, once the process group is there."""

import torch


def first_reason(why: str) -> str:
    """The first rank's `why` that is not empty; every rank calls this, and is given the same."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return why
    reasons = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, why)
    return next(filter(None, reasons), "")
