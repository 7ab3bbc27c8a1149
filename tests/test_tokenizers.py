"""Tokenizers of published models, from files that the tests write, and chat templates."""

import dataclasses
import datetime
import json
import pathlib

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from occ import sources
from occ.tasks import chat_rendering, chat_template
from occ.tasks.chat_template import ChatTemplate
from occ.tasks.pretrained_tokenizer import PretrainedTokenizer, load
from occ.tasks.prompts import encode_prompts
from occ.tasks.workers import WorkerPool

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CORPUS = [
    "What is 12 + 30? The answer is 42.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Grüße aus Köln, 東京, и Москва — naïve café 🙂",
    "x = 3.14159; y = 1,234,567",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  12  345",
    "\n\n\t x",
    "🙂🙃",
    "<|im_start|>user\nhi<|im_end|>",
    "a\u0301\0",
]
USER = [{"role": "user", "content": "2+2?"}]


def trained(merges=400):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


def write_folder(folder, **files):
    """A published model's tokenizer files; `None` leaves one out."""
    trained().save(str(folder / "tokenizer.json"))
    contents = {
        "tokenizer_config": {
            "eos_token": "<|im_end|>",
            "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
            "chat_template": TEMPLATE,
        },
        "generation_config": {"eos_token_id": [2, 0], "pad_token_id": 1},
        **files,
    }
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_gguf(path, pre="smollm", kind="gpt2", **more):
    """The same tokenizer inside a GGUF file."""
    model = json.loads(trained().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for method, value in more.items():
        getattr(writer, method)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PretrainedTokenizer.from_folder(folder)


# -- text and tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.split("<|im_end|>")[0].replace("<|im_start|>", "")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_a_gguf_file_has_the_same_tokenizer(tokenizer, text, tmp_path):
    inside = load(write_gguf(tmp_path / "tiny.gguf"))
    assert inside.encode(text) == tokenizer.encode(text)
    assert inside.end_ids == (2, 0) and inside.pad_id == 2 and inside.special_tokens
    assert inside.chat(USER) == tokenizer.chat(USER)


def test_digits_are_tokens_of_their_own(tokenizer):
    """And a text of numbers shows that another split is another tokenizer."""
    assert len(tokenizer.encode("345")) == 3
    assert tokenizer.encode("  12") != [i for part in (" ", " 12") for i in tokenizer.encode(part)]


def test_stop_tokens_are_those_of_the_generation(tokenizer, tmp_path):
    assert tokenizer.end_ids == (2, 0) and tokenizer.end_id == 2 and tokenizer.pad_id == 0
    single = write_folder(tmp_path, generation_config={"eos_token_id": 0})
    assert PretrainedTokenizer.from_folder(single).end_ids == (2, 0)
    bare = write_folder(tmp_path, tokenizer_config=None, generation_config={"eos_token_id": 1})
    (bare / "tokenizer_config.json").unlink()
    unnamed = PretrainedTokenizer.from_folder(bare)
    assert unnamed.end_ids == (1,) and unnamed.pad_id == 1
    (bare / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert PretrainedTokenizer.from_folder(bare).end_ids == (2, 1)


def test_a_response_ends_at_any_stop_token(tokenizer):
    ids = tokenizer.encode("42")
    for end in tokenizer.end_ids:
        assert tokenizer.decode([*ids, end, *ids]) == "42"
    assert tokenizer.decode([1, *ids, 1]) == "42"  # special, but no stop token


def test_tokens_beyond_the_vocabulary_are_shown_as_unknown(tokenizer):
    ids = tokenizer.encode("4")
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([*ids, beyond, beyond + 9, *ids]) == "4\ufffd\ufffd4"


def test_prompts_and_batches_take_it(tokenizer):
    prompts = [tokenizer.chat(USER), "12"]
    columns = max(len(tokenizer.encode(p)) for p in prompts)
    tokens, mask = encode_prompts(tokenizer, prompts, columns)
    assert tokens[1, mask[1]].tolist() == tokenizer.encode("12")
    assert tokenizer.decode_batch(tokens, mask) == ["user\n2+2?", "12"]
    assert tokenizer.decode_batch(tokens, np.zeros_like(mask)) == ["", ""]


def test_tokens_that_only_the_configuration_has_are_added(tmp_path):
    entry = {"content": "<think>", "special": False, "normalized": False}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"900": entry}}
    with_more = PretrainedTokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    (token,) = with_more.encode("<think>")
    assert with_more.decode([token]) == "<think>" and token == with_more.vocab_size - 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": None, "tokenizer_config": {}}, "no stop token; expected eos_token"),
        ({"generation_config": {"eos_token_id": 9999}}, "must be below .* one model"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "'</s>' .* is not in tokenizer.json"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer.from_folder(write_folder(tmp_path, **files))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"kind 'llama' .* expected 'gpt2' .*'smollm'"):
        load(write_gguf(tmp_path / "a.gguf", kind="llama"))
    with pytest.raises(ValueError, match="pre-tokenizer 'qwen2'"):
        load(write_gguf(tmp_path / "b.gguf", pre="qwen2"))


