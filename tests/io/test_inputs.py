from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retex_cli.errors import RetexError
from retex_cli.io.inputs import BadInput, Example, read_items, read_rows, read_stream


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def seen(path: Path) -> list[tuple[str | None, str | None]]:
    return [(example.text, example.label) for example in read_rows(path)]


ROWS = [("one, two", "spam"), ('say "hi"\nthere', "ham")]


def test_every_text_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    jsonl = "\n\n".join(json.dumps({"id": 3, "text": text, "label": label}) for text, label in ROWS)
    put(tmp_path, "a.jsonl", "\ufeff" + jsonl + "\n")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([("id", "label", "text"), *((1, b, a) for a, b in ROWS)])
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        assert seen(tmp_path / name) == ROWS, name


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": "b"}')
    assert [example.source for example in read_rows(path)] == [f"{path}:1", f"{path}:3"]
    path = put(tmp_path, "a.csv", 'text\n"a\nb"\nc\n')
    assert [example.source for example in read_rows(path)] == [f"{path}:3", f"{path}:4"]


def test_a_text_file_has_one_text_a_line_and_labels_may_be_numbers(tmp_path: Path) -> None:
    assert seen(put(tmp_path, "a.txt", "one\n\ntwo\n")) == [("one", None), ("two", None)]
    assert seen(put(tmp_path, "b.jsonl", '{"sentence": "x", "labels": 4}')) == [("x", "4")]
    assert seen(put(tmp_path, "c.jsonl", '{"text": "x", "label": 0}')) == [("x", "0")]


