"""Llama and its kin (Mistral, Qwen2), as imported (Touvron et al., 2023): the shared decoder, tied or untied."""

from __future__ import annotations

from reflowlens.models.decoder import Decoder


class Llama(Decoder):
    """GPT-2-New's shape, with what public checkpoints differ in left to the configuration.

    That is: grouped-query attention, the rotary base and its scaling, biases, and a readout of its own.
    """
