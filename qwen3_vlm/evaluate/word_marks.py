"""Where a prediction differs from its reference, for the eye."""

import difflib

from markupsafe import Markup, escape


def mark_words(prediction: str, reference: str) -> Markup:
    """The prediction with the words that are not in the reference, or not at that place, marked."""
    words, wanted = prediction.split(), reference.split()
    matcher = difflib.SequenceMatcher(a=wanted, b=words, autojunk=False)
    parts = []
    for kind, _, _, start, stop in matcher.get_opcodes():
        text = escape(" ".join(words[start:stop]))
        if text:
            parts.append(text if kind == "equal" else Markup("<mark>{}</mark>").format(text))
    return Markup(" ").join(parts)
