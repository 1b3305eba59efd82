"""Kvist serves large language models with prefill and decode apart, over a radix-shared KV cache.

Importing this package imports nothing heavy: `kvist.__version__` answers without torch.
"""

__version__ = "0.1.0"
