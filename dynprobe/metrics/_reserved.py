"""Names that a metric of another package may not bear: families and columns that dynprobe's own tables use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["RESERVED", "refuse_names"]

_WORDS = """
acted_after acted_on actions active alpha alpha50 alpha_abs alpha_coordstd alpha_cos alpha_mad alpha_relnorm arm
atlas attention_prompt baseline best_iteration boot_high boot_low born category cell change choice_margin
chose_right chosen clean cluster component condition_id conditions confidence contexts control_energy controller
converged_at correct cos coverage criterion decode_mode delta_min depth depths detected detector_duty deviance
digest distinct_1 distinct_2 distinct_3 doc_hash doc_id dose drift duty duty_cycle ended energy energy_prev
energy_written equal_to error_power error_stick estimator exponent filter filtered_response fit_id fits flip_rate
floor gain gamma grain headline high hit_rate hits items iteration iterations kind kl kl_largest lapse largest layer
length lengths level longest_repeat low matched_to max_new_tokens method metric metrics mode model monotone_p n
n_active n_asked n_boot n_choices n_fed n_fires n_left n_left_alone n_live n_missing n_new n_nonfinite n_nonmonotone
n_prompt n_recrossing n_restarts n_right n_taken_back n_texts n_tokens n_uncertain n_watched nll_bare nll_prompt
nll_right nonlinear params perturbed phase pos ppl profiles prompt_hash prompt_id prompts question raw reason
reasons recovered recovered_after regime remark repetition replicate response responses rf right sample_id samples
scale seed signal signal_mean signal_score site slope slot slots source spread stage states status step strength
strength_total target target_id task temperature text timing token_id token_ids token_text token_texts tokens top_p
track trial trial_round trials value values variant where width words words_away write written written_abs
written_coordstd written_mad written_relnorm
"""
#: Names of tables, and columns of run folders that are no column of a metric.
RESERVED = frozenset(_WORDS.split())
#: Endings of the columns that compare an arm with the clean one.
_PAIRED = ("_d", "_d_inj", "_d_down")


def refuse_names(family: str, column: str, families: Collection[str], taken: Mapping[str, str]) -> None:
    """Refuse the family or the column of a metric that is not dynprobe's own.

    Args:
        family: First part of its id.
        column: Its column; empty where it has none.
        families: Families of dynprobe's own metrics.
        taken: Columns of the other metrics, with the id that each is of.

    Raises:
        ValueError: Something else bears the name, or is recognised by it.
    """
    if family in families:
        raise ValueError(
            f"its family {family!r} is one of dynprobe's own; take a name of yours, such as that of your lab"
        )
    if column in taken:
        raise ValueError(f"its column {column!r} is that of {taken[column]}")
    if column in RESERVED:
        raise ValueError(f"its column {column!r} is one that run folders have beside those of metrics")
    near = next((name for name in (*sorted(families), "alpha") if column.startswith(f"{name}_")), None)
    if near is not None:
        raise ValueError(
            f"its column {column!r} begins with {near}_, as dynprobe's own do; put a name of yours before it"
        )
    if column.endswith(_PAIRED):
        raise ValueError(f"its column {column!r} ends as those that compare an arm with the clean one")
