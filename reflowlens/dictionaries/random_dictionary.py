"""The null of a trained dictionary: one of the same sizes and norms whose directions are random."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from reflowlens.arguments import random_seed
from reflowlens.dictionaries.dictionary import Dictionary


@torch.no_grad()
def random_dictionary(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """A dictionary whose encoder and decoder rows have the norms of a trained one's and random directions.

    An autoencoder's decoder row goes along its encoder row, as far as the trained one's does. The rows of a skip are
    random too, each of its norm: a trained skip alone says much of an MLP. Biases, thresholds, k and the hook points
    are the trained one's, so that it is spliced, evaluated and viewed as that is.

    Example: ``rl.signal_view(model, random_dictionary(rl.load_dictionary("reflow-nano-sae")))``
    """
    generator = torch.Generator().manual_seed(random_seed(seed))
    found = Dictionary(dataclasses.replace(dictionary.cfg, name=f"random {dictionary.cfg.name}".strip()))
    found.load_state_dict(dictionary.state_dict())
    for layer in found.each_layer():
        encoder = F.normalize(torch.randn(layer.W_enc.shape, generator=generator), dim=1).to(layer.W_enc)
        decoder = F.normalize(torch.randn(layer.W_dec.shape, generator=generator), dim=2).to(layer.W_dec)
        if dictionary.cfg.kind == "sae":
            cosine = F.cosine_similarity(layer.W_enc, layer.W_dec[:, 0], dim=1)[:, None]
            beside = F.normalize(decoder[:, 0] - (decoder[:, 0] * encoder).sum(1, keepdim=True) * encoder, dim=1)
            decoder = (cosine * encoder + (1 - cosine.square()).clamp(min=0).sqrt() * beside)[:, None]
        layer.W_enc.copy_(encoder * layer.W_enc.norm(dim=1, keepdim=True))
        layer.W_dec.copy_(decoder * layer.W_dec.norm(dim=2, keepdim=True))
        if layer.W_skip is not None:
            skip = F.normalize(torch.randn(layer.W_skip.shape, generator=generator), dim=1).to(layer.W_skip)
            layer.W_skip.copy_(skip * layer.W_skip.norm(dim=1, keepdim=True))
    return found.eval().requires_grad_(False)
