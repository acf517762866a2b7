"""User code as one zip: made from a folder, looked through before anything trusts it, unpacked to be imported.

It knows zip files and names; no store, and nothing of what the code does: nothing here is ever imported or run.
The invariant: what `check_package` passes unpacks to plain files below the folder given, within the limits, and
the same folder gives the same bytes wherever it is packed. A zip bomb has to declare its size, since no more than
that comes out of an entry, and it must match its checksum. Source: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import ast
import io
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PACKAGE_BYTES = 16 << 20
MAX_UNPACKED_BYTES = 64 << 20
MAX_FILES = 2_000
MAX_NAME_BYTES = 200  # file systems take 255 of a name's part

INVALID = "invalid_package"
TOO_LARGE = "package_too_large"

_CHUNK_BYTES = 1 << 20
_DIRECTORY_ENTRY = b"PK\x01\x02"  # what the directory says of each file begins so
# Counted before the directory is read, which takes a kilobyte of memory for each. A zip in the zip has some too.
_MAX_MARKS = 10 * MAX_FILES
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time a zip can say
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_IS_ENCRYPTED = 0x1
_LEFT_OUT = frozenset({"__pycache__", "node_modules"})


@dataclass(frozen=True, slots=True)
class PackageContents:
    """What is in a sound package: its files by name, in order, and their sizes in bytes."""

    sizes: dict[str, int]

    @property
    def unpacked_bytes(self) -> int:
        """All files together."""
        return sum(self.sizes.values())

    @property
    def modules(self) -> list[str]:
        """The Python modules, as they are imported."""
        return sorted(
            ".".join(PurePosixPath(name).with_suffix("").parts).removesuffix(".__init__")
            for name in self.sizes
            if name.endswith(".py")
        )


def pack_folder(folder: Path) -> bytes:
    """Make a package of a folder: of the folder itself when it is a Python package, else of what is in it.

    Hidden files, byte code and virtual environments stay out. Times and permissions do too, so that the same
    files always give the same bytes.

    Raises:
        InvalidInputError: there is no such folder, it has no Python file, or it cannot be packed within the limits
            (`package_too_large`).
    """
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is no folder; name the folder that holds the recipe's module")
    folder = folder.resolve()
    root = folder.parent if (folder / "__init__.py").exists() else folder
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        num_bytes = 0
        for path in _files(folder):
            num_bytes += path.stat().st_size
            if num_bytes > MAX_UNPACKED_BYTES:
                raise _too_large(f"{folder} holds more than {MAX_UNPACKED_BYTES >> 20} MiB")
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), date_time=_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    if not check_package(body.getvalue()).modules:
        raise InvalidInputError(f"{folder} holds no Python file; name the folder that holds the recipe's module")
    return body.getvalue()


def check_package(body: bytes) -> PackageContents:
    """Look through a zip that somebody sent.

    Raises:
        InvalidInputError: `package_too_large` beyond a limit; `invalid_package` when it is no zip, is damaged or
            encrypted, or holds anything but plain files with plain names below its root.
    """
    return PackageContents({name: sum(map(len, _read(archive, entry))) for archive, name, entry in _entries(body)})


def unpack(body: bytes, folder: Path) -> PackageContents:
    """Check a package, and write its files below `folder`, which is made.

    Raises:
        InvalidInputError: as for `check_package`; nothing is written then.
        OSError: the disk has no room.
    """
    contents = check_package(body)
    folder.mkdir(parents=True, exist_ok=True)
    for archive, name, entry in _entries(body):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(_read(archive, entry))
    return contents


def find_recipe(body: bytes, recipe: str) -> None:
    """See, without running anything, that a package has the module and the class that ``module:Class`` names.

    Raises:
        InvalidInputError: code ``unknown_recipe``, with the modules or classes that there are.
    """
    module, _, name = recipe.partition(":")
    modules = PackageContents({name: entry.file_size for _, name, entry in _entries(body)}).modules
    if module not in modules:
        raise InvalidInputError(
            f"the package has no module {module!r}; its modules are: {', '.join(modules[:20]) or 'none'}",
            code="unknown_recipe",
        )
    names = _top_level_names(_source_of(body, module), module=module)
    if name not in names:
        raise InvalidInputError(
            f"module {module!r} of the package has no {name!r}; at its top level are: {', '.join(names[:20])}",
            code="unknown_recipe",
        )


def _entries(body: bytes) -> Iterator[tuple[zipfile.ZipFile, str, zipfile.ZipInfo]]:
    """The files in an archive, each with its name, after the archive's directory has been checked."""
    if len(body) > MAX_PACKAGE_BYTES:
        raise _too_large(f"the package has {len(body)} bytes, more than {MAX_PACKAGE_BYTES >> 20} MiB")
    if body.count(_DIRECTORY_ENTRY) > _MAX_MARKS:
        raise _too_large(f"the package's directory has more than the {MAX_FILES} files that a package may have")
    try:
        archive = zipfile.ZipFile(io.BytesIO(body))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _invalid(f"the package is no zip file ({error})") from None
    with archive:
        found = _checked(archive.infolist())
        for name, entry in found.items():
            yield archive, name, entry


