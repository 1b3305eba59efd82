"""Processes that read the pages of a store into the host pool, beside the engine's own threads.

A thread that opens, reads and verifies files gives Python's lock up several times for each page, and waits for it each
time while the engine's loop or another thread has it. A process has a lock of its own, and delays no stream.

    engine: a reading thread of the store ──keys, offsets──► reader process ──pages──► the host pool, which both map
                              ▲────────── number of pages ────────┘

reads.py is the engine's side: a `PageStore` around the store. process.py is the reader's. messages.py is what they say.
"""
