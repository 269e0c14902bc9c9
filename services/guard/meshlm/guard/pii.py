"""Personal data in answers: numbers with check digits stop an answer, addresses are only told.

Check digits, country formats and the numbers that were never issued come from python-stdnum.
"""

from __future__ import annotations

from collections import defaultdict

from stdnum import iban, luhn, numdb
from stdnum.us import ssn

from meshlm.guard.patterns import Pattern

VERSION = "pii/1"


def _is_card(text: str) -> bool:
    digits = "".join(c for c in text if c.isdigit())
    return len(set(digits)) > 1 and luhn.is_valid(digits)


def _is_ssn(text: str) -> bool:
    # The number that every form shows as an example.
    return text != "123-45-6789" and ssn.is_valid(text)


def _iban_pattern() -> str:
    """One alternative for each length: a number's country decides where it ends, spaces or not."""
    by_length: defaultdict[int, list[str]] = defaultdict(list)
    for _, country, _, properties, _ in numdb.get("iban").prefixes:
        if bban := properties.get("bban"):
            parts = bban.replace("!n", " ").replace("!a", " ").replace("!c", " ").split()
            by_length[sum(map(int, parts))].append(country)
    # The country is looked up behind the check digits: few words come that far.
    alternatives = (
        rf"(?<=(?:{'|'.join(sorted(countries))})[0-9]{{2}})(?: ?[A-Z0-9]){{{length}}}"
        for length, countries in sorted(by_length.items())
    )
    return rf"[A-Z]{{2}}[0-9]{{2}}(?:{'|'.join(alternatives)})"


# Lengths and first digits (ISO/IEC 7812) as the networks publish them: Visa, Mastercard, American Express, Diners,
# Discover, JCB, UnionPay. Timestamps and device numbers are as long, and pass Luhn one time in ten.
_CARD = (
    r"(?:4[0-9]{15}(?:[0-9]{3})?|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}|"
    r"3[47][0-9]{13}|3(?:0[0-5]|[68][0-9])[0-9]{11}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|"
    r"35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17})"
)
# Only digits, or the groups that are printed on a card.
_CARDS = (
    rf"(?<![.,-]){_CARD}",
    r"(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|6[0245][0-9]{2}|35[2-8][0-9])(?: [0-9]{4}){3}",
    r"(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|6[0245][0-9]{2}|35[2-8][0-9])(?:-[0-9]{4}){3}",
    r"3[47][0-9]{2}[ -][0-9]{6}[ -][0-9]{5}",
)

PATTERNS = (
    *(Pattern("pii.credit_card", body, r"[^0-9]", check=_is_card) for body in _CARDS),
    Pattern("pii.us_ssn", r"(?<!-)[0-9]{3}-[0-9]{2}-[0-9]{4}", r"[^0-9-]", score=0.85, check=_is_ssn),
    Pattern("pii.iban", _iban_pattern(), r"[^A-Za-z0-9]", check=iban.is_valid),
    Pattern(
        "pii.email",
        r"(?<![._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}",
        r"[^A-Za-z0-9-]",
        score=0.9,
        act="flag",
    ),
    Pattern("pii.phone", r"(?<!\+)\+[1-9](?:[ ().-]{0,2}[0-9]){7,14}", r"[^0-9]", score=0.7, act="flag"),
    Pattern(
        "pii.phone",
        r"\(?[2-9][0-9]{2}\)?[ .-][2-9][0-9]{2}[.-][0-9]{4}",
        r"[^0-9-]",
        score=0.7,
        act="flag",
    ),
)
