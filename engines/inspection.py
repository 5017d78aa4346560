"""What `flowcut inspect` tells of an engine directory: what it is and, if asked, whether it would load here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.loading import choose_backend, why_not
from engines.trust import Check, check_content, checks_here
from flowcut.artifacts import Manifest, check_files, read_manifest, what_differs


@dataclass(frozen=True)
class Inspection:
    """differences: of files, one line each. here: what was asked of this machine; nothing where no check was made."""

    directory: Path
    manifest: Manifest
    differences: list[str]
    here: tuple[Check, ...] = ()

    @property
    def checks(self) -> tuple[Check, ...]:
        """All that load_engine asks for; none where they were not made."""
        return (_manifest(self.manifest), _files(self.manifest, self.differences), *self.here) if self.here else ()

    @property
    def ok(self) -> bool:
        return not self.differences and all(check.verdict != "differs" for check in self.here)

    @property
    def complaint(self) -> str:
        """One line with what differs; empty where all is well."""
        lines = [what_differs(self.directory, self.manifest, self.differences)] if self.differences else []
        return " ".join([*lines, *(str(check) for check in self.here if check.verdict == "differs")])

    def to_dict(self) -> dict[str, Any]:
        checks = [{"name": each.name, "verdict": each.verdict, "detail": each.detail} for each in self.checks]
        found = {"manifest": json.loads(self.manifest.to_json()), "differences": self.differences, "ok": self.ok}
        return found | ({"checks": checks} if checks else {})


def inspect_directory(directory: Path, check: bool = False) -> Inspection:
    """The manifest, and how the files differ from it in name, kind and size.

    Args:
        check: hash them too, and ask all that load_engine(directory) asks for on this machine.

    Raises:
        EngineError: not an engine directory, or one whose manifest was changed.
    """
    manifest = read_manifest(directory)
    if not check:
        return Inspection(directory, manifest, check_files(directory, manifest, hashes=False))
    backend = choose_backend(manifest, "auto")
    lines = check_content(directory, manifest, backend)
    here = checks_here(manifest, backend, "" if manifest.backend == "ort" else why_not(manifest.backend))
    return Inspection(directory, manifest, lines, tuple(here))


def _manifest(manifest: Manifest) -> Check:
    """One that was read passed."""
    return Check("manifest.json", "ok", f"has the hash that it names, {manifest.sha256[:16]}..")


def _files(manifest: Manifest, differences: list[str]) -> Check:
    if differences:
        return Check("files", "differs", f"{len(differences)} differ")
    total = sum(record.bytes for record in manifest.files.values())
    held = f"are {len(manifest.files)}, {total / 1e6:,.1f} MB: names, kinds, sizes and sha256 as recorded"
    return Check("files", "ok", held)
