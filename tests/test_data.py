"""Prompts from files of every format, refused files and their messages, data sets of the Hugging
Face hub without a network, and the toy world.
"""

from __future__ import annotations

import json
import sys

import pytest

from vksteer import data

ROWS = [
    {"id": 1, "prompt": "How do I oil a lock?", "kind": "a"},
    {"id": 2, "prompt": 'Say "hi",\nplease – ’now’', "kind": "b"},
    {"id": 3, "prompt": "x", "kind": "b"},
]
PROMPTS = [row["prompt"] for row in ROWS]


def write(folder, ending, rows=ROWS):
    path = folder / f"prompts{ending}"
    if ending in (".csv", ".tsv"):
        import csv

        with open(
            path, "w", newline="", encoding="utf-8-sig" if ending == ".csv" else "utf-8"
        ) as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == ".jsonl":
        path.write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
            encoding="utf-8",
        )
    elif ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format(tmp_path, ending):
    path = write(tmp_path, ending)
    assert data.load(path) == data.load(str(path), column="prompt") == PROMPTS
    assert data.load(path, "kind") == ["a", "b", "b"]
    assert data.load(path, keep=lambda row: row["kind"] == "b", limit=1) == [PROMPTS[1]]
    with pytest.raises(
        ValueError, match=r"'Prompt'; did you mean 'prompt'.*'id', 'prompt', 'kind'"
    ):
        data.load(path, "Prompt")
    with pytest.raises(ValueError, match="left none of 3"):
        data.load(path, keep=lambda row: False)


def test_texts_alone(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n")
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "b.json").write_text('{"q": ["one", "two"]}')
    (tmp_path / "a.jsonl").write_text('"one"\n"two"')
    for name in ("a.txt", "a.json", "b.json", "a.jsonl"):
        assert data.load(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", "a,b\nx,y\n", "which column.*'a', 'b'"),
        ("a.csv", "prompt\nx,y\n", "another number of fields"),
        ("a.csv", "a,b\nx\n", "row 0"),
        ("a.csv", 'prompt\n"x', "line"),
        ("a.csv", "", "no rows"),
        ("a.csv", "prompt\n", "no rows"),
        ("a.json", "[", "JSON"),
        ("a.json", "3", "int"),
        ("a.json", "[3]", "entry 0"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "one length"),
        ("a.json", '{"a": 1}', "one length"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": null}', "which column"),
        ("a.xlsx", "x", "xlsx"),
        ("a", "x", "without an ending"),
        ("a.parquet", "PAR1nonsense", "parquet"),
        ("a.txt", "\n\n", "no rows"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        data.load(tmp_path / name)


def test_rows_without_a_prompt_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": null}\n')
    with pytest.raises(ValueError, match=r"row 1.*'prompt' holds None.*keep="):
        data.load(tmp_path / "a.jsonl", "prompt")
    assert data.load(tmp_path / "a.jsonl", "prompt", keep=lambda row: row["prompt"]) == ["x"]


def test_names_and_limits(tmp_path):
    (tmp_path / "latin.csv").write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        data.load(tmp_path / "latin.csv")
    with pytest.raises(FileNotFoundError, match=r"none.csv"):
        data.load(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="folder"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match=r"owner/name.*jailbreakbench"):
        data.load("nothing")
    for limit in (0, True, 1.5):
        with pytest.raises(ValueError, match="limit"):
            data.load(tmp_path / "latin.csv", limit=limit)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path, ".parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        data.load(path)


class Hub:
    """Replaces huggingface_hub: one data set, no network."""

    files = ["README.md", "LICENSE.txt", "data/good.csv", "data/bad.csv"]

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def list_repo_files(self, repository, repo_type):
        assert repo_type == "dataset"
        if repository != "owner/set":
            raise OSError("no network")
        return self.files

    def download(self, repository, file, repo_type):
        self.asked.append((repository, file))
        return str(write(self.folder, ".csv"))


def test_hub_names(tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    assert (
        data.load("owner/set:data/bad.csv")
        == data.load("owner/set:data/b*.csv", "prompt")
        == PROMPTS
    )
    assert hub.asked == [("owner/set", "data/bad.csv")] * 2
    with pytest.raises(
        ValueError, match=r"more than one.*owner/set:PATH.*data/good.csv, data/bad.csv"
    ):
        data.load("owner/set")
    with pytest.raises(ValueError, match="no file matches"):
        data.load("owner/set:data/other.csv")
    with pytest.raises(ValueError, match="no network"):
        data.load("owner/other")
    assert data.load("owner/set", "kind", split="bad") == ["a", "b", "b"]


def test_tiny_is_the_world():
    from vksteer.data import world

    assert data.tiny("validation", seed=3) == world.tiny("validation", seed=3)
    harmful, harmless = data.tiny_pair("test", 5)
    assert len(harmful) == len(harmless) == 5 and all(
        isinstance(p, str) for p in harmful + harmless
    )
    with pytest.raises(ValueError, match="train"):
        data.tiny("exam")


def test_the_hub_out_of_reach(monkeypatch):
    """The errors of the HTTP client are not OSErrors, and the client changed between releases of
    huggingface_hub.
    """
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})(
            "[Errno 111] Connection refused"
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(
        ValueError, match=r"the hub did not give it: ConnectError: .Errno 111. Connection refused"
    ):
        data.load("owner/set:a.csv")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug is not reported as a network problem
        data.load("owner/set:a.csv")
