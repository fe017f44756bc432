"""An application's word that the model which it got does its work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_infer.store import Store, default_root, store_of

if TYPE_CHECKING:
    from edge_infer.runtime.session import Session

#: A push that tries a release holds the store for moments only.
WAIT_S = 10.0


def confirm(model: str | Session) -> str:
    """Keep the release on trial that a push activated with a deadline; gives its digest.

    ``model`` is its name in this device's store, or the session that runs it: then it must be that very release.
    Nothing changes where it was confirmed before. Raises ReleaseNotFound when it is no more in use (its time was over,
    another push came), DeviceError when the store stays busy, OSError when it cannot be written.
    """
    if isinstance(model, str):
        store, name, digest = Store(default_root()), model, None
    else:
        bundle = model.bundle
        store, name, digest = store_of(bundle.path) or Store(default_root()), bundle.manifest.name, bundle.digest
    pointer = store.pointer(name)
    if pointer.digests and not pointer.pending and pointer.digests[0] == (digest or pointer.digests[0]):
        return pointer.digests[0]  # nothing to write, so that a store on a read-only disk will do
    with store.lock(WAIT_S, f"a confirmation of {name}"):
        return store.confirm(name, digest, "the application")