def _checked(entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    if len(entries) > MAX_FILES:
        raise _too_large(f"the package has {len(entries)} files, more than {MAX_FILES}")
    if sum(entry.file_size for entry in entries) > MAX_UNPACKED_BYTES:
        raise _too_large(f"the package unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
    files: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        _check_name(entry.orig_filename)
        _check_kind(entry)
        if not entry.is_dir():
            if entry.filename in files:
                raise _invalid(f"the package has two files named {entry.filename!r}")
            files[entry.filename] = entry
    for name in files:
        if taken := next((str(above) for above in PurePosixPath(name).parents if str(above) in files), None):
            raise _invalid(f"the package has {taken!r} both as a file and as a folder")
    return files


def _check_name(name: str) -> None:
    parts = name.removesuffix("/").split("/")
    is_plain = name.isprintable() and "\\" not in name and ":" not in name and len(name.encode()) <= MAX_NAME_BYTES
    if not is_plain or any(part in {"", ".", ".."} for part in parts):
        raise _invalid(
            f"the package has an entry named {name[:100]!r}; names must be relative, without '..', backslashes, "
            f"colons or control characters, and at most {MAX_NAME_BYTES} bytes long"
        )


def _check_kind(entry: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise _invalid(f"{entry.filename!r} in the package is a link or a device; only plain files can be in it")
    if entry.flag_bits & _IS_ENCRYPTED:
        raise _invalid(f"{entry.filename!r} in the package is encrypted")
    if entry.compress_type not in _COMPRESSIONS:
        raise _invalid(f"{entry.filename!r} in the package is compressed in another way than deflate")


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of an entry, whose checksum is verified at their end."""
    try:
        with archive.open(entry) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, zlib.error) as error:
        raise _invalid(f"{entry.filename!r} in the package is damaged ({error})") from None


def _source_of(body: bytes, module: str) -> bytes:
    path = module.replace(".", "/")
    wanted = {f"{path}.py", f"{path}/__init__.py"}
    return next(b"".join(_read(archive, entry)) for archive, name, entry in _entries(body) if name in wanted)


def _top_level_names(source: bytes, *, module: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidInputError(
            f"module {module!r} of the package is no Python: {error}", code="unknown_recipe"
        ) from None
    found: list[str] = []
    for node in tree.body:
        match node:
            case ast.ClassDef():
                found.append(node.name)
            case ast.ImportFrom() | ast.Import():
                found += [alias.asname or alias.name for alias in node.names]
            case ast.Assign():
                found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return found


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_OUT or path.suffix == ".pyc":
            continue
        if path.is_symlink():
            raise InvalidInputError(f"{path} is a link, which a package cannot hold; copy what it points to")
        if path.is_dir():
            if not (path / "pyvenv.cfg").exists():
                found += _files(path)
        elif path.is_file():
            found.append(path)
        if len(found) > MAX_FILES:
            raise _too_large(f"{folder} holds more than {MAX_FILES} files")
    return found


def _invalid(message: str) -> InvalidInputError:
    return InvalidInputError(message, code=INVALID)


def _too_large(message: str) -> InvalidInputError:
    return InvalidInputError(f"{message}; leave data out and read them from elsewhere", code=TOO_LARGE)
