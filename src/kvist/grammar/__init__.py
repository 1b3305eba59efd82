"""Constraints on the form of an answer: compiled into grammars, and followed token by token.

    Constraint ──compiler.py──► Grammar ──► Matcher ──fill──► packed bits of the allowed tokens ──► the sampling kernels

backend.py has the interface, backends.py the list of backends. compiler.py compiles on threads of its own and keeps
what it has compiled. runner/answers.py has the matchers of the running requests.
"""
