"""A gateway's knowledge of the pages that workers have cached (docs/routing.md). PURE.

One index for all workers (prefix_index.py over digest_table.py, page_runs.py), kept equal to what the workers report
(page_feed.py), and the digests of prompts that are looked up in it (prompt_digests.py).
"""
