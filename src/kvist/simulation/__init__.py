"""Simulations of engines, gateways and their wires: Kvist's real decisions, in simulated time and under any fault.

    cluster       simulated engines, a gateway and wires with faults; pure: real schedulers, no threads or clocks
    engine        one of these engines; its parts are device, transport, mover, store, and the checks order and slots
    lossy_wires   the wires: any order between pairs, losses and duplicates
    timed_fleet   a gateway's decisions and unified workers, whose steps take simulated time
    timed_pair    the loops of a prefill and a decode engine, whose devices and copies take simulated time

For tests and benchmarks, as the fakes of `kvist.testing`, on which this package builds. Nothing that serves imports it.
"""
