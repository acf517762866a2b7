"""Packages of user code: made reproducibly, looked through, unpacked nowhere but where they should."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from typing import TYPE_CHECKING

import pytest

from wa_core.catalog.packages import fetch_package, package_id, put_package
from wa_core.errors import CorruptError, InvalidInputError
from wa_core.packages import (
    MAX_FILES,
    MAX_PACKAGE_BYTES,
    MAX_UNPACKED_BYTES,
    check_package,
    find_recipe,
    pack_folder,
    unpack,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def zipped(files: Mapping[str, bytes], *, kind: int = stat.S_IFREG) -> bytes:
    """A zip of these files, whatever their names."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (kind | 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return body.getvalue()


def understated(content: bytes) -> bytes:
    """A zip whose only file is said to be empty, and is not."""
    body = bytearray(zipped({"a.py": content}))
    central = body.rindex(b"PK\x01\x02")
    body[central + 24 : central + 28] = struct.pack("<I", 0)
    return bytes(body)


def flagged(bits: int) -> bytes:
    """A zip whose only file claims what nobody can read: patched data (0x20), strong encryption (0x40)."""
    body = bytearray(zipped({"a.py": b"x = 1"}))
    for header, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        struct.pack_into("<H", body, body.rindex(header) + offset, bits)
    return bytes(body)


def all_directory(num_files: int) -> bytes:
    """A zip that is a directory and nothing else, of as many files."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    sizes = struct.pack("<HHIIH", num_files & 0xFFFF, num_files & 0xFFFF, len(entry) * num_files, 0, 0)
    return entry * num_files + b"PK\x05\x06" + bytes(4) + sizes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe, and with what a package should not hold."""
    root = tmp_path / "mine"
    for name, text in {
        "recipe.py": "class Mine: ...\n",
        "lib/__init__.py": "",
        "lib/nets.py": "",
        "data/words.txt": "a b c",
        ".git/config": "secret",
        ".env": "WA_TOKEN=secret",
        "__pycache__/recipe.cpython-311.pyc": "x",
        "env/pyvenv.cfg": "",
        "env/lib.py": "",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_folder_becomes_a_package_of_its_plain_files(folder: Path) -> None:
    """Hidden files, byte code and virtual environments stay at home."""
    contents = check_package(pack_folder(folder))

    assert list(contents.sizes) == ["data/words.txt", "lib/__init__.py", "lib/nets.py", "recipe.py"]
    assert contents.modules == ["lib", "lib.nets", "recipe"]
    assert contents.unpacked_bytes == 21


def test_a_python_package_keeps_its_name(folder: Path) -> None:
    """A folder that is itself a Python package is imported by its own name."""
    assert check_package(pack_folder(folder / "lib")).modules == ["lib", "lib.nets"]


def test_the_same_files_give_the_same_bytes(folder: Path) -> None:
    """Neither times nor permissions are in a package, so its digest says what code it is."""
    first = pack_folder(folder)
    os.utime(folder / "recipe.py", (1, 1))
    (folder / "recipe.py").chmod(0o700)

    assert pack_folder(folder) == first


def test_what_is_packed_is_what_is_unpacked(folder: Path, tmp_path: Path) -> None:
    """Every file comes out with its bytes."""
    unpack(pack_folder(folder), tmp_path / "out")

    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"data/words.txt", "lib/__init__.py", "lib/nets.py", "recipe.py"}
    assert (tmp_path / "out/data/words.txt").read_text() == "a b c"


def test_a_link_is_not_packed(folder: Path) -> None:
    """A link is refused rather than followed to somebody's keys."""
    (folder / "keys").symlink_to("/etc/passwd")

    with pytest.raises(InvalidInputError, match="is a link"):
        pack_folder(folder)


