"""`kvist bench`: measures any OpenAI-compatible server from outside, over HTTP, by docs/bench.md's definitions.

    config.py  the scenarios' settings        load.py      what is asked, drawn by a seed; whose turn it is (pure)
    http.py    a small HTTP/1.1 client        completions.py  one streamed answer → one `Row`
    drive.py   a scenario's requests in time  report.py    rows → figures, tables, JSON, ratios (pure)
    verbs.py   what the command does

It imports nothing of the servers it measures: a server is a URL here.
"""
