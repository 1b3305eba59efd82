"""The request bodies of the HTTP API: every known field with its class and type, and their strict decoding.

Pure: no sockets, no state. schemas.py has a struct for each endpoint, fields.py the names that all endpoints know,
decoding.py turns bytes into such a struct, and shape.py bounds the bytes first. The values of fields are checked where
their limits are known, in `server/`.
"""
