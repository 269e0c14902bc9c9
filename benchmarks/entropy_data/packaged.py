"""Texts that ship inside packages, each fetched once, without its dependencies, and checked."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator

from meshlm.guard.training.packages import Package, fetch

WAGTAIL = Package("wagtail==8.0.1", "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c", "BSD-3-Clause")

# Where Django's translations are whole, and a language has a name that needs no explanation.
LANGUAGES = (
    "ar", "bg", "cs", "da", "de", "el", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nb", "nl",
    "pl", "pt_BR", "ro", "ru", "sr", "sv", "th", "tr", "uk", "vi", "zh_Hans", "zh_Hant",
)  # fmt: skip


def translations(package: Package, language: str) -> list[str]:
    """What a package says in a language, in the order of its files; without English originals."""
    archive, told = fetch(package), []
    for name in sorted(archive.namelist()):
        if re.search(rf"/locale/{language}/LC_MESSAGES/django\.po$", name):
            told += _messages(archive.read(name).decode())
    return told


def files(package: Package, ends: tuple[str, ...], *, least: int = 200) -> Iterator[tuple[str, str]]:
    """Name and text of a package's files, translations left out."""
    archive = fetch(package)
    for name in sorted(archive.namelist()):
        if name.endswith(ends) and "/locale/" not in name and archive.getinfo(name).file_size >= least:
            yield name, archive.read(name).decode("utf-8", "replace")


def records(package: Package, path: str) -> Iterator[dict[str, str]]:
    """Rows of a JSON-lines file, text fields only."""
    for line in fetch(package).read(path).decode().splitlines():
        if line.strip():
            yield {key: value for key, value in json.loads(line).items() if isinstance(value, str)}


def rows(package: Package, path: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file."""
    yield from csv.DictReader(io.StringIO(fetch(package).read(path).decode("utf-8", "replace")))


def lines(package: Package, path: str) -> list[str]:
    """Lines of a text file that say something."""
    return [line for line in fetch(package).read(path).decode().splitlines() if line.strip()]


def _messages(text: str) -> list[str]:
    """The translated texts of a gettext catalogue."""
    found: list[str] = []
    current: str | None = None
    for line in [*text.splitlines(), ""]:
        if line.startswith("msgstr"):
            current = line[line.index('"') + 1 : line.rindex('"')]
        elif current is not None and line.startswith('"'):
            current += line[1:-1]
        elif current is not None:
            found.append(current)
            current = None
    unescaped = (message.replace("\\n", "\n").replace('\\"', '"') for message in found[1:])  # the first is the header
    return [message for message in unescaped if message.strip()]
