"""Stage 1, identify: from the caller's metadata to the key it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import KeyConfig


class KeyRing:
    """The configured keys, by the hash of their secret."""

    def __init__(self, keys: Iterable[KeyConfig]) -> None:
        self._by_hash = {key.secret_hash: key for key in keys}

    def identify(self, metadata: Sequence[tuple[str, str | bytes]]) -> KeyConfig:
        """The caller's key. Raises MeshError KEY_INVALID.

        A lookup by the hash of a random 256-bit secret tells an observer of its timing nothing about the secret.
        """
        values = [value for name, value in metadata if name == "authorization" and isinstance(value, str)]
        if len(values) != 1:
            raise MeshError(Reason.KEY_INVALID, "send one `authorization: Bearer <key>`")
        scheme, _, secret = values[0].partition(" ")
        key = self._by_hash.get(hashlib.sha256(secret.strip().encode()).hexdigest())
        if scheme.lower() != "bearer" or key is None:
            raise MeshError(Reason.KEY_INVALID, "the key is not known")
        return key
