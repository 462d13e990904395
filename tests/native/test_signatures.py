"""Ed25519 of the native runtime: the vectors of RFC 8032, and what OpenSSL says, hostile points among it."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Sequence

import pytest
from helpers import ROOT

P, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
Case = tuple[bytes, bytes, bytes]
"""A key, a signature and a message."""
Verify = Callable[[Sequence[Case]], list[bool]]
# RFC 8032, 7.1: tests 1, 2, 3 and SHA(abc).
VECTORS = """
d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a -
e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b
3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c 72
92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00
fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025 af82
6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a
ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf
ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f
dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704
"""


@pytest.fixture(scope="module")
def verify(tmp_path_factory: pytest.TempPathFactory) -> Verify:
    """The verifier, compiled alone with sanitizers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    program, native = tmp_path_factory.mktemp("signatures") / "check", ROOT / "runtime" / "native"
    sources = [ROOT / "tests" / "native" / "check_signatures.cpp", native / "session" / "ed25519.cpp"]
    options = ["-std=c++20", "-O1", f"-I{native}", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *options, *sources, "-o", program], check=True)

    def answers(cases: Sequence[Case]) -> list[bool]:
        lines = "\n".join(" ".join(part.hex() or "-" for part in case) for case in cases)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        return [line == "1" for line in done.stdout.split()]

    return answers


def test_the_vectors_of_the_standard(verify: Verify) -> None:
    words = ["" if word == "-" else word for word in VECTORS.split()]
    cases = [
        (bytes.fromhex(words[i]), bytes.fromhex(words[i + 2]), bytes.fromhex(words[i + 1]))
        for i in range(0, len(words), 3)
    ]
    assert verify(cases) == [True] * 4
    assert verify([(key, sign, message + b"\0") for key, sign, message in cases]) == [False] * 4


def signed_and_changed(draws: random.Random) -> list[Case]:
    """Signatures, each also with a bit of itself or of its key changed, and with s + the order for s."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    def changed(content: bytes) -> bytes:
        made = bytearray(content)
        made[draws.randrange(len(made))] ^= 1 << draws.randrange(8)
        return bytes(made)

    cases = []
    for length in (0, 1, 47, 63, 64, 65, 111, 112, 175, 176, 1000):  # about the ends of SHA-512's blocks
        private = Ed25519PrivateKey.from_private_bytes(draws.randbytes(32))
        key = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        message = draws.randbytes(length)
        signature = private.sign(message)
        cases += [(key, signature, message), (key, changed(signature), message)]
        cases += [(changed(key), signature, message), (key, signature[:63], message)]
        more = int.from_bytes(signature[32:], "little") + ORDER
        cases.append((key, signature[:32] + more.to_bytes(32, "little"), message))
    return cases


def of_small_order() -> list[Case]:
    """Keys and commitments of small order, in every form, for which anybody can sign some messages."""
    places = [0, 1, P - 1, P, P + 1]
    places.append(2707385501144840649318225287225658788936804267575313519463743609750303021190)
    places.append(55188659117513257062467267217118295137698188065244968500265048394206261417927)
    points = [(place | sign << 255).to_bytes(32, "little") for place in places for sign in (0, 1)]
    return [
        (key, commitment + bytes(32), message)
        for key in points
        for commitment in points
        for message in (b"", b"a", b"b")
    ]


def test_openssl_and_we_agree(verify: Verify) -> None:
    pytest.importorskip("cryptography")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    def by_openssl(case: Case) -> bool:
        key, signature, message = case
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    for cases in (signed_and_changed(random.Random(1)), of_small_order()):
        expected = [by_openssl(case) for case in cases]
        assert True in expected and False in expected
        assert verify(cases) == expected
