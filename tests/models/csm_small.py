"""A small random CSM-style model in float64, for numbers that are compared."""

import torch

from dynprobe.models import CsmConfig, CsmForCausalLM

SMALL = {"vocab_size": 32, "hidden_size": 20, "state_size": 12, "memory_size": 10}


def small(dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    model = CsmForCausalLM(CsmConfig(**{**SMALL, **more})).eval().to(dtype)
    with torch.no_grad():  # parameters that start at 0 or 1 must not hide a missing term
        for name in ("drive_gain", "drive_bias", "gate_bias"):
            getattr(model.model.landscape, name).add_(torch.randn_like(getattr(model.model.landscape, name)) * 0.3)
        model.model.refine.coupling_gain.add_(torch.randn(12, dtype=dtype) * 0.3)
        model.model.reader.log_temperature.fill_(0.2)
    return model


def tokens(batch=2, length=9, seed=1):
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(seed))
