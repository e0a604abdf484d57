"""The only part of hf_spp that uses the network: files of Hub repositories, wheels, Debian packages."""

from .commits import Change, Head, Pushed, push_files
from .files import download_again, download_snapshot, find_files, forget_file, list_files, resolve_file
from .packages import download_debian_package, download_wheel, verify_checksum
from .ranges import (
    REQUEST_BYTES,
    RemoteFile,
    Transfer,
    fetch_ranges,
    has_file,
    missing_ranges,
    open_file,
    open_files,
    resolve_commit,
)

__all__ = [
    "REQUEST_BYTES",
    "Change",
    "Head",
    "Pushed",
    "RemoteFile",
    "Transfer",
    "download_again",
    "download_debian_package",
    "download_snapshot",
    "download_wheel",
    "fetch_ranges",
    "find_files",
    "forget_file",
    "has_file",
    "list_files",
    "missing_ranges",
    "open_file",
    "open_files",
    "push_files",
    "resolve_commit",
    "resolve_file",
    "verify_checksum",
]
