"""Servers that speak the engines' protocol without vLLM: around our own model, and faulty ones.

As a script it is a server of constants, which starts in a moment and fails as it is told to.
"""

import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np

SERVER = pathlib.Path(__file__).parent.parent / "occ/generation/engines/server"
sys.path.insert(0, str(SERVER))  # as where it is run

import service  # noqa: E402


def experts_as_vllm_has_them(made, config):
    """Of all layers, those without experts included, and of all tokens but the last."""
    experts = np.moveaxis(np.asarray(made.experts), (0, 1), (2, 3))
    seen = (experts >= 0).all(axis=(2, 3))
    dense = np.zeros((*experts.shape[:2], config.moe.first_dense_layers, experts.shape[3]))
    everywhere = np.concatenate([dense, experts], axis=2).astype(np.int16)
    return {"experts": everywhere[seen], "experts_lengths": seen.sum(axis=1).astype(np.int32)}


class OwnModel:
    """Loads and samples as vLLM would, with `occ.generation`.

    Attributes:
      keeps_old: it takes no further weights, and says that it did.
      wrong: what it says that it does not hold.
      shift: nats, added to every log-prob.
    """

    def __init__(self):
        self.policy, self.folders = None, []
        self.keeps_old, self.wrong, self.shift = False, [], 0.0
        self.unlike = ()

    def load(self, folder):
        from occ.models import pretrained

        self.folders.append(folder)
        if not (self.keeps_old and self.policy is not None):
            self.policy = pretrained.load(folder)
        return {
            "wrong": self.wrong,
            "exact": 1,
            "product": 0,
            "unseen": 0,
            "left_out": list(self.unlike),
        }

    def generate(self, sampling, arrays):
        import jax
        import jax.numpy as jnp

        from occ.generation.decoding import generate
        from occ.generation.sampling import SamplingConfig

        ends = np.cumsum(arrays["lengths"])
        columns = -(-int(arrays["lengths"].max()) // 8) * 8  # few shapes to compile
        prompts = np.zeros((len(ends), columns), np.int32)
        for row, tokens in enumerate(np.split(arrays["tokens"], ends[:-1])):
            prompts[row, columns - len(tokens) :] = tokens
        mask = np.arange(columns)[None] >= columns - arrays["lengths"][:, None]
        sampling = {**sampling, "stop_tokens": tuple(sampling["stop_tokens"])}
        made = jax.jit(generate, static_argnames="config")(
            self.policy,
            jnp.asarray(prompts),
            jnp.asarray(mask),
            jax.random.key(int(arrays["seeds"][0]) % 2**31),
            config=SamplingConfig(**sampling),
            prompt_of=jnp.asarray(arrays["prompt_of"]),
        )
        taken = np.asarray(made.response_mask)
        experts = {} if made.experts is None else experts_as_vllm_has_them(made, self.policy.config)
        return {"speculation": {}}, experts | {
            "tokens": np.asarray(made.tokens)[taken],
            "log_prob": np.asarray(made.log_prob)[taken] + np.float32(self.shift),
            "lengths": np.asarray(made.lengths),
            "finished": np.asarray(made.finished),
        }

    def sleep(self):
        self.policy = None

    def wake(self):
        pass


class Serving:
    """A service in a thread, at `address`."""

    def __init__(self, folder: pathlib.Path, model=None):
        self.address = f"unix:{folder / 'socket'}"
        self.model = OwnModel() if model is None else model
        self.service = service.Service(self.model, self.address)
        self._thread = threading.Thread(target=self.service.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.service.stop()
        self._thread.join(20)


class Constants:
    """Takes any weights, and says 1 for ever; or fails in the way that `how` names."""

    def __init__(self, how: str):
        self.how = how

    def load(self, folder):
        return {"wrong": [], "exact": 1, "product": 0, "unseen": 0, "left_out": []}

    def generate(self, sampling, arrays):
        if self.how == "dies":
            print("out of memory, says the kernel", flush=True)
            os._exit(7)
        if self.how == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "slow":
            time.sleep(60)
        if self.how == "raises":
            raise RuntimeError("no such kernel")
        rows = len(arrays["prompt_of"])
        return {}, {
            "tokens": np.ones(rows, np.int32),
            "log_prob": np.zeros(rows, np.float32),
            "lengths": np.ones(rows, np.int32),
            "finished": np.ones(rows, bool),
        }


if __name__ == "__main__":
    import importlib.util

    # The real server's own handling of the end of its standard input.
    spec = importlib.util.spec_from_file_location("server_main", SERVER / "__main__.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    how, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2], strict=False))
    main.end_with_input(options["--scratch"])
    if how == "no start":
        sys.exit("no module named vllm")
    service.Service(Constants(how), options["--address"]).run()
