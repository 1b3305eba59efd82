"""Mooncake's TransferEngine in this process, for every room that uses it: the handoff between hosts (transfer/) and the
storage tier (store/).

    requirements.py   what must be installed and present, and the command that helps
    engine.py         the one engine of the process, its users, and the memory that they have registered
    client.py         a client of the pool of stores: its calls and their codes

Nothing of the library is imported before a user has asked for it.
"""
