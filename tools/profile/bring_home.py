"""One archive of a folder's files, small enough to come back from a lease of a GPU, where files have 16 MiB at most.

    python3 -m tools.profile.bring_home FOLDER TARGET.tar.gz
"""

import sys
import tarfile
from pathlib import Path

LIMIT = 15 * 2**20


def archive(folder: Path, target: Path, limit: int = LIMIT) -> list[str]:
    """Write the files below `folder` to `target`, a .tar.gz of at most `limit` bytes, the smallest first.

    Replaces `target` at once. Returns the names of the files left out. Raises OSError.
    """
    left_out, part = [], target.with_name(f".{target.name}.part")
    with part.open("wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.stat().st_size, path)):
            # As if it did not shrink at all; what is still in the buffers comes on top, less than a MiB.
            if file.tell() + path.stat().st_size > limit:
                left_out.append(str(path.relative_to(folder)))
            else:
                tar.add(path, path.relative_to(folder))
    part.replace(target)
    return left_out


if __name__ == "__main__":
    for name in archive(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{name}: too large for the archive, left out")