@pytest.mark.parametrize("name", ["missing", "data"])
def test_a_folder_without_code_is_refused(folder: Path, name: str) -> None:
    """What cannot hold a recipe is refused before it is sent."""
    with pytest.raises(InvalidInputError, match="name the folder that holds the recipe's module"):
        pack_folder(folder / name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no zip file"),
        (b"<html></html>", "no zip file"),
        (zipped({"a.py": b"x"})[:-30], "no zip file"),
        (zipped({"../a.py": b""}), "must be relative"),
        (zipped({"a/../../b.py": b""}), "must be relative"),
        (zipped({"/etc/cron.d/a": b""}), "must be relative"),
        (zipped({"C:\\a.py": b""}), "must be relative"),
        (zipped({"a\\..\\b.py": b""}), "must be relative"),
        (zipped({"a//b.py": b""}), "must be relative"),
        (zipped({"./a.py": b""}), "must be relative"),
        (zipped({"a\nb.py": b""}), "must be relative"),
        (zipped({"\u202eyp.a": b""}), "must be relative"),
        (zipped({"a" * 300: b""}), "must be relative"),
        (zipped({"é" * 150: b""}), "must be relative"),
        (zipped({"link.py": b"/etc/passwd"}, kind=stat.S_IFLNK), "link or a device"),
        (zipped({"pipe": b""}, kind=stat.S_IFIFO), "link or a device"),
        (zipped({"a": b"", "a/b.py": b""}), "both as a file and as a folder"),
        (zipped({"a.py": b"x" * 1000}).replace(b"PK\x03\x04", b"PK\x03\x05", 1), "damaged"),
        (understated(b"x" * 1000), "damaged"),
        (flagged(0x1), "encrypted"),
        (flagged(0x20), "damaged"),
        (flagged(0x40), "damaged"),
    ],
)
def test_a_package_that_is_none_is_refused(body: bytes, message: str, tmp_path: Path) -> None:
    """Bad input 37: no zip, `../`, absolute paths, links and what is damaged; nothing of it is written."""
    with pytest.raises(InvalidInputError, match=message) as refused:
        unpack(body, tmp_path / "out")

    assert refused.value.code == "invalid_package"
    assert not list(tmp_path.iterdir())


def test_two_files_of_one_name_are_refused() -> None:
    """Which of the two would be run is nobody's guess."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("a.py", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.py", b"2")

    with pytest.raises(InvalidInputError, match="two files named"):
        check_package(body.getvalue())


@pytest.mark.parametrize(
    "body",
    [
        zipped({f"{number}.bin": bytes(MAX_UNPACKED_BYTES // 8) for number in range(9)}),
        zipped({f"{number}.py": b"" for number in range(MAX_FILES + 1)}),
        all_directory(300_000),
        bytes(MAX_PACKAGE_BYTES + 1),
    ],
    ids=["bomb", "files", "directory", "bytes"],
)
def test_a_package_beyond_the_limits_is_refused(body: bytes) -> None:
    """Bad inputs 37 and 38: a bomb, too many files, too many bytes."""
    with pytest.raises(InvalidInputError, match="leave data out") as refused:
        check_package(body)

    assert refused.value.code == "package_too_large"


@pytest.mark.parametrize(
    "text", ["class Mine: ...", "from lib import Mine", "import lib as Mine", "Mine = make()"]
)
def test_a_recipe_is_found_without_running_anything(text: str) -> None:
    """A class, however it comes into its module, is found by reading the source."""
    find_recipe(zipped({"pkg/__init__.py": b"", "pkg/recipe.py": f"1 / 0\n{text}\n".encode()}), "pkg.recipe:Mine")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("other:Mine", "no module 'other'; its modules are: broken, recipe"),
        ("recipe:Other", "has no 'Other'; at its top level are: Mine"),
        ("broken:Mine", "is no Python"),
    ],
)
def test_a_recipe_that_is_not_there_is_named(recipe: str, message: str) -> None:
    """The refusal lists what there is."""
    body = zipped({"recipe.py": b"class Mine: ...", "broken.py": b"class"})

    with pytest.raises(InvalidInputError, match=message) as refused:
        find_recipe(body, recipe)

    assert refused.value.code == "unknown_recipe"


def test_a_package_is_kept_once_under_its_digest() -> None:
    """The same bytes are the same package, however often they are sent."""
    store, body = MemoryStore(), zipped({"a.py": b""})

    assert put_package(store, body) == put_package(store, body) == package_id(body)
    assert fetch_package(store, package_id(body)) == body
    assert len(list(store.list(""))) == 1


def test_a_package_that_is_gone_or_changed_is_not_run() -> None:
    """What is fetched is what the id names, or an error."""
    store, body = MemoryStore(), zipped({"a.py": b""})
    with pytest.raises(InvalidInputError, match="there is no package"):
        fetch_package(store, package_id(body))
    store.put(f"packages/{package_id(body).removeprefix('sha256:')}.zip", body + b"x")

    with pytest.raises(CorruptError, match="not what its name says"):
        fetch_package(store, package_id(body))