def test_class_numbers_of_a_datasets_parquet_become_names(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    features = {
        "info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}}
    }
    for labels in ([1, 0], [1, 2]):
        table = pyarrow.table({"text": ["a", "b"], "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        if labels == [1, 0]:
            assert seen(tmp_path / "a.parquet") == [("a", "pos"), ("b", "neg")]
        else:
            with pytest.raises(RetexError, match="row 2: the label 2 is not among the file's 2 classes"):
                read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: holds no inputs"),
        ("a.csv", "text,label\n", r"a\.csv: holds no inputs"),
        ("a.txt", "\n \n", r"a\.txt: holds no inputs"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl:2: not valid JSON: .*column 10"),
        ("a.jsonl", '{"text": "a"}\n["b"]', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", '{"body": "a", "n": 1}', r"a\.jsonl:1: no text; the columns are body, n"),
        ("a.jsonl", '{"text": "a"}\n{"text": " "}', r"a\.jsonl:2: the text is ' '"),
        ("a.jsonl", '{"text": 3}', r"a\.jsonl:1: the text is 3"),
        ("a.jsonl", '{"text": "a", "label": [1]}', r"a\.jsonl:1: the label \[1\] is neither"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}', r"a\.jsonl:2: has no label, other rows have one"),
        ("a.jsonl", '{"image": "gone.png"}', r"a\.jsonl:1: no such image: .*gone\.png"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        ("a.csv", "text,label\na,b,c\n", r"a\.csv:2: 3 fields, the header has 2"),
        ("a.csv", "text,label\na\n", r"a\.csv:2: 1 fields, the header has 2"),
        ("a.csv", 'text\n"a"b\n', r"a\.csv:2: not valid CSV"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
        ("a.docx", "x", r"a\.docx: inputs of an unknown kind"),
    ],
)
def test_bad_inputs_are_named_with_their_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = put(tmp_path, name, content)
    with pytest.raises(RetexError, match=message) as caught:
        read_rows(path)
    assert "\n" not in caught.value.message


def test_a_very_long_field_is_read_and_the_csv_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert seen(put(tmp_path, "a.csv", "text\n" + "x" * (before + 1)))[0][0] == "x" * (before + 1)
    assert csv.field_size_limit() == before


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RetexError, match="no such file or folder of inputs"):
        read_rows(tmp_path / "gone.csv")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RetexError, match="needs pyarrow") as caught:
        read_rows(put(tmp_path, "a.parquet", b"PAR1"))
    assert caught.value.hint == "pip install 'retex-cli[parquet]'"


def test_images_by_file_by_folder_and_by_row(tmp_path: Path) -> None:
    for name in ("cars/b.jpg", "cars/a.PNG", "dogs/deep/c.webp", "dogs/notes.txt", "dogs/.hidden.png"):
        put(tmp_path, f"set/{name}", b"")
    found = [(e.image.name if e.image else "", e.label) for e in read_rows(tmp_path / "set")]
    assert found == [("a.PNG", "cars"), ("b.jpg", "cars"), ("c.webp", "dogs")]
    single = tmp_path / "set/cars/b.jpg"
    assert read_rows(single) == [Example(image=single, source=str(single))]
    listed = put(tmp_path, "set/rows.jsonl", '{"image": "cars/b.jpg", "label": "car"}')
    assert read_rows(listed) == [Example(image=single, label="car", source=f"{listed}:1")]
    flat = read_rows(tmp_path / "set/cars")
    assert [example.label for example in flat] == [None, None]


def test_folders_of_images_that_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(RetexError, match="none: holds no images"):
        read_rows(tmp_path / "none")
    put(tmp_path, "mixed/cars/a.png", b"")
    put(tmp_path, "mixed/loose.png", b"")
    with pytest.raises(RetexError, match=r"loose\.png: lies beside the folders of labels"):
        read_rows(tmp_path / "mixed")


def test_ready_model_inputs(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    inputs = {"input_ids": torch.arange(6).view(3, 2), "labels": torch.tensor([1, 0, 1])}
    save_file(inputs, path)
    rows = read_rows(path)
    assert [row.label for row in rows] == ["1", "0", "1"]
    assert [row.tensors["input_ids"].tolist() for row in rows if row.tensors] == [[0, 1], [2, 3], [4, 5]]
    assert rows[2].source == f"{path}: row 3"
    save_file(inputs, path, metadata={"labels": '["no", "yes"]'})
    assert [row.label for row in read_rows(path)] == ["yes", "no", "yes"]


@pytest.mark.parametrize(
    ("tensors", "names", "message"),
    [
        ({}, None, "holds no inputs"),
        ({"a": torch.tensor(1)}, None, "holds no inputs"),
        ({"a": torch.empty(0, 3)}, None, "holds no inputs"),
        ({"labels": torch.zeros(2).long()}, None, "holds labels and no inputs"),
        ({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, None, "tensor 'a' has 2 rows, 'b' has 3"),
        ({"a": torch.ones(1, 3), "labels": torch.ones(1)}, None, "row 1: the label is not one whole number"),
        ({"a": torch.ones(1, 3), "labels": torch.tensor([5])}, '["x"]', "the label 5 is not among the 1 names"),
        ({"a": torch.ones(1, 3)}, "{", "the metadata entry 'labels' is not valid JSON"),
    ],
)
def test_model_inputs_that_cannot_be_meant(
    tmp_path: Path, tensors: dict[str, torch.Tensor], names: str | None, message: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"labels": names} if names else None)
    with pytest.raises(RetexError, match=message):
        read_rows(tmp_path / "x.safetensors")


def kinds(items: Iterable[Example | BadInput]) -> list[str]:
    return [f"! {item.error.message}" if isinstance(item, BadInput) else item.text or str(item.image) for item in items]


def test_a_bad_row_is_left_in_its_place_and_the_others_are_read(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": ""}\n{"te\n{"text": "\xff"}\n{"text": "b", "label": 1}\n')
    found = kinds(read_items(path))
    assert [found[0], found[-1]] == ["a", "b"]
    for text, words in zip(found[1:4], ("the text is ''", "not valid JSON", "not UTF-8 (byte 0xff)"), strict=True):
        assert words in text
    path = put(tmp_path, "a.csv", 'text,label\na,1\nb\n"c"x,1\nd,2\n')
    found = kinds(read_items(path))
    assert [found[0], found[-1]] == ["a", "d"]
    assert "a.csv:3: 1 fields, the header has 2" in found[1]
    assert "a.csv:4: not valid CSV" in found[2]


def test_lines_that_arrive_are_texts_or_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put(tmp_path, "x.png", b"").parent)
    lines = b'\xef\xbb\xbfone { two\r\n\n{"text": "three"}\n{"image": "x.png"}\n{"image": "y.png"}\n{{no}}\nla\x0cst'
    found = list(read_stream(io.BytesIO(lines), "stdin"))
    assert [item.source for item in found] == [f"stdin:{n}" for n in range(1, 8)]
    texts = kinds(found)
    assert [texts[k] for k in (0, 2, 3, 6)] == ["one { two", "three", "x.png", "la\x0cst"]
    for k, words in ((1, "the text is ''"), (4, "no such image: y.png"), (5, "not valid JSON")):
        assert words in texts[k]
    assert found[1].to_json() == {"source": "stdin:2", "error": "stdin:2: the text is ''", "hint": found[1].error.hint}
