"""The embedded model's file: two heads and the categories, in small whole numbers, with a card of what it was made of.

The version is a digest of the contents, not of the file: the same weights have the same version however compressed.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from meshlm.guard import ngrams
from meshlm.guard.ngrams import Layout

FORMAT = 1
# Larger than any that is made here: a file of another kind is not read in.
MAX_BYTES = 64 << 20
_PACKAGED = "embedded.npz"
_ARRAYS = ("attack", "harm", "categories")


class ArtefactError(Exception):
    """The file is no model that this guard can use; the text says why."""


@dataclass(frozen=True)
class Artefact:
    """What the file holds. `card`: the rest, as JSON: scales, calibration, sources, figures."""

    # One weight a bucket.
    attack: NDArray[np.int8]
    harm: NDArray[np.int8]
    # One row a category, one weight for each 2**category_shift neighbouring buckets.
    categories: NDArray[np.int8]
    card: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        return Layout(**self.card["layout"])

    @property
    def version(self) -> str:
        """e.g. `embedded-1-3f2a91bc`."""
        digest = hashlib.sha256(json.dumps(self.card, sort_keys=True).encode())
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return f"embedded-{FORMAT}-{digest.hexdigest()[:8]}"


def save(artefact: Artefact, path: Path) -> None:
    """Write the file; the same bytes for the same contents."""
    card = np.frombuffer(json.dumps(artefact.card, sort_keys=True).encode(), np.uint8)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, card=card, **{name: getattr(artefact, name) for name in _ARRAYS})
    partial.replace(path)


def load(path: str | Path | None = None) -> Artefact:
    """The file's contents; without a path, those of the model that the guard ships. Raises ArtefactError."""
    name = str(path) if path is not None else _PACKAGED
    try:
        if path is not None:
            with Path(path).open("rb") as file:
                return _read(file)
        with resources.files("meshlm.guard").joinpath(_PACKAGED).open("rb") as file:
            return _read(file)
    except ArtefactError as error:
        raise ArtefactError(f"{name}: {error}") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtefactError(f"{name} is no model of the guard ({type(error).__name__}: {error})") from None


def _read(file: IO[bytes]) -> Artefact:
    if file.seek(0, 2) > MAX_BYTES:
        raise ArtefactError(f"larger than {MAX_BYTES} bytes")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        card = json.loads(arrays["card"].tobytes())
        found = [arrays[name] for name in _ARRAYS]
    if card["format"] != FORMAT or card["ngrams"] != ngrams.VERSION:
        raise ArtefactError(f"format {card['format']}, n-grams {card['ngrams']}; this guard reads {FORMAT} and "
                            f"{ngrams.VERSION}")  # fmt: skip
    artefact = Artefact(found[0], found[1], found[2], card)
    _check(artefact)
    return artefact


def _check(artefact: Artefact) -> None:
    """Raises ArtefactError, KeyError, TypeError or ValueError."""
    buckets = artefact.layout.buckets
    shapes: dict[str, tuple[int, ...]] = {"attack": (buckets,), "harm": (buckets,)}
    shapes["categories"] = (len(artefact.card["categories"]), buckets >> int(artefact.card["category_shift"]))
    for name, shape in shapes.items():
        array = getattr(artefact, name)
        if array.dtype != np.int8 or array.shape != shape:
            raise ArtefactError(f"{name} is {array.dtype}{list(array.shape)}, not int8{list(shape)}")
    for head in ("attack", "harm"):
        numbers = artefact.card["heads"][head]
        if not all(np.isfinite(float(numbers[key])) for key in ("scale", "intercept", "slope", "offset")):
            raise ArtefactError(f"the {head} head has numbers that are none")
