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

settings = {"limit": 6, "max_new_tokens": 24, "decode": "forced", "out": "runs"}
mild = dp.recover("tiny-llama", mode="none", perturb="alpha=0.9,layers=1,phase=decode", **settings)

# %% [markdown]
# ## First the detector
#
# Before any mode acts, the detector only looks on: clean texts against perturbed ones. `kappa_phase_zmax` is the
# largest step angle over depth, in standard deviations of that step on calibration text. It comes on after three
# tokens in a row above the 99 % quantile of clean text.


# %%
def power(run):
    """The detector's power on given text, before anything acts."""
    found = run.summary["detector"]["forced"]
    return {
        "AUC": found["auc"]["value"],
        "on, clean": found["duty_clean"],
        "on, perturbed": found["duty_perturbed"],
        "verdict": found["blind"] or "sees",
    }


pd.DataFrame([power(mild)]).round(3)

# %% [markdown]
# The signal orders the texts perfectly (an AUC of 1; 0.5 would be a coin), and still the loop would sleep: at fewer
# than 5 % of the perturbed tokens it is on. The verdict is `DETECTOR_BLIND`, and no recovery fraction would be given
# for what waits for it. A signal that separates texts is not yet a detector that fires. Now a stronger push, and a
# mode: `slerp` turns a state back along the arc of its last step.

# %%
run = dp.recover(
    "tiny-llama", mode="slerp", perturb="alpha=1.5,layers=1,phase=decode", timings="detector,oracle", **settings
)
pd.DataFrame([power(run)]).round(3)

# %% [markdown]
# ## Then what came back
#
# RF = (perturbed − recovered)/(perturbed − clean): 1 is all of it, 0 nothing, below 0 harm. The column `acted_on` is
# the important one: what a controller acts on recovers **by construction**.

# %%
fits = run.table("fits")
shown = fits[fits["metric"].isin(["nll", "kl_clean_pert", "delta_rel_prev"])]
shown[["condition_id", "metric", "rf", "low", "high", "acted_on"]].round(3)

# %% [markdown]
# Read the rows of `delta_rel_prev` first: the step lengths come back, by the detector in part, and where the mode
# acts at exactly the noisy tokens (`oracle`) in full or beyond. That metric is marked. Then the rows nobody acted on:
# KL and NLL stay where the perturbation put them, and so do those of `random:slerp`, which writes the same energy at
# the same tokens in directions that mean nothing. The dynamics look repaired; what the model says is not.

# %%
run.plot.recovery(save="recovery.png")

# %% [markdown]
# Hollow marks are acted on and are no evidence. A bar without end is a fraction whose denominator may be zero: the
# push did not move that metric for certain.
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
# `dynprobe.testing.check_controller` tries the whole contract on it: that it detaches, that rows do not see each
# other, that a second pass gives the same. `dp.recover(model, mode=[Halve(), "slerp"])` studies it like the others,
# with a random control that replays its energies.
#
# ## What this does not show
#
# Six texts; a model of four layers; noise that is on at every new token. That a mode recovers a number says nothing
# about meaning: for that there are items with right answers, `dynprobe dissociate`, and a verdict that may be
# `INDETERMINATE`. See [why recovery under its own signal proves nothing](../concepts/own_signal.md).
