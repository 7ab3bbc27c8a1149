"""vLLM's server with a planted fault: after an update a tied output head keeps its old weights.

This is what vLLM 0.32 does on CPUs by itself: its kernels hold a packed copy that its own reload
does not renew. It is run with vLLM's environment, and the server's folder on the path.
"""

import pathlib
import runpy


def main():
    import vllm_worker

    vllm_worker._tie = lambda model: None
    runpy.run_path(str(pathlib.Path(vllm_worker.__file__).parent), run_name="__main__")


if __name__ == "__main__":
    main()
