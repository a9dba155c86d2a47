"""Regular expressions as rules of a grammar in xgrammar's EBNF: what the rules match, `re.fullmatch` matches.

The reverse does not always hold: \\d, \\w and \\s are ASCII as in JSON schemas, their opposites leave out what either
dialect counts to the class. The expression is read by Python's own parser, as xgrammar's readers differ from Python in
silence, and becomes Glushkov's automaton with a rule for each state, which xgrammar follows without looking back.
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
MOST_STATES = 2000
MOST_STEPS = 50_000  # from one state to another
# More repetitions of one character are left to xgrammar: it takes longer over each token, but not to compile. Where
# nearly any character may stand before the quote that ends a JSON string, it takes little over both.
MOST_UNROLLED, MOST_UNROLLED_BEFORE_QUOTE = 128, 8
QUOTE = r'"\""'
# What follows a string in JSON, and any other text: nothing. Told so, xgrammar knows beforehand of nearly all tokens
# whether they are allowed.
LOOK_AHEAD = r" (=([ \n\r\t]* [,}\]:]))"
LOOK_AT_NOTHING = r' (="\x00")'


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
LINE_ENDS = _ranges_of("\n\r\u2028\u2029")
NOT_ASCII = (0x80, LAST)
DIGITS = _ranges_of(string.digits)
WORD = _ranges_of(string.ascii_letters + string.digits + "_")
SPACE = _ranges_of(" \t\n\r\f\v")
OTHER_SPACE = _ranges_of("\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff")
# What a class holds in every dialect, and what it may hold in one of them.
CLASSES = {
    ops.CATEGORY_DIGIT: (DIGITS, _union([*DIGITS, NOT_ASCII])),
    ops.CATEGORY_WORD: (WORD, _union([*WORD, NOT_ASCII])),
    ops.CATEGORY_SPACE: (SPACE, _union([*SPACE, *OTHER_SPACE, (0x2000, 0x200A)])),
}
CLASSES |= {
    opposite: (_complement(CLASSES[category][1]), _complement(CLASSES[category][0]))
    for opposite, category in (
        (ops.CATEGORY_NOT_DIGIT, ops.CATEGORY_DIGIT),
        (ops.CATEGORY_NOT_WORD, ops.CATEGORY_WORD),
        (ops.CATEGORY_NOT_SPACE, ops.CATEGORY_SPACE),
    )
}
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


def regex_rules(pattern: str, name: str, in_json: bool = False) -> str:
    """A grammar's rules, a line each, of which the one called `name` matches the texts that the pattern matches whole.

    in_json: it matches JSON strings, quotes included, whose value the pattern matches.

    Raises:
        ValueError: no regular expression, or one with a part that cannot be honoured; names the pattern.
    """
    try:
        tree = parser.parse(pattern)
        flags = tree.state.flags & ~(re.UNICODE | re.ASCII | re.VERBOSE | re.DOTALL)
        if flags:
            raise ValueError(f"the flags {re.RegexFlag(flags)!r} are not supported")
        return _Writer(name, in_json, bool(tree.state.flags & re.DOTALL)).rules(tree)
    except (re.error, ValueError, OverflowError) as error:
        raise ValueError(f"the regular expression {pattern!r} cannot be used: {error}") from error
    except RecursionError:
        raise ValueError(f"the regular expression {pattern[:50]!r}... is nested too deeply") from None


class _Part(NamedTuple):
    """A part of an expression.

    Attributes:
        is_nullable: whether it matches the empty text.
        first, last: the states that its texts can begin and end with; a state is a character that was just matched.
    """

    is_nullable: bool
    first: frozenset[int]
    last: frozenset[int]


NOTHING = _Part(True, frozenset(), frozenset())


class _Writer:
    """Turns a parsed expression into an automaton, and that into rules.

    Attributes:
        dot_is_all: whether "." matches a line's end too.
        classes: what each state's character may be, as EBNF.
        following: the states that each state can be followed by.
        lines: the rules so far.
    """

    def __init__(self, name: str, in_json: bool, dot_is_all: bool) -> None:
        self.name = name
        self.in_json = in_json
        self.dot_is_all = dot_is_all
        self.classes: list[str] = []
        self.following: list[frozenset[int]] = []
        self.lines: list[str] = []
        self.num_steps = 0

    def rules(self, tree: Sequence[Item]) -> str:
        """The rules of a whole expression, from its end to its start: each stretch ends with the next one's rule."""
        end, run = QUOTE if self.in_json else '""', []
        for item in reversed(_with_edges(tree, True, True)):
            if item[0][0] is ops.AT:
                self._item(*item)  # raises unless it holds anyway
                continue
            repeated = self._long_repeat(item[0], end == QUOTE and not run)
            if repeated is None:
                run.append(item)
                continue
            end = self._add_rule(f"{repeated} {self._add_automaton(run[::-1], end)}")
            run = []
        end = self._add_automaton(run[::-1], end)
        opening = f"{QUOTE} " if self.in_json else ""
        return "\n".join([f"{self.name} ::= {opening}{end}", *self.lines])

    def _add_rule(self, right_side: str) -> str:
        self.lines.append(
            f"{self.name}_{len(self.lines)} ::= {right_side}{LOOK_AHEAD if self.in_json else LOOK_AT_NOTHING}"
        )
        return self.lines[-1].partition(" ")[0]

    def _add_automaton(self, run: list[Placed], end: str) -> str:
        """Adds the rules of successive items, with `end` behind them. Returns what begins with the first of them."""
        if not run:
            return end
        part = self._chain(self._item(*item) for item in run)
        names: dict[tuple[frozenset[int], bool], str] = {}
        waiting = []

        def name_of(states: frozenset[int], is_last: bool) -> str:
            if (states, is_last) not in names:
                waiting.append((states, is_last))
                names[states, is_last] = f"{self.name}_{len(self.lines) + len(waiting) - 1}"
            return names[states, is_last]

        start = name_of(part.first, part.is_nullable)
        while waiting:
            states, is_last = waiting[0]
            choices = [end] if is_last else []
            for state in sorted(states):
                choices.append(f"{self.classes[state]} {name_of(self.following[state], state in part.last)}")
            self._add_rule(" | ".join(choices))
            del waiting[0]
        return start

    def _long_repeat(self, item: Item, is_before_quote: bool) -> str | None:
        """The EBNF of many repetitions of one character, None for any other item."""
        op, value = item
        if op not in (ops.MAX_REPEAT, ops.MIN_REPEAT) or len(value[2]) != 1:
            return None
        least, most = value[:2]
        ranges = self._characters(value[2][0])
        if not ranges or most == parser.MAXREPEAT:
            return None
        is_cheap = is_before_quote and ranges[-1][1] == LAST
        if most <= (MOST_UNROLLED_BEFORE_QUOTE if is_cheap else MOST_UNROLLED):
            return None
        ranges = _without(ranges, [*SURROGATES, *(ESCAPED_IN_JSON if self.in_json else [])])
        return f"{_spell_class(ranges)}{{{least},{most}}}" if ranges else None

    def _chain(self, parts: Iterable[_Part]) -> _Part:
        whole = NOTHING
        for part in parts:
            self.num_steps += len(whole.last) * len(part.first)
            if self.num_steps > MOST_STEPS:
                raise ValueError("it has too many ways to repeat what may be empty")
            for state in whole.last:
                self.following[state] |= part.first
            whole = _Part(
                whole.is_nullable and part.is_nullable,
                whole.first | part.first if whole.is_nullable else whole.first,
                whole.last | part.last if part.is_nullable else part.last,
            )
        return whole

    def _sequence(self, tree: Sequence[Item], is_start: bool, is_end: bool) -> _Part:
        return self._chain(self._item(*item) for item in _with_edges(tree, is_start, is_end))

    def _item(self, item: Item, is_start: bool, is_end: bool) -> _Part:
        """One item; is_start, is_end: whether it stands at the expression's start or end."""
        op, value = item
        ranges = self._characters(item)
        if ranges is not None:
            return self._one_of(ranges)
        if op is ops.SUBPATTERN:
            _, added_flags, removed_flags, tree = value
            if added_flags or removed_flags:
                raise ValueError("flags of a group are not supported")
            return self._sequence(tree, is_start, is_end)
        if op is ops.BRANCH:
            return _either([self._sequence(tree, is_start, is_end) for tree in value[1]])
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            return self._repeat(*value)
        if op is ops.AT and (
            (value in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING) and is_start)
            or (value in (ops.AT_END, ops.AT_END_STRING) and is_end)
        ):
            return NOTHING
        if op is ops.AT and value not in (ops.AT_BOUNDARY, ops.AT_NON_BOUNDARY):
            raise ValueError("^ and $ are supported at its start and its end only")
        name = str(value if op is ops.AT else op)
        raise ValueError(f"{UNSUPPORTED.get(name, name)} is not supported")

    def _repeat(self, least: int, most: Any, tree: Sequence[Item]) -> _Part:
        if most == parser.MAXREPEAT:
            parts = [self._sequence(tree, False, False) for _ in range(max(least, 1))]
            for state in parts[-1].last:
                self.following[state] |= parts[-1].first
            if least == 0:
                parts[-1] = parts[-1]._replace(is_nullable=True)
            return self._chain(parts)
        optional = NOTHING
        for _ in range(most - least):
            optional = self._chain([self._sequence(tree, False, False), optional])._replace(is_nullable=True)
        return self._chain([*(self._sequence(tree, False, False) for _ in range(least)), optional])

    def _characters(self, item: Item) -> Ranges | None:
        """The characters of an item that matches one character, None for any other item."""
        op, value = item
        if op is ops.LITERAL:
            return [(value, value)]
        if op is ops.NOT_LITERAL:
            return _complement([(value, value)])
        if op is ops.ANY:
            return [(0, LAST)] if self.dot_is_all else _complement(LINE_ENDS)
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

    def _one_of(self, ranges: Ranges) -> _Part:
        """One of some characters; in JSON also those with a short escape, unless nearly any character will do."""
        ranges = _without(ranges, SURROGATES)
        plain = _without(ranges, ESCAPED_IN_JSON) if self.in_json else ranges
        choices = [self._state(plain)] if plain else []
        if ranges and ranges[-1][1] < LAST:
            for low, high in _without(ranges, plain):
                escapes = [json.dumps(chr(code))[1:-1] for code in range(low, high + 1)]
                choices += [
                    self._chain(self._state(_ranges_of(sign)) for sign in escape)
                    for escape in escapes
                    if len(escape) == len(r"\n")
                ]
        if not choices:
            raise ValueError("it has a character class that matches nothing")
        return _either(choices)

    def _state(self, ranges: Ranges) -> _Part:
        state = frozenset([len(self.classes)])
        if len(self.classes) == MOST_STATES:
            limit = f"it has more than {MOST_STATES} characters, counted as often as they may repeat"
            raise ValueError(f"{limit}; {{m,n}} behind one character, outside of groups, counts as none")
        self.classes.append(_spell_class(ranges))
        self.following.append(frozenset())
        return _Part(False, state, state)


