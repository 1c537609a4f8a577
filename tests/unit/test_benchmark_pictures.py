"""Pictures that READMEs show, and the comparisons in their tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from components.foundation.errors import SettingsError
from components.foundation.results import Estimate, Evaluation
from components.foundation.settings import resolve_settings
from tests.benchmarks.fixed_nu_policies import Compared
from tests.benchmarks.pictures import Axis, Dot, tradeoff
from tests.benchmarks.results import check_settings, claim, picture, run_uri_of, table

_SVG = "{http://www.w3.org/2000/svg}"


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{_SVG}text")]


def test_dots_that_lie_together_share_a_label() -> None:
    dots = [Dot("nu 5", 1.0, 1.0, False), Dot("nu 10", 1.001, 1.0, False), Dot("multiplier", 3.0, 4.0, True)]
    svg = tradeoff("policies", dots, Axis("cost"), Axis("reward"))
    assert {"nu 5, 10", "multiplier", "cost", "reward"} <= set(words(svg))
    assert len(ElementTree.fromstring(svg).findall(f"{_SVG}circle")) == len(dots)


@pytest.mark.parametrize("together", [False, True])
def test_a_label_stands_clear_of_the_axis(together: bool) -> None:
    """A dot on the lowest line has its label above it, any other one below."""
    low = [Dot("nu 100", 20.0, 35.0, False), *([Dot("nu 50", 20.1, 35.0, False)] if together else [])]
    svg = tradeoff("policies", [*low, Dot("nu 1", 40.0, 60.0, False)], Axis("cost", (0.0, 80.0)), Axis("reward"))
    drawn = ElementTree.fromstring(svg)
    labels = {element.text: float(element.attrib["y"]) for element in drawn.iter(f"{_SVG}text")}
    dots = [float(element.attrib["cy"]) for element in drawn.iter(f"{_SVG}circle")]
    assert labels["nu 100, 50" if together else "nu 100"] < max(dots) < labels["20"]
    assert labels["nu 1"] > min(dots)


def test_a_run_is_drawn_with_every_step_and_every_policy() -> None:
    rates = {"unsafe_rate": 0.7, "unsafe_rate_ci": [0.6, 0.8]}
    trace = {"lambda": [3.0, 3.2], "cost": [-1.0, -1.5], "reward": [0.1, 0.4], "threshold": -1.2}
    rounds = [{"round": number, "eval": rates, "ppo": trace} for number in (1, 2)]
    svg = picture({"seed": 4, "sft": {"eval": rates}, "rounds": rounds})
    charts = ElementTree.fromstring(svg).findall(f"{_SVG}svg")
    assert [len(chart.findall(f"{_SVG}circle")) for chart in charts] == [4, 4, 4, 3]
    assert words(svg).count("round 2") == 4  # of three charts over the steps, and of the policies
    assert "seed 4" in ElementTree.fromstring(svg).attrib["aria-label"]


def summary_of(
    seed: int, unsafe: list[float], wins: list[float], refusals: list[float], decision: str
) -> dict[str, Any]:
    """The SFT model's rates come first."""
    evaluations = [
        {
            "unsafe_rate": u,
            "unsafe_rate_ci": [u - 0.04, u + 0.04],
            "win_rate": w,
            "win_rate_ci": [w - 0.05, w + 0.05],
            "over_refusal_rate": r,
        }
        for u, w, r in zip(unsafe, [0.5, *wins], refusals, strict=True)
    ]
    sft, *rounds = evaluations
    entries = [{"round": number, "eval": e} for number, e in enumerate(rounds, start=1)]
    return {"seed": seed, "sft": {"eval": sft}, "rounds": entries, "promotion": {"decision": decision}}


