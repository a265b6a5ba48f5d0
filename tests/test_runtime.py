"""The settings of the process, in a process of their own."""

from __future__ import annotations

import subprocess
import sys


def test_tuned_processes_flush_denormals_and_compute_the_same():
    code = (
        "import torch; from remanence.runtime import tune; torch.manual_seed(0); a = torch.randn(64, 64); before = a @ a\n"
        "tune(); tune(); tiny = torch.full((8,), 1e-30)\n"
        "assert torch.equal(a @ a, before) and float((tiny * 1e-10).sum()) == 0.0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
