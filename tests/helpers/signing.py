"""Keys and signed artifacts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from edge_bcs.runtime import signature


def make_key(folder: Path, name: str, kind: str = "ed25519") -> tuple[Path, Path]:
    """A private and a public key, by openssl where there is one."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    if shutil.which("openssl"):
        options = ["-pkeyopt", "rsa_keygen_bits:1024"] if kind == "rsa" else []
        subprocess.run(
            ["openssl", "genpkey", "-quiet", "-algorithm", kind, *options, "-out", private], check=True
        )
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
        return private, public
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    key: Any = (
        rsa.generate_private_key(65537, 1024) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    )
    pem, plain = forms.Encoding.PEM, forms.NoEncryption()
    private.write_bytes(key.private_bytes(pem, forms.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, forms.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def make_keys(folder: Path) -> Path:
    """The keys `maker` and `other`, and the RSA key `rsa`, in a folder that is there."""
    for name, kind in (("maker", "ed25519"), ("other", "ed25519"), ("rsa", "rsa")):
        make_key(folder, name, kind)
    return folder


def sign(folder: Path, key: Path) -> Path:
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json.sig").write_bytes(signature.sign(content, signature.private_key(key)))
    return folder
