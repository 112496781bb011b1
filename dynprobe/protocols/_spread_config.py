"""Who does the units of a run: settings that change no number, and the engine that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from dynprobe.engines import ENGINES, Engine
from dynprobe.errors import did_you_mean

__all__ = ["SPREAD", "SpreadConfig", "in_words"]


class SpreadConfig(BaseModel):
    """How the work is spread."""

    engine: str = Field("local", description="Who does the batches.")
    workers: int | Literal["auto"] = Field("auto", description="Processes that do them; 'auto' is one per GPU.")
    address: str | None = Field(None, description="Ray cluster to join: 'auto', 'ray://…'.")
    worker_gpus: float | None = Field(None, ge=0, description="GPUs of each worker; Ray takes shares such as 0.25.")
    worker_threads: int | None = Field(None, ge=1, description="Processor threads of each worker.")
    slurm: tuple[str, ...] = Field((), description="name=value for submitit: timeout_min=60, slurm_partition=gpu.")

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"one of {', '.join(ENGINES)}.{did_you_mean(value, ENGINES)}")
        return value

    @field_validator("workers")
    @classmethod
    def _some(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("workers is 'auto' or at least 1")
        return value

    @field_validator("slurm", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> tuple[str, ...]:
        if not isinstance(value, str | list | tuple):
            raise ValueError("a list of name=value")
        texts = (value,) if isinstance(value, str) else value
        items = tuple(item.strip() for text in texts for item in str(text).split(",") if item.strip())
        wrong = [item for item in items if "=" not in item]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no name=value")
        return items

    @field_validator("address", "worker_gpus", "slurm")
    @classmethod
    def _taken(cls, value: Any, info: ValidationInfo) -> Any:
        """A setting that the engine would not look at is a run that is done elsewhere than was meant."""
        engine, name = info.data.get("engine"), str(info.field_name)
        if value not in (None, ()) and engine is not None and name not in ENGINES[engine].takes:
            takers = [other for other in ENGINES.builtin if name in ENGINES[other].takes]
            raise ValueError(
                f"engine={engine!r} does not take it. Type --engine {' or --engine '.join(takers)}, or leave "
                f"--{name.replace('_', '-')} out"
            )
        return value

    @property
    def in_process(self) -> bool:
        """Whether the calling process does the work, unless there are several GPUs."""
        return self.engine == "local" and self.workers in ("auto", 1)

    def make_engine(self, out: str | Path) -> Engine:
        """Return the engine; what it shares between machines lies under ``out``.

        Raises:
            EngineError: If there is no such cluster.
            UsageError: If a library is missing, or the settings do not go together.
        """
        return ENGINES[self.engine].made(self.model_dump(include=set(SPREAD)), Path(out))


#: Names of these settings.
SPREAD = tuple(SpreadConfig.model_fields)


def in_words(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with an engine that was handed over as an object told in words."""
    engine = values.get("engine")
    return {**values, "workers": engine.workers, "engine": engine.name} if isinstance(engine, Engine) else values
