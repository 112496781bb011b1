# %% [markdown]
# # Bring your own iterative model
#
# Any loop that refines a state can be measured: with a callback inside the loop, from a file that the loop left, or
# by loading the module itself. The example is a loop whose contraction is known, so that the numbers can be checked.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import dynprobe as dp

RHO = 0.7


def refine(start, target, steps, on_iteration):
    """Move towards a target; the distance shrinks by RHO with every step."""
    state = start
    on_iteration(0, state)
    for k in range(1, steps + 1):
        state = target + RHO * (state - target)
        on_iteration(k, state)
    return state


# %% [markdown]
# ## A callback in the loop
#
# `cb(k, state)` hears iteration k; 0 is the state before the first update. Nothing else of the loop has to change.

# %%
torch.manual_seed(0)
start, target = torch.randn(2, 2, 5, 32).unbind(0)
with dp.trace_callback(dims="batch,pos,dim", ids=["a", "b"], meta={"model": "toy", "trained_iterations": 20}) as cb:
    refine(start, target, steps=20, on_iteration=cb)

run = dp.ingest(cb, out="runs")
run.samples[["prompt_id", "kappa_phase", "delta_rel_prev", "converge_rho", "converge_iterations"]]

# %% [markdown]
# `converge_rho` finds the contraction that was put in. `converge_iterations` is the number of updates until the
# absolute residual is below 0.001; had it never been, the value would be missing with the reason `censored`, and not
# the last iteration.

# %%
residual = run.pivot("delta_rms", index="iteration", columns="prompt_id", table="depths")
figure, axes = plt.subplots(figsize=(6, 3))
residual.plot(ax=axes, logy=True, marker="o", xlabel="iteration", ylabel="Δ (rms)")
figure.savefig("residual.png", bbox_inches="tight")

# %% [markdown]
# ## A file, for others
#
# The same states as a file that can be measured by anyone without the model. `dynprobe import --template` prints
# plain NumPy that writes such a file; nothing of dynprobe is in it.

# %%
cb.save("states.safetensors")
again = dp.ingest("states.safetensors", out="elsewhere")
(again.samples["converge_rho"] == run.samples["converge_rho"]).all()

# %% [markdown]
# ## The module itself
#
# Where the model is a torch module, name what runs again and again. Then states can be written too, and every
# perturbation, sweep and threshold works on iterations as it does on layers.


# %%
class Core(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, state):
        return state + 0.3 * (torch.tanh(self.mix(state)) - state)


class Looped(nn.Module):
    def __init__(self, vocabulary=64, dim=32, iterations=8):
        super().__init__()
        self.embed, self.core = nn.Embedding(vocabulary, dim), Core(dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)
        self.iterations = iterations

    def forward(self, input_ids):
        state = self.embed(input_ids)
        for _ in range(self.iterations):
            state = self.core(state)
        return self.head(self.norm(state))


subject = dp.load(Looped().eval(), loop="core")
tape = dp.capture(subject, torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), logits="all")
pushed = dp.capture(subject, tape.token_ids, perturb="alpha=0.5,iterations=2", logits="all")
for d in (0, 2, 3, 5, 8):
    moved = (pushed.states[d] - tape.states[d]).norm() / tape.states[d].norm()
    print(f"iteration {d}: moved by {float(moved):.3f} of the norm")

# %% [markdown]
# The write at `iterations=2` shows in the state after it, and the loop forgets it step by step.
#
# ## What to watch out for
#
# - Iteration 0 is the state **before** the first update. A file that begins later counts from its own zero, and what
#   needs the start says so.
# - A residual below a tolerance means only that the state stopped moving. Whether the answer is better there is
#   another question; see the iterations in [an energy model beside a Transformer](energy_beside_transformer.md).
# - States run at one depth and read at several are a trajectory only if the model has the prefix property. `dynprobe
#   validate` tries it where a file has both. All of it: [trajectory files](../trajectories.md), [looped
#   models](../iterations.md).
