# %% [markdown]
# # Closing the loop
#
# Perturb a model while it reads, let a detector and a recovery mode act, and ask three questions that are easily
# taken for one. Does the detector see the noise? What comes back when the mode acts? And would the same energy in any
# direction have done as well?

# %%
import pandas as pd
import torch

import dynprobe as dp

run = dp.recover(
    "tiny-llama", mode="slerp", perturb="alpha=0.9,layers=0,phase=decode", limit=6, max_new_tokens=24, out="runs"
)
run

# %% [markdown]
# ## First the detector
#
# Before any mode acts, the detector only looks on: clean texts against perturbed ones. An AUC of 0.5 is a coin. A
# loop that does not see the noise recovers nothing, and a fraction would be an accident; then the verdict is
# `DETECTOR_BLIND` and no fraction is given.

# %%
pd.DataFrame(run.summary["detector"]).T

# %% [markdown]
# ## Then what came back
#
# RF = (perturbed − recovered)/(perturbed − clean): 1 is all of it, 0 nothing, below 0 harm. The column `acted_on` is
# the important one: what a controller acts on recovers **by construction**. `slerp` halves step angles, so κ phase
# falls whatever the text is worth.

# %%
fits = run.table("fits")
columns = ["arm", "condition_id", "decode_mode", "metric", "rf", "low", "high", "acted_on", "reason"]
fits[[c for c in columns if c in fits]].head(24).round(3)

# %%
run.plot.recovery(save="recovery.png")

# %% [markdown]
# Hollow marks are acted on and are no evidence. Read the filled ones beside `random:`, which writes the same energy
# at the same tokens and sites in directions that mean nothing.
#
# ## Token by token

# %%
run.plot.signal(save="signal.png")

# %% [markdown]
# ## A controller of your own
#
# A class with three short methods: what to remember, what to decide after each token, what to write at the next.


# %%
class Halve(dp.Controller):
    """Halve the states of a row whose last token came out of block 1 louder than 20."""

    reads = writes = "layers=1"

    def start(self, n_rows):
        return {"loud": torch.zeros(n_rows, dtype=torch.bool)}

    def decide(self, seen, memory):
        memory["loud"] = seen.states["resid_post", 1][:, -1].norm(dim=-1) > 20

    def act(self, state, site, seen, memory):
        return torch.where(memory["loud"][:, None, None], 0.5 * state, state)


subject = dp.load("tiny-llama")
with Halve().attach(subject) as handle:
    subject.model.generate(torch.tensor([[65, 66, 67]]), max_new_tokens=8, do_sample=False)
pd.DataFrame(handle.actions()).head()

# %% [markdown]
# `dynprobe.testing.check_controller` tries the whole contract on it: that it leaves clean rows alone, that it
# detaches, that rows do not see each other. `dp.recover(model, mode=[Halve(), "slerp"])` studies it like the others,
# with a random control that replays its energies.
#
# ## What this does not show
#
# Six texts; a model of four layers; noise that is on at every new token. That a mode recovers a number says nothing
# about meaning: for that there are items with right answers, `dynprobe dissociate`, and a verdict that may be
# `INDETERMINATE`. See [why recovery under its own signal proves nothing](../concepts/own_signal.md).
