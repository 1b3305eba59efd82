"""Kvist serves large language models with disaggregated prefill and decode and a radix-tree KV cache.

Importing this package is fast: `kvist.__version__` does not import torch.
"""

__version__ = "0.1.0"
