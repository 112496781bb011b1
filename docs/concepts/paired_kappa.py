# %% [markdown]
# # Why κ must be paired
#
# κ is the mean angle by which a state turns between neighbouring depths. It differs from model to model and from text
# to text far more than a mild perturbation changes it. So a κ by itself says which model and which text were read,
# and a difference between two groups of texts says that they were different texts.
#
# ## How large is the effect, and how large is everything else?

# %%
import dynprobe as dp

run = dp.run("tiny-llama", perturb="alpha=0.1,layers=0", max_new_tokens=0, out="runs")
clean = run.samples.query("condition_id == 'clean'").set_index("prompt_id")["kappa_phase"]
forced = run.samples.query("condition_id == 'perturbed.forced'").set_index("prompt_id")
print(f"κ of clean text:          mean {clean.mean():.4f}, SD between texts {clean.std():.4f}")
print(f"paired difference Δκ:     mean {forced['kappa_phase_d'].mean():+.5f}, SD {forced['kappa_phase_d'].std():.5f}")
effect = abs(forced["kappa_phase_d"].mean())
print(f"effect, in SDs between texts:          {effect / clean.std():.2f}")
print(f"effect, in SDs of paired differences:  {effect / forced['kappa_phase_d'].std():.2f}")

# %% [markdown]
# The same effect is a small part of what texts differ by, and large beside what is left when each text is its own
# control. With two separate groups of texts, hundreds would be needed to see it at all.
#
# ## What pairing needs
#
# - **The same tokens.** The perturbed model is fed the clean text, token by token (`decode_mode=forced`). On its own
#   text the tokens differ after a while, so position 12 is compared with another word; paired columns are missing
#   there, with the reason.
# - **The same noise at every strength.** Noise is a function of seed, text, site and position, so two arms that
#   differ in α differ in nothing else.
# - **Terms that are valid on both sides.** A state that is missing in one run is left out of the other.
# - **Enough digits.** Rounding to bfloat16 alone turns a state of some hundred coordinates by about 5e-4 half-turns,
#   as much as a mild push does. The default dtype is float32, and angles of half-precision captures are flagged.
#
# ## What even the paired κ does not say
#
# Only the step **into** the perturbed depth has a guaranteed sign: if the noise is orthogonal to the two states of
# that step and their angle is below a right angle,
#
# $$\cos\theta' = \frac{\cos\theta}{\sqrt{1+\alpha^2}}$$
#
# so the angle grows with α and tends to a right angle. What the later steps do is the model's business: the mean over
# all steps may fall although the perturbed step turned more, as the printed mean above and the middle panel below
# show. So a Δκ of either sign is no evidence of damage. Read it beside the KL divergence, which says what happened to
# the output.

# %%
run.plot.depth(save="paired.png")

# %% [markdown]
# ## Models of different depth
#
# For a smooth path sampled at D points κ falls as 1/D, while the whole angle, `kappa_path`, stays. A statement about
# two models gives both, and `compare` always prints them together.
#
# Definitions: [`kappa.phase/1`](../metrics/kappa.phase-1.md),
# [`kappa.phase.paired/1`](../metrics/kappa.phase.paired-1.md).
