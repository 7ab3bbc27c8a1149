"""An engine in a process and an environment of its own: `python FOLDER_OF_THIS_FILE OPTIONS`.

It imports vLLM, and nothing of this project but the files beside it. With --while-open it ends when
its standard input does, and so with the run that started it, however that ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading

from service import Service


def main() -> int:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="unix:PATH or HOST:PORT")
    parser.add_argument(
        "--model", required=True, help="folder with config.json; weights come later"
    )
    parser.add_argument("--options", default="{}", help="JSON: further arguments of vllm.LLM")
    parser.add_argument("--while-open", action="store_true", help="end with standard input")
    parser.add_argument("--scratch", help="folder to delete at that end")
    arguments = parser.parse_args()
    if arguments.while_open:
        end_with_input(arguments.scratch)
    from vllm_model import VLLMModel

    model = VLLMModel(arguments.model, json.loads(arguments.options))
    service = Service(model, arguments.address)
    print(f"engine: listening at {arguments.address}", flush=True)
    service.run()
    return 0


def end_with_input(scratch: str | None) -> None:
    """Ends this process and those that it started when the run at the other end is gone."""

    def wait() -> None:
        while os.read(0, 1):  # sys.stdin has a lock, which this would hold to the end
            pass
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if os.getpgid(0) == os.getpid():  # the group holds workers of vLLM, and nobody else
            os.killpg(0, signal.SIGTERM)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
