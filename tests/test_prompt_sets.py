"""The study's prompt sets by name: the hub is replaced by a folder with the layout that the public
cards and file lists show (docs/prompt-sets.md), filled with harmless texts. No network.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from source_tree import ROOT
from vksteer import data

PAGE = Path(__file__).resolve().parent.parent / "docs" / "prompt-sets.md"
#: name: (repository, {file: columns}, column of the prompts), copied from the cards, not from the
#: package's own table. Files that a set has beside its prompts are there too, with made-up columns.
CARDS = {
    "advbench": (
        "walledai/AdvBench",
        {"README.md": None, "data/train-00000-of-00001.parquet": ["prompt", "target"]},
        "prompt",
    ),
    "maliciousinstruct": (
        "walledai/MaliciousInstruct",
        {"README.md": None, "data/train-00000-of-00001.parquet": ["prompt"]},
        "prompt",
    ),
    "tdc2023": (
        "walledai/TDC23-RedTeaming",
        {"README.md": None, "data/train-00000-of-00001.parquet": ["prompt"]},
        "prompt",
    ),
    "harmbench": (
        "walledai/HarmBench",
        {
            "README.md": None,
            "contextual/train-00000-of-00001.parquet": ["prompt", "context"],
            "copyright/train-00000-of-00001.parquet": ["prompt"],
            "standard/train-00000-of-00001.parquet": ["prompt", "category"],
        },
        "prompt",
    ),
    "jailbreakbench": (
        "JailbreakBench/JBB-Behaviors",
        {
            "LICENSE": None,
            "README.md": None,
            "data/benign-behaviors.csv": [
                "Index",
                "Goal",
                "Target",
                "Behavior",
                "Category",
                "Source",
            ],
            "data/harmful-behaviors.csv": [
                "Index",
                "Goal",
                "Target",
                "Behavior",
                "Category",
                "Source",
            ],
            "data/judge-comparison.csv": ["Index", "prompt", "response"],
            "generation_scripts/requirements.txt": None,
        },
        "Goal",
    ),
    "strongreject": (
        "walledai/StrongREJECT",
        {"README.md": None, "data/train-00000-of-00001.parquet": ["prompt", "category", "source"]},
        "prompt",
    ),
    "alpaca": (
        "tatsu-lab/alpaca",
        {
            "README.md": None,
            "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": [
                "instruction",
                "input",
                "output",
                "text",
            ],
        },
        "instruction",
    ),
}
DEFAULT = {"harmbench": "standard", "jailbreakbench": "harmful-behaviors"}


def write(path: Path, columns: list[str] | None, n: int = 5) -> None:
    """A file with texts that name their file, column and row; README and licences are plain."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if columns is None:
        path.write_text("plain\n")
        return
    rows = [{c: f"{path.parent.name}/{path.stem} {c} {i}" for c in columns} for i in range(n)]
    for row in rows[:-1]:
        if "input" in row:
            row["input"] = ""
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)


class FolderHub:
    """The two calls of huggingface_hub that are used, over folders owner/name/file."""

    def __init__(self, root: Path):
        self.root, self.fetched, self.error = root, [], None

    def list_repo_files(self, repository, repo_type):
        assert repo_type == "dataset"
        folder = self.root / repository
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def download(self, repository, file, repo_type):
        assert repo_type == "dataset"
        if self.error is not None:
            raise self.error
        self.fetched.append((repository, file))
        return str(self.root / repository / file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    found = FolderHub(tmp_path / "hub")
    for repository, files, _ in CARDS.values():
        for file, columns in files.items():
            write(found.root / repository / file, columns)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    monkeypatch.chdir(tmp_path)
    return found


def test_every_set_has_a_card_here():
    assert set(data.STUDY) == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_name_loads_the_prompts_of_its_set(hub, name):
    repository, _, column = CARDS[name]
    prompts = data.load(name.upper())
    assert len(prompts) == (4 if name == "alpaca" else 5)
    (fetched,) = hub.fetched
    assert fetched[0] == repository and DEFAULT.get(name, "train") in fetched[1]
    place = f"{Path(fetched[1]).parent.name}/{Path(fetched[1]).stem}"
    assert prompts == [f"{place} {column} {i}" for i in range(len(prompts))]


def test_splits(hub):
    benign = data.load("jailbreakbench", split="benign")
    assert benign == data.load("jailbreakbench:benign") and "benign-behaviors" in benign[0]
    with pytest.raises(ValueError, match=r"split harmful, benign, not 'train'"):
        data.load("jailbreakbench", split="train")
    with pytest.raises(ValueError, match="split standard, not 'contextual'"):
        data.load("harmbench:contextual")
    # without a short name, a split is found in the files' names
    assert data.load("JailbreakBench/JBB-Behaviors", "Goal", split="benign") == benign
    with pytest.raises(ValueError, match=r"no file matches split 'ben'.*benign-behaviors.csv"):
        data.load("JailbreakBench/JBB-Behaviors", split="ben")
    with pytest.raises(ValueError, match="names a file: leave split='harmful' out"):
        data.load("JailbreakBench/JBB-Behaviors:data/benign-behaviors.csv", split="harmful")


def test_instructions_with_an_input_are_not_prompts(hub):
    whole = data.load("tatsu-lab/alpaca", "instruction")
    assert len(whole) == 5 and data.load("alpaca") == whole[:4]
    assert data.load("alpaca", keep=lambda row: row["output"].endswith("2")) == whole[2:3]


def test_n_prompts_are_drawn_by_the_seed(hub):
    prompts = data.load("advbench")
    drawn = data.load("advbench", n=3)
    assert (
        len(set(drawn)) == 3
        and set(drawn) < set(prompts)
        and drawn == data.load("advbench", n=3, seed=0)
    )
    assert data.load("advbench", n=5)[:3] == drawn and sorted(data.load("advbench", n=5)) == prompts
    assert len({tuple(data.load("advbench", n=5, seed=seed)) for seed in range(8)}) > 4
    with pytest.raises(ValueError, match=r"advbench.*holds 5 prompts, n=6"):
        data.load("advbench", n=6)
    with pytest.raises(ValueError, match="give one of them"):
        data.load("advbench", n=2, limit=2)
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="n must be a whole number"):
            data.load("advbench", n=bad)
    with pytest.raises(ValueError, match="seed"):
        data.load("advbench", n=2, seed="a")


