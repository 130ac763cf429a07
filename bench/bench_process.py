"""What importing fastgen costs a process, over importing torch alone."""

from __future__ import annotations

import subprocess
import sys

from fastgen.bench.cases import Case


def test_import(race):
    def importing(*names):
        code = f"import {', '.join(names)}"
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    case = Case("import", "a process from start to end", "a tool that starts often", 0, 0)
    variants = {"fastgen": importing("torch", "fastgen"), "torch alone": importing("torch")}
    race(case, variants, [()], lambda *_: None, rounds=5)
