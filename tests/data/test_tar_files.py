"""What identifies a tar as a data set."""

from pathlib import Path

from qwen3_vlm.data.captions import open_records
from tests.data.helpers import write_tar

NAMES = ("1.png", "1.txt", "2.png", "2.json")


def fingerprint(path: Path, contents: tuple[bytes, ...], cache_dir: Path | None = None) -> str:
    write_tar(path, list(zip(NAMES, contents, strict=True)))
    return open_records([str(path)], cache_dir=cache_dir).fingerprint


def test_texts_count_even_where_their_lengths_agree(tmp_path: Path) -> None:
    cat, dog = b"A cat.        ", b'{"caption":""}'
    first = fingerprint(tmp_path / "a.tar", (b"x", cat, b"y", dog))
    assert fingerprint(tmp_path / "b.tar", (b"x", cat, b"y", dog)) == first
    assert fingerprint(tmp_path / "c.tar", (b"x", dog, b"y", cat)) != first
    assert fingerprint(tmp_path / "d.tar", (b"x", b"A dog.        ", b"y", dog)) != first


def test_a_cached_index_gives_the_same(tmp_path: Path) -> None:
    contents = (b"x", b"A cat.", b"y", b'{"caption": "A dog."}')
    first = fingerprint(tmp_path / "a.tar", contents)
    cached = [open_records([str(tmp_path / "a.tar")], cache_dir=tmp_path / "cache").fingerprint for _ in range(2)]
    assert cached == [first, first]
