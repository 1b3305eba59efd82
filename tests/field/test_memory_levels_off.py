"""An engine on a CPU computes steps with many different numbers of tokens; the memory kept for them is bounded."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In its own process, because this process keeps memory of earlier tests.
_STEPS = """
import sys
import torch
from kvist.models.formats import PlainWeight
from kvist.models.linear import make_linear

def anonymous_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
shapes = ((192, 128), (128, 192), (320, 128))
products = {make_linear(PlainWeight(torch.randn(rows, columns))): columns for rows, columns in shapes}
seen = []
with torch.inference_mode():
    for num_rows in range(100, 196):
        for product, columns in products.items():
            product(torch.randn(num_rows, columns))
        seen.append(anonymous_mib())
print(seen[31], seen[-1])
"""


@pytest.mark.model
@pytest.mark.case("memory-by-length")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_new_numbers_of_rows_in_matrix_products_levels_off() -> None:
    done = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True, timeout=60)
    after_32, after_96 = map(float, done.stdout.split())
    assert after_96 - after_32 < 40, "64 more numbers of rows, three products each, used to take 110 MiB"
