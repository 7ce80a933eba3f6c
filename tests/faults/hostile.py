"""Hostile inputs made from sound ones. Every choice comes from a `random.Random`, which hypothesis may be."""

import copy
import json

_NUMBERS = (
    *(0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**63, 10**30, -(2**63)),
    *(0.5, 1e-320, 1e308, float("nan"), float("inf")),
)
_TEXTS = ("", "x", "\0", "\ud800", "..", "../x", "/etc/passwd", "~", "*", "nan", "true", "1e9", "{}", "\u20ac" * 70)
_OTHERS = (None, True, False, [], {}, [[]], {"": None}, [1, "x"], {"x": {"x": []}})
_STRANGE = (*_NUMBERS, *_TEXTS, *_OTHERS)

_EDITS_OF_BYTES = ("insert", "insert", "over", "over", "flip", "cut", "end", "double")
_EDITS_OF_VALUES = ("replace", "replace", "remove", "add", "copy")


def mutated(random, data, words=()):
    """These bytes, up to four spans cut, doubled, flipped or written over. words: what the format is made of."""
    data = bytearray(data)
    for _ in range(random.randrange(5)):
        action, at, length = random.choice(_EDITS_OF_BYTES), random.randrange(len(data) + 1), random.randrange(1, 14)
        piece = random.choice(words) if words and random.randrange(4) else random.randbytes(random.randrange(1, 5))
        if action == "insert":
            data[at:at] = piece
        elif action == "over":
            data[at : at + len(piece)] = piece
        elif action == "flip" and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif action == "cut":
            del data[at : at + length]
        elif action == "end":
            del data[at:]
        elif action == "double":
            data[at:at] = data[at : at + length]
    return bytes(data)


def altered(random, value, others=()):
    """This JSON value, up to three of its parts replaced, left out, added to or put elsewhere. others: to put there."""
    whole = {"": copy.deepcopy(value)}
    for _ in range(random.randrange(4)):
        places = list(_places(whole))
        node, key = random.choice(places)
        new = _new_value(random, others)
        action = random.choice(_EDITS_OF_VALUES)
        if action == "copy":
            source, other = random.choice(places)
            new = copy.deepcopy(source[other])
        if action == "remove" and node is not whole:
            del node[key]
        elif action == "add" and isinstance(node[key], dict):
            node[key][new if isinstance(new, str) else "x"] = new
        elif action == "add" and isinstance(node[key], list):
            node[key].append(new)
        else:
            node[key] = new
    return whole[""]


def json_text(random, value, others=()):
    """The JSON text of an altered value, now and then with its bytes mutated too."""
    text = json.dumps(altered(random, value, others)).encode()
    return text if random.randrange(3) else mutated(random, text, _JSON)


_JSON = (*(b'"', b"[", b"]", b"{", b"}", b",", b":"), b"\\ud800", b"1e999", b"NaN", b"-", b"9" * 5000, b"[" * 2000)


def _new_value(random, others):
    if others and random.randrange(2):
        return copy.deepcopy(random.choice(others))
    if random.randrange(20) == 0:
        deep = 1
        for _ in range(random.choice((3, 90, 400))):
            deep = [deep]
        return deep
    return copy.deepcopy(random.choice(_STRANGE))


def _places(node):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


YAML_WORDS = (
    *(b"&a ", b"*a", b"<<: ", b"!!int ", b"!!float ", b"!!bool ", b"!!binary ", b"!!timestamp ", b"!!set ", b"!!omap "),
    *(b"!!pairs ", b"!!str ", b"!!null ", b"!!map ", b"!!seq ", b"!!merge ", b"!!python/object/apply:os.system "),
    *(
        b"? ",
        b"- ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"\n",
        b"  ",
        b"'",
        b'"',
        b"#",
        b"|\n",
        b">\n",
        b"---\n",
        b"%YAML ",
    ),
    *(
        b"1:1:1",
        b".inf",
        b".nan",
        b"1e999",
        b"0x" + b"f" * 5000,
        b"9" * 5000,
        b"0o7",
        b"0b1",
        b"1_0",
        b"_",
        b"\x00",
        b"\xc3",
    ),
    *(
        b"yes",
        b"2025-01-01",
        b"=",
        b"~",
        b"null",
        b"[" * 300,
        b"{a: " * 100,
        b"- " * 300,
        b"(a{9999}){9999}",
        b"(?P<",
        b"\\",
    ),
)
