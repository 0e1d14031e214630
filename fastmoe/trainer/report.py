from __future__ import annotations

from pathlib import Path


def report(run_dir):
    p = Path(run_dir) / "report.html"
    p.write_text("x")
    return p
