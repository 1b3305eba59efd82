"""Plans the programs of kvist.lang: which worker does which part, what is computed ahead, what is kept, in which order.

Pure: a program is a graph (graph.py), the cluster a value (fleet.py), and `plan` a function of both (planner.py). No
module here knows sockets, clocks or threads; kvist.lang records the graphs and carries the plans out.
"""
