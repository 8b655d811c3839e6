"""SHA256SUMS: digests of a complete output's files beside its images, as ``sha256sum --check`` reads them.

Its first line is a comment with the digest of the lines below, so that damage to it is not taken for damage to the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from sage_fast.generation.stores import Store

__all__ = ["CARD", "CONFIG", "MANIFEST", "PARQUET", "SHEET", "SUMS", "digest_of", "read_sums", "write_sums"]

CONFIG, CARD, SHEET = "config.json", "README.md", "contact_sheet.png"
MANIFEST, PARQUET = "manifest.jsonl", "manifest.parquet"
SUMS = "SHA256SUMS"
_BLOCK = 1 << 22


def read_sums(store: Store) -> dict[str, str] | None:
    """The recorded digests by name; None: the file is not there; empty: it is damaged."""
    if store.size(SUMS) is None:
        return None
    try:
        text = store.read(SUMS).decode("ascii")
    except UnicodeDecodeError:
        return {}
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.split("\n")[1:-1])}
    return sums if text == _text(sums) else {}


def write_sums(store: Store, sums: Mapping[str, str]) -> None:
    """Record digests, in place of those that were."""
    store.write(SUMS, _text(sums).encode("ascii"))


def digest_of(store: Store, name: str) -> str:
    """SHA-256 of a file that is there."""
    sha256 = hashlib.sha256()
    with store.reader(name) as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def _text(sums: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    return f"# the lines below: {hashlib.sha256(lines.encode('ascii')).hexdigest()}\n{lines}"
