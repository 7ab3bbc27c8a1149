"""Rollout engines: what samples a run's responses, in this process or in another.

```text
protocol.py     what an engine is: weights in; prompts, sampling and a key in; tokens, log-probs
                and finish reasons out
in_process.py   the compiled samplers of this process
vllm.py         vLLM, in a process and an environment of its own
handover.py     weights on their way there, with a digest that both ends compare
connection.py   that process: started or attached to, waited for, and never for ever
server/         what runs there; it imports vLLM, and nothing of this project
```
"""

from occ.generation.engines.protocol import (
    EngineError,
    MismatchError,
    Request,
    RolloutEngine,
    StaleWeightsError,
)

__all__ = ["EngineError", "MismatchError", "Request", "RolloutEngine", "StaleWeightsError"]
