"""Counts against torch's own counter, which sees every matrix product that is executed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reflowlens.config import preset
from reflowlens.flops import (
    forward_flops_by_part,
    forward_flops_per_token,
    mfu,
    named_peak_flops,
    peak_flops,
    training_flops_per_token,
)
from tests.support.tiny import random_tokens, tiny_config

CONTEXT = 12


@pytest.mark.parametrize("batch", [2, 40])  # tiny reFlows whose basis is square or wide form E at 480 positions
def test_every_product_of_both_passes_is_counted(model, batch):
    tokens = random_tokens(model.cfg, batch, CONTEXT)
    # The plain kernel computes the whole square of scores, and none of it twice; the fused ones are not counted on CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
        forward = counter.get_total_flops()
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    model.zero_grad()
    parts = forward_flops_by_part(model.cfg, CONTEXT, batch=batch)
    square = parts["attention_mixing"] * 2 * CONTEXT / (CONTEXT + 1)
    whole = sum(parts.values()) - parts["attention_mixing"] + square
    assert forward == whole * batch * CONTEXT
    assert counter.get_total_flops() == 3 * forward
    assert training_flops_per_token(model.cfg, CONTEXT, batch=batch) == 3 * sum(parts.values())


def test_a_long_pass_forms_the_embedding_and_a_short_one_does_not():
    cfg = tiny_config("reflow")
    assert forward_flops_by_part(cfg, CONTEXT, batch=2)["forming"] == 0
    assert forward_flops_by_part(cfg, CONTEXT, batch=40)["forming"] > 0
    assert forward_flops_per_token(cfg, CONTEXT, batch=40) < forward_flops_per_token(cfg, CONTEXT, batch=2)


def test_causal_attention_is_half_the_square_and_the_diagonal():
    cfg = tiny_config("gpt2_new")
    pairs = sum(position + 1 for position in range(CONTEXT))  # of a query and a key it may look at
    per_pair = 2 * 2 * cfg.n_layers * cfg.n_heads * cfg.d_head
    assert forward_flops_by_part(cfg, CONTEXT)["attention_mixing"] == pytest.approx(pairs * per_pair / CONTEXT)


def test_six_operations_a_parameter_and_token():
    """Kaplan et al.'s 6 N, N without what is only looked up, is what remains of training without attention's mixing."""
    cfg = preset("gpt2_new")
    products = training_flops_per_token(cfg, 1024) - 3 * forward_flops_by_part(cfg, 1024)["attention_mixing"]
    assert products == 6 * (514_008_064 - (2 * cfg.n_layers + 1) * cfg.d_model)  # norms


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("Tesla T4", torch.float16, False, 65),
        ("Tesla T4", torch.bfloat16, False, None),
        ("Tesla T4", torch.float32, True, 8.1),
        ("NVIDIA A10", torch.bfloat16, False, 125),
        ("NVIDIA A100-PCIE-40GB", torch.float32, False, 19.5),
        ("NVIDIA A100 80GB PCIe", torch.float32, True, 156),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756),
        ("NVIDIA H200", torch.bfloat16, False, 989.4),
        ("NVIDIA L4", torch.bfloat16, False, 121),
        ("NVIDIA L40S", torch.bfloat16, False, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, False, None),
        ("NVIDIA GeForce RTX 3090", torch.float64, False, None),
        ("Some Other GPU", torch.bfloat16, False, None),
    ],
)
def test_peaks_by_name(name, dtype, tf32, tera):
    assert named_peak_flops(name, dtype, tf32=tf32) == (None if tera is None else tera * 1e12)


def test_a_cpu_has_no_known_peak_and_then_no_utilisation():
    assert peak_flops("cpu", torch.bfloat16) is None
    assert mfu(1000.0, 1e6, None) is None
    assert mfu(1000.0, 1e6, 1e10) == pytest.approx(0.1)