def _with_edges(tree: Sequence[Item], is_start: bool, is_end: bool) -> list[Placed]:
    """The items of a sequence that stands at the expression's start or end, each with whether it does."""
    others = [index for index, (op, _) in enumerate(tree) if op is not ops.AT] or [0]
    return [(item, is_start and index <= others[0], is_end and index >= others[-1]) for index, item in enumerate(tree)]


def _either(parts: Sequence[_Part]) -> _Part:
    return _Part(
        any(part.is_nullable for part in parts),
        frozenset().union(*(part.first for part in parts)),
        frozenset().union(*(part.last for part in parts)),
    )


def _spell_class(ranges: Ranges) -> str:
    """A character class in EBNF. xgrammar is the faster if one that leaves out little says what that is."""
    if ranges[-1][1] == LAST:
        return f"[^{''.join(map(_spell_range, _complement(ranges)))}]"
    return f"[{''.join(map(_spell_range, ranges))}]"


def _spell_range(codes: tuple[int, int]) -> str:
    ends = []
    for code in sorted(set(codes)):
        if code < 0x80:
            ends.append(f"\\x{code:02x}")
        else:  # UTF-8 has no surrogates
            ends.append(f"\\u{code:04x}" if 0xD800 <= code <= 0xDFFF else chr(code))
    return "-".join(ends)
