"""Reading process tables: pure parsing, with names that try to mislead it."""

from __future__ import annotations

from services.stack.leftovers import parse_ps, parse_stat


def test_a_command_name_with_spaces_and_parentheses_does_not_shift_the_fields() -> None:
    """`/proc/PID/stat` is parsed from the last parenthesis on, whatever a process calls itself."""
    line = "77 (a) S (b c) S 1 70 69 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2"

    assert parse_stat(line) == ("S", 69, "987654")


def test_ps_lines_of_macos_give_group_start_and_environment() -> None:
    """Where there is no /proc, ps says the same things."""
    seen = parse_ps(
        "  501   500 Ss   Sun Nov 22 08:57:16 2026 python -m services.api WA_STACK_ID=abc HOME=/Users/a"
    )

    assert seen is not None
    assert (seen.pid, seen.session, seen.started) == (501, 500, "Sun Nov 22 08:57:16 2026")
    assert "WA_STACK_ID=abc" in seen.environment


def test_zombies_are_no_leftovers() -> None:
    """A process that has ended but was not collected by its parent cannot be killed any more."""
    assert parse_ps("501 500 Z Sun Nov 22 08:57:16 2026 (python)") is None
