"""θ lets at most one unrelated token in ten hit any of M slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.controllers import AttractorLayer
from dynprobe.controllers.attractor._centre import FALSE_HITS, _Keep, measure_centre
from dynprobe.probes import Instrument, make_batch, tokenize
from dynprobe.probes._evaluating import evaluating
from dynprobe.prompts import load_prompts, load_stories

SLOTS = 16


def states(subject, site, text):
    """Tokens of one text at a site, without the first, ``[pos, dim]``."""
    batch, keep = make_batch(subject, tokenize(subject, [text])), _Keep(site)
    with torch.no_grad(), evaluating(subject.model), Instrument(subject, (), [keep], **batch.rows):
        subject.model(**batch.model_inputs(subject))
    return keep.state[0, 1:].double()


def unrelated_hits(layer, subject, one, other):
    """Share of the tokens of one text that reinforce a slot which another text left behind."""
    with layer.attach(subject) as handle, torch.no_grad(), evaluating(subject.model):
        subject.model(**make_batch(subject, tokenize(subject, [one])).model_inputs(subject))
        ((place, left),) = handle.states.items()
    name, _, block = place.rpartition(".")
    (mean, theta), y = (
        layer._centres[layer._key(subject, (name, int(block)))],
        states(subject, (name, int(block)), other),
    )
    assert int((left["s"] > 0).sum()) > 1
    cos = torch.nn.functional.normalize(y - mean, dim=-1) @ left["A"][0].double().T
    return float((cos[:, left["s"][0] > 0].amax(1) >= theta).double().mean())


@pytest.mark.parametrize(
    ("model", "component"), [("tiny-llama", "attn_out"), ("tiny-llama", "resid_post"), ("tiny-cem", "resid_post")]
)
def test_theta_is_the_quantile_over_all_slots(model, component):
    subject, site, texts = dp.load(model), (component, 1), [p.text for p in load_prompts(source="calibration")]
    x = torch.cat([states(subject, site, text) for text in texts]).numpy()
    mean, theta = measure_centre(subject, site, slots=SLOTS)
    np.testing.assert_allclose(mean.numpy(), x.mean(0), atol=1e-4 * np.abs(x).max())
    u = x[:2048] - x.mean(0)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    pairs = np.sort((u @ u.T)[np.triu_indices(len(u), 1)])
    assert (pairs >= theta).mean() == pytest.approx(FALSE_HITS / SLOTS, rel=0.02)
    assert measure_centre(subject, site, slots=1)[1] < theta < measure_centre(subject, site, slots=64)[1]
    # Boole's inequality at work: a token against M tokens of other texts.
    owner = np.repeat(np.arange(len(texts)), [len(r) - 1 for r in tokenize(subject, texts)])[:2048]
    rng, hits = np.random.default_rng(0), []
    for t in rng.choice(len(u), 400, replace=False):
        others = rng.choice(np.flatnonzero(owner != owner[t]), SLOTS, replace=False)
        hits.append((u[others] @ u[t]).max() >= theta)
    assert np.mean(hits) <= FALSE_HITS + 3 * np.sqrt(FALSE_HITS * (1 - FALSE_HITS) / 400)


def test_a_grid_of_slots_has_a_theta_for_each(zoo):
    thetas = []
    for slots in (4, 64):
        (site,) = AttractorLayer(slots=slots).controllers(zoo)
        thetas.append(site.theta)
    assert thetas[0] < thetas[1]
    (told,) = AttractorLayer(slots=4, theta=0.3).controllers(zoo)
    assert told.theta == 0.3


@pytest.mark.slow
def test_on_real_weights_unrelated_text_is_no_hit(smollm2):
    layer, stories = AttractorLayer(), [story.text for story in load_stories("short", limit=4)]
    shares = [unrelated_hits(layer, smollm2, one, other) for one in stories for other in stories if one != other]
    assert np.mean(shares) < FALSE_HITS
