"""Secrets of the environment and those that stand in addresses, kept out of what is printed or written.

Standard library only: what looks at a machine before torch is there imports it too.
"""

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

SHORTEST_SECRET = 8  # shorter values would blank out ordinary words, as the `true` of TOKENIZERS_PARALLELISM
SHORTEST_PASSWORD = 6  # of an address in the environment, where nothing but a password can stand

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|_PASS$|CREDENTIAL", re.IGNORECASE)
_PASSWORD = re.compile(r"//[^/@\s:]*:(\S+)@|^[^/@\s:]*:([^/@\s]+)@")  # the second is an address without http://
_QUERY_VALUE = re.compile(r"[?&#][^\s?&#=]*=([^\s&#]+)")

# In a text: to the last @ of the word, as a password may hold a / or an @ that should have been written %2F or %40.
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_QUERY = re.compile(
    r"""(://[^\s'"?\#]*(?:\?|\#(?=[^\s'"]*=)) | \?(?=[\w.%~-]+=))  # of an address, or of a path: /x?token=...
        [^\s'"]*[^\s'",.;:)\]>?]                                  # but not the punctuation that follows it""",
    re.VERBOSE,
)


def redacted(text: str) -> str:
    """Return the text with `***` for each secret.

    These are the `user:password@` and the query of every address, and wherever they stand, the values of environment
    variables whose name says that they are secret, and passwords and query values of the addresses in all of them.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))


def _secrets() -> list[str]:
    """The secrets of the environment as they are and as messages show them; the longest first, to leave no rest."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value.strip()) >= SHORTEST_SECRET:
            found |= _forms(value.strip())
        found |= {form for secret in _in_addresses(value) for form in _forms(secret)}
    return sorted(found, key=len, reverse=True)


def _in_addresses(value: str) -> Iterator[str]:
    """Yield the passwords of addresses and the values of their queries, and what programs may take for a password."""
    for match in _PASSWORD.finditer(value):
        password = match[1] or match[2]
        # Written as they are, these end the password for some programs, which show the rest as a host or a port.
        yield from (part for part in (password, *re.split(r"[/?#@:]", password)) if len(part) >= SHORTEST_PASSWORD)
    if "://" in value:
        yield from (found for found in _QUERY_VALUE.findall(value) if len(found) >= SHORTEST_SECRET)


def _forms(secret: str) -> set[str]:
    """The secret as it is, encoded and decoded as in an address, and as Python and JSON quote it."""
    forms = {secret, unquote(secret), quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    return {form for form in forms if len(form) >= SHORTEST_PASSWORD}
