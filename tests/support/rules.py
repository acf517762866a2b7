"""Rules of every kind, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from wa_core.averaging.rules import (
    EmaRule,
    PowerEmaRule,
    SwaRule,
)

LERP_RULES = st.one_of(
    st.builds(SwaRule),
    st.builds(EmaRule, half_life_steps=st.floats(1e-300, 1e18), init=st.sampled_from(["debias", "first"])),
    st.builds(EmaRule, half_life_steps=st.floats(1e-300, 1e18), rampup=st.floats(1e-9, 1000)),
    st.builds(EmaRule, decay=st.floats(0, 1, exclude_max=True), init=st.sampled_from(["debias", "first"])),
    st.builds(
        EmaRule,
        decay=st.floats(0, 1, exclude_max=True),
        warmup=st.integers(2, 10**6),
        init=st.sampled_from(["debias", "first"]),
    ),
    st.builds(PowerEmaRule, sigma_rel=st.floats(1e-9, 12**-0.5)),
)
