"""Representations of values in one short line, for a notebook and an interpreter: what it is, not all that it holds."""

MOST = 199


def short(value: object, *facts: object) -> str:
    """The name of a value's class with these facts about it: one line of at most 199 characters.

    Facts that are None or empty are left out.
    """
    told = ", ".join(" ".join(str(fact).split()) for fact in facts if fact is not None and fact != "")
    text = "".join(letter if letter.isprintable() else "?" for letter in f"{type(value).__name__}({told})")
    return text if len(text) <= MOST else f"{text[: MOST - 4]}...)"


def tail(text: str, most: int = 60) -> str:
    """The end of a name or path that may be long, quoted."""
    return repr(text if len(text) <= most else f"...{text[3 - most :]}")
