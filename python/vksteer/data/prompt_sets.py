"""The study's public prompt sets: where they lie on the Hugging Face hub, and in which column.

Every entry was compared with the public dataset card or file list; docs/prompt-sets.md says with
which, and what could not be confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_GITHUB = "https://raw.githubusercontent.com"
_HUB = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class PromptSet:
    """A public prompt set.

    repository: owner/name on the hub. splits: {split: pattern of its files}, the default first.
    column: holds the prompts. by_hand: {split: addresses of files that hold the same prompts},
    for those who cannot or may not fetch from the hub. by_hand_column: their column; None for
    files that hold nothing but texts. empty: a column that has to be empty, because a prompt is
    not complete without what stands there. by_hand_rows: which rows of the files by hand the set
    holds, where it does not hold all, or how several files are kept apart.
    """

    repository: str
    splits: Mapping[str, str]
    column: str
    by_hand: Mapping[str, tuple[str, ...]]
    by_hand_column: str | None
    empty: str | None = None
    by_hand_rows: str = ""

    def split(self, name: str | None) -> str:
        """`name`, or the default split. Raises ValueError for one that the set does not have."""
        if name is None:
            return next(iter(self.splits))
        if name not in self.splits:
            raise ValueError(
                f"{self.repository} is read with the split {', '.join(self.splits)}, not {name!r}"
            )
        return name

    def instead(self, split: str) -> str:
        """How to go on without the hub, for an error's message."""
        addresses = self.by_hand[split]
        column = f":{self.by_hand_column}" if self.by_hand_column else ""
        file = addresses[0].rpartition("/")[2]
        files = f"the file as '{file}{column}'" if len(addresses) == 1 else "the files"
        text = f"fetch {' and '.join(addresses)} by hand and load {files}"
        return f"{text} {self.by_hand_rows}" if self.by_hand_rows else text


def _one_split(repository: str, *addresses: str, column: str | None, rows: str = "") -> PromptSet:
    """A set with the layout of most: parquet files named after the only split."""
    split = {"train": "data/train-*.parquet"}
    return PromptSet(repository, split, "prompt", {"train": addresses}, column, by_hand_rows=rows)


_JBB = "JailbreakBench/JBB-Behaviors"
_TDC = f"{_GITHUB}/centerforaisafety/tdc2023-starter-kit/main/red_teaming/data"
_HARMBENCH = f"{_GITHUB}/centerforaisafety/HarmBench/main/data/behavior_datasets"
_ALPACA = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"

#: Short name -> set. Training: advbench, maliciousinstruct, tdc2023; validation: harmbench; tests:
#: jailbreakbench and strongreject; harmless prompts: alpaca (docs/method.md section 1).
STUDY: dict[str, PromptSet] = {
    "advbench": _one_split(
        "walledai/AdvBench",
        f"{_GITHUB}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
        column="goal",
    ),
    "maliciousinstruct": _one_split(
        "walledai/MaliciousInstruct",
        f"{_GITHUB}/Princeton-SysML/Jailbreak_LLM/main/data/MaliciousInstruct.txt",
        column=None,
    ),
    "tdc2023": _one_split(
        "walledai/TDC23-RedTeaming",
        f"{_TDC}/dev/behaviors.json",
        f"{_TDC}/test/behaviors.json",
        column=None,
        rows="under two names (both are called behaviors.json), one after the other",
    ),
    "harmbench": PromptSet(
        "walledai/HarmBench",
        {"standard": "standard/train-*.parquet"},
        "prompt",
        {"standard": (f"{_HARMBENCH}/harmbench_behaviors_text_all.csv",)},
        "Behavior",
        by_hand_rows="with keep=lambda row: 'copyright' not in row['FunctionalCategory'] and"
        " 'context' not in row['Tags']",
    ),
    "jailbreakbench": PromptSet(
        _JBB,
        {"harmful": "data/harmful-behaviors.csv", "benign": "data/benign-behaviors.csv"},
        "Goal",
        {
            "harmful": (f"{_HUB}/{_JBB}/resolve/main/data/harmful-behaviors.csv",),
            "benign": (f"{_HUB}/{_JBB}/resolve/main/data/benign-behaviors.csv",),
        },
        "Goal",
    ),
    "strongreject": _one_split(
        "walledai/StrongREJECT",
        f"{_GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
        column="forbidden_prompt",
    ),
    "alpaca": PromptSet(
        "tatsu-lab/alpaca",
        {"train": "data/train-*.parquet"},
        "instruction",
        {"train": (f"{_HUB}/tatsu-lab/alpaca/resolve/main/data/{_ALPACA}",)},
        "instruction",
        empty="input",
        by_hand_rows="with keep=lambda row: not row['input']",
    ),
}
