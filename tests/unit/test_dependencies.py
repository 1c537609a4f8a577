"""What the project is built on: pinned exactly, and free to be passed on with it."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
PERMISSIVE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software|MPL|Mozilla|Unlicense|CC0|Zlib|HPND|BSL")
KNOWN = {
    "huey": "MIT, by its LICENSE file; its metadata do not say so",
    "skops": "MIT, likewise",
    "psycopg": "LGPL-3.0: loaded as a library, unchanged; only MLflow's server uses it",
    "psycopg-binary": "LGPL-3.0: as psycopg",
}


def licence_of(package: str) -> str:
    """What a package's metadata say; not whole texts, which speak of parts that are bundled or compatible."""
    metadata = importlib.metadata.metadata(package)
    classifiers = [entry for entry in metadata.get_all("Classifier", []) if entry.startswith("License ::")]
    short = [text for text in metadata.get_all("License", []) if len(text) < 100]
    return "; ".join([*metadata.get_all("License-Expression", []), *classifiers, *short])


def test_every_package_is_pinned_to_one_version_that_is_installed() -> None:
    assert len({canonicalize_name(pin.name) for pin in PINS}) == len(PINS) > 100
    for pin in PINS:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(pin)
        assert importlib.metadata.version(pin.name).partition("+")[0] == specifier.version, str(pin)


def test_the_pins_are_within_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINS}
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)


def test_what_is_installed_may_be_passed_on_with_the_project() -> None:
    """Permissive, or copyleft by file alone (MPL). Another licence is looked at and written down in KNOWN."""
    licences = {pin.name: licence_of(pin.name) for pin in PINS if pin.name not in KNOWN}
    doubtful = {
        name: text[:80] for name, text in licences.items() if not PERMISSIVE.search(text) or re.search(r"\bA?GPL", text)
    }
    assert doubtful == {}
