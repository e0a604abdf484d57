"""The only part of hf_spp that uses the network: files of Hub repositories, wheels, Debian packages."""

from .files import find_files, resolve_file
from .packages import download_debian_package, download_wheel, verify_checksum

__all__ = ["download_debian_package", "download_wheel", "find_files", "resolve_file", "verify_checksum"]
