"""Checks the fields of requests and converts them into the engine's parameters.

Pure: no sockets, no state. api/ has decoded the body into typed fields. A file here checks the values of one concern
against the limits of the model and of the server; every fault is a `RequestError` that names the field. Nothing is
clamped.
"""
