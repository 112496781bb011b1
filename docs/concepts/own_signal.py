# %% [markdown]
# # Why recovery under its own signal proves nothing
#
# A controller watches κ. When κ is high it turns the state back along its last step. κ falls. Has the model
# recovered?
#
# κ fell because it was pushed down. The controller would lower it just as well on a model of random weights, on a
# text of random bytes, and on states that were never disturbed. What is controlled is no evidence about anything but
# the controller.
#
# ## Seen on a model that knows nothing
#
# The same architecture with newly drawn weights. There is no knowledge that could be lost or recovered.

# %%
import torch
from transformers import AutoModelForCausalLM

import dynprobe as dp
import dynprobe.models

trained = AutoModelForCausalLM.from_pretrained(dynprobe.models.zoo_folder("tiny-llama"))
torch.manual_seed(0)
untrained = AutoModelForCausalLM.from_config(trained.config).eval()
subject = dp.load(untrained, tokenizer=dynprobe.models.byte_tokenizer())


def slerp(a, b, g):
    """Turn a towards b by the share g of the angle between them, at the length of a."""
    x, y = (v / v.norm(dim=-1, keepdim=True) for v in (a, b))
    angle = torch.arccos((x * y).sum(-1, keepdim=True).clamp(-1, 1))
    turned = (torch.sin((1 - g) * angle) * x + torch.sin(g * angle) * y) / torch.sin(angle)
    return turned * a.norm(dim=-1, keepdim=True)


tape = dp.capture(subject, ["In the beginning God created the heaven and the earth."], logits="all")
noisy = dp.capture(subject, tape.token_ids, perturb="alpha=1.0,layers=1", logits="all")
before, after = noisy.states[1], noisy.states[2]
halfway = slerp(after, before, 0.5)


def kappa(a, b):
    return dp.metrics.compute("kappa.phase/1", torch.stack([a[0, 1:], b[0, 1:]])).value


def kl(state):
    """KL(clean ‖ arm) of the next-token distribution, nats per token."""
    arm = dp.readout(subject, state).log_softmax(-1)[0, 1:]
    own = tape.logits.log_softmax(-1)[0, 1:]
    return float((own.exp() * (own - arm)).sum(-1).mean())


clean_kappa, noisy_kappa, turned_kappa = (
    kappa(tape.states[1], tape.states[2]),
    kappa(before, after),
    kappa(before, halfway),
)
noisy_kl, turned_kl = kl(after), kl(halfway)
print("                     κ of the last step   KL to clean")
print(f"clean                {clean_kappa:18.4f}   {0:11.4f}")
print(f"perturbed            {noisy_kappa:18.4f}   {noisy_kl:11.4f}")
print(f"turned halfway       {turned_kappa:18.4f}   {turned_kl:11.4f}")
recovered = (noisy_kappa - turned_kappa) / (noisy_kappa - clean_kappa), (noisy_kl - turned_kl) / noisy_kl
print("recovery fraction    {:18.2f}   {:11.2f}".format(*recovered))

# %% [markdown]
# Turning halfway halves the angle of the step, exactly and always. Read as recovery of κ it is complete and more (1
# would be full recovery). The other column has hardly moved: what the model says is as far from the clean answer as
# before.
#
# ## What would be evidence
#
# | requirement | how a run meets it |
# |---|---|
# | a metric the controller does not act on | every row of `fits` says `acted_on`; such marks are hollow in figures |
# | the same energy in a meaningless direction | `random:MODE` replays tokens, sites and ‖u‖²/‖h‖² of the mode |
# | a detector that sees the noise | its power stands first; where it is blind there is no fraction |
# | no harm where nothing is wrong | the arm `clean+MODE` |
# | meaning, where it is claimed | items with answers, equivalence: [`dissoc.rf2/1`](../metrics/dissoc.rf2-1.md) |
#
# A second artefact has the same root. A signal over a window of four tokens cannot be calm sooner than four tokens
# after the last loud one, whatever the model does. Times to recovery are therefore given less the tokens that the
# signal looks back on.
#
# That dynamics recover and meaning does not is what this construction predicts **without any finding**. It becomes a
# finding only under a metric that nobody pushed. In practice: [closing the loop](../tutorials/closing_the_loop.md),
# [recovery](../recovery.md), [dissociation](../dissociation.md).
