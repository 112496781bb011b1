"""Is this calibration this model's? Asked wherever a caller hands one in.

A calibration knows its model by the hash of the weights, of which there are two kinds: of the files they were read
from, and of the tensors that a module holds. They cannot be told from each other, so the kind that the calibration was
made with is the one that is asked of the model.
"""

from __future__ import annotations

from dynprobe import models
from dynprobe.models._hash import combine_file_hashes
from dynprobe.probes._calibration import Calibration
from dynprobe.probes._subject import Subject

__all__ = ["check_same_model"]


def check_same_model(subject: Subject, calibration: Calibration) -> None:
    """Refuse the calibration of another model, of other weights, or of another dtype.

    The tensors are hashed once per subject; the hash is kept in ``subject.facts``.

    Raises:
        CalibrationError: If it is not this model's.

    Example:
        >>> import dynprobe as dp
        >>> from dynprobe.testing import tiny_llama
        >>> calibration = Calibration({}, {}, {"weights": "tensors-blake2b:00", "dtype": "float32"})
        >>> check_same_model(tiny_llama(), calibration)
        Traceback (most recent call last):
        ...
        dynprobe.errors.CalibrationError: this calibration was made with weights 'tensors-blake2b:00', ... has ...
    """
    kind = str(calibration.header.get("weights")).split(":")[0]
    found = str(subject.facts.get("weights_hash", ""))
    if not found.startswith(kind) and kind.startswith("tensors"):
        found = subject.facts.setdefault("tensors_hash", models.weights_hash(subject.model))
    elif not found.startswith(kind) and subject.facts.get("weights_files"):
        found = combine_file_hashes(subject.facts["weights_files"])
    elif not found:
        found = "no files: it was handed over as a module"
    calibration.check(found, str(subject.dtype).removeprefix("torch."), subject.name or "the model")