def test_a_file_in_parts_is_one(hub):
    folder = hub.root / "owner" / "cut" / "data"
    for i in range(3):
        write(folder / f"train-0000{i}-of-00003.parquet", ["prompt"], n=2)
    write(folder / "test-00000-of-00001.parquet", ["prompt"], n=2)
    prompts = data.load("owner/cut", split="train")
    assert [p.split()[0][-14:] for p in prompts[::2]] == [
        f"0000{i}-of-00003"[-14:] for i in range(3)
    ]
    with pytest.raises(ValueError, match="more than one file matches"):
        data.load("owner/cut")
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="more than one file matches split 'train'"):
        data.load("owner/cut", split="train")


def gated():
    from huggingface_hub.errors import GatedRepoError

    error = GatedRepoError.__new__(GatedRepoError)
    Exception.__init__(error, "403 Client Error. Cannot access gated repo")
    return error


def test_a_gated_set_says_what_to_do(hub):
    hub.error = gated()
    with pytest.raises(ValueError) as caught:
        data.load("advbench")
    said = str(caught.value)
    assert "walledai/AdvBench is gated" in said and "HF_TOKEN" in said
    assert "https://huggingface.co/datasets/walledai/AdvBench" in said
    assert "llm-attacks/main/data/advbench/harmful_behaviors.csv by hand" in said
    assert "'harmful_behaviors.csv:goal'" in said
    with pytest.raises(ValueError, match="walledai/AdvBench is gated") as caught:
        data.load("walledai/AdvBench")
    assert "by hand" not in str(caught.value)  # of a free name nothing is known


@pytest.mark.parametrize("name", CARDS)
def test_without_the_hub_the_file_to_fetch_is_named(hub, name, monkeypatch):
    hub.error = OSError("no network")
    with pytest.raises(
        ValueError, match=r"no network; or fetch https://.* by hand and load"
    ) as one:
        data.load(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install huggingface_hub; or fetch") as other:
        data.load(name)
    by_hand = data.STUDY[name]
    address = next(iter(by_hand.by_hand.values()))[0]
    assert address in str(one.value) and address in str(other.value)
    assert str(one.value).endswith(by_hand.by_hand_rows)
    if "keep=" in by_hand.by_hand_rows:  # the rule that the documents give
        rule = by_hand.by_hand_rows.removeprefix("with ").replace("'", '"')
        assert rule in " ".join((ROOT / "docs/prompt-sets.md").read_text().split())


def test_a_file_fetched_by_hand_names_its_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("harmful_behaviors.csv").write_text("goal,target\noil a lock,Sure\npaint a door,Sure\n")
    expected = ["oil a lock", "paint a door"]
    assert (
        data.load("harmful_behaviors.csv:goal")
        == data.prompt_files.prompts_of("harmful_behaviors.csv:goal")
        == expected
    )
    assert data.load("harmful_behaviors.csv", n=1)[0] in expected
    with pytest.raises(ValueError, match="names a column, and column='target'"):
        data.load("harmful_behaviors.csv:goal", "target")
    with pytest.raises(ValueError, match="a file, which has no splits"):
        data.load("harmful_behaviors.csv:goal", split="train")
    with pytest.raises(FileNotFoundError, match=r"no file other\.csv"):
        data.load("other.csv:goal")
    Path("odd:name.csv").write_text("goal\nx\n")  # a colon in the name of a file that is there
    assert data.load("odd:name.csv") == ["x"]


def test_a_folder_of_the_same_name_does_not_hide_a_set(hub):
    Path("alpaca").mkdir()
    assert len(data.load("alpaca")) == 4


def test_the_command_line_takes_names(hub, capsys):
    from argparse import Namespace

    from vksteer.cli.arguments import whole_prompts

    harmful, harmless = whole_prompts(
        Namespace(harmful="advbench", harmless="jailbreakbench:benign", model="m")
    )
    assert harmful == data.load("advbench")
    assert harmless == data.load("jailbreakbench", split="benign")


def test_the_page_says_what_the_package_loads():
    """Every name, repository, split, column and address of the package stands on the page, in the
    section of its set.
    """
    sections = {
        part.partition("\n")[0].strip(" `"): part for part in PAGE.read_text().split("\n## ")[1:]
    }
    for name, known in data.STUDY.items():
        said = sections[name]
        for word in (known.repository, known.column, *known.splits):
            assert f"`{word}`" in said, f"{name}: {word}"
        for address in (a for some in known.by_hand.values() for a in some):
            assert address in said, f"{name}: {address}"
        assert "license" in said.lower() and "Checked" in said, name
