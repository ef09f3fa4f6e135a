"""The form of a key, what is stored of it, and where it is looked for in a request."""

import re
from hashlib import sha256

import pytest

from app import keys, tables


def test_a_key_has_a_prefix_and_at_least_160_bits_and_is_stored_as_its_hash():
    several = [keys.mint() for _ in range(200)]
    assert len({each.prefix for each in several}) == len({each.token for each in several}) == 200
    assert len(keys._IN_SECRET) ** 32 > 2**160
    for each in several:
        assert re.fullmatch(keys.PATTERN, each.token)[1] == each.prefix
        assert each.digest == sha256(each.token.encode()).digest()
    assert {len(set(character)) > 20 for character in zip(*(each.token[13:] for each in several), strict=True)} == {
        True
    }


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], None),
        ([(b"authorization", b"Bearer pgr_a")], "pgr_a"),
        ([(b"authorization", b"bEARER  pgr_a ")], "pgr_a"),
        ([(b"authorization", b"Basic cGdy")], ""),
        ([(b"authorization", b"Bearer")], ""),
        ([(b"authorization", b"Bearer a b")], ""),
        ([(b"authorization", b"Bearer \xff")], ""),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")], ""),
    ],
)
def test_the_token_of_a_request(headers, found):
    assert keys.token_of([(b"host", b"x"), *headers]) == found


def test_the_scopes_are_those_of_the_table():
    (rule,) = [each for each in tables.api_keys.constraints if each.name == "api_keys_scopes_check"]
    assert set(re.findall(r"'(\w+)'", str(rule.sqltext))) == set(keys.SCOPES)
