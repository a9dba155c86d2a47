"""Regular expressions as rules of an xgrammar grammar: what a rule matches whole, `re.fullmatch` matches.

The reverse does not always hold: \\d, \\w and \\s are ASCII as in JSON schemas, their opposites leave out what either
dialect counts to the class. The expression is read by Python's own parser and written anew, since xgrammar's readers
differ from Python in silence, and since its automata are far faster than what it makes of an expression itself.
Nothing here knows of tokens, of requests or of xgrammar's Python package.
"""

import json
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

try:
    from re import _constants as ops
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as ops
    import sre_parse as parser

Item = tuple[Any, Any]  # of a parsed expression: what it is, and what belongs to it
Placed = tuple[Item, bool, bool]  # with whether it stands at the expression's start, and at its end
Ranges = list[tuple[int, int]]  # first and last code points, both included, sorted and apart
LAST = 0x10FFFF
# Code points of one or two, three and four bytes. In one class, xgrammar takes bytes for UTF-8 that are none.
UTF8_LENGTHS = ((0, 0x7FF), (0x800, 0xFFFF), (0x10000, LAST))
# With a higher count, xgrammar does not compute what an automaton allows before it is asked for.
MOST_IN_AUTOMATON = 128
LARGEST_AUTOMATON = 10_000  # characters, counted as often as they may repeat


def _union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return merged


def _complement(ranges: Ranges) -> Ranges:
    lows = [0, *(high + 1 for _, high in ranges)]
    highs = [*(low - 1 for low, _ in ranges), LAST]
    return [(low, high) for low, high in zip(lows, highs, strict=True) if low <= high]


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    return _complement(_union([*_complement(ranges), *others]))


def _ranges_of(characters: str) -> Ranges:
    return _union((ord(character), ord(character)) for character in characters)


SURROGATES: Ranges = [(0xD800, 0xDFFF)]
ESCAPED_IN_JSON: Ranges = _union([(0, 0x1F), *_ranges_of('"\\')])
NOT_ASCII = (0x80, LAST)
# What a class holds in each dialect, and what it holds in any of them.
DIGITS = _ranges_of(string.digits)
WORD = _ranges_of(string.ascii_letters + string.digits + "_")
SPACE = _ranges_of(" \t\n\r\f\v")
ANY_SPACE = _union(
    [*SPACE, *_ranges_of("\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"), (0x2000, 0x200A)]
)
CLASSES = {
    ops.CATEGORY_DIGIT: (DIGITS, _union([*DIGITS, NOT_ASCII])),
    ops.CATEGORY_WORD: (WORD, _union([*WORD, NOT_ASCII])),
    ops.CATEGORY_SPACE: (SPACE, ANY_SPACE),
}
CLASSES |= {
    opposite: (_complement(CLASSES[category][1]), _complement(CLASSES[category][0]))
    for opposite, category in (
        (ops.CATEGORY_NOT_DIGIT, ops.CATEGORY_DIGIT),
        (ops.CATEGORY_NOT_WORD, ops.CATEGORY_WORD),
        (ops.CATEGORY_NOT_SPACE, ops.CATEGORY_SPACE),
    )
}
MATCHES_NOTHING = "it has a character class that matches nothing"
UNSUPPORTED = {
    "ASSERT": "a look-ahead or look-behind",
    "ASSERT_NOT": "a look-ahead or look-behind",
    "AT_BOUNDARY": r"a word boundary (\b)",
    "AT_NON_BOUNDARY": r"a word boundary (\B)",
    "ATOMIC_GROUP": "an atomic group",
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a back-reference",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
}


def regex_rule(pattern: str, in_json: bool = False) -> str:
    """The right side of a grammar's rule for the texts that match a regular expression as a whole.

    in_json: the rule is for what stands between the quotes of a JSON string whose value matches.

    Raises:
        ValueError: no regular expression, or one with a part that cannot be honoured; names the pattern.
    """
    try:
        tree = parser.parse(pattern)
        flags = tree.state.flags & ~(re.UNICODE | re.ASCII | re.VERBOSE | re.DOTALL)
        if flags:
            raise ValueError(f"flags ({re.RegexFlag(flags)!r}) are not supported")
        return _Writer(in_json, bool(tree.state.flags & re.DOTALL)).rule(tree)
    except (re.error, ValueError, OverflowError) as error:
        raise ValueError(f"the regular expression {pattern!r} cannot be used: {error}") from error
    except RecursionError:
        raise ValueError(f"the regular expression {pattern[:50]!r}... is nested too deeply") from None


