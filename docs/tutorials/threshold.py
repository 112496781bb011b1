# %% [markdown]
# # Settle a threshold
#
# "The model destabilises at α = 0.1" says nothing yet. Four things are missing: the unit of α, what counts as
# destabilised, where the write was, and over which texts. This tutorial settles all four for two small models, and
# shows what becomes of a comparison when the unit is changed.

# %%
import dynprobe as dp

llama = dp.threshold("tiny-llama", layers="50%", limit=12, out="runs")
columns = ["criterion", "estimator", "scale", "layer", "alpha50", "low", "high", "status", "n_prompts"]
fits = llama.table("fits")
fits[[c for c in columns if c in fits]].round(4)

# %% [markdown]
# The criterion `kl` asks for a mean KL divergence of 1 nat between the clean and the perturbed next-token
# distribution, at the positions that the write can reach. For each prompt the first crossing **from below** is
# searched, inside its own bracket; the number is the median over prompts of the strengths found, with an interval
# over prompts.
#
# Every trial is kept, and can be looked at. An arrow stands for a prompt that did not reach the level in the tested
# range; it counts as "above", and is never replaced by the end of the range.

# %%
llama.plot.response(save="response.png")

# %% [markdown]
# ## The unit decides the comparison
#
# Now the same question of another architecture of the same size, trained on the same bytes.

# %%
cem = dp.threshold("tiny-cem", layers="50%", limit=12, out="runs")
compared = dp.compare([llama, cem])
shown = compared.thresholds
shown[[c for c in ("scale", "criterion", "a", "b", "ratio", "ratio_low", "ratio_high") if c in shown]].round(3)

# %% [markdown]
# Read the ratios by row. Under `relnorm` a push is measured by the norm of the state it is added to; under `coordstd`
# by how much each coordinate varies over ordinary text. Where a model carries a large constant part in its states, a
# push of a tenth of the norm is a large push by any other measure. So "which model is more robust, and by how much"
# has one answer per unit. `dynprobe threshold` gives both unless you choose.

# %% [markdown]
# ## A grid, where a curve is wanted
#
# A search asks only as much as the threshold needs. For a curve, or to fit one, name the strengths.

# %%
grid = dp.threshold("tiny-llama", layers="50%", scale="relnorm", alphas="0.05:5:12", limit=12, out="runs")
fits = grid.table("fits")
fits[[c for c in ("estimator", "alpha50", "low", "high", "status", "reason") if c in fits]].round(4)

# %% [markdown]
# Several estimates, several questions. The first is the median over prompts of each one's own threshold; the second
# is where the *mean* response crosses, which prompts with a large response pull down; the logistic curve needs a
# shape and the isotonic and Spearman–Kärber estimates do not. A row without a number says why it has none: a fit that
# its data do not carry is not forced. Quote one, with its id.
#
# ## What it does not show
#
# - One layer, one seed of noise, twelve texts. `--seeds 0:4` gives several noises for each text, `--layers all` every
#   layer.
# - The range was 0.01 to 10. A threshold outside of it is reported as such.
# - The response need not be monotone: κ comes down again under very strong noise. The search reports a response that
#   does.
