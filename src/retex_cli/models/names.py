"""What checkpoint files call a transformers model's tensors: since version 5 modules may have names of their own."""

from __future__ import annotations

import torch


def saved_names(module: torch.nn.Module) -> dict[str, str]:
    """Name in a file -> name in ``module.state_dict()``, of the tensors whose two names differ.

    Tensors that a file has in another shape (experts of a mixture, fused) have no such pair. Empty for modules that are
    not transformers'.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return {}
    # stand-ins without data: only which object comes out under which name counts
    own = {name: torch.empty_like(value, device="meta") for name, value in module.state_dict().items()}
    names = {id(value): name for name, value in own.items()}
    saved = revert_weight_conversion(module, own)
    return {there: names[id(value)] for there, value in saved.items() if names.get(id(value), there) != there}
