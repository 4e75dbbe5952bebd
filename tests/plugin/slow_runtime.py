"""A runtime's Python package, which is slow to import."""

from __future__ import annotations

import time

time.sleep(0.3)
READY = 0.05
"""How long it takes to get ready (s) once imported."""
