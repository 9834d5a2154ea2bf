"""The identity of a model in results, caches and figures."""

from __future__ import annotations

import hashlib
import json

import torch

from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model


def model_hash(model: HookedModel) -> str:
    """SHA-256 over the configuration and the weights, the identity of a model in results and figures.

    Of a pruned model over its masks too.
    """
    model = hooked_model(model)
    digest = hashlib.sha256(json.dumps(model.cfg.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
