"""`kvist bench`: measures any OpenAI-compatible server from outside, over HTTP, by docs/bench.md's definitions.

    config.py          settings of the scenarios            load.py         prompts and turns, drawn by a seed (pure)
    http.py            a small HTTP/1.1 client              completions.py  one streamed answer → one `Row`
    drive.py           sends a scenario's requests in time  report.py       rows → figures, tables, JSON, ratios (pure)
    infinite_cache.py  the highest hit rate possible        verbs.py        the command itself

This room imports nothing of the servers that it measures: a server is a URL here.
"""