class _Part(NamedTuple):
    """A part of an expression, as xgrammar's grammars and its automata both read it.

    Attributes:
        text: its spelling; a literal character is a class of one, as only classes are spelt alike.
        size: how many classes it has, counted as often as they may repeat.
    """

    text: str
    size: int = 0


NOTHING = _Part("[a]{0}")  # the empty text


class _Writer:
    """Writes a parsed expression anew.

    Attributes:
        in_json: whether for the inside of a JSON string.
        dot_is_all: whether "." matches a line's end too.
        is_automaton: whether classes are spelt for an automaton or for a grammar.
    """

    def __init__(self, in_json: bool, dot_is_all: bool) -> None:
        self.in_json = in_json
        self.dot_is_all = dot_is_all
        self.is_automaton = True

    def rule(self, tree: Sequence[Any]) -> str:
        """The rule of a whole expression."""
        pieces, run = [], []
        for item in _with_edges(tree, True, True):
            if self._is_for_grammar(item[0]):
                pieces += [*self._automaton(run), self._grammar(item)]
                run = []
            else:
                run.append(item)
        return " ".join([*pieces, *self._automaton(run)]) or '""'

    def _automaton(self, run: list[Placed]) -> list[str]:
        """The rule's piece for successive items; none if there are none."""
        self.is_automaton = True
        part = _chain(self._item(*item) for item in run)
        if part.size > LARGEST_AUTOMATON:
            limit = f"its repetitions count up to {part.size} characters, the limit is {LARGEST_AUTOMATON}"
            raise ValueError(f"{limit}, but for repetitions of one character outside of groups")
        return [] if part is NOTHING else [f"Regex({json.dumps(part.text, ensure_ascii=False)})"]

    def _grammar(self, item: Placed) -> str:
        """The rule's piece for an item without an automaton."""
        self.is_automaton = False
        return self._item(*item).text

    def _is_for_grammar(self, item: Item) -> bool:
        """Whether it repeats one character, out of nearly all or very often: a grammar takes these the fastest."""
        op, value = item
        if op not in (ops.MAX_REPEAT, ops.MIN_REPEAT) or len(value[2]) != 1:
            return False
        ranges = self._characters(value[2][0])
        is_often = max(value[0], value[1] if value[1] != parser.MAXREPEAT else 0) > MOST_IN_AUTOMATON
        return bool(ranges) and (is_often or ranges[-1][1] == LAST)

    def _sequence(self, tree: Sequence[Any], is_start: bool, is_end: bool) -> _Part:
        return _chain(self._item(*item) for item in _with_edges(tree, is_start, is_end))

    def _item(self, item: Item, is_start: bool, is_end: bool) -> _Part:
        """One item; is_start, is_end: whether it stands at the expression's start or end."""
        op, value = item
        ranges = self._characters(item)
        if ranges is not None:
            return self._class(ranges)
        if op is ops.SUBPATTERN:
            _, added_flags, removed_flags, tree = value
            if added_flags or removed_flags:
                raise ValueError("flags of a group are not supported")
            return _group(self._sequence(tree, is_start, is_end))
        if op is ops.BRANCH:
            parts = [self._sequence(tree, is_start, is_end) for tree in value[1]]
            return _Part(f"({'|'.join(part.text for part in parts)})", sum(part.size for part in parts))
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            return _repeat(self._sequence(value[2], False, False), *value[:2])
        if op is ops.AT and (
            (value in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING) and is_start)
            or (value in (ops.AT_END, ops.AT_END_STRING) and is_end)
        ):
            return NOTHING
        if op is ops.AT and value not in (ops.AT_BOUNDARY, ops.AT_NON_BOUNDARY):
            raise ValueError("^ and $ are supported at its start and its end only")
        name = str(value if op is ops.AT else op)
        raise ValueError(f"{UNSUPPORTED.get(name, name)} is not supported")

    def _characters(self, item: Item) -> Ranges | None:
        """The characters of an item that matches one character, None for any other item."""
        op, value = item
        if op is ops.LITERAL:
            return [(value, value)]
        if op is ops.NOT_LITERAL:
            return _complement([(value, value)])
        if op is ops.ANY:
            return [(0, LAST)] if self.dot_is_all else _complement(_ranges_of("\n\r\u2028\u2029"))
        if op is not ops.IN:
            return None
        is_negated = value[0][0] is ops.NEGATE
        ranges: Ranges = []
        for kind, members in value[is_negated:]:
            if kind is ops.CATEGORY:
                ranges += CLASSES[members][is_negated]
            else:
                ranges.append(members if kind is ops.RANGE else (members, members))
        return _complement(_union(ranges)) if is_negated else _union(ranges)

    def _class(self, ranges: Ranges) -> _Part:
        """One of some characters; inside of JSON escaped where it must be, or left out if nearly any will do."""
        ranges = _without(ranges, SURROGATES)
        if not self.in_json:
            return _Part(self._spelling(ranges), 1)
        plain = _without(ranges, ESCAPED_IN_JSON)
        choices = [self._spelling(plain)] if plain else []
        if not ranges or ranges[-1][1] < LAST:
            for low, high in _without(ranges, plain):
                escapes = [json.dumps(chr(code))[1:-1] for code in range(low, high + 1)]
                choices += ["".join(map(self._spelling, map(_ranges_of, escape))) for escape in escapes]
        if not choices:
            raise ValueError(MATCHES_NOTHING)
        return _Part(choices[0] if len(choices) == 1 and plain else f"({'|'.join(choices)})", len(choices))

    def _spelling(self, ranges: Ranges) -> str:
        if not ranges:
            raise ValueError(MATCHES_NOTHING)
        # xgrammar is the faster with a class that leaves out little if that is what it is told.
        if not self.is_automaton and ranges[-1][1] == LAST:
            return f"[^{''.join(map(_spell, _complement(ranges)))}]"
        if not self.is_automaton:
            return f"[{''.join(map(_spell, ranges))}]"
        parts = [_without(ranges, _complement([length])) for length in UTF8_LENGTHS]
        classes = [f"[{''.join(map(_spell, part))}]" for part in parts if part]
        return classes[0] if len(classes) == 1 else f"({'|'.join(classes)})"


