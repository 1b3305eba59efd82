"""Kvist serves large language models with separate prefill and decode workers and a shared prefix cache.

Importing this package is fast: `kvist.__version__` does not import torch.
"""

__version__ = "0.1.0"
