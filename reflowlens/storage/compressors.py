"""Compressors of packed files by name: those of the standard library, and two that may be installed."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from reflowlens.errors import ReflowlensError

Data = TypeVar("Data", bytes, bytearray)
_PIECE = 4_096
_HUFFMAN = (9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)  # codes by frequency, without a search for repetitions
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


class Compressor(NamedTuple):
    """Args:
    compress: bytes to fewer bytes.
    decompress: the inverse, of data that are known to be no more than so many bytes.
    """

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes]


def compressor(name: str) -> Compressor:
    """The compressor of a name.

    Raises:
        ReflowlensError: there is none, or its package is not installed.
    """
    if name not in _KNOWN:
        raise ReflowlensError(f"compressor must be one of {', '.join(_KNOWN)}, got {name!r}")
    return _KNOWN[name]()


def _lzma() -> Compressor:
    def decompress(data: bytes, limit: int) -> bytes:
        return _whole(lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS), data, limit)

    return Compressor(lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS), decompress)


def _huffman() -> Compressor:
    def compress(data: bytes) -> bytes:
        packer = zlib.compressobj(*_HUFFMAN)
        return packer.compress(data) + packer.flush()

    def decompress(data: bytes, limit: int) -> bytes:
        return _whole(zlib.decompressobj(31), data, limit)

    return Compressor(compress, decompress)


def _brotli() -> Compressor:
    brotli = _installed("brotli", "brotli")

    def decompress(data: bytes, limit: int) -> bytes:
        unpacker, found = brotli.Decompressor(), bytearray()
        for start in range(0, len(data), _PIECE):  # it knows no limit, so that it is given little at a time
            found += unpacker.process(data[start : start + _PIECE])
            _bounded(found, limit)
        if not unpacker.is_finished():
            raise ValueError("it is cut short")
        return bytes(found)

    return Compressor(lambda data: brotli.compress(data, quality=11, lgwin=24), decompress)


def _zstd() -> Compressor:
    zstandard = _installed("zstandard", "zstd")

    def decompress(data: bytes, limit: int) -> bytes:
        if zstandard.frame_content_size(data) > limit:  # of which so much memory would be taken
            raise ValueError(f"it unpacks to more than {limit:,} bytes")
        return _bounded(zstandard.ZstdDecompressor().decompress(data, max_output_size=limit), limit)

    return Compressor(lambda data: zstandard.ZstdCompressor(level=22).compress(data), decompress)


def _installed(package: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ReflowlensError(
            f"compressor {name!r} needs the package {package}, which is not installed: pip install 'reflowlens[pack]', "
            "or take lzma or huffman"
        ) from error


def _whole(unpacker: Any, data: bytes, limit: int) -> bytes:
    found: bytes = unpacker.decompress(data, limit + 1)
    if len(found) <= limit and not unpacker.eof:
        raise ValueError("it is cut short")
    return _bounded(found, limit)


def _bounded(data: Data, limit: int) -> Data:
    if len(data) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    return data


_KNOWN: dict[str, Callable[[], Compressor]] = {"lzma": _lzma, "huffman": _huffman, "brotli": _brotli, "zstd": _zstd}
COMPRESSORS = tuple(_KNOWN)
