#!/usr/bin/env python3
"""What a release changes in the files, and what it says about itself.

    version.py bump patch|minor|major [DATE]   the next version in all files; prints it
    version.py check vX.Y.Z                    the tag, the files and the changelog agree
    version.py notes X.Y.Z                     the version's section of the changelog
    version.py tags X.Y.Z                      what the image is called: the version, and for releases X.Y, X and latest

It works on the folder it is called in, and needs nothing but Python.
"""

import datetime
import pathlib
import re
import sys

NAME = "obscura-server"
VERSION = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
UNRELEASED = "## Unreleased\n"
# Where the version stands: a file, and a pattern with what is before it and behind it in groups.
PLACES = [
    ("Cargo.toml", rf'(\A\[package\]\nname = "{NAME}"\nversion = "){VERSION}(")'),
    ("Cargo.lock", rf'(\[\[package\]\]\nname = "{NAME}"\nversion = "){VERSION}(")'),
    ("openapi.yaml", rf"(\ninfo:\n  title: [^\n]*\n  version: ){VERSION}(\n)"),
]


class Refused(Exception):
    """A sentence for whoever releases."""


def read(name):
    return pathlib.Path(name).read_text(encoding="utf-8")


def find(name, pattern):
    found = re.findall(pattern, read(name))
    if len(found) != 1:
        raise Refused(f"{name} has the version {len(found)} times where it should stand once")
    return ".".join(found[0][1:4])


def current():
    versions = {name: find(name, pattern) for name, pattern in PLACES}
    if len(set(versions.values())) != 1:
        raise Refused(f"the files don't agree about the version: {versions}")
    return versions["Cargo.toml"]


def following(version, level):
    major, minor, patch = map(int, version.split("."))
    return {
        "major": f"{major + 1}.0.0",
        "minor": f"{major}.{minor + 1}.0",
        "patch": f"{major}.{minor}.{patch + 1}",
    }[level]


def section(text, heading):
    """What stands below this heading of the changelog, up to the next version's."""
    _, found, rest = text.partition(heading)
    if not found:
        raise Refused(f"CHANGELOG.md has no {heading.strip()!r}")
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()


def heading_of(version):
    found = re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)\n", read("CHANGELOG.md"), re.MULTILINE)
    if not found:
        raise Refused(f"CHANGELOG.md has no section of {version}")
    return found[0]


def bump(level, date=None):
    if level not in ("patch", "minor", "major"):
        raise Refused(f"{level!r} is no level; it takes patch, minor or major")
    version = following(current(), level)
    changelog = read("CHANGELOG.md")
    if not re.search(r"^- ", section(changelog, UNRELEASED), re.MULTILINE):
        raise Refused("CHANGELOG.md has nothing below 'Unreleased', so there is nothing to release")
    date = datetime.date.fromisoformat(date) if date else datetime.datetime.now(datetime.timezone.utc).date()
    changed = {
        name: re.sub(pattern, lambda match: match[1] + version + match[5], read(name)) for name, pattern in PLACES
    }
    changed["CHANGELOG.md"] = changelog.replace(UNRELEASED, f"{UNRELEASED}\n## {version} ({date})\n", 1)
    # Nothing is written before everything was found.
    for name, text in changed.items():
        pathlib.Path(name).write_text(text, encoding="utf-8")
    return version


def notes(version):
    return section(read("CHANGELOG.md"), heading_of(version))


def check(tag):
    if not re.fullmatch(f"v{VERSION}", tag):
        raise Refused(f"{tag!r} is no tag of a release; it takes vX.Y.Z")
    version = current()
    if tag != f"v{version}":
        raise Refused(f"the tag is {tag}, and the files are those of {version}")
    if not notes(version):
        raise Refused(f"CHANGELOG.md says nothing about {version}")
    return version


def tags(version):
    major, minor, _ = version.split(".")
    # Below 1.0 a new minor version may break what was, so nobody should be on "0".
    moving = [f"{major}.{minor}"] + ([major] if major != "0" else []) + ["latest"]
    return "\n".join([version, *moving])


def main(arguments):
    commands = {"bump": bump, "check": check, "notes": notes, "tags": tags}
    if len(arguments) < 2 or arguments[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(commands[arguments[0]](*arguments[1:]))
    except (Refused, ValueError, OSError) as error:
        print(f"scripts/release/version.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
