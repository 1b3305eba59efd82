"""Fakes of Kvist's own parts, for tests, benchmarks and simulations.

    specs    an engine's spec, its load report, a request and its submits: valid defaults, and the fields that differ
    page_events       page events in one line, and their replay
    clocks   clocks that stand still until a test advances them
    fake_engine       an engine without a model, over real sockets
    inproc_transport  a transport between the pools of one process

Nothing that serves imports this package. Only the modules that run real pages or models import torch.
"""
