"""Where the final answer of a completion stands. Everything is linear in the text's length."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_EMPTY = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{\s*\}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE = re.compile(
    # "Answer: 12", "**Answer**: 12", "_Final answer:_ 12", and a heading "## Final Answer" alone.
    r"(?:answer(?:[ \t]+is)?|答案)[ \t*_`}]*[:\N{FULLWIDTH COLON}]"
    r"|^[#*_ \t]*(?:final[ \t]+)?answer[#*_ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_BLANK = re.compile(r"[\s*_`}]*")
_DISPLAY = {"$$": "$$", r"\[": r"\]"}
_FORMULA = re.compile(r"[0-9=+*/^<>|&]|\\(?![()\[\],;!: ]|text|quad)")
_UNIT = re.compile(r"[A-Za-z]+(?:\^[23])?(?:/[A-Za-z]+(?:\^[23])?)?\.?")
_REASON = re.compile(r"\s\((?:since|because|as|which|that|i\.e)\b")
_BOLD = re.compile(r"(?<![\w)}])\*\*(?=[^\s*])|(?<=[^\s*])\*\*(?=[\s.,;:)]|$)")


def extract_answer(text: str) -> str | None:
    r"""The final answer of a completion, or None if it gives none.

    Two conventions are in use, and either is read, whatever the prompt asked for:

    - a box, `\boxed{...}`, `\fbox{...}` or `\framebox{...}`: what the last one holds;
    - a line `Answer: ...` in any case, with Markdown around the word or the answer
      (`**Answer**: 12`, `_Answer:_ 12`), a full-width colon, or 答案; the answer may stand on the
      next line, also in `$$...$$` or `\[...\]`, and so it may after a heading `Answer`. The last
      such line counts.

    Of both, the one that comes last counts. A box in an answer line is the answer if only words
    stand around it, and a unit or a word after it stays; otherwise the line is read as it is,
    without the box: in `x = \boxed{5}` it is 5, and `\boxed{2}9` is no number. A box that never
    closes, holds nothing, or has digits right beside it, is none, and an empty last line is none
    either. Outside of formulas `~12` says "about 12", in an answer line, and gives no final answer
    (in a box `~` is LaTeX's space). A reason in brackets behind ("7 (since ...)") and check marks
    are no part of it. Delimiters, Markdown and a final dot are left for
    `math_reading` to drop.

    >>> extract_answer(r"\boxed{1}, no: \boxed{\frac{1}{2}}."), extract_answer("**Answer:** 7\n")
    ('\\frac{1}{2}', '7')
    >>> extract_answer(r"Answer: $\boxed{29}$"), extract_answer("Answer:\n$$\n29\n$$")
    ('29', '29')
    >>> extract_answer("The answer is 12.") is None
    True
    """
    text = _EMPTY.sub(" ", text)
    line, box = _last_line(text), _last_box(text)
    if line is not None and (box is None or box[0] < line[1]):
        if box is not None and box[0] >= line[0]:
            return _line_with_boxes(text, line)
        return _content(text, line)
    if box is None or box[2] is None:
        return None
    return _inside(text, box)


def extract_boxed(text: str) -> str | None:
    r"""What the last box holds; None without one, or if it never closes (for solutions).

    >>> extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}") is None
    True
    """
    box = _last_box(text)
    return None if box is None or box[2] is None else _inside(text, box)


def extract_answer_line(text: str) -> str | None:
    r"""What follows the last `Answer:`, as `extract_answer` has it (the form of DAPO's prompt).

    Reference: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    arXiv:2503.14476.

    >>> extract_answer_line("Answer: 7? Let me see.\n**Answer:** $12$\n")
    '$12$'
    """
    text = _EMPTY.sub(" ", text)
    line = _last_line(text)
    return None if line is None else _line_with_boxes(text, line)


def _last_box(text: str) -> tuple[int, int, int | None] | None:
    """Where the last box begins, where its inside does, and where that ends if it does."""
    start = max(text.rfind(name) for name in ("\\boxed", "\\fbox", "\\framebox"))
    box = _BOX.match(text, start) if start >= 0 else None
    if box is None:
        return None
    return start, box.end(), _closing(text, box.end())


def _closing(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # an escaped brace is a character
        if depth == 0:
            return brace.start()
    return None


def _inside(text: str, box: tuple[int, int, int | None]) -> str | None:
    start, first, last = box
    assert last is not None
    beside = text[start - 1 : start] if start else "", text[last + 1 : last + 3].lstrip(".")[:1]
    return None if any(character.isdigit() for character in beside) else text[first:last]


def _last_line(text: str) -> tuple[int, int] | None:
    """Where the answer of the last answer line begins and ends; the same if it is empty."""
    found: re.Match[str] | None = None
    for match in _LINE.finditer(text):
        found = match
    if found is None or _in_box(text, found.start()):
        return None
    start = _BLANK.match(text, found.end()).end()  # type: ignore[union-attr]
    closing = _DISPLAY.get(text[start : start + 2])
    if closing is not None:
        end = text.find(closing, start + 2)
        if end >= 0:
            inside = text[start + 2 : end]
            skipped = len(inside) - len(inside.lstrip())
            return start + 2 + skipped, start + 2 + len(inside.rstrip())
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    box = _BOX.search(text, start, end)
    if box:
        end = max(end, (_closing(text, box.end()) or end - 1) + 1)
    return start, end


def _in_box(text: str, place: int) -> bool:
    box = _last_box(text[:place])
    return box is not None and box[2] is None


def _content(text: str, line: tuple[int, int]) -> str | None:
    content = _BOLD.sub("", text[slice(*line)].strip(" \t\r*`").rstrip(" ✓✔✅☑"))
    reason = _REASON.search(content)
    if reason is not None and content.rstrip(" .").endswith(")"):
        content = content[: reason.start()].rstrip()
    return None if content.startswith("~") else content or None


def _line_with_boxes(text: str, line: tuple[int, int]) -> str | None:
    content = _content(text, line)
    box = None if content is None else _last_box(content)
    if content is None or box is None:
        return content
    start, first, last = box
    if last is None:
        return None
    before, after = content[:start], content[last + 1 :]
    if _BOX.search(before) or _FORMULA.search(before) or before.rstrip()[-1:] in ("(", "-"):
        return content
    if re.match(r"\s*[$*]*\s*[,;.(]\s*[A-Za-z]{3}", after) and not _BOX.search(after):
        return content[first:last]  # "\\boxed{5}, since 2 + 3 = 5"
    behind = re.sub(r"^(?:\s|[$*]|\\[)\]])+", " ", after)
    trailing = re.split(r"[,;.:(\n]|\\[)\]]|\$", behind, maxsplit=1)[0].strip(" *`_")
    if _UNIT.fullmatch(trailing):  # of which the "/" is no sign of a formula
        return f"{content[first:last]} {trailing.rstrip('.')}"
    if after[:1].isalnum() or _FORMULA.search(after):
        return content
    return f"{content[first:last]} {trailing}".rstrip()
