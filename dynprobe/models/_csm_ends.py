"""Where the refinement of the CSM-style model begins and where it is read: s⁰ and the readout.

s⁰ is the memory m itself unless the configuration says otherwise: a learned constant, or noise. The noise is a pure
function of a seed and of the position among real tokens, the same for every row of a batch and on every device; two
seeds give two starts for the same input, which is what a test of path independence needs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.models._csm_config import CsmConfig
from dynprobe.models._csm_writer import rms

__all__ = ["CsmReader", "CsmStart"]


class CsmStart(nn.Module):
    """Memory to the state s⁰ that the refinement starts from; its output is iteration 0.

    Args:
        config: ``init`` and ``init_seed``.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        self.config = config
        if config.init == "learned":
            self.state = nn.Parameter(torch.empty(config.num_states, config.state_size))

    def forward(self, memory: Tensor, positions: Tensor) -> Tensor:
        """Return s⁰.

        Args:
            memory: m ``[batch, pos, slot, dim]``.
            positions: Number of real tokens before each ``[batch, pos]``.

        Returns:
            s⁰ of the shape of ``memory``.
        """
        if self.config.init == "memory":
            return memory
        if self.config.init == "learned":
            return self.state.to(memory.dtype).expand_as(memory)
        return self.noise(positions).to(memory)

    def noise(self, positions: Tensor) -> Tensor:
        """Standard normal states in float32 on the CPU, one draw per position, ``[batch, pos, slot, dim]``."""
        shape = (self.config.num_states, self.config.state_size)
        places, index = np.unique(positions.cpu().numpy(), return_inverse=True)
        key = np.array([self.config.init_seed, 0], dtype=np.uint64)
        drawn = [
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, int(place), 0])).standard_normal(shape)
            for place in np.maximum(places, 0)
        ]
        table = torch.from_numpy(np.stack(drawn).astype(np.float32))
        return table[torch.from_numpy(index.reshape(tuple(positions.shape)))]


class CsmReader(nn.Module):
    """Final state to the vector that the embedding matrix turns into logits.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        self.state_eps, self.eps = config.state_eps, config.norm_eps
        self.read = nn.Parameter(torch.empty(config.hidden_size, config.num_states * config.state_size))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.log_temperature = nn.Parameter(torch.empty(()))

    def forward(self, state: Tensor) -> Tensor:
        """Read ``[batch, pos, slot, dim]`` into ``[batch, pos, hidden]``."""
        flat = rms(state, self.state_eps).flatten(-2)
        y = rms(functional.linear(flat, self.read), self.eps, self.norm)
        return y * torch.exp(-self.log_temperature).to(y.dtype)
