"""APIs of other libraries, served by fastmoe."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_PARTS = ("", ".gates", ".layers", ".linear", ".transformer")


def install() -> ModuleType:
    """Makes `import fmoe` mean fastmoe.compat.fmoe in this process, so that FastMoE scripts run unchanged; returns it.

    Errors: RuntimeError where another fmoe has been imported already.
    """
    ours = {f"fmoe{part}": importlib.import_module(f"fastmoe.compat.fmoe{part}") for part in _PARTS}
    for name, module in ours.items():
        if sys.modules.get(name, module) is not module:
            raise RuntimeError(
                f"fastmoe.compat.install: call it before `import fmoe`; {name} is already "
                f"{getattr(sys.modules[name], '__file__', 'imported')}"
            )
    sys.modules.update(ours)
    return ours["fmoe"]


__all__ = ["install"]
