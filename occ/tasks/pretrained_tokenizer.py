"""Tokenizers that come with a published model: from its folder, or from inside a GGUF file."""

from __future__ import annotations

import codecs
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from occ.extras import require

require("pretrained", __name__, "tokenizers")
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from occ import json_files
from occ.gguf_files import open_gguf
from occ.tasks.chat_template import ChatTemplate, Message
from occ.tasks.tokenizer import UNKNOWN, Tokenizer

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
"""Special tokens that templates may write by name."""

END_TOKENS = frozenset(
    ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"]
)
"""Control tokens that end a response wherever a GGUF file has them; it names one or two itself."""

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, with its chat template and stop tokens.

    `encode` adds no token by itself: a chat template writes what the model expects at the
    beginning; without one, as base models are, `encode_prompt` puts it there. `encode` reads the
    spelling of a special token as that token, wherever it stands: so do other implementations, and
    so must it be for a rendered template. What a user wrote can therefore hold tokens that look
    like the end of a turn; strip them from text that is not trusted.

    Args:
      backend: of the library.
      end_ids: stop tokens, the one that ends demonstrations first.
      begin_ids: tokens before every prompt (BOS), of a model without a chat template.
      pad_id: None takes the first stop token, as is usual: masks say what is padding.
      special_tokens: "bos_token", "eos_token", ...: their spelling, for the template.
      chat_template: None where the model has none.

    Raises:
      ValueError: no stop token, or one that the tokenizer does not have.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_ids: Sequence[int],
        begin_ids: Sequence[int] = (),
        pad_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._end_ids = tuple(dict.fromkeys(end_ids))
        self._begin_ids = list(begin_ids)
        self._ends = frozenset(self._end_ids)
        self._pad_id = pad_id
        self.special_tokens = dict({} if special_tokens is None else special_tokens)
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template)
        _check_ends(self._end_ids, self._size)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> PretrainedTokenizer:
        """From the files that are published with a model.

        tokenizer.json is needed. tokenizer_config.json names special tokens and may hold the
        template, as may chat_template.jinja, which goes before it; special_tokens_map.json fills
        in names; generation_config.json has the stop tokens, to which the tokenizer's own belongs.
        What stands before a prompt is what tokenizer.json puts there by itself, unless
        "add_bos_token" says otherwise.

        Raises:
          ValueError: no tokenizer.json, no stop token in any of the files, or a field of another
            kind than expected; the folder is named.
        """
        folder = pathlib.Path(folder)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise ValueError(
                f"PretrainedTokenizer: {str(folder)!r} has no tokenizer.json; expected the folder "
                "of a published model in the format of the tokenizers library."
            )
        try:
            return cls(**_of_folder(folder, file))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def from_gguf(cls, path: str | pathlib.Path) -> PretrainedTokenizer:
        """From the tokens, merges and template inside a GGUF file.

        Raises:
          ValueError: another kind of tokenizer than byte-level pairs, or one that splits text in a
            way that is not known here.
        """
        reader = open_gguf(path)

        def get(name: str) -> Any:
            field = reader.get_field(f"tokenizer.{name}")
            return None if field is None else field.contents()

        kind, split = get("ggml.model"), get("ggml.pre")
        if kind != "gpt2" or split not in _SPLITS:
            raise ValueError(
                f"PretrainedTokenizer: {str(path)!r} has a tokenizer of kind {kind!r} with "
                f"pre-tokenizer {split!r}; expected 'gpt2' with one of {sorted(_SPLITS)}. Use "
                "from_folder with the model's tokenizer.json."
            )
        tokens, types = get("ggml.tokens"), get("ggml.token_type")
        backend = _byte_level(tokens, get("ggml.merges"), types, split)
        ids = {
            name: get(f"ggml.{field}_token_id")
            for name, field in [
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            ]
        }
        named = [ids["eos"], get("ggml.eot_token_id"), get("ggml.eom_token_id")]
        by_spelling = [i for i, t in enumerate(types) if t == _CONTROL and tokens[i] in END_TOKENS]
        return cls(
            backend,
            end_ids=[*(i for i in named if i is not None), *by_spelling],
            begin_ids=[ids["bos"]] if get("ggml.add_bos_token") and ids["bos"] is not None else [],
            pad_id=ids["pad"],
            special_tokens={f"{n}_token": tokens[i] for n, i in ids.items() if i is not None},
            chat_template=get("chat_template"),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Stop tokens."""
        return self._end_ids

    @property
    def end_id(self) -> int:
        """The stop token that ends demonstrations."""
        return self._end_ids[0]

    @property
    def pad_id(self) -> int:
        """Of padding; often a stop token."""
        return self.end_id if self._pad_id is None else self._pad_id

    def encode(self, text: str) -> list[int]:
        """Token ids of what the text holds, special tokens included, and of nothing else."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The same, after the token that a model without a chat template expects before a text."""
        ids, begin = self.encode(text), self._begin_ids
        if self.chat_template is not None or ids[: len(begin)] == begin:
            return ids
        return [*begin, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first stop token, special tokens left out.

        Tokens that the tokenizer does not have (a model may have more) are shown as unknown.
        """
        inside = itertools.takewhile(lambda token: token not in self._ends, ids)
        runs = itertools.groupby(inside, key=lambda token: token < self._size)
        return "".join(
            self._backend.decode(list(run), skip_special_tokens=True)
            if known
            else UNKNOWN * len(list(run))
            for known, run in runs
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **template_variables: Any,
    ) -> str:
        """A conversation in the form that the model was trained on.

        Args:
          messages: `{"role": ..., "content": ...}`, in order.
          add_generation_prompt: whether the beginning of the model's next turn follows.
          **template_variables: what else the template reads, for example `tools`.

        Raises:
          ValueError: the model has no template, or the template refuses or fails.
        """
        if self.chat_template is None:
            raise ValueError(
                "PretrainedTokenizer.chat: there is no chat template, neither in "
                "chat_template.jinja nor in tokenizer_config.json. Write the prompt as plain text, "
                "or pass chat_template=."
            )
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **template_variables},
        )


def load(path: str | pathlib.Path) -> PretrainedTokenizer:
    """From a folder or a .gguf file."""
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return PretrainedTokenizer.from_gguf(path)
    return PretrainedTokenizer.from_folder(path)


def _check_ends(end_ids: tuple[int, ...], size: int) -> None:
    if not end_ids:
        raise ValueError(
            "PretrainedTokenizer: no stop token; expected eos_token in tokenizer_config.json or "
            "eos_token_id in generation_config.json. Without one no response would ever end."
        )
    if not all(isinstance(end, int) and 0 <= end < size for end in end_ids):
        raise ValueError(
            f"PretrainedTokenizer: stop tokens {end_ids} must be below the number of "
            f"tokens, {size}. Do generation_config.json and tokenizer.json belong to one model?"
        )


# -- folders ----------------------------------------------------------------------------------


def _of_folder(folder: pathlib.Path, file: pathlib.Path) -> dict[str, Any]:
    """Arguments of `PretrainedTokenizer`."""
    backend = _backend(file)
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    _add_tokens(backend, config.get("added_tokens_decoder", {}))
    names = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    own_end = _token_id(backend, names.get("eos_token"))
    stops = generation.get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    pad = _token_id(backend, names.get("pad_token"))
    return {
        "backend": backend,
        "end_ids": [*([] if own_end is None else [own_end]), *stops],
        "begin_ids": _begin_ids(backend, config, names),
        "pad_id": generation.get("pad_token_id") if pad is None else pad,
        "special_tokens": names,
        "chat_template": _template(folder, config),
    }


def _backend(file: pathlib.Path) -> tokenizers.Tokenizer:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises this very class
        raise ValueError(f"{file.name} is no tokenizer of the library: {error}.") from error


def _begin_ids(
    backend: tokenizers.Tokenizer, config: dict[str, Any], names: dict[str, str]
) -> list[int]:
    """What stands before a text: as the tokenizer does by itself, or as "add_bos_token" says."""
    wanted = config.get("add_bos_token")
    if wanted is None:
        example = backend.encode("a", add_special_tokens=True)
        pairs = zip(example.ids, example.special_tokens_mask, strict=True)
        return [token for token, special in itertools.takewhile(lambda pair: pair[1], pairs)]
    begin = _token_id(backend, names.get("bos_token"))
    if wanted and begin is None:
        raise ValueError("tokenizer_config.json has add_bos_token and no bos_token.")
    return [begin] if wanted and begin is not None else []


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    return json_files.read_object(file) if file.exists() else {}


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Spellings by name; earlier sources go before later ones."""
    found: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_NAMES:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise ValueError(f"special token {name} must be a text, got {token!r}.")
            if token is not None:
                found.setdefault(name, token)
    return found


def _token_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    if token is None:
        return None
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(
            f"PretrainedTokenizer: special token {token!r} of tokenizer_config.json is not in "
            "tokenizer.json. Do both files belong to one model?"
        )
    return found


def _add_tokens(backend: tokenizers.Tokenizer, entries: dict[str, dict[str, Any]]) -> None:
    """Tokens that only tokenizer_config.json has; they get the ids that are next."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not all(str(i).isdecimal() and "content" in entry for i, entry in entries.items()):
        raise ValueError("added_tokens_decoder in tokenizer_config.json must hold tokens by id.")
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            options = {
                name: entry[name]
                for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if name in entry
            }
            backend.add_tokens([tokenizers.AddedToken(entry["content"], **options)])


def _template(folder: pathlib.Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    try:
        if isinstance(template, list):  # several by name
            template = {each["name"]: each["template"] for each in template}
        if isinstance(template, dict):
            template = template.get("default")
    except (KeyError, TypeError):
        template = False
    if not isinstance(template, str | None):
        raise ValueError(
            "chat_template in tokenizer_config.json must be a text, or several by name, got "
            f"{str(config['chat_template'])[:80]}."
        )
    return template


# -- GGUF -------------------------------------------------------------------------------------

_SPLITS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
}
"""How text is cut before pairs are merged, by the name that GGUF has for it."""


def _byte_level(
    tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], split: str
) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[split])
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens([tokenizers.AddedToken(token, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([tokenizers.AddedToken(token, normalized=False)])
    return backend
