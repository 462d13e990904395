"""Who made an artifact: an Ed25519 signature (RFC 8032) of its manifest, which has the sha256 of every file.

`manifest.json.sig` holds the 64 bytes that `openssl pkeyutl -sign -rawin -inkey KEY -in manifest.json`
writes, so openssl can sign and verify artifacts, too. Keys are PEM files:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub.pem

Needs the package cryptography (`pip install 'edge-bcs[sign]'`), and that only where a key is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.core.errors import EdgeBcsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

TRUSTED = "EDGE_BCS_TRUST_KEY"
"""The environment variable that names trusted keys where --trust-key does not."""
_LARGEST_KEY = 64 << 10
_NEW_KEY = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"


def _read(file: str | Path, what: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return stream.read(_LARGEST_KEY)
    except OSError as error:
        raise EdgeBcsError(f"the {what} {file} cannot be read: {error.strerror or error}.") from None


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise EdgeBcsError(
            "keys and signatures need the package cryptography: run `pip install 'edge-bcs[sign]'`."
        ) from None
    return serialization


def private_key(file: str | Path) -> Ed25519PrivateKey:
    """Read the Ed25519 private key that signs.

    Raises EdgeBcsError if the file is missing, no PEM file, protected by a password, or another kind of key.
    """
    serialization = _serialization()
    content = _read(file, "signing key")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise EdgeBcsError(
            f"the signing key {file} is protected by a password; decrypt it with `openssl pkey`, or sign "
            "manifest.json with `openssl pkeyutl -sign -rawin`."
        ) from None
    except Exception:  # cryptography raises its own kinds for what it does not know
        public = b"PUBLIC KEY" in content
        hint = "is a public key; the private one signs" if public else "is not a private key in PEM form"
        raise EdgeBcsError(f"the signing key {file} {hint}: {_NEW_KEY}.") from None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(key, Ed25519PrivateKey):
        raise EdgeBcsError(f"the signing key {file} is not an Ed25519 key: {_NEW_KEY}.")
    return key


def public_key(file: str | Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key whose signatures are trusted.

    Raises EdgeBcsError if the file is missing, no PEM file, a private key, or another kind of key.
    """
    serialization = _serialization()
    content = _read(file, "trusted key")
    if b"PRIVATE KEY" in content:
        raise EdgeBcsError(
            f"the trusted key {file} is a private key, which belongs on no board; write its public half with "
            f"`openssl pkey -in {file} -pubout`."
        )
    try:
        key = serialization.load_pem_public_key(content)
    except Exception:  # cryptography raises its own kinds for what it does not know
        raise EdgeBcsError(
            f"the trusted key {file} is not a public key in PEM form, such as `openssl pkey -pubout` writes."
        ) from None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(key, Ed25519PublicKey):
        raise EdgeBcsError(f"the trusted key {file} is not an Ed25519 key: {_NEW_KEY}.")
    return key


def how_to_trust_none() -> str:
    """What to do so that nothing needs a signature, within a sentence."""
    return "leave --trust-key out" + (f" and unset {TRUSTED}" if os.environ.get(TRUSTED) else "")


def sign(content: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signature of ``content``, 64 bytes."""
    return key.sign(content)


def verify(content: bytes, signature: bytes, trusted: Iterable[str | Path]) -> bool:
    """Whether one of the public keys in the files ``trusted`` made ``signature`` of ``content``."""
    keys = [public_key(file) for file in trusted]
    from cryptography.exceptions import InvalidSignature

    for key in keys:
        try:
            key.verify(signature, content)
        except InvalidSignature:
            continue
        return True
    return False
