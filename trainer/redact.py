"""Secrets that stand in addresses, such as that of a hub mirror or a proxy, kept out of what is printed or written."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"<>]+@")


def redacted(text: str) -> str:
    """Return the text with `user:password@` in each address replaced by `***@`."""
    return _CREDENTIALS.sub("***@", text)
