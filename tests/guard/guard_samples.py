"""Made-up secrets and numbers, put together at run time so that no scanner takes this file for a leak."""

from __future__ import annotations

import random
import string

_RANDOM = random.Random(20260801)
_ALNUM = string.ascii_letters + string.digits


def _draw(alphabet: str, length: int) -> str:
    return "".join(_RANDOM.choice(alphabet) for _ in range(length))


SECRETS: dict[str, str] = {
    "secret.aws_access_key": "AK" + "IA" + _draw("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16),
    "secret.github_token": "gh" + "p_" + _draw(_ALNUM, 36),
    "secret.gitlab_token": "glp" + "at-" + _draw(_ALNUM, 20),
    "secret.slack_token": "xo" + "xb-" + _draw("123456789", 11) + "-" + _draw("12345678", 12) + "-" + _draw(_ALNUM, 24),
    "secret.slack_webhook": "https://hooks.slack" + ".com/services/T" + _draw("ABC123", 9) + "/B" + _draw("ABC123", 9)
    + "/" + _draw(_ALNUM, 24),
    "secret.google_api_key": "AI" + "za" + _draw(_ALNUM, 35),
    "secret.stripe_key": "sk_" + "live_" + _draw(_ALNUM, 24),
    "secret.openai_key": "sk-" + "proj-" + _draw(_ALNUM, 60),
    "secret.anthropic_key": "sk-" + "ant-api03-" + _draw(_ALNUM, 80),
    "secret.huggingface_token": "h" + "f_" + _draw(_ALNUM, 34),
    "secret.npm_token": "np" + "m_" + _draw(_ALNUM, 36),
    "secret.sendgrid_key": "S" + "G." + _draw(_ALNUM, 22) + "." + _draw(_ALNUM, 43),
    "secret.private_key": "-----BEGIN RSA PRIV" + "ATE KEY-----\n" + _draw(_ALNUM, 64) + "\n" + _draw(_ALNUM, 64),
    "secret.jwt": "ey" + "J" + _draw(_ALNUM, 30) + ".ey" + "J" + _draw(_ALNUM, 60) + "." + _draw(_ALNUM, 43),
}  # fmt: skip

# Numbers that their issuers publish for tests and documentation.
NUMBERS: dict[str, list[str]] = {
    "pii.credit_card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "5555-5555-5555-4444",
        "378282246310005",
        "3782 822463 10005",
        "6011000990139424",
    ],
    "pii.us_ssn": ["536-90-4399"],
    "pii.iban": ["GB29NWBK60161331926819", "DE89 3704 0044 0532 0130 00", "FR1420041010050500013M02606"],
}

# Nothing of this may stop an answer.
HARMLESS = [
    "Paris is the capital of France. AKIA is how an AWS key id starts, and ghp_ a GitHub token.",
    "The placeholder AKIAIOSFODNN7EXAMPLE from the manual, or sk-proj-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.",
    "Order 4111111111111112 has a wrong check digit; 0.4111111111111111 is a fraction.",
    "Call 1234567890123456789012345 is no card either, and 000-12-3456 was never a social security number.",
    "20170809091249 is a time, 354178036859789 a device and 26412941454148414 a constant; 123-45-6789 an example.",
    "GB00NWBK60161331926819 fails modulo 97.",
    "A file that starts with -----BEGIN PUBLIC KEY----- holds no secret.",
    "commit 5f2c1e6ab04d5c1e6ab04d5f2c1e6ab04d5c1e6a, uuid 123e4567-e89b-12d3-a456-426614174000",
    "eyJ is base64 for an opening brace and a quote; e.g. eyJhIjoxfQ== alone.",
]
