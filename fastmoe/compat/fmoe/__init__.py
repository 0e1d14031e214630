"""The layers and gates of FastMoE (He et al., arXiv 2103.13262) by their names, for one process.

`import fastmoe.compat.fmoe as fmoe`, or fastmoe.compat.install() and `import fmoe`. Parameters keep FastMoE's names, so
its checkpoints load.
"""

from fastmoe.compat.fmoe import gates, layers, linear, transformer
from fastmoe.compat.fmoe.layers import FMoE
from fastmoe.compat.fmoe.linear import FMoELinear
from fastmoe.compat.fmoe.transformer import FMoETransformerMLP

__all__ = ["FMoE", "FMoELinear", "FMoETransformerMLP", "gates", "layers", "linear", "transformer"]

_LATER = ("DistributedGroupedDataParallel", "balance", "distributed", "fastermoe", "functions", "megatron")


def __getattr__(name: str):
    if name in _LATER:
        raise NotImplementedError(f"fastmoe.compat.fmoe: {name} is not served yet; there are {__all__}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
