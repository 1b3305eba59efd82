"""Makes `transport_hosts` importable by this folder's tests (there are no test packages)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
