"""Builders of published sets on files of the released formats: fields, duplicates, sums, errors."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from occ.tasks import datasets
from occ.tasks.datasets import answers, builder, files, published
from occ.tasks.datasets.builder import deduplicate
from occ.tasks.datasets.files import Row
from tests import fixtures_math

EXPECTED = {
    "dapo_math_17k": ("train", 21, "What is $2 + 3$?", "5"),
    "aime_2024": ("test", 2, "Find the number of primes below   $30$ .", "10"),
    "aime_2025": ("test", 2, "Find $3 \\cdot 5 + 55$.", "70"),
    "amc": ("test", 2, "What is $3^3$?", "27"),
    "math_500": ("test", 2, "Simplify $\\frac{2}{4}$.", "\\frac{1}{2}"),
    "math": ("train", 7, "Compute $1 + 1$ (algebra, train).", "2"),
    "minerva_math": ("test", 2, "A mass of $2$ kg is pushed by $6$ N. Its acceleration?", "3"),
    "olympiad_bench": ("test", 2, "Find the sum of the roots of $x^2 - 5x + 6$.", "5"),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    fixtures_math.write(folder)
    return folder


def row(problem, answer, identity="0"):
    return Row(identity, problem, answer, "", "")


@pytest.mark.parametrize("name", published.TABLE)
def test_a_released_format_is_read(data_dir, name):
    split, size, problem, answer = EXPECTED[name]
    prepared = datasets.prepare(name, data_dir, verify=False)
    source = prepared.as_data_source(split=split)
    found = [datasets.read(source[i]) for i in range(len(source))]
    assert len(found) == size == datasets.counts(prepared)[split].kept
    assert (found[0].problem, found[0].answer) == (problem, answer)
    assert all(row.identity and row.answer == row.answer.strip() for row in found)
    assert prepared.info.metadata["licence"] == published.TABLE[name].licence


def test_what_was_prepared_is_not_read_again(data_dir, monkeypatch):
    first = datasets.prepare("dapo_math_17k", data_dir, verify=False)
    monkeypatch.setattr(builder, "rows", None)
    again = datasets.prepare("dapo_math_17k", data_dir, verify=False)
    assert datasets.counts(again) == datasets.counts(first)
    assert again.info.metadata["revision"] == published.DAPO_MATH_17K.revision


def test_dapos_duplicates_are_left_out_and_counted(data_dir):
    """21 problems and one with two answers, three times each."""
    prepared = datasets.prepare("dapo_math_17k", data_dir, verify=False)
    assert datasets.counts(prepared) == {
        "train": datasets.Counts(rows=69, duplicates=42, conflicting=6, kept=21)
    }
    source = prepared.as_data_source(split="train")
    problems = [datasets.read(source[i]).problem for i in range(len(source))]
    assert len(set(problems)) == 21 and not any("two answers" in text for text in problems)
    assert not any("Remember" in text or "Solve the" in text for text in problems)


def test_a_context_goes_before_its_problem(data_dir):
    source = datasets.prepare("olympiad_bench", data_dir, verify=False).as_data_source("test")
    found = datasets.read(source[1])
    assert found.problem == "Let $x^2 - 5x + 6 = 0$.\nFind both roots." and found.answer == "2, 3"


def test_duplicates_keep_their_first_place():
    found = [row("One?", "1"), row("Two?", "2"), row("One?", "1"), row("Three?", "3")]
    kept, counts = deduplicate(found)
    numbered = [(number, kept_row.answer) for number, kept_row in kept]
    assert numbered == [(0, "1"), (1, "2"), (3, "3")]
    assert counts == datasets.Counts(4, 1, 0, 3)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("12"))))
def test_every_row_is_accounted_for(pairs):
    kept, counts = deduplicate([row(problem, answer) for problem, answer in pairs])
    assert counts.rows == counts.kept + counts.duplicates + counts.conflicting == len(pairs)
    assert {kept_row.problem for _, kept_row in kept} == {
        problem for problem, _ in pairs if len({a for p, a in pairs if p == problem}) == 1
    }


def test_a_point_or_a_sign_makes_another_problem():
    """1.5 + 2 and 15 + 2 were one problem with two answers, so both were left out."""
    texts = ["What is 1.5 + 2?", "What is 15 + 2?", "What is 5!?", "What is 5?", "3:4", "34"]
    kept, counts = deduplicate([row(text, str(n)) for n, text in enumerate(texts)])
    assert len(kept) == 6 and counts.conflicting == 0
    assert len(set(map(answers.same_problem, texts))) == 6


# -- what is wrong is told ------------------------------------------------------------------------


def change(tmp_path, name, row_change, number=1):
    """The set's fixture with one row changed."""
    rows = fixtures_math.ROWS[name]()
    rows[number] = row_change(rows[number])
    file = datasets.find(name).files["test"][0]
    path = tmp_path / "manual" / name / file.path
    fixtures_math.write_rows(path, rows)
    return path


