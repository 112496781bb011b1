"""Names that a metric of another package may not bear hold all that run folders have beside metrics."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynprobe.errors import PluginError
from dynprobe.metrics import MetricSpec, columns, spec, trajectory_metric
from dynprobe.metrics._reserved import RESERVED
from dynprobe.protocols import _attract_columns, _columns, _evaluate_rows
from dynprobe.protocols._dissociate_config import SEMANTIC
from dynprobe.protocols._responses import RESPONSES
from dynprobe.runs._schema import COLUMNS, TABLES
from dynprobe.testing._metric_contract import _entered

METRIC = """
    from dynprobe.metrics import MetricSpec, trajectory_metric
    METRIC = trajectory_metric(
        MetricSpec(
            id="{id}", sentence="One.", formula="1", input="trajectory[depth,unit,dim]", value_range="[0, 2]",
            unit="1", invariances=frozenset(), source="Acme", column="{column}", levels={{"sample": "one"}},
            vectors=("x -> 1",),
        ),
        lambda x, ok: 1.0,
    )
"""


def test_every_column_that_is_no_metric_s_is_reserved():
    facts = _attract_columns.attract_facts()
    ours = {
        *COLUMNS, *TABLES, *_columns._OWN, *_columns._LOOP, *_columns._ACTIONS, *_columns._FRACTIONS,
        *(name for table in _columns._GRID.values() for name in table), *_columns.PASSPORT, *_columns.WRITTEN,
        *RESPONSES, *SEMANTIC, *(name.split(".")[-1] for name in facts), *_evaluate_rows.ITEM_FACTS,
    }  # fmt: skip
    left = {name for name in ours - RESERVED - columns().keys() if not name.endswith(("_d", "_d_inj", "_d_down"))}
    assert left == set()
    assert not RESERVED & columns().keys()


@pytest.mark.parametrize(
    "column",
    ["text", "ppl", "status", "n_new", "sample_id", "flip_rate", "regime", "alpha_relnorm", "alpha_mine", "nll_d",
     "acme_d", "kappa_phase", "kappa_path", "kappa_geom_w16", "converge_mine"],
)  # fmt: skip
def test_a_column_of_ours_is_refused(package, column):
    package("acme", {"dynprobe.metrics": {"acme.one": "of_acme:METRIC"}},
            of_acme=METRIC.format(id="acme.one/1", column=column))  # fmt: skip
    with pytest.raises(PluginError, match=f"its column '{column}'"):
        spec("acme.one/1")


@pytest.mark.parametrize("family", ["output", "lens", "delta", "deq", "converge", "lockin"])
def test_a_family_of_ours_is_refused(package, family):
    package("acme", {"dynprobe.metrics": {f"{family}.one": "of_acme:METRIC"}},
            of_acme=METRIC.format(id=f"{family}.one/1", column="acme_one"))  # fmt: skip
    with pytest.raises(PluginError, match=f"its family '{family}' is one of dynprobe's own"):
        spec(f"{family}.one/1")


def test_states_leave_a_device_before_they_widen():
    """MPS has no float64."""

    class OnMps:
        device = torch.device("cpu")

        def __getitem__(self, _):
            return self

        def detach(self):
            return self

        def cpu(self):
            return torch.ones(1, 2, 3)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    made = MetricSpec("acme.one/1", "One.", "1", "trajectory[depth,unit,dim]", "[0, 2]", "1", frozenset(), "Acme",
                      levels={"sample": "one"})  # fmt: skip
    real = np.ones((2, 1, 2), bool)
    context = SimpleNamespace(w=SimpleNamespace(keep=real, real=real, eps=0.0), states=[OnMps(), OnMps()])
    with _entered(metric := trajectory_metric(made, lambda x, ok: float(x.sum()))):
        assert metric.score(context, {}).value[0] == 12.0


def test_which_tokens_a_metric_reads_is_in_its_digest():
    made = MetricSpec("acme.one/1", "One.", "1", "trajectory[depth,unit,dim]", "[0, 2]", "1", frozenset(), "Acme")
    assert dataclasses.replace(made, span=True).digest != made.digest
    ours = spec("kappa.geom/1")
    assert dataclasses.replace(ours, span=not ours.span).digest == ours.digest
