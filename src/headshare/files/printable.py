"""Text that came from outside, made fit for a terminal and for one line of an error."""

import re

# what a terminal acts on, or what turns the direction of text; and halves of characters, which no output can encode
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_TEXT = 512
MAX_LINE = 900
_BREAKS = re.compile(r"\s*[\r\n]\s*")


def is_shown(text: str) -> bool:
    """True if a text that somebody else wrote is short and can be printed as it is."""
    return len(text) <= MAX_TEXT and not CONTROL.search(text)


def shown(text: str) -> str:
    """The text with escapes, such as \\x1b, for all that a terminal would act on; new lines and tabs stay."""
    return CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else _escaped(match[0]), text)


def one_line(text: str, most: int = MAX_LINE) -> str:
    """The text as one line that can be printed, shortened in its middle if it is longer than `most` characters."""
    joined = _BREAKS.sub(" ", text.strip())
    line = CONTROL.sub(lambda match: _escaped(match[0]), joined if len(joined) < 8 * most else _short(joined, most))
    return _short(line, most)


def reason_of(error: BaseException) -> str:
    """What an exception of somebody else's library says, in one line, or its kind if it says nothing."""
    said = one_line(str(error), 300).rstrip(".: ")
    return f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said or type(error).__name__


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} [...] {text[-(most // 3 - 7) :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
