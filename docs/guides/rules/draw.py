"""Draws the pictures of these pages from the rules themselves: ``python docs/guides/rules/draw.py``.

Every picture is one or more panels; a panel shows one rule's coefficients, a bar per checkpoint. A test draws them
again and compares, so the pictures cannot fall behind the code.
"""
# ruff: noqa: INP001 - a script beside the pages that it draws for

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from wa_core.averaging.posthoc import Kept, plan_rebuild
from wa_core.averaging.rules import parse_rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
EVERY = list(range(20, 1220, 20))
IRREGULAR = [20, 60, 100, 120, 200, 240, 260, 300, 420, 460, 480, 500, 640, 760, 800, 840, 1000, 1040, 1120, 1200]

Panel = tuple[str, "Mapping[int, float]"]
_WIDTH, _PANEL, _PLOT, _LEFT = 720, 96, 56, 60
_STYLE = (
    "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#768390}"
    ".bar{fill:#3f7fbf}.minus{fill:#d2691e}.axis{stroke:#768390;stroke-width:1}"
)


def pictures() -> dict[str, str]:
    """File name -> SVG text, for every picture."""
    return {
        "swa.svg": _draw(_rules(["swa", "swa:start_step=600"])),
        "ema.svg": _draw(_rules(["ema:half_life=100", "ema:half_life=400", "ema:half_life=400,init=first"])),
        "ema-warmup.svg": _draw(
            _rules(["ema:half_life=400", "ema:half_life=400,rampup=0.1"], steps=EVERY[:30])
            + _rules(["ema:decay=0.98", "ema:decay=0.98,warmup=10"], steps=EVERY[:30])
        ),
        "ema-interval.svg": _draw(_rules(["ema:half_life=200", "ema:decay=0.9"], steps=IRREGULAR)),
        "power.svg": _draw(_rules(["power:sigma_rel=0.05", "power:sigma_rel=0.1", "power:sigma_rel=0.2"])),
        "power-grows.svg": _draw(
            [
                (f"power:sigma_rel=0.1 at step {steps[-1]}", parse_rule("power:sigma_rel=0.1").coefficients(steps))
                for steps in (EVERY[:15], EVERY[:30], EVERY)
            ]
        ),
        "window.svg": _draw(
            _rules(
                [
                    "window:last=20",
                    *(f"window:last=20,shape={shape}" for shape in ("linear", "minus_sqrt", "cosine")),
                ]
            )
        ),
        "window-irregular.svg": _draw(_rules(["window:last=15", "window:last=15,shape=linear"], steps=IRREGULAR)),
        "rebuild.svg": _draw(_rebuilt()),
    }


def _rules(spellings: Sequence[str], *, steps: Sequence[int] = EVERY) -> list[Panel]:
    return [
        (spelling, dict.fromkeys(steps, 0.0) | parse_rule(spelling).coefficients(steps)) for spelling in spellings
    ]


def _rebuilt() -> list[Panel]:
    kept = [
        Kept(f"{spelling} at step {EVERY[end - 1]}", parse_rule(spelling).coefficients(EVERY[:end]))
        for spelling in ("power:sigma_rel=0.05", "power:sigma_rel=0.1")
        for end in range(10, len(EVERY) + 1, 10)
    ]
    wanted = parse_rule("power:sigma_rel=0.125").coefficients(EVERY)
    plan = plan_rebuild(kept, wanted)
    title = f"rebuilt from 12 snapshots: error {plan.profile_error:.1%}, noise gain {plan.noise_gain:.1f}"
    return [("wanted: power:sigma_rel=0.125", wanted), (title, plan.coefficients)]


def _draw(panels: Sequence[Panel]) -> str:
    """One panel under the other, each with its own scale."""
    height = _PANEL * len(panels)
    about = escape("; ".join(title for title, _ in panels))
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{about}</title>']
    parts.append(f"<style>{_STYLE}</style>")
    for number, (title, coefficients) in enumerate(panels):
        parts.append(f'<g transform="translate(0 {number * _PANEL})">{_panel(title, coefficients)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, coefficients: Mapping[int, float]) -> str:
    last, largest = max(coefficients), max(abs(value) for value in coefficients.values())
    floor, scale = 20 + _PLOT, (_WIDTH - _LEFT - 20) / last
    bars = "".join(
        f'<rect class="{"bar" if value > 0 else "minus"}" x="{_LEFT + step * scale - 3:.1f}" '
        f'y="{floor - _PLOT * abs(value) / largest:.1f}" width="6" height="{_PLOT * abs(value) / largest:.1f}"/>'
        for step, value in coefficients.items()
        if abs(value) > largest / 1000
    )
    return (
        f'<text x="{_LEFT}" y="13">{escape(title)}</text><text x="4" y="{floor - _PLOT + 12}">{largest:.3f}</text>'
        f'{bars}<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 8}" y2="{floor}"/>'
        f'<text x="{_LEFT}" y="{floor + 13}">step 0</text>'
        f'<text x="{_WIDTH - 8}" y="{floor + 13}" text-anchor="end">{last}</text>'
    )


if __name__ == "__main__":
    for name, svg in pictures().items():
        (HERE / name).write_text(svg, encoding="utf-8")
