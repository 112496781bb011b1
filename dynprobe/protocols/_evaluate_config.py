"""Settings of an evaluation."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from dynprobe.errors import UsageError
from dynprobe.protocols._config import RunConfig

__all__ = ["EvaluateConfig"]

#: Settings of a run that mean nothing here: tasks bring their own prompts, and the harness reads and writes.
_NONE_OF_OURS = (
    "prompt", "prompts", "category", "temperature", "top_p", "num_samples", "stop_at_eos", "where", "states", "lens",
    "metrics", "span", "padding",
)  # fmt: skip


class EvaluateConfig(RunConfig):
    """Settings of :func:`dynprobe.evaluate`."""

    tasks: tuple[str, ...] = Field((), description="Tasks, groups or tags of lm-evaluation-harness.")
    include_path: tuple[str, ...] = Field((), description="Folders of task files.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each item; default the task's own.")
    fewshot_seed: int = Field(1234, ge=0, description="Which examples; the harness's default.")
    apply_chat_template: bool = Field(False, description="Wrap prompts by the tokenizer's chat template.")
    system_instruction: str | None = Field(None, description="System turn, or text before every prompt.")
    gen_kwargs: str | None = Field(None, description="Generation settings that replace the task's: max_gen_toks=8,….")
    max_new_tokens: int = Field(0, ge=0, le=0, description="The task says how much is written.")
    batch_size: int = Field(1, description="Rows per forward.")
    controllers: tuple[str, ...] = Field((), description="What controls, in words.")
    content: str = Field("", description="Hash of all requests and of the tasks' settings; filled in.")
    harness: str = Field("", description="Version of lm-eval; filled in.")

    @field_validator("batch_size", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("the harness would try sizes out on the instrumented model; name a number, such as 8")
        return value

    @field_validator("tasks", "include_path", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str) else list(value)
        return tuple(part.strip() for item in items for part in str(item).split(",") if part.strip())

    @property
    def generation(self) -> dict[str, Any] | None:
        """``gen_kwargs`` as the harness reads them."""
        if not self.gen_kwargs:
            return None
        from lm_eval.utils import simple_parse_args_string

        return dict(simple_parse_args_string(self.gen_kwargs))

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this evaluation."""
        settings = {k: v for k, v in super().identity().items() if k != "include_path"}  # its content is hashed
        return {**settings, "protocol": "eval"}

    @classmethod
    def build(cls, **values: Any) -> EvaluateConfig:
        """Validate settings; see :meth:`RunConfig.build`."""
        built = super().build(**values)
        assert isinstance(built, cls)
        return built

    def refuse(self) -> None:
        """Refuse settings that belong to another protocol.

        Raises:
            UsageError: Naming one.
        """
        if not self.tasks:
            raise UsageError("name a task: --tasks dynprobe_cloze (several with commas)")
        for name in _NONE_OF_OURS:
            if getattr(self, name) != EvaluateConfig.model_fields[name].default:
                raise UsageError(
                    f"{name} does not belong to dynprobe eval: a task brings its prompts, and the harness says how it "
                    "reads and writes; see dynprobe run, or --gen-kwargs"
                )
