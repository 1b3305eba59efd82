"""HTTP below the API: connections and their limits, the log of requests, bodies, callers, threads for long work."""