def _spell(codes: tuple[int, int]) -> str:
    """A range inside of a class's brackets."""
    ends = []
    for code in sorted(set(codes)):
        if code < 0x80:
            ends.append(f"\\x{code:02x}")
        else:  # a grammar knows surrogates by this name alone
            ends.append(f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else chr(code))
    return "-".join(ends)


def _with_edges(tree: Sequence[Item], is_start: bool, is_end: bool) -> list[Placed]:
    """The items of a sequence that stands at the expression's start or end, each with whether it does."""
    others = [index for index, (op, _) in enumerate(tree) if op is not ops.AT] or [0]
    return [(item, is_start and index <= others[0], is_end and index >= others[-1]) for index, item in enumerate(tree)]


def _chain(parts: Iterable[_Part]) -> _Part:
    parts = [part for part in parts if part is not NOTHING]
    return _Part("".join(part.text for part in parts), sum(part.size for part in parts)) if parts else NOTHING


def _group(part: _Part) -> _Part:
    return part if part is NOTHING else part._replace(text=f"({part.text})")


def _repeat(part: _Part, least: int, most: int | Any) -> _Part:
    if part is NOTHING or most == 0:
        return NOTHING
    if most == parser.MAXREPEAT:
        count, most = "*" if least == 0 else f"{{{least},}}", max(least, 1)
    else:
        count = f"{{{least},{most}}}"
    return _Part(f"({part.text}){count}", part.size * int(most))
