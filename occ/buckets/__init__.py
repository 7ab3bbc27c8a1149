"""Paths that may lie in a bucket, where nothing is renamed, appended to or locked.

What replaces what, in Google Cloud Storage (`gs://`):

    write beside, then rename     one upload: an object appears whole, or stays what it was
    append and fsync              the whole object again, on condition that it is still the one
                                  that this process wrote (`append`)
    flock, and a file's time      an object that one process creates, and writes again as a sign of
                                  life (`occ.training.durable.bucket_lock`)
    rename a folder               copy its objects, then delete them; or, of what must appear whole,
                                  an object that is written last and names the folder
    Orbax's renamed folder        Orbax's own commit_success.txt, written last

Where the bucket does not answer, every request waits, says so, and goes on (`outage`).
"""

from occ.buckets.outage import UnreachableError
from occ.buckets.paths import Path, absolute, is_bucket, path

__all__ = ["Path", "UnreachableError", "absolute", "is_bucket", "path"]