# -- templates --------------------------------------------------------------------------------


def test_special_tokens_survive_the_round_trip(tokenizer):
    text = tokenizer.chat([{"role": "system", "content": "Be brief."}, *USER])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids.count(1) == 3 and ids.count(2) == 2
    assert not tokenizer.chat(USER, add_generation_prompt=False).endswith("assistant\n")


def test_a_template_file_goes_before_the_field(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ mood }}")
    tokenizer = PretrainedTokenizer.from_folder(folder)
    assert tokenizer.chat([], mood="calm") == "<|im_end|>calm"
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    config = {"eos_token": "<|im_end|>", "chat_template": several}
    (folder / "chat_template.jinja").unlink()
    write_folder(folder, tokenizer_config=config)
    assert PretrainedTokenizer.from_folder(folder).chat([]) == "b"


def with_bos(folder):
    """tokenizer.json itself puts a token before a text, as those of base models do."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("fields", "itself", "begin"),
    [
        ({}, True, [0]),
        ({}, False, []),
        ({"add_bos_token": True, "bos_token": "<|im_start|>"}, False, [1]),
        ({"add_bos_token": False, "bos_token": "<|im_start|>"}, True, []),
        ({"chat_template": TEMPLATE}, True, []),  # which writes what it wants
    ],
)
def test_a_base_models_prompt_begins_as_it_was_trained(tmp_path, fields, itself, begin):
    folder = write_folder(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", **fields})
    tokenizer = load(with_bos(folder) if itself else folder)
    text = tokenizer.encode("12 + 30 =")
    assert tokenizer.encode_prompt("12 + 30 =") == [*begin, *text]
    tokens, mask = encode_prompts(tokenizer, ["12 + 30 ="], 20)
    assert tokens[0][mask[0]].tolist() == [*begin, *text]
    spelt = "".join(CONTROL[token] for token in begin)
    assert tokenizer.encode_prompt(f"{spelt}12 + 30 =") == [*begin, *text]  # and not twice


@pytest.mark.parametrize("wanted", [True, False])
def test_a_gguf_file_says_whether_a_prompt_has_a_beginning(tmp_path, wanted):
    path = write_gguf(tmp_path / "x.gguf", add_bos_token_id=1, add_add_bos_token=wanted)
    tokenizer = load(path)
    tokenizer.chat_template = None
    assert tokenizer.encode_prompt("12") == [*([1] if wanted else []), *tokenizer.encode("12")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template": 3}, "chat_template in tokenizer_config.json must be a text"),
        ({"chat_template": [{"name": "a"}]}, "chat_template in tokenizer_config.json must be"),
        ({"eos_token": ["a"]}, "special token eos_token must be a text, got .'a'."),
        ({"eos_token": {"id": 2}}, "no stop token"),
        ({"add_bos_token": True}, "has add_bos_token and no bos_token"),
        ({"added_tokens_decoder": {"x": {}}}, "must hold tokens by id"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, fields, message):
    config = {"eos_token": "<|im_end|>", **fields}
    write_folder(tmp_path, tokenizer_config=config, generation_config=None)
    with pytest.raises(ValueError, match=f"{tmp_path.name}: .*{message}"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: tokenizer.json is no tokenizer"):
        load(tmp_path)


def test_without_a_template_there_is_no_chat(tmp_path):
    config = {"eos_token": "<|im_end|>"}
    plain = PretrainedTokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    with pytest.raises(ValueError, match="there is no chat template"):
        plain.chat(USER)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", '[{"a": "é<b>"}]'),
        ("{% for m in messages %}\n  {% if m.role == 'x' %}\n{{ m }}\n  {% endif %}\n"
         "{% endfor %}", ""),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}.", "2+2?."),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "1"),
        ("{{ strftime_now('%d %b %Y') }}", "02 Jan 2026"),
        ("{{ dict(a=1).a }}{{ messages[0]['missing'] }}", "1"),
    ],
)  # fmt: skip
def test_templates_of_published_models_render(template, expected):
    clock = lambda: datetime.datetime(2026, 1, 2)  # noqa: E731
    assert ChatTemplate(template, now=clock).render(USER, tools=[{"a": "é<b>"}]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace.__init__.__globals__ | length }}",
        "{{ dict.__call__.__globals__.x }}",
        "{{ raise_exception.__globals__.json.loads('1') }}",
        "{{ strftime_now.__closure__[0].cell_contents }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_a_hostile_template_reaches_nothing(template):
    messages = [dict(message) for message in USER]
    with pytest.raises(ValueError, match=r"the sandbox forbids.*before you trust"):
        ChatTemplate(template).render(messages)
    assert messages == USER


def test_internals_that_a_template_only_prints_are_nothing():
    template = "[{{ ''.__class__ }}{{ ''|attr('__class__')|attr('__mro__')|list }}]"
    assert ChatTemplate(template).render(USER) == "[[]]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "template refuses: roles must alternate"),
        ("{{ 1 / 0 }}", "fails on these messages: ZeroDivisionError"),
        ("{{ messages | map('nothing') | list }}", "fails on these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on these messages: OverflowError"),
        ("{{ missing.field }}", "UndefinedError.*'missing' is undefined"),
    ],
)
def test_a_template_that_fails_says_why(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template).render(USER)


def test_a_template_that_is_not_jinja_is_refused():
    with pytest.raises(ValueError, match="line 2 is not valid Jinja"):
        ChatTemplate("\n{% if %}")
    with pytest.raises(ValueError, match="must be what JSON can hold: .*ndarray"):
        ChatTemplate("").render(USER, tools=np.zeros(2))


@pytest.fixture(scope="module")
def hasty():
    """The same with a bound that a test can wait for."""
    limits = dataclasses.replace(chat_template.LIMITS, cpu_seconds=0.3)
    source = pathlib.Path(chat_rendering.__file__)
    with WorkerPool(source, "render", workers=1, limits=limits) as pool:
        yield lambda: pool


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10 ** (10 ** 10) }}", "was stopped.*time"),  # which Jinja computes as it compiles
        (
            "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% endfor %}"
            "{% endfor %}",
            "was stopped.*time",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on these.*RecursionError"),
        ("{{ ('x' * 10 ** 10) | length }}", "was stopped.*died"),
        ("{{ 'x' * 10 ** 6 }}", "writes 1000000 characters, more than 200000"),
    ],
)
def test_a_template_without_end_is_stopped(monkeypatch, hasty, template, message):
    """Time, memory or length; and the next one renders."""
    monkeypatch.setattr(chat_template, "_pool", hasty)
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template).render(USER)
    assert ChatTemplate("{{ messages[0].content }}").render(USER) == "2+2?"


# -- where files are --------------------------------------------------------------------------


def test_sources_are_paths_or_packages(tmp_path):
    assert sources.resolve(str(tmp_path)) == tmp_path
    assert sources.resolve("package:occ/py.typed").name == "py.typed"
    for source, message in [
        (str(tmp_path / "no"), "there is no file or folder"),
        ("package:no_such_package", "'no_such_package' .* is not installed"),
        ("package:../etc/passwd", r"'\.\.' .* is not installed"),
        ("package:occ", "expected 'one .gguf file' in package 'occ'"),
        ("package:occ/missing", "expected 'missing' in package"),
    ]:
        with pytest.raises(ValueError, match=message):
            sources.resolve(source)


def test_a_fetched_model_is_found_by_its_name(tmp_path, monkeypatch):
    """In the cache as huggingface_hub lays it out; nothing is asked of the network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--Owner--Name-1.7B"
    (model / "snapshots" / revision).mkdir(parents=True)
    (model / "snapshots" / revision / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    assert sources.resolve("Owner/Name-1.7B") == model / "snapshots" / revision
    with pytest.raises(ValueError, match=r"no such model in the cache .*: hf download Owner/Other"):
        sources.resolve("Owner/Other")
