# %% [markdown]
# # A first run
#
# Load a model, look at its states, push on them by a measured amount, and read what happened. The model is
# `tiny-llama`, which comes with the package: four fifths of a million parameters, four layers, bytes as tokens.
# Nothing is downloaded.

# %%
import dynprobe as dp

subject = dp.load("tiny-llama")
subject

# %% [markdown]
# ## States
#
# `capture` runs one forward over texts and keeps the states. Depth *d* is the state that **enters** block *d*; the
# last depth is the state before the final norm.

# %%
tape = dp.capture(subject, ["In the beginning was the Word", "The king said unto him"], logits="all")
for d in range(len(tape.states)):
    print(f"depth {d}: {tuple(tape.states[d].shape)} = [batch, pos, dim]")

# %% [markdown]
# The shorter text is padded, and `tape.mask` says where. A forward can be taken up again at any depth; the blocks
# below do not run. Continuing from the very state that was recorded changes nothing, and every run tries that on its
# own model:

# %%
again = dp.resume(tape, at=1, states=tape.states[1], logits="all")
float((again.logits - tape.logits)[tape.mask].abs().max())

# %% [markdown]
# ## Numbers
#
# Every metric has an id with a version. `frame` computes several for each text, and leaves padding out.

# %%
dp.metrics.frame(["kappa.phase/1", "delta.rel_prev/1", "limen.ct/1"], tape)

# %% [markdown]
# κ phase is the mean angle by which a state turns from one depth to the next, in half-turns: 0 is the same direction,
# 0.5 a right angle. It says how this model moves this text. By itself it says nothing about stability or quality.
#
# ## A push
#
# `run` measures the model clean and perturbed and stores it in a folder. The perturbation below adds Gaussian noise
# of three tenths of each state's norm (`relnorm`) behind the first block, at every position but the first.

# %%
run = dp.run(subject, perturb="alpha=0.3,scale=relnorm,layers=0", limit=12, max_new_tokens=16, out="runs")
run

# %% [markdown]
# There are four arms. **clean** is the model left alone. **sham** goes through the whole write path with α = 0 and
# has to equal clean bit for bit. **perturbed.forced** reads the clean text, so that every token of it can be compared
# with itself. **perturbed.free** writes its own text, which soon is another text; so nothing of it is paired.

# %%
arms = run.samples.groupby("condition_id", observed=True)[
    ["kappa_phase", "kappa_phase_d", "kl_clean_pert", "flip_rate"]
].mean()
arms.round(4)

# %% [markdown]
# `kappa_phase_d` is the paired difference and `kl_clean_pert` the KL divergence from the clean distribution in nats
# per token. Missing numbers are missing for a reason, which stands beside them; none of them is 0.

# %%
run.columns().query("table == 'samples' and column in ['kappa_phase_d', 'kl_clean_pert']").T

# %% [markdown]
# ## A figure
#
# The same along the depth of the model: the angle of each step, its paired change, and how far the perturbed state is
# from the clean one.

# %%
run.plot.depth(save="first_run.png")

# %% [markdown]
# ## What this does not show
#
# - Twelve texts, one seed, one layer. The bands are over texts only.
# - α = 0.3 has a meaning because the unit was named (`relnorm`). Under another noise scale the same 0.3 is another
#   push: [α has no unit until you name one](../concepts/alpha.md).
# - A model of four layers has few steps to average over. κ of two models with different depth is not compared without
#   its path; see [an energy model beside a Transformer](energy_beside_transformer.md).
#
# The same from a shell: `dynprobe run --model tiny-llama --perturb alpha=0.3,layers=0 --limit 12 --max-new-tokens
# 16`.
