# %% [markdown]
# # An energy model beside a Transformer
#
# `tiny-cem` refines its states by steps down an energy: two in each attention and two in each MLP. `tiny-csm` refines
# sixteen vectors by one loop. `tiny-llama` is a plain Transformer. All three saw the same bytes in the same order and
# have the same number of parameters within 2.5 %. Here they stand on one axis.

# %%
import matplotlib.pyplot as plt

import dynprobe as dp

runs = {name: dp.run(name, limit=4, max_new_tokens=0, out="runs") for name in ("tiny-llama", "tiny-cem", "tiny-csm")}
for name, run in runs.items():
    clean = run.samples.query("condition_id == 'clean'")
    print(f"{name:11} depths {run.depths['depth'].nunique():3}   NLL {clean['nll'].mean():.3f} nats/byte")

# %% [markdown]
# ## The same axis
#
# The depth axis counts updates of the state: layers of the Llama, steps inside the layers of the CEM, iterations of
# the CSM. `compare` puts them on a normalised depth and gives two numbers for κ, which must be read together: the
# mean angle of a step, and the length of the whole path.

# %%
compared = dp.compare(list(runs.values()), condition="clean")
kappa = compared.depth_means.query("metric == 'kappa_phase'")
kappa[[c for c in ("run", "measure", "mean", "low", "high", "n") if c in kappa]].round(4)

# %%
compared.figure("kappa_phase").savefig("kappa.png", bbox_inches="tight")
compared.figure("kappa_phase")

# %% [markdown]
# The path is the sum of the angles. A model that takes eighteen small steps and one that takes two large ones may
# walk the same way: by κ alone the first would look calm and the second restless.
#
# The comparison also says what must not be read off it:

# %%
for text in compared.warnings:
    print("-", text)

# %% [markdown]
# ## Energy
#
# A CEM has an energy of its own for every loop. `energy_prev` is the energy of the state before an update and
# `energy` that after it, under the same energy; so one row tells whether the update went down.

# %%
rows = (
    runs["tiny-cem"]
    .depths.query("sample_id.str.contains('clean')", engine="python")
    .dropna(subset=["energy", "energy_prev"])
)
rows = rows.assign(down=rows["energy"] < rows["energy_prev"], change=rows["energy"] - rows["energy_prev"])
rows.groupby(["layer", "component", "iteration"], observed=True)[["down", "change"]].mean().round(3)

# %% [markdown]
# The share of tokens whose energy fell, and the mean change, for every step. Nothing forces a trained preconditioned
# step to go down at every token, which is why it is measured.
#
# ## More iterations
#
# A CSM-style model can be asked for any number of iterations.

# %%
study = dp.iterate("tiny-csm", iterations=[1, 2, 4, 8, 15, 30], limit=4, out="runs")
study.plot.iterations(save="iterations.png")

# %% [markdown]
# Δ keeps falling while the loss has its lowest point well before the last iteration: a state that comes to rest is
# not the same as an answer that gets better. `run.summary["iterations"]` holds the numbers with their intervals.
#
# ## What this does not show
#
# One model of each kind, one training seed, less than a million parameters. The differences are between *these three
# sets of weights*. For a statement about architectures take a [panel](../panel.md) with several seeds, depths and
# widths, and look at how far apart two seeds of one cell lie.
