"""Packages of user code in the bucket: addressed by their content, written once, never changed.

It knows the bucket; what a package may hold is `wa_core.packages`' to say.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.commit import patiently
from wa_core.errors import AlreadyExistsError, CorruptError, InvalidInputError, ObjectNotFoundError
from wa_core.packages import unpack

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.store.base import ObjectStore

NOT_FOUND = "package_not_found"


def package_id(body: bytes) -> str:
    """``sha256:…`` of a package."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def put_package(store: ObjectStore, body: bytes) -> str:
    """Keep a package that has been checked, and return its id; the same bytes have the same one.

    Raises:
        TransientError: the store is away.
    """
    package = package_id(body)
    try:
        store.create(layout.package(package), body)
    except AlreadyExistsError:
        return package
    return package


def fetch_package(store: ObjectStore, package: str) -> bytes:
    """The bytes of a package.

    Raises:
        InvalidInputError: there is none of this id (`package_not_found`).
        CorruptError: its bytes are not those that the id names.
        TransientError: the store is away.
    """
    key = layout.package(package)
    try:
        body = patiently(lambda: store.get(key))
    except ObjectNotFoundError:
        raise InvalidInputError(
            f"there is no package {package}; upload it again, or leave `package` out to use a built-in recipe",
            code=NOT_FOUND,
        ) from None
    if (found := package_id(body)) != package:
        raise CorruptError(f"{key} has {found}, not what its name says; upload the package again")
    return body


def unpack_package(store: ObjectStore, package: str, folder: Path) -> Path:
    """Fetch a package and unpack it into `folder`, which is returned.

    Raises:
        InvalidInputError: there is no such package, or it is none.
        CorruptError: its bytes are not those that its id names.
        TransientError: the store is away.
        OSError: the disk has no room.
    """
    unpack(fetch_package(store, package), folder)
    return folder
