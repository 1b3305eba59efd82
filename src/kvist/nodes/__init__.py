"""The nodes of a Mooncake pool, each run as one process: `kvist master`, `kvist store`, and `kvist store drain`.

config.py          the options
node_server.py     HTTP of a node: /health, /ready, /server_info, /metrics; a node's life until a stop is requested
master.py          the master: starts `mooncake_master`, watches it, passes on the safe part of its HTTP
master_program.py  `mooncake_master` itself: found, checked, its command line, its lines in our log
store.py           a store: waits for its master, lends memory and SSD to the pool, leaves in order
segment.py         the calls of Mooncake's library that a store makes, on a thread of their own
ssd_folder.py      the folder on the SSD: checked, locked, with a note about the run that uses it
emptying.py        a store is emptied: its pages move to the other stores
drain.py           `kvist store drain`, which asks a store to empty itself and waits
"""
