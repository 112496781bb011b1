# %% [markdown]
# # α has no unit until you name one
#
# "Noise of strength α = 0.1 destabilises the model." A tenth of what? Of the state's length, of what a coordinate
# usually varies by, of the model's own numbers? The answers are different pushes, and comparisons between models can
# turn around with the choice.
#
# ## One α, several pushes
#
# Let h be a state of width d and ε Gaussian noise. Some of the named scales:
#
# | scale | what is added | size relative to the state |
# |---|---|---|
# | `relnorm` | $\alpha\,\lVert h\rVert\,\varepsilon/\lVert\varepsilon\rVert$ | α, exactly |
# | `coordstd` | $\alpha\,s\odot\varepsilon$, s the SD of each coordinate in calibration | about α‖s‖/‖h‖ |
# | `mad` | $\alpha\cdot 1.4826\,\mathrm{MAD}(h)\,\varepsilon$ | depends on the state |
# | `abs` | $\alpha\,\varepsilon$ | about $\alpha\sqrt d/\lVert h\rVert$ |
#
# States of trained models are not round clouds. Often a few coordinates, or one constant vector, hold most of the
# length. A push of a tenth of that length, spread over all coordinates, is large for all the others. A push in
# standard deviations of each coordinate is not. Here is the same α on one model, under three scales:

# %%
import dynprobe as dp

subject = dp.load("tiny-llama")
calibration = dp.calibrate(subject)
text = ["And the LORD spake unto Moses, saying"]
clean = dp.capture(subject, text)
for scale in ("relnorm", "coordstd", "mad", "abs"):
    tape = dp.capture(subject, text, perturb=f"alpha=0.3,scale={scale},layers=0", calibration=calibration)
    moved = (tape.states[1] - clean.states[1])[0, 1:].norm(dim=-1) / clean.states[1][0, 1:].norm(dim=-1)
    print(f"α = 0.3 {scale:9} moves a state by {float(moved.mean()):.3f} of its norm")

# %% [markdown]
# ## What a run does about it
#
# - A scale is part of every perturbation and of every condition's name: `alpha=0.1,scale=relnorm,layers=6`. Where
#   none is named, the run takes `relnorm` and says so in its first line.
# - Every perturbed row stores its realised size in **every** unit, so one sweep can be read on any of them.

# %%
run = dp.run(subject, perturb="alpha=0.3,layers=0", limit=4, max_new_tokens=0, out="runs")
row = run.samples.query("condition_id == 'perturbed.forced'").iloc[0]
row[[c for c in run.samples.columns if c.startswith("alpha_") or c == "alpha"]].to_frame("size of this write")

# %% [markdown]
# - `dynprobe threshold` answers under two scales unless you choose one, and `compare` gives the ratio of two models'
#   thresholds for each ([settle a threshold](../tutorials/threshold.md)).
# - To compare models without any scale, compare them where they have done the same to the output: `scale=isokl`
#   solves the strength of every row for a given KL, and `compare` matches sweeps at equal KL.
#
# ## What else belongs to an α
#
# The site (depth, component), the positions, how long it lasts, the shape of the noise, the seed, whether the text is
# given or the model's own, and the dtype. A run stores all of them. A published "α ≈ 0.1" without them cannot be
# reproduced, and this library does not pretend to.
