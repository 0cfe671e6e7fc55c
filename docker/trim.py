"""Remove what a list of patterns names from a directory, and say how much each pattern freed.

    python3 docker/trim.py docker/cpu-unused.txt /opt/venv/lib/python3.11/site-packages

The list has one pattern a line, relative to the directory; `#` begins a comment. A pattern that
matches nothing is an error: the list then describes other packages than those that are installed.
Where none matches anything there is nothing to leave out, as in PyTorch's CPU build.
"""

import shutil
import sys
from pathlib import Path


def patterns(list_file: Path) -> list[str]:
    """The lines that are no comments."""
    lines = (line.partition("#")[0].strip() for line in list_file.read_text().splitlines())
    return [line for line in lines if line]


def size_bytes(path: Path) -> int:
    """Bytes of the files in a directory, or of a file; a link counts as itself."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_bytes(child) for child in path.iterdir())
    return path.lstat().st_size


def trim(list_file: Path, directory: Path) -> list[str]:
    """Remove what the patterns match. Gives those that matched nothing, if others did."""
    found = {pattern: sorted(directory.glob(pattern)) for pattern in patterns(list_file)}
    if not any(found.values()):
        return []
    freed = 0
    for pattern, paths in found.items():
        size = sum(size_bytes(path) for path in paths)
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        freed += size
        print(f"{size / 1e6:8.1f} MB  {pattern}")
    print(f"{freed / 1e6:8.1f} MB  in all")
    return [pattern for pattern, paths in found.items() if not paths]


if __name__ == "__main__":
    unmatched = trim(Path(sys.argv[1]), Path(sys.argv[2]))
    for pattern in unmatched:
        print(f"{sys.argv[1]}: '{pattern}' matches nothing", file=sys.stderr)
    sys.exit(1 if unmatched else 0)
