"""The verbs of an operator that are one HTTP request to a running server: `kvist role`, `kvist drain`."""
