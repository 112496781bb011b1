"""Who does the units of a run: settings that change no number, and the engine that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationInfo, field_validator

from dynprobe.engines import Engine, Local, Ray, Slurm

__all__ = ["SPREAD", "SpreadConfig", "in_words"]


#: Engines that look at a setting.
_TAKERS = {"address": ("ray",), "worker_gpus": ("ray", "slurm"), "slurm": ("slurm",)}


class SpreadConfig(BaseModel):
    """How the work is spread."""

    engine: Literal["local", "ray", "slurm"] = Field("local", description="Who does the batches.")
    workers: int | Literal["auto"] = Field("auto", description="Processes that do them; 'auto' is one per GPU.")
    address: str | None = Field(None, description="Ray cluster to join: 'auto', 'ray://…'.")
    worker_gpus: float | None = Field(None, ge=0, description="GPUs of each worker; Ray takes shares such as 0.25.")
    worker_threads: int | None = Field(None, ge=1, description="Processor threads of each worker.")
    slurm: tuple[str, ...] = Field((), description="name=value for submitit: timeout_min=60, slurm_partition=gpu.")

    @field_validator("workers")
    @classmethod
    def _some(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("workers is 'auto' or at least 1")
        return value

    @field_validator("slurm", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else tuple(value)
        items = tuple(item.strip() for text in texts for item in str(text).split(",") if item.strip())
        wrong = [item for item in items if "=" not in item]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no name=value")
        return items

    @field_validator("address", "worker_gpus", "slurm")
    @classmethod
    def _taken(cls, value: Any, info: ValidationInfo) -> Any:
        """A setting that the engine would not look at is a run that is done elsewhere than was meant."""
        engine, takers = info.data.get("engine"), _TAKERS[str(info.field_name)]
        if value not in (None, ()) and engine is not None and engine not in takers:
            raise ValueError(
                f"engine={engine!r} does not take it. Type --engine {' or --engine '.join(takers)}, or leave "
                f"--{str(info.field_name).replace('_', '-')} out"
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
        if self.engine == "local":
            return Local(self.workers, threads=self.worker_threads)
        if self.engine == "ray":
            return Ray(self.workers, address=self.address, gpus=self.worker_gpus, threads=self.worker_threads)
        pairs = dict(item.split("=", 1) for item in self.slurm)
        cluster = pairs.pop("cluster", None)
        return Slurm(
            self.workers, folder=Path(out) / ".slurm", cluster=cluster, threads=self.worker_threads,
            gpus=self.worker_gpus, parameters={key.strip(): yaml.safe_load(value) for key, value in pairs.items()},
        )  # fmt: skip


#: Names of these settings.
SPREAD = tuple(SpreadConfig.model_fields)


def in_words(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with an engine that was handed over as an object told in words."""
    engine = values.get("engine")
    return {**values, "workers": engine.workers, "engine": engine.name} if isinstance(engine, Engine) else values
