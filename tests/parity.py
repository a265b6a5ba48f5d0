"""Agreement with code that others published: asserted like any other comparison, and written down for the catalog page.

`REMANENCE_PARITY=results/parity/parity.json pytest -k parity` records what each comparison measured; without it nothing is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from helpers import assert_close


def assert_parity(slug: str, source: str, got: Tensor, want: Tensor, tol: float = 1e-5) -> None:
    """Assert that two results agree to `tol` (relative RMS). source: what made `want`, as the catalog page will name it."""
    error = assert_close(f"{slug} against {source}", got, want, tol)
    path = os.environ.get("REMANENCE_PARITY")
    if path:
        file = Path(path)
        known = json.loads(file.read_text()) if file.exists() else {}
        known.setdefault(slug, {})
        known[slug][source] = max(error, known[slug].get(source, 0.0))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
