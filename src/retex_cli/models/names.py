"""What checkpoint files call a transformers model's tensors: since version 5 modules may have names of their own, and a
model with a head may be filled from the file of one without."""

from __future__ import annotations

import re

import torch


def saved_names(module: torch.nn.Module) -> dict[str, str]:
    """Name in a file -> name in ``module.state_dict()``, of the tensors whose two names differ.

    Tensors that a file has in another shape (experts of a mixture, fused) have no such pair. What lies in the base
    model (``transformer.h.0…`` of GPT-2 with a head) may stand in a file as that model's own (``h.0…``). Empty for
    modules that are not transformers'.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return {}
    # stand-ins without data: only which object comes out under which name counts
    own = {name: torch.empty_like(value, device="meta") for name, value in module.state_dict().items()}
    names = {id(value): name for name, value in own.items()}
    saved = revert_weight_conversion(module, own)
    pairs = {there: names.get(id(value), there) for there, value in saved.items()}
    start = f"{module.base_model_prefix}."
    bare = {there.removeprefix(start): ours for there, ours in pairs.items() if there.startswith(start)}
    return {there: ours for there, ours in {**bare, **pairs}.items() if there != ours}


def passed_over(module: torch.nn.Module, name: str) -> bool:
    """Whether transformers itself leaves out a tensor of this name where the module has no place for it: masks that
    older versions saved."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
