"""The only part of hf_spp that uses the network: files of Hub repositories, wheels, Debian packages."""

from .commits import Change, Head, Pushed, push_files
from .files import download_again, download_snapshot, find_files, forget_file, resolve_file
from .packages import download_debian_package, download_wheel, verify_checksum

__all__ = [
    "Change",
    "Head",
    "Pushed",
    "download_again",
    "download_debian_package",
    "download_snapshot",
    "download_wheel",
    "find_files",
    "forget_file",
    "push_files",
    "resolve_file",
    "verify_checksum",
]
