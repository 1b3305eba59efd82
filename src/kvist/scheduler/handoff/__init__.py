"""The handoffs of one engine: pages move from a prefill engine to a decode engine. docs/handoff.md has the protocol.

    tables.py   the transitions of both sides        source.py   the prefill side: accepts Grants, writes, sends Done
    sides.py    both sides, chosen by mode           target.py   the decode side: grants pages, verifies, takes over
    stored.py   handoffs through the store: the sides never meet

Every engine has both sides. The role of an engine decides which handoffs begin; a handoff that has begun is finished,
even if the role changes.
"""
