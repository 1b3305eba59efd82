"""A client of a Mooncake pool in a process of its own: each line of its input is a call, each line of its output the
result, both in JSON. The library may crash or hang in the tests that break the pool; pytest must not.

    {"call": "put", "names": [...], "store": "127.0.0.1:17110"}    number of pages that were stored
    {"call": "check", "names": [...]}                              {"right": n, "wrong": n, "missing": n}

The bytes of a page follow from its name, so that every page can be checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections import Counter
from typing import Any

PAGE_BYTES = 200_000


def page(name: str) -> bytes:
    return hashlib.shake_128(name.encode()).digest(PAGE_BYTES)


def main(master_addr: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the library prints
    from kvist.mooncake.requirements import load

    library = load("mooncake.store")
    store = library.MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master_addr)
    assert code == 0, code
    buffer = (ctypes.c_char * PAGE_BYTES)()
    address = ctypes.addressof(buffer)
    assert store.register_buffer(address, PAGE_BYTES) == 0

    def put(names: list[str], store_name: str | None) -> int:
        config = library.ReplicateConfig()
        if store_name is not None:
            config.preferred_segment = store_name
        num_stored = 0
        for name in names:
            ctypes.memmove(buffer, page(name), PAGE_BYTES)
            num_stored += store.put_from(name, address, PAGE_BYTES, config) == 0
        return num_stored

    def check(names: list[str]) -> dict[str, int]:
        found: Counter[str] = Counter(right=0, wrong=0, missing=0)
        for name in names:
            if store.get_into(name, address, PAGE_BYTES) < 0:
                found["missing"] += 1
            else:
                found["right" if buffer.raw == page(name) else "wrong"] += 1
        return found

    answers.write("ready\n")
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        result = put(asked["names"], asked.get("store")) if asked["call"] == "put" else check(asked["names"])
        answers.write(json.dumps(result) + "\n")
    os._exit(0)  # the library's threads would crash an ordinary exit


if __name__ == "__main__":
    main(sys.argv[1])
