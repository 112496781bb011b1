"""What the columns of an attractor study mean."""

from __future__ import annotations

__all__ = ["attract_facts"]

_UPTO = "new tokens up to the length"
#: Column → (unit, aggregation, description), in ``lengths``; those that a sample has too describe its whole text.
_LENGTHS: dict[str, tuple[str, str, str]] = {
    "distinct_1": ("fraction", "over tokens", "Share of tokens that are different (distinct-1)."),
    "distinct_2": ("fraction", "over 2-grams", "Share of 2-grams that are different (distinct-2)."),
    "distinct_3": ("fraction", "over 3-grams", "Share of 3-grams that are different (distinct-3)."),
    "longest_repeat": ("tokens", "largest", "Longest span of tokens that occurs twice, overlap allowed."),
    "repetition": ("fraction", "over 4-grams", "Share of 4-grams that occurred before in the text."),
    "nll_bare": ("nats", "mean", "NLL of the text under the model with nothing on it."),
    "nll": ("nats", "mean", "NLL of the text under the model as it wrote it."),
    "drift": ("half-turns", "mean", "Angle of the final state to the bare model's on the same text."),
    "attention_prompt": ("fraction", "mean over tokens, layers and heads", "Share of attention on the prompt."),
    "n_live": ("slots", "at the last token, mean over sites", "Slots that are alive."),
    "strength_total": ("strength", "at the last token, mean over sites", "Summed strength of live slots."),
    "hit_rate": ("fraction", "mean", "Share of tokens that reinforced a slot."),
    "gain": ("1", "mean", "Gate g of the injection."),
    "written": ("‖δ‖/‖y‖", "mean", "Realised relative size of the injection."),
}
_TOKENS = ("nll_bare", "drift", "attention_prompt", "gain", "written", "n_live", "strength_total", "hit_rate")
_OWN: dict[str, tuple[str, str]] = {
    "slots.strength": ("strength", "Strength of the slot after the token."),
    "slots.hits": ("tokens", "Tokens that have reinforced the slot since its birth."),
    "slots.born": ("tokens", "Count of the token that opened the slot."),
    "slots.cos": ("cosine", "Cosine of the token to the slot as it was before it; missing where the slot was dead."),
    "slots.site": ("", "Place of the slot, component and block."),
    "atlas.site": ("", "Place of the slot, component and block."),
    "atlas.born": ("tokens", "Position of the token that opened the slot; −1 where that was in an earlier text."),
    "atlas.ended": ("tokens", "Position of the token that took the slot over; −1 where it lived to the end."),
    "atlas.hits": ("tokens", "Tokens that reinforced the slot."),
    "atlas.strength": ("strength", "Its last strength."),
    "fits.arm": ("", "Arm of the study."),
    "fits.cell": ("", "Settings that differ between the arms of one kind; empty where none do."),
    "fits.dose": ("nats", "Mean KL(bare ‖ layer) per token past burn-in that was asked for, or ε where raw."),
    "fits.raw": ("", "Whether dose is a raw ε."),
    "fits.strength": ("‖δ‖/‖y‖", "ε of the arm; missing where the dose was not reached or the arm has none."),
    "fits.kl": ("nats", "Mean KL(bare ‖ arm) per token past burn-in at that ε."),
    "fits.largest": ("‖δ‖/‖y‖", "Largest ε that was tried."),
    "fits.kl_largest": ("nats", "KL at the largest ε that was tried."),
    "fits.n_texts": ("texts", "Texts that were read."),
    "fits.n_tokens": ("tokens", "Tokens past burn-in."),
    "fits.status": ("", "solved for this arm, given (taken over or raw), or unreached."),
    "trials.alpha": ("‖δ‖/‖y‖", "ε that was tried."),
    "trials.condition_id": ("", "Arm and settings."),
    "trials.kl_clean_pert": ("nats", "KL(bare ‖ arm), mean over the text's tokens past burn-in."),
    "trials.n_tokens": ("tokens", "The text's tokens past burn-in."),
    "items.target": ("", "The right answer."),
    "items.correct": ("", "Whether what was written begins with the right answer."),
    "items.chose_right": ("", "Whether the right name is the likeliest choice; missing where nothing is chosen."),
    "items.choice_margin": ("nats", "Summed log-probability of the right choice minus that of the best wrong one."),
    "items.n_choices": ("choices", "Choices of the item; 0 where there are none."),
    "items.cluster": ("", "What the item shares with others: its story, or its assignment of names."),
}  # fmt: skip
_JSON: dict[str, str] = {
    "atlas.tokens": "Tokens that reinforced the slot, with how often.",
    "atlas.contexts": "The latest places of the text where it was reinforced; the token stands in ⟦⟧.",
    "atlas.words": "Tokens that the slot's direction raises most, read off as a final state (direct path).",
    "atlas.words_away": "Tokens that it lowers most.",
    "items.responses": "Summed log-probability of each choice, the right one first.",
}


def attract_facts() -> dict[str, dict[str, str]]:
    """Return what is known of the columns, by ``table.column``."""
    facts: dict[str, dict[str, str]] = {"trials.floor": {}}
    for name, (unit, how, text) in _LENGTHS.items():
        facts[f"lengths.{name}"] = {"unit": unit, "span": _UPTO, "aggregation": how, "description": text}
        facts[f"samples.{name}"] = {"unit": unit, "span": "new", "aggregation": how, "description": text}
    for name in _TOKENS:
        facts[f"tokens.{name}"] = {"unit": _LENGTHS[name][0], "span": "all", "description": _LENGTHS[name][2]}
    for name, (unit, text) in _OWN.items():
        facts[name] = {"unit": unit, "description": text}
    for name, text in _JSON.items():
        facts[name] = {"description": text, "dtype": "json"}
    facts["items.text"] = facts["samples.text"] = {"description": "What was written.", "dtype": "text"}
    facts["fits.dose"]["dtype"] = facts["fits.strength"]["dtype"] = "float64"
    del facts["trials.floor"]
    return facts
