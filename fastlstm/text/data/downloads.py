"""Texts from the network: each is downloaded once and kept in a cache."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from .. import UserError, cli


def download(url: str, sha256: str | None) -> Path:
    """The file that a URL's text is kept in, downloaded where it is not there yet.

    Raises:
        UserError: it cannot be downloaded, or is not what ``sha256`` says.
    """
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)

    def fetch(*arguments: Any) -> None:
        cli.say(f"downloading {url}")
        pooch.HTTPDownloader(progressbar=sys.stderr.isatty())(*arguments)

    try:
        known = f"sha256:{sha256}" if sha256 else None
        cache = pooch.os_cache("fastlstm")
        path = Path(pooch.retrieve(url, known, path=cache, downloader=fetch))
    except Exception as error:  # pooch lets every kind of network error through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data: cannot fetch {url}: {reason}") from error
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    cli.say(f"{url}: downloaded {day}, kept in {path}; delete that file to download it again")
    return path
