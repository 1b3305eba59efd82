"""`kvist deploy run`: the pods of a manifest as processes of this machine."""
