"""Fakes of Kvist's own parts, for tests and benchmarks; `kvist.simulation` builds on them.

    specs                an engine's spec and load report, a request and its submits: defaults and changes
    clocks               clocks that stand still until a test advances them
    tokenizers           a tokenizer with one token for each byte
    scripted_dispatcher  the gateway's view of its engines, with answers that a test writes
    gateway_bench        the gateway's HTTP application over that dispatcher, called without sockets
    loop_bench           an engine's loop, with fakes of its channel, scheduler, runner, transport and store
    router_bench         a dispatcher over engines in memory, whose messages the test sends
    tiny_model           a model of two layers with random weights
    memory_engine        a whole engine in this thread, with that model
    memory_cluster       such engines and a gateway, stepped by a test
    fake_engine          an engine without a model, over real sockets
    inproc_transport     a transport between the pools of one process
    stepped_store        the store mover with threads that the test steps, and a store with faults
    memory_store         a store of pages in memory, as a row of the stores
    rounds               time limits in tests: a round that other work on the machine slowed down is repeated
    waits                waits for a condition, with a limit
    page_events          changes of cached pages in one line, and their replay

Nothing that serves imports this package. Only the modules that run real pages or models import torch.
"""