@pytest.mark.parametrize(
    ("name", "row_change", "message"),
    [
        (
            "aime_2025",
            lambda row: {"question": row["problem"], "answer": "1", "id": "1"},
            r"test.jsonl, row 1: expected a field 'problem', there is no 'problem'. It has the "
            r"fields \['answer', 'id', 'question'\]",
        ),
        ("aime_2025", lambda row: row | {"problem": 3}, "row 1: expected a text in field 'problem"),
        ("aime_2025", lambda row: row | {"problem": " "}, "row 1: field 'problem' is empty"),
        ("math_500", lambda row: row | {"answer": " "}, "row 1: field 'answer': expected a text"),
        ("math_500", lambda row: row | {"answer": None}, "row 1: expected a field 'answer', it is"),
        *(
            ("math_500", lambda row, wrong=wrong: row | {"answer": wrong}, message)
            for wrong, message in [
                (
                    ["1", "2"],
                    r"field 'answer': expected a text or a number, got \['1', '2'\]",
                ),
                ({"a": 1}, "field 'answer': expected a text or a number, got {'a': 1}"),
                (True, "row 1: field 'answer': expected a text or a number, got True"),
                (float("nan"), "row 1: field 'answer': expected a finite number, got nan"),
            ]
        ),
        (
            "aime_2025",
            lambda row: [row],
            r"test.jsonl, row 1: expected an object with fields, got \[",
        ),
        (
            "olympiad_bench",
            lambda row: row | {"final_answer": ["1", "2"]},
            "row 1: field 'final_answer': expected a list of one answer",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, name, row_change, message):
    path = change(tmp_path, name, row_change)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.prepare(name, tmp_path, verify=False)
    assert str(path) in str(caught.value) and datasets.find(name).revision in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "aime_2025",
            b"<!DOCTYPE html><html>Sign in</html>",
            "expected a .jsonl file, got a web page",
        ),
        ("aime_2025", b"\xef\xbb\xbf <html>", "expected a .jsonl file, got a web page"),
        (
            "aime_2025",
            b'{"problem": "1 + 1?", "answer": "2", "id": "0"}\n{"problem": "1',
            "line 2: ex",
        ),
        ("aime_2025", b'{"problem": "\xff"}\n', "line 1: expected JSON in UTF-8"),
        ("amc", b"<html></html>", "expected a .parquet file, got a web page"),
        ("amc", b"PAR1 and then nothing", "expected a parquet file, but it cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, name, content, message):
    file = datasets.find(name).files["test"][0]
    path = tmp_path / "manual" / name / file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.prepare(name, tmp_path, verify=False)
    assert str(path) in str(caught.value)


def test_a_cut_off_parquet_file_is_named(tmp_path):
    fixtures_math.write(tmp_path, ["amc"])
    path = tmp_path / "manual" / "amc" / datasets.find("amc").files["test"][0].path
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        datasets.prepare("amc", tmp_path, verify=False)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    fixtures_math.write(tmp_path, ["aime_2025"])
    path = tmp_path / "manual" / "aime_2025" / "test.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert datasets.counts(datasets.prepare("aime_2025", tmp_path, verify=False))["test"].kept == 2


def test_what_was_prepared_unverified_or_of_another_file_is_not_used(tmp_path):
    fixtures_math.write(tmp_path, ["amc", "minerva_math"])
    datasets.prepare("amc", tmp_path, verify=False)
    with pytest.raises(ValueError, match=r"prepared with verify=False from .* the published b696e"):
        datasets.prepare("amc", tmp_path)
    datasets.prepare("amc", tmp_path, verify=False)
    datasets.prepare("minerva_math", tmp_path)
    path = tmp_path / "manual" / "minerva_math" / "test.jsonl"
    path.write_text(path.read_text().replace('"3"', '"4"'))
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"put in the place of the file.*Delete that folder"):
            datasets.prepare("minerva_math", tmp_path, verify=verify)
    path.unlink()  # as after a download
    assert datasets.counts(datasets.prepare("minerva_math", tmp_path))["test"].kept == 2


def test_a_comma_is_what_the_set_says():
    counted = answers.counted
    assert counted("45,135", True) == "45, 135" and counted("45,135", False) == "45{,}135"
    assert counted("(1,2),(3,4)", True) == "(1,2), (3,4)" and counted("(1,2)", False) == "(1,2)"


def test_another_release_put_there_by_hand_is_read(tmp_path):
    """Minerva Math's answers first stood in the boxes of solutions; any single file is taken."""
    folder = tmp_path / "manual" / "minerva_math"
    folder.mkdir(parents=True)
    rows = [{"problem": "How far?", "solution": r"So $\boxed{1.5e3}$ m.", "type": "A", "idx": 7}]
    fixtures_math.write_rows(folder / "minerva.jsonl", rows)
    source = datasets.prepare("minerva_math", tmp_path).as_data_source("test")
    assert datasets.read(source[0]) == Row("7", "How far?", "1.5e3", "A", "")


def test_a_column_that_is_missing_is_named(tmp_path):
    rows = [{"id": 0, "problem": "What?", "answer": "1"}]
    path = tmp_path / "file.parquet"
    fixtures_math.write_rows(path, rows)
    with pytest.raises(ValueError, match=r"row 0: expected a field 'question', there is no"):
        list(files.rows(path, datasets.find("amc"), path.name))


def test_a_solution_without_a_box_is_named(tmp_path):
    path = tmp_path / "file.parquet"
    problem = fixtures_math.math_rows("algebra", "train")[0]
    fixtures_math.write_rows(path, [problem, problem | {"solution": "Two."}])
    with pytest.raises(ValueError, match=r"row 1: field 'solution': expected a solution with"):
        list(files.rows(path, datasets.find("math"), path.name))


def test_a_file_with_another_sum_is_refused(tmp_path):
    fixtures_math.write(tmp_path, ["amc", "minerva_math"])
    with pytest.raises(ValueError, match=r"expected the SHA-256 b696e87b.*verify=False"):
        datasets.prepare("amc", tmp_path)
    # No sum is known for this one; that of the file is kept.
    [found] = datasets.prepare("minerva_math", tmp_path).info.metadata["sha256"].values()
    assert found == files.sha256(tmp_path / "manual" / "minerva_math" / "test.jsonl")


def test_without_file_and_network_the_error_says_where_to_put_it(tmp_path, monkeypatch):
    def refuse(url, **_):
        assert url == (
            "https://huggingface.co/datasets/math-ai/aime25/resolve/"
            "563bb8404243c5f09de6ec262f2db674fe5bce9b/test.jsonl"
        )
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(requests, "head", refuse)
    with pytest.raises(FileNotFoundError, match="could not be downloaded") as caught:
        datasets.prepare("aime_2025", tmp_path)
    assert str(tmp_path / "manual" / "aime_2025" / "test.jsonl") in str(caught.value)


def test_a_file_in_the_hubs_cache_is_used(tmp_path, monkeypatch):
    """Of the pinned revision, under the repository's name too; what lies by hand comes first."""
    constants = pytest.importorskip("huggingface_hub").constants
    entry = datasets.find("amc")
    fixtures_math.write(tmp_path / "elsewhere", ["amc"])
    name = entry.files["test"][0].path
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(requests, "head", _no_network)
    owned = f"datasets--{entry.repository.replace('/', '--')}"
    for revision in ("0" * 40, entry.revision):
        with pytest.raises(FileNotFoundError, match=rf"hf download {entry.repository} .*dataset"):
            datasets.prepare(entry.repository, tmp_path / "data", verify=False)
        place = tmp_path / "hub" / owned / "snapshots" / revision / name
        place.parent.mkdir(parents=True)
        shutil.copy(tmp_path / "elsewhere" / "manual" / "amc" / name, place)
    prepared = datasets.prepare(entry.repository, tmp_path / "data", verify=False)
    assert datasets.counts(prepared)["test"].kept == 2
    assert prepared.info.metadata["sha256"] == {name: files.sha256(place)}


def _no_network(url, **_):
    raise requests.exceptions.ConnectionError


def test_a_downloaded_file_is_used(tmp_path, monkeypatch):
    fixtures_math.write(tmp_path / "elsewhere", ["amc"])
    name = datasets.find("amc").files["test"][0].path
    downloaded = tmp_path / "a_name_without_an_ending"
    (tmp_path / "elsewhere" / "manual" / "amc" / name).rename(downloaded)
    answer = requests.Response()
    answer.status_code = 200
    monkeypatch.setattr(requests, "head", lambda url, **_: answer)
    monkeypatch.setattr(
        "tensorflow_datasets.download.DownloadManager.download", lambda manager, url: downloaded
    )
    assert datasets.counts(datasets.prepare("amc", tmp_path, verify=False))["test"].kept == 2


def test_an_unknown_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown set 'aime'; expected one of \['aime_2024'"):
        datasets.prepare("aime", tmp_path)


# -- the table ------------------------------------------------------------------------------------


def test_the_table_is_whole():
    for entry in published.TABLE.values():
        assert len(entry.revision) == 40 and int(entry.revision, 16)
        assert entry.files.keys() == entry.sizes.keys()
        for split in entry.files.values():
            for file in split:
                assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
                assert entry.url(file).startswith("https://huggingface.co/datasets/")
    assert set(published.SIX) < set(published.TABLE)
    assert json.dumps([dataclasses.asdict(f) for f in published.AMC.files["test"]])


def test_one_problem_in_two_spellings_has_one_key():
    same = answers.same_problem
    assert same(r"Find $x$ if $2x = \frac{1}{2}$.") == same("find x, if 2x=\\frac12")
    assert same("What is $2 - 3$?") != same("What is $2 + 3$?")
    assert same("\N{FULLWIDTH DIGIT ONE}") == same("1")


def test_tensorflow_is_never_imported(data_dir):
    program = (
        "import sys\n"
        "from occ.tasks import datasets\n"
        "prepared = datasets.prepare('aime_2024', sys.argv[1], verify=False)\n"
        "source = prepared.as_data_source(split='test')\n"
        "assert datasets.read(source[1]).answer == '42'\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    fresh = data_dir.parent / "fresh"
    fixtures_math.write(fresh, ["aime_2024"])
    subprocess.run([sys.executable, "-c", program, str(fresh)], check=True, capture_output=True)
