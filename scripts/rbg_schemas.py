"""Writes the schemas of RoleBasedGroup's kinds that `kvist deploy check` uses, from files of RBG's own schemas.

python scripts/rbg_schemas.py FOLDER     # with one JSON file a kind: group, kind, source, versions
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "src" / "kvist" / "deploy" / "schemas" / "rbg.json.gz"


def packed(folder: Path) -> bytes:
    """Return the compressed schemas. Equal files give equal bytes."""
    kinds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    text = json.dumps(kinds, separators=(",", ":"), sort_keys=True)
    return gzip.compress(text.encode(), mtime=0)


if __name__ == "__main__":
    TARGET.write_bytes(packed(Path(sys.argv[1])))
