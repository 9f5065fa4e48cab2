"""`--plan` and `--budget` of a study: counts of work, measured rates, the ladder of sample counts,
what is kept in the folder, and what is refused.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

import vksteer as vs
from vksteer.base.idle_clock import IdleClock
from vksteer.cli import commands as cli
from vksteer.study import budget, ladder, planning, rates, unfinished
from vksteer.study.settings import SIZES, Settings
from vksteer.study.steps import STEPS
from vksteer.study.work import KINDS, WORK, Known, Lengths, Shape, answers

LENGTHS = Lengths((2, 4), 2, 5)
SHAPE = Shape(
    {"train": (48, 960), "validation": (24, 480), "test": (24, 480)},
    n_layers=10, positions=4, nonzero=0.9, edges=lambda layer: 190, sharing=0.7, n_heads=4,
    vocabulary=1024, lengths=LENGTHS,
)  # fmt: skip
#: Rates near those of llvmpipe on two cores with tiny-llama-chat.
SECONDS = {
    "capture": 1e-5, "score": 1e-5, "prefill": 1e-4, "step": 2e-3, "token": 3e-4, "gradient": 3e-5,
    "contract": 1e-6, "final": 6e-5, "circuits": 5e-5, "near": 1.5e-5, "patch": 7e-6, "learn": 3e-5,
    "reread": 1.5e-5, "lens": 1e-4, "word": 1e-5,
}  # fmt: skip
RATES = rates.Rates(SECONDS, {k: 2 * v for k, v in SECONDS.items()}, 1.8, 0.9, 0.7,
                    Lengths((28,) * 20, 0, 128), 3.0)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as opened:
        yield opened


@pytest.fixture
def measured(monkeypatch):
    """Known rates in place of a calibration, whose calls are counted."""
    calls = []
    monkeypatch.setattr(rates, "measure", lambda *a: calls.append(a) or RATES)
    return calls


def run(model, folder, **options):
    return vs.study.run(model, out=folder, **{"only": ["prompts"], "progress": False, **options})


# -- budgets and counts, without a device ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), (" 2H 5s ", 7205), (75, 75),
     (0.5, 0.5)],
)  # fmt: skip
def test_a_budget_is_a_time(text, seconds):
    assert ladder.seconds_of(text) == seconds


@pytest.mark.parametrize(
    "bad", ["", "30", "m", "5d", "-3m", "0s", "30m1h", "1h 30", "nan", True, None, 0, -1, [60],
            math.inf, math.nan, "9" * 400 + "h"],
)  # fmt: skip
def test_what_is_no_time(bad):
    with pytest.raises(ValueError, match="'90s', '30m' or '1h30m'"):
        ladder.seconds_of(bad)


@pytest.mark.parametrize("seconds", [1, 59.2, 119, 600, 7140, 7200, 90_000])
def test_a_time_that_is_said_is_read_again_and_not_less(seconds):
    again = ladder.seconds_of(ladder.said(seconds))
    assert seconds <= again < seconds + max(1, 60 * (seconds >= 120))


def test_the_ladder_rises_from_tiny_to_full():
    found = ladder.rungs(seed=3)
    assert found[0].counts == SIZES["tiny"] and found[-1].counts == SIZES["full"]
    assert {s.seed for s in found} == {3} and {s.size for s in found} == {"budget"}
    for one, next_one in pairwise(found):
        for name, value in one.counts.items():
            other = next_one.counts[name]
            if isinstance(value, tuple):
                assert len(other) >= len(value)
            else:
                assert other <= value if name == "grid" else other >= value
    middle = found[ladder.BETWEEN]
    assert (middle.train, middle.test, middle.samples) == (64, 64, 32)


def test_lengths_of_answers():
    # 2 and 4 tokens, and two that were cut at 5: one of six tokens more ends in 16
    assert LENGTHS.survival(5) == [1, 1, 0.75, 0.75, 0.5]
    assert LENGTHS.mean(3) == 2.75
    goes_on = 1 - 2 / 16
    assert LENGTHS.survival(7)[5:] == pytest.approx([0.5 * goes_on, 0.5 * goes_on**2])
    assert LENGTHS.longest(5, 1) == LENGTHS.mean(5)
    assert LENGTHS.longest(5, 1000) == pytest.approx(5)
    assert Lengths((3, 3), 0, 128).mean(40) == 3


def test_answers_are_decoded_in_batches():
    one, two = (answers(SHAPE, n, 100, 5) for n in (64, 128))
    assert two["step"] == 2 * one["step"] and two["token"] == 2 * one["token"]
    assert one["token"] == 64 * LENGTHS.mean(5) and one["prefill"] == 100
    assert answers(SHAPE, 65, 100, 5)["step"] == one["step"] + LENGTHS.longest(5, 1)


def test_every_step_has_work_of_known_kinds():
    assert set(WORK) == set(STEPS)
    for size in SIZES:
        for name, work in WORK.items():
            found = work(SHAPE, Settings.of(size))
            assert {kind.removeprefix("frozen ") for kind in found} <= set(KINDS), name
            assert all(n >= 0 for n in found.values())
            assert bool(found) == (name not in ("prompts", "texts"))


def test_work_follows_the_settings_and_what_is_known():
    s = Settings.of("tiny")

    def work(name, shape=SHAPE, **counts):
        return WORK[name](shape, Settings.of_counts("x", {**s.counts, **counts}))

    assert work("ntp", epochs=3)["learn"] == pytest.approx(3 * work("ntp")["learn"])
    assert work("attribution", steps=8)["gradient"] == 2 * work("attribution")["gradient"]
    assert work("exact", patches=24)["patch"] == 2 * work("exact")["patch"]
    # one more run over the 24 prompts of validation for every coefficient
    more = work("strength", coefficients=(0.5, 0.8, 1.2, 1.5))["token"] - work("strength")["token"]
    assert more == pytest.approx(24 * LENGTHS.mean(s.new_tokens))
    known = Shape(**{**SHAPE.__dict__, "known": Known(9, 0, 1, {"harmful.steered": 0})})
    assert work("ntp", known)["learn"] == 0 and not work("exact", known)
    assert work("attribution_learned", known)["token"] == 0
    assert SHAPE.layer == 7 and known.layer == 9


def test_the_largest_counts_within_a_budget():
    seconds = lambda s: s.test + s.new_tokens
    stored, predicted = budget.choose(120.0, "x", ["screen"], 0, seconds)
    assert predicted == seconds(stored.settings(0)) <= 120
    larger = ladder.rungs()[[s.counts for s in ladder.rungs()].index(stored.counts) + 1]
    assert seconds(larger) > 120
    assert budget.choose(1e6, "x", [], 0, seconds)[0].counts == SIZES["full"]
    with pytest.raises(ValueError, match=r"budget of 51s is too small: .* takes 52s"):
        budget.choose(51.0, "x", [], 0, seconds)


def test_stored_counts(tmp_path):
    assert budget.load(tmp_path) is None
    stored = budget.Stored(1800.0, SIZES["small"], "model and prompts", ("prompts", "screen"))
    budget.save(tmp_path, stored)
    assert budget.load(tmp_path) == stored
    budget.check(stored, None, "model and prompts", ["prompts"], tmp_path)
    budget.check(stored, 1800.0, "model and prompts", ["prompts", "screen"], tmp_path)
    with pytest.raises(ValueError, match=r"chosen for a budget of 1800s, not 90s: .*remove"):
        budget.check(stored, 90.0, "model and prompts", [], tmp_path)
    with pytest.raises(ValueError, match=r"chosen for other steps \(table1 differ\)"):
        budget.check(stored, 1800.0, "model and prompts", ["prompts", "screen", "table1"], tmp_path)
    with pytest.raises(ValueError, match="another model or other prompts: give a size"):
        budget.check(stored, None, "others", [], tmp_path)
    path = tmp_path / budget.FILE
    path.write_text(path.read_text().replace("72", "73"))
    with pytest.raises(ValueError, match=r"is damaged .* remove it"):
        budget.load(tmp_path)


def test_items_of_unfinished_steps(tmp_path):
    s = Settings.of("tiny")
    assert unfinished.counted("screen", tmp_path, s, SHAPE) is None
    assert unfinished.counted("strength", tmp_path, s, SHAPE) == (0, 4)
    (tmp_path / "answers.jsonl").write_text("head\none\ntwo\nhalf a lin")
    assert unfinished.counted("strength", tmp_path, s, SHAPE) == (2, 4)
    (tmp_path / "answers.json").write_text('{"rows": {"none": 1, "QK": 2}}')
    assert unfinished.counted("table1", tmp_path, s, SHAPE) == (2, 9)
    (tmp_path / "harmful.steered.checkpoint.ab.jsonl").write_text("head\n" + 4 * "sample\n")
    (tmp_path / "harmful.steered.samples.json").write_text('{"index": [0, 1, 2, 4, 5]}')
    assert unfinished.counted("attribution", tmp_path, s, SHAPE) == (4, 23)
    (tmp_path / "checkpoint.ab.json").write_text('{"items": {"state": {"steps": 3}}}')
    trained = Shape(**{**SHAPE.__dict__, "known": Known(examples=40)})
    assert unfinished.counted("ntp", tmp_path, s, trained) == (3, 7)
    (tmp_path / "checkpoint.ab.json").write_text("{")
    assert unfinished.counted("ntp", tmp_path, s, trained) is None


def test_two_rates_explain_two_batches():
    wide, narrow = rates._decoded([_made(20), _made(31)]), rates._decoded([_made(11)])
    assert wide.tolist() == [30, 49] and narrow.tolist() == [10, 10]
    step, token = 0.5, 0.25
    found = rates._two_rates(wide, wide @ [step, token], narrow, narrow @ [step, token])
    assert found == pytest.approx((step, token))
    # noise that would need a negative rate: everything is counted by the other one
    assert rates._two_rates(wide, 3.0, narrow, 9.0) == (0.1, 0.0)
    assert rates._two_rates(wide, 4.9, narrow, 0.01) == (0.0, pytest.approx(0.1))


def _made(n):
    class Made:
        tokens = list(range(n))

    return Made()


def test_time_on_an_idle_machine():
    with IdleClock(software=True) as clock:
        sum(i * i for i in range(300_000))
    # the calling thread's own work is not divided by the cores
    assert clock.seconds == pytest.approx(clock.processor, rel=0.2)
    with IdleClock(software=False) as clock:
        pass
    assert 0 <= clock.processor < 0.1 and clock.seconds >= 0


# -- plans and budgets of a study ------------------------------------------------------------------


def test_a_plan_predicts_every_step(model, measured, tmp_path):
    study = run(model, tmp_path, only=None, size="tiny", plan_only=True)
    assert [p.name for p in study.planned] == list(STEPS) and len(measured) == 1
    plan = model._engine.plan()
    for p in study.planned:
        assert p.cost.memory >= plan["weights"] + plan["work"]
        assert (p.cost.seconds > 0) == (p.name not in ("prompts", "texts"))
        assert p.cost.processor == pytest.approx(2 * p.cost.seconds)
    text = study.plan()
    assert text._repr_markdown_() == text
    assert "| predicted time | device memory |" in text
    total = sum(p.cost.seconds for p in study.planned)
    assert f"| all | | | {ladder.said(total)} | " in text
    # a second plan, and one of other counts, measure nothing again
    again = run(model, tmp_path, only=None, size="tiny", plan_only=True)
    assert again.planned == study.planned
    more = run(model, tmp_path, only=None, size="full", plan_only=True)
    assert sum(p.cost.seconds for p in more.planned) > 5 * total and len(measured) == 1
    # other prompts do, and so does a damaged file
    kinds = [[f"{kind} {i}" for i in range(20)] for kind in ("steal", "water")]
    vs.study.run(model, *kinds, tmp_path, size="tiny", only=["prompts"], plan_only=True,
                 progress=False)  # fmt: skip
    (tmp_path / rates.FILE).write_text("{")
    run(model, tmp_path, size="tiny", plan_only=True)
    assert len(measured) == 3
    assert not list(tmp_path.glob("steps/*")) and not (tmp_path / "results.json").exists()


def test_a_run_without_plan_or_budget_measures_nothing(model, measured, tmp_path):
    assert run(model, tmp_path, size="tiny").planned[0].cost is None
    assert not measured and not (tmp_path / rates.FILE).exists()


def test_a_budget_is_chosen_once(model, measured, tmp_path):
    options = {"budget": "5m"}
    planned = run(model, tmp_path, only=None, plan_only=True, **options)
    assert planned.plan().startswith("budget 5m (predicted ")
    assert sum(p.cost.seconds for p in planned.planned) <= 300
    assert not (tmp_path / budget.FILE).exists()  # a plan chooses nothing for good
    everything = list(STEPS)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr(vs.study.running, "_run", lambda *a: None)
        run(model, tmp_path, only=everything, **options)
        counts = budget.load(tmp_path).counts
        assert counts["test"] > SIZES["tiny"]["test"]
        # resumed without a budget, and with the same
        for again in ({}, {"budget": 300, "only": everything}):
            study = run(model, tmp_path, **again)
            assert {n: study.results["settings"][n] for n in counts} == plain(counts)
            assert study.results["settings"]["size"] == "budget"
    with pytest.raises(ValueError, match="chosen for other steps"):
        run(model, tmp_path, budget=300)
    text = (tmp_path / "results.json").read_text()
    assert not [word for word in ("budget.json", "predicted", "seconds", "memory") if word in text]
    with pytest.raises(ValueError, match="chosen for a budget of 300s, not 600s"):
        run(model, tmp_path, budget="10m")
    assert run(model, tmp_path, size="tiny").results["settings"]["test"] == 12  # said explicitly
    assert len(measured) == 1


@pytest.mark.parametrize("n", [16, 20, 30])
def test_a_budget_with_short_lists(n, model, measured, tmp_path):
    """The largest counts that the lists can fill, though larger ones would fit the time."""
    lists = [[f"{kind} the box {i}" for i in range(n)] for kind in ("open", "break")]
    study = vs.study.run(
        model, *lists, tmp_path, budget="10h", plan_only=True, progress=False, only=["screen"]
    )
    counts = study.results["settings"]
    assert counts["train"] + counts["validation"] + counts["test"] >= n


def test_a_call_that_is_refused_leaves_no_counts(model, measured, tmp_path):
    lists = [[f"{kind} the box {i}" for i in range(30)] for kind in ("open", "break")]
    lists[0][7] = "open the box " * 160
    with pytest.raises(ValueError, match="the harmful prompt that begins with 'open the box open"):
        vs.study.run(model, *lists, tmp_path, budget="10h", progress=False, only=["screen"])
    assert not (tmp_path / budget.FILE).exists()


def plain(counts):
    return json.loads(json.dumps(counts))


def test_bad_budgets_before_any_work(model, measured, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="size='tiny' and budget='5m' both say how many"):
        run(model, tmp_path, size="tiny", budget="5m")
    with pytest.raises(ValueError, match="budget='soon': use a time above 0"):
        run(model, tmp_path, budget="soon")
    with pytest.raises(ValueError, match=r"a budget of 3s is too small: .* takes \d+s; give at"):
        run(model, tmp_path, only=None, budget="3s")
    assert not list(tmp_path.glob("steps/*")) and not (tmp_path / budget.FILE).exists()
    monkeypatch.setattr(vs.Model, "from_pretrained", lambda *a, **k: pytest.fail("loads"))
    command = ["study", "--model", "tiny-llama-chat", "--out", str(tmp_path)]
    assert cli.main([*command, "--size", "tiny", "--budget", "5m"]) == 2
    assert "both say how many samples" in capsys.readouterr().err
    assert cli.main([*command, "--budget", "5 parsecs"]) == 2
    assert "budget='5 parsecs': use a time" in capsys.readouterr().err


def test_the_command_prints_the_plan(measured, tmp_path, capsys):
    command = ["study", "--model", "tiny-llama-chat", "--out", str(tmp_path), "--plan"]
    assert cli.main([*command, "--budget", "2m", "--only", "screen"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("budget 2m (predicted ") and "| screen | " in out
    assert "vksteer: budget 2m" in err  # said before the first step, too


def test_partial_steps_are_counted(model, measured, tmp_path):
    first = run(model, tmp_path, size="tiny", only=["candidates"], plan_only=True)
    assert {p.reason for p in first.planned} == {"new", "waits for prompts"}
    done = run(model, tmp_path, size="tiny", only=["candidates"])
    settings = Settings(**{**done.results["settings"], **{
        n: tuple(SIZES["tiny"][n]) for n in ("coefficients", "shares", "taus")}})  # fmt: skip
    store = planning.StudyStore(tmp_path)
    found = planning.finished_steps(store, model, settings)
    key = STEPS["strength"].key(planning.identity(model), settings, found)
    folder = store.begin("strength", key, anew=False)
    (folder / "answers.jsonl").write_text("head\none\ntwo\nthree\n")
    planned = {p.name: p for p in run(
        model, tmp_path, size="tiny", only=["strength"], plan_only=True).planned}  # fmt: skip
    assert planned["strength"].reason == "partial 3 of 4" and planned["prompts"].cost is None
    (folder / "answers.jsonl").unlink()
    whole = {p.name: p for p in run(
        model, tmp_path, size="tiny", only=["strength"], plan_only=True).planned}  # fmt: skip
    assert planned["strength"].cost.seconds == pytest.approx(whole["strength"].cost.seconds / 4)


def test_measured_rates(model):
    data = planning.of_world(Settings.of("tiny"))
    found = rates.measure(model, data)
    assert set(found.seconds) == set(found.processor) == set(KINDS)
    # one of step and token may be 0 where noise says so, all else takes time
    assert all(v > 0 for k, v in found.seconds.items() if k not in ("step", "token"))
    assert found.seconds["step"] + found.seconds["token"] > 0
    assert 1 < found.frozen < 6 and 0.5 < found.nonzero <= 1 and 0 <= found.sharing <= 1
    assert not found.lengths.open and 20 < found.lengths.mean(128) < 45  # the answers end
    assert rates.Rates.from_dict(json.loads(json.dumps(found.to_dict()))) == found


#: Predicted and used processor time of a whole study may differ by this share. Measured with a
#: budget of 30 s on two loaded cores: tiny-llama-chat 54.3 s predicted, 53.6 s used;
#: tiny-gemma-chat 50.0 s and 49.4 s.
CLOSE = 0.15


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["tiny-llama-chat", "tiny-gemma-chat"])
@pytest.mark.parametrize("given", ["60s", "150s"])
def test_a_study_takes_what_was_predicted(name, given, tmp_path):
    with vs.Model.from_pretrained(name, progress=False) as model:
        study = run(model, tmp_path, only=None, budget=given)
    assert study.complete
    used = json.loads((tmp_path / "run.json").read_text())["steps"]
    predicted, taken = (
        sum(p.cost.processor for p in study.planned),
        sum(s["processor_seconds"] for s in used.values()),
    )
    lines = [
        f"{p.name}: predicted {p.cost.processor:.1f} s, {p.cost.memory / 1e6:.0f} MB; used"
        f" {used[p.name]['processor_seconds']:.1f} s, {used[p.name]['device_bytes'] / 1e6:.0f} MB"
        for p in study.planned
    ]
    print(*lines, f"predicted {predicted:.1f} s, used {taken:.1f} s", sep="\n")
    assert abs(taken / predicted - 1) <= CLOSE, "\n".join(lines)