def test_the_results_table_has_a_row_a_seed_and_their_means() -> None:
    first = summary_of(0, [0.8, 0.3, 0.1], [0.45, 0.5], [0.05, 0.2, 0.1], "promote")
    second = summary_of(7, [0.9, 0.2, 0.15], [0.55, 0.48], [0.15, 0.3, 0.2], "hold")
    assert table([first]).splitlines()[2:] == [
        "| 0 | 80.0 → 30.0 → **10.0** (6.0 to 14.0) | 8.0 | 45.0 → **50.0** (45.0 to 55.0) "
        "| 5.0 → 20.0 → **10.0** | promote |"
    ]
    assert table([first, second]).splitlines()[2:] == [
        *table([first]).splitlines()[2:],
        *table([second]).splitlines()[2:],
        "| mean | 85.0 → 25.0 → **12.5** (10.0 to 15.0) | 6.8 | 50.0 → **49.0** (48.0 to 50.0) "
        "| 10.0 → 25.0 → **15.0** | promote: 1 of 2 |",
    ]


def test_the_claim_is_of_the_means_over_all_seeds() -> None:
    first = summary_of(0, [0.8, 0.3, 0.1], [0.45, 0.5], [0.05, 0.2, 0.1], "promote")
    second = summary_of(7, [0.9, 0.2, 0.15], [0.55, 0.48], [0.15, 0.3, 0.2], "hold")
    assert claim([first, second]) == (
        "The last policy of 2 seeds is 6.8 times safer than its SFT model (85.0% and 12.5% unsafe), wins 49.0% of "
        "benign prompts, and refuses 15.0% of lookalikes (the SFT model: 10.0%)."
    )
    assert "of seed 0 is 8.0 times safer" in claim([first])
    assert "is never unsafe" in claim([summary_of(0, [0.8, 0.0], [0.5], [0.1, 0.1], "promote")])


@pytest.mark.parametrize(
    ("unsafe", "wins", "dominated"), [(0.2, 0.6, True), (0.2, 0.4, False), (0.4, 0.6, False), (0.3, 0.6, False)]
)
def test_a_policy_is_dominated_by_a_safer_and_more_helpful_one(unsafe: float, wins: float, dominated: bool) -> None:
    def evaluation(unsafe_rate: float, win_rate: float) -> Evaluation:
        rate = Estimate(0.0, 0.0, 0.0, 100)
        return Evaluation(
            1, replace(rate, value=unsafe_rate), {}, replace(rate, value=win_rate), rate, 100, 100, "digest"
        )

    policy, other = Compared(2.0, evaluation(0.3, 0.5)), Compared(None, evaluation(unsafe, wins))
    assert policy.is_dominated_by(other) is dominated


def test_a_table_of_seeds_takes_only_runs_with_the_profile_s_present_settings() -> None:
    """A setting that came later was as it is by default, unless the profile has it otherwise now."""
    there = resolve_settings("smol", 3).flat()
    del there["ppo.value_clip"]
    check_settings(Path("runs/seed-3"), {"profile": "smol", "seed": 3, "settings": there})
    del there["ppo.lagrangian"]
    there["ppo.lambda_init"] = "1.5"
    with pytest.raises(SettingsError) as error:
        check_settings(Path("runs/seed-3"), {"profile": "smol", "seed": 3, "settings": there})
    message = str(error.value)
    assert "runs/seed-3 holds a run with other settings than profile smol has today" in message
    assert "ppo.lambda_init (1.5 there, " in message and "ppo.lagrangian (dual_ascent there, pid here)" in message
    assert "ppo.value_clip" not in message


def test_a_branch_lies_beside_the_run_whose_rounds_it_took_over() -> None:
    rounds = [{"policy_uri": f"s3://b/p/runs/{run}/round-1/ppo_lagrangian/step-2"} for run in ("earlier", "branch")]
    assert run_uri_of({"run_id": "branch", "rounds": rounds}) == "s3://b/p/runs/branch"
    assert run_uri_of({"run_id": "branch", "rounds": rounds[:1]}) == "s3://b/p/runs/branch"
