"""Files that come with megamup: configs/ and ds_configs/, beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOTS = (PACKAGE.parent, PACKAGE)
FOLDERS = ("configs", "ds_configs")


def find(name: str | Path) -> Path | None:
    """``name`` as a path, or, where there is no such file and it starts with a shipped folder, the file shipped."""
    path = Path(name)
    candidates = [path]
    if path.parts[:1] and path.parts[0] in FOLDERS:
        candidates += [root / path for root in ROOTS]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def listing(folder: str, suffix: str) -> list[str]:
    """Names of the shipped files of a folder."""
    return sorted({f"{folder}/{file.name}" for root in ROOTS for file in (root / folder).glob(f"*{suffix}")})
