"""Proofs that an HTTP request comes from a member of the cluster: a MAC under the cluster key.

A worker that announces itself to a gateway shows such a proof, so that a client without the cluster key can neither add
nor withdraw a worker in its name. A proof does not expire: a person who reads the traffic can repeat the announcement,
not change it.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

_PROOF_BYTES = 16
PROOF_HEADER = "x-kvist-member"


class ClusterProof:
    def __init__(self, cluster_key: str) -> None:
        self._key = hashlib.blake2b(cluster_key.encode(), digest_size=32, person=b"kvist-proof").digest()

    def of(self, *words: str) -> str:
        """Return the proof of these words, in hex."""
        return hashlib.blake2b(msgspec.json.encode(words), key=self._key, digest_size=_PROOF_BYTES).hexdigest()

    def holds(self, proof: str, *words: str) -> bool:
        return hmac.compare_digest(self.of(*words).encode(), proof.encode())
