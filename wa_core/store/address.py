"""How another process opens the same bucket: which adapter, with which arguments.

It knows the adapters that reach something outside this process; for a store in memory, or one that wraps another,
there is no address. The invariant: `open_address` opens the bucket that `address_of` was told of. An address may
hold a secret: it goes from process to process through a pipe, never through arguments or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.store.base import ObjectStore


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """An adapter and the arguments that it was opened with."""

    adapter: Literal["s3", "local"]
    arguments: Mapping[str, Any] = field(repr=False)


def address_of(store: ObjectStore) -> StoreAddress | None:
    """The address of a bucket that other processes reach; None if `store` is this process's own."""
    if type(store) is LocalStore:
        return StoreAddress("local", {"root": str(store.root.absolute())})
    # Not imported for the comparison: whoever has an S3Store has loaded its module.
    if (type(store).__module__, type(store).__name__) == ("wa_core.store.s3", "S3Store"):
        return StoreAddress("s3", dict(store.arguments))  # type: ignore[attr-defined]
    return None


def open_address(address: StoreAddress) -> ObjectStore:
    """Open the bucket."""
    if address.adapter == "local":
        return LocalStore(**address.arguments)
    from wa_core.store.s3 import S3Store

    return S3Store(**address.arguments)
