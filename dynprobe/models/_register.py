"""Making transformers' Auto classes know the model types of this package, without importing transformers for it.

``AutoModelForCausalLM.from_pretrained(folder)`` shall work on a CEM or CSM-style folder once ``dynprobe.models`` was
imported. But resolving a name must stay a matter of milliseconds, and transformers with torch costs seconds. So where
transformers is there already the types are registered at once; where it is not, they are registered at the moment
somebody imports its Auto classes, and never if nobody does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_own_types"]

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def register_own_types() -> None:
    """Register what can be registered now, and the rest when the Auto classes are imported."""
    for module, register in ((_CONFIGS, _register_configs), (_MODELS, _register_models)):
        if module in sys.modules:
            register()
        elif not any(isinstance(finder, _Waiting) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(module, register))


def _register_configs() -> None:
    mapping = importlib.import_module(_CONFIGS)
    from dynprobe.models._cem_config import CemConfig
    from dynprobe.models._csm_config import CsmConfig

    for config in (CemConfig, CsmConfig):
        mapping.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    for module in ("dynprobe.models._cem_model", "dynprobe.models._csm_model"):
        importlib.import_module(module)  # each registers its classes at its end


class _Waiting(MetaPathFinder):
    """Finds nothing by itself: lets one module be found as always, and registers once it is loaded."""

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module, self.register = module, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self.register)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:  # as if nobody had stood in between
            module.__spec__.loader = self._loader
        self._register()
