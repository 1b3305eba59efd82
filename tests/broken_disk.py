"""System calls that fail as on a broken disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

BROKEN = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE]
BROKEN_IDS = [errno.errorcode[number] for number in BROKEN]


def refusing(real: Callable[..., object], number: int, *, spares: Callable[..., bool] | None = None) -> object:
    def refuse(*arguments: object, **options: object) -> object:
        if spares is not None and spares(*arguments):
            return real(*arguments, **options)
        raise OSError(number, os.strerror(number))

    return refuse
