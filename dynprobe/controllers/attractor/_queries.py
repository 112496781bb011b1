"""The site of the first published version: slots of mean queries, a field written after attention.

What is compared and stored is q̄, the mean over heads of a token's queries before they are rotated; it is linear in
what attention takes in, q̄ = W̄x + b̄, so it is computed from the weights that :func:`attention_weights` finds by
evidence. What is written is the field of width dh, repeated until it is as wide as the model: a vector whose direction
in the residual stream means nothing. It is kept because it is the version with the published +3.3 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynprobe.controllers._controller import Memory, Seen
from dynprobe.controllers.attractor._layer import AttractorSite
from dynprobe.controllers.attractor._rule import pass_tokens
from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Site, Subject, make_batch
from dynprobe.probes._attention_calls import AttentionCall, AttentionWatch
from dynprobe.probes._attention_weights import AttentionWeights, attention_weights
from dynprobe.probes._dispatch import attach_to
from dynprobe.probes._evaluating import evaluating

__all__ = ["QuerySite", "mean_query"]


def mean_query(subject: Subject, layer: int) -> tuple[Tensor, Tensor]:
    """Return W̄ ``[dh, dim]`` and b̄ ``[dh]``: the mean over heads of a layer's queries is W̄x + b̄.

    Raises:
        UsageError: If the weights are not found, or queries pass a norm, or it does not come out.
    """
    every = attention_weights(subject)
    found = every[layer]
    why = found.reason if not isinstance(found, AttentionWeights) else "its queries pass a norm" if found.normed else ""
    if why or not isinstance(found, AttentionWeights):
        raise UsageError(
            f"site='query_mean' needs the queries of layer {layer} of {subject.name} as a linear map: {why}. Take "
            "site='attn_out', the site that the published text names"
        )
    paths = tuple(w.path if isinstance(w, AttentionWeights) else found.path for w in every)
    subject.updates = {**subject.updates, "attn_in": paths}
    weight = found.w_q.float().mean(0)
    # At position 0 a rotation turns by nothing, so what reaches attention there is the query itself.
    calls: list[AttentionCall] = []
    taken: list[Tensor] = []
    vocab = subject.vocab_size or 4
    batch = make_batch(subject, [[1 + i % (vocab - 1)] for i in range(4)])
    attachment = attach_to(subject.module_at("attn_in", layer), read=lambda x: taken.append(x.detach().clone()))
    try:
        with torch.no_grad(), evaluating(subject.model), AttentionWatch(calls.append):
            subject.model(**batch.model_inputs(subject))
    finally:
        attachment.remove()
    seen = calls[layer].q.float().mean(1)[:, 0] / found.factor
    rest = seen - taken[0].float()[:, 0] @ weight.T
    bias = rest.mean(0)
    if float((rest - bias).abs().max()) > 1e-4 * float(seen.abs().max()):
        raise UsageError(f"the queries of layer {layer} of {subject.name} are no linear map of what attention takes in")
    return weight, bias


class QuerySite(AttractorSite):
    """The layer's rule on mean queries, its field repeated over the width of the attention output."""

    id = "attractor.query_mean/1"

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Find the map from attention's input to the mean query."""
        self._weight, self._bias = mean_query(subject, self.site[1])
        if subject.dim is None or subject.dim % len(self._bias):
            raise UsageError(f"a field of width {len(self._bias)} cannot be repeated over the width {subject.dim}")

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """Attention's input is observed, its output written."""
        return [self.site] if writing else [("attn_in", self.site[1])]

    def act(self, state: Tensor, site: Site, seen: Seen, memory: Memory) -> Tensor:
        """Pass mean queries by the slots and write the field after attention."""
        x = seen.states["attn_in", site[1]].float()
        q = x @ self._weight.T.to(x) + self._bias.to(x)
        if "A" not in memory:
            memory.update(self._fresh(q))
        real = torch.from_numpy(seen.step.positions >= 0).to(state.device)
        with torch.autocast(device_type=state.device.type, enabled=False):
            self.passed = pass_tokens(memory, q, real, self.settings, self.mean, self.theta)
        gain = self.passed.gain
        if self.settings.idle or not bool((gain > 0).any()):
            return state
        wide = self.passed.field.repeat(1, 1, state.shape[-1] // q.shape[-1])
        scale = gain.float() * self.settings.strength
        if self.settings.inject == "relative":  # of a unit field, as at the other sites
            scale = scale * state.float().norm(dim=-1) / wide.norm(dim=-1).clamp_min(1e-12)
        pushed = (state.float() + scale[..., None] * wide).to(state.dtype)
        return torch.where((gain > 0)[..., None], pushed, state)
