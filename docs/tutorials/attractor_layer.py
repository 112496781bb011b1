# %% [markdown]
# # Attach the attractor layer
#
# A few vectors that strengthen when a token comes near them, fade when none does, and nudge the next step; on a model
# whose weights stay as they are. It is an idea that was published with large effects. Here it is taken apart: first
# that it does nothing where it should do nothing, then what it remembers, then what it does beside a control of the
# same dose.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import dynprobe as dp

subject = dp.load("tiny-llama")
tape = dp.capture(
    subject,
    ["And it came to pass in those days, that the king of Israel went up unto the house of the LORD"],
    logits="all",
)
tokens = tape.token_ids

# %% [markdown]
# ## Nothing where nothing is asked
#
# With `gate=0` the layer watches and writes nothing, and the logits are those of the bare model bit for bit.

# %%
with torch.no_grad():
    bare = subject.model(tokens).logits
    with dp.AttractorLayer(slots=8, gate=0.0).attach(subject, layers=[1]):
        gated = subject.model(tokens).logits
    with dp.AttractorLayer(slots=8, strength=1.0, burn_in=8).attach(subject, layers=[1]) as handle:
        nudged = subject.model(tokens).logits
    after = subject.model(tokens).logits
print("gate = 0 equals bare:      ", torch.equal(gated, bare))
print("detached equals bare:      ", torch.equal(after, bare))
print("first 8 tokens equal bare: ", torch.equal(nudged[:, :8], bare[:, :8]))
print("later tokens moved by:     ", float((nudged - bare)[:, 8:].abs().max()))

# %% [markdown]
# ## What it remembers
#
# Strengths of the slots after that text. A slot gains 1 with each token that hits it and halves with every
# `half_life` tokens that do not.

# %%
strengths = handle.states["attn_out.1"]["s"][0]
pd.Series(strengths.sort(descending=True).values.numpy(), name="strength").round(3).to_frame().T

# %% [markdown]
# ## What it does, beside controls of the same dose
#
# A strength ε says as little as an α without a unit. `attract` solves ε for a **dose**: the mean KL divergence from
# the bare model on given text. Then the layer stands beside arms whose own ε gives the same KL: a constant direction,
# and a random one.

# %%
run = dp.attract(
    subject, arms=["layer", "constant", "random"], doses=[0.1], match="kl", slots=8, burn_in=8,
    max_new_tokens=40, lengths=[20, 40], dose_texts=2, dose_tokens=40, limit=4, attention=False, out="runs",
)  # fmt: skip
doses = pd.DataFrame(run.summary["doses"])
doses[[c for c in ("condition", "arm", "dose", "strength", "kl") if c in doses]].round(4)

# %%
run.plot.lengths(save="lengths.png")

# %%
run.plot.slots(save="slots.png")

# %% [markdown]
# ## How to read it
#
# - What the layer changes and the controls of the same KL change just as much is an effect of being pushed, not of
#   memory.
# - Four short texts of a model of 0.8 million parameters settle nothing about long generation. The intervals say so;
#   the study with its defaults is `dynprobe attract --model smollm2-135m`.
# - The published form of this idea changed the cache as well; [the attractor layer](../attractor.md) lists the
#   defects that were removed, and what remains.
