"""TLS endpoints whose certificates take OpenSSL very long to read.

Each certificate's key is on an elliptic curve of its own, over a field whose prime is one more than
a multiple of a large power of two. The base point is compressed: to decompress it, OpenSSL takes a
square root, which with such a prime (the algorithm of Tonelli and Shanks) takes 200,000
multiplications. It does so as soon as it has the certificate, before it verifies anything.
"""

import hashlib
import hmac
import socket
import struct
from collections.abc import Callable, Sequence
from itertools import count

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.tls import wait_for_close

# A prime as large as OpenSSL takes (OPENSSL_ECC_MAX_FIELD_BITS is 661).
_PRIME = 97 * 2**652 + 1
_POINT = pow(pow(3, 2 * 97, _PRIME) - 1, (2 * _PRIME - 1) // 3, _PRIME)  # its x


def _der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 128 | len(octets)]) + octets + content


def _integer(value: int) -> bytes:
    return _der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def slow_certificate(serial: int) -> bytes:
    """Return a certificate of some 390 bytes that takes OpenSSL half a second to decode."""
    size = (_PRIME.bit_length() + 7) // 8
    point = b"\x02" + _POINT.to_bytes(size, "big")
    curve = _der(
        0x30,
        _integer(1),
        _der(0x30, _der(6, bytes.fromhex("2a8648ce3d0101")), _integer(_PRIME)),
        _der(0x30, _der(4, b"\0"), _der(4, b"\1")),
        _der(4, point),
        _integer(_PRIME - 2),
    )
    key = _der(0x30, _der(0x30, _der(6, bytes.fromhex("2a8648ce3d0201")), curve), _der(3, b"\0\0"))
    algorithm = _der(0x30, _der(6, bytes.fromhex("2a8648ce3d040302")))  # ecdsa-with-SHA256
    validity = _der(0x30, _der(23, b"200101000000Z"), _der(23, b"490101000000Z"))
    empty = _der(0x30)
    to_sign = _der(0x30, _integer(serial), algorithm, empty, validity, empty, key)
    return _der(0x30, to_sign, algorithm, _der(3, b"\0", b"\x30\0"))


def _vector(length_size: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_size, "big") + content


def _message(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + _vector(3, content)


def _records(handshake: bytes) -> list[bytes]:
    return [handshake[at : at + 16384] for at in range(0, len(handshake), 16384)]


def _server_hello(session: bytes, cipher: int, extensions: bytes) -> bytes:
    content = b"\3\3" + bytes(32) + _vector(1, session) + struct.pack("!HB", cipher, 0)
    return _message(2, content + _vector(2, extensions))


def _receive_hello(connection: socket.socket) -> bytes:
    head = connection.recv(5, socket.MSG_WAITALL)
    return connection.recv(int.from_bytes(head[3:], "big"), socket.MSG_WAITALL)


def showing_in_tls_1_2(certificates: Sequence[bytes]) -> Callable[[socket.socket], None]:
    """Answer a client's hello with a certificate message (RFC 5246), and wait for the end."""
    chain = b"".join(_vector(3, certificate) for certificate in certificates)
    return _answering_in_tls_1_2(_message(11, _vector(3, chain)))


def stalling_in_tls_1_2(size: int) -> Callable[[socket.socket], None]:
    """Send a certificate message of so many bytes, all but the last; then say nothing."""
    return _answering_in_tls_1_2(_message(11, bytes(size))[:-1])


def _answering_in_tls_1_2(message: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        _receive_hello(connection)
        hello = _server_hello(b"", 0xC02F, b"\xff\1\0\1\0")  # renegotiation_info (RFC 5746)
        for record in _records(hello + message):
            connection.sendall(b"\x16\3\3" + _vector(2, record))
        wait_for_close(connection)

    return behave


def showing_in_tls_1_3(certificates: Sequence[bytes]) -> Callable[[socket.socket], None]:
    """The same in TLS 1.3 (RFC 8446), which encrypts it."""

    def behave(connection: socket.socket) -> None:
        client_hello = _receive_hello(connection)
        session = client_hello[39 : 39 + client_hello[38]]
        share = client_hello.index(b"\0\x1d\0\x20", 39 + len(session)) + 4  # for X25519
        peer = X25519PublicKey.from_public_bytes(client_hello[share : share + 32])
        own = X25519PrivateKey.generate()
        public = own.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        key_share = b"\0\x33" + _vector(2, b"\0\x1d" + _vector(2, public))
        hello = _server_hello(session, 0x1301, b"\0\x2b\0\2\3\4" + key_share)
        connection.sendall(b"\x16\3\3" + _vector(2, hello))
        chain = b"".join(_vector(3, certificate) + b"\0\0" for certificate in certificates)
        certificate = _message(11, b"\0" + _vector(3, chain))
        seal = _sealer(own.exchange(peer), client_hello + hello)
        for record in _records(_message(8, b"\0\0") + certificate):
            connection.sendall(seal(record))
        wait_for_close(connection)

    return behave


def _sealer(shared: bytes, transcript: bytes) -> Callable[[bytes], bytes]:
    """Return what makes records of a server's handshake (RFC 8446 sections 5.2 and 7.1)."""

    def extract(salt: bytes, secret: bytes) -> bytes:
        return hmac.digest(salt, secret, "sha256")

    def expand(secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
        info = struct.pack("!H", size) + _vector(1, b"tls13 " + label) + _vector(1, context)
        return hmac.digest(secret, info + b"\1", "sha256")[:size]

    early = extract(bytes(32), bytes(32))
    derived = expand(early, b"derived", hashlib.sha256().digest(), 32)
    context = hashlib.sha256(transcript).digest()
    traffic = expand(extract(derived, shared), b"s hs traffic", context, 32)
    cipher = AESGCM(expand(traffic, b"key", b"", 16))
    first = int.from_bytes(expand(traffic, b"iv", b"", 12), "big")
    numbers = count()

    def seal(record: bytes) -> bytes:
        head = b"\x17\3\3" + struct.pack("!H", len(record) + 17)
        nonce = (first ^ next(numbers)).to_bytes(12, "big")
        return head + cipher.encrypt(nonce, record + b"\x16", head)

    return seal
