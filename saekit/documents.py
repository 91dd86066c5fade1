"""Documents, and the one rule by which a document is held out.

Everything that splits text splits it here, by document and by the document's name, so that what the
embedded model, an SAE and an evaluation have not seen is the same set however the work is cut up.
"""

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Document:
    """One text or one chat, under a name that is stable between machines (a module path, a row
    number)."""

    id: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    """A chat in place of a text: each message has a "role" and a "content"."""


def held_out(document_id: str, fraction: float) -> bool:
    """Whether the document belongs to the held-out `fraction` (0..1) of all documents.

    The name alone decides (BLAKE2b of it, read as a number in [0, 1)): no seed, no order, no count.
    The sets are nested: what is held out at 0.05 is held out at 0.1.
    """
    digest = blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
