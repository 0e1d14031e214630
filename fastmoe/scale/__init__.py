"""What a model costs and where it fits: formulas, named models and a planner. Nothing here touches a device."""

from fastmoe.scale.planner import Machine, Plan, plan
from fastmoe.scale.presets import PRESETS, Preset, from_config, preset

__all__ = ["PRESETS", "Machine", "Plan", "Preset", "from_config", "plan", "preset"]
