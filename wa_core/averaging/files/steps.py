"""Which step each checkpoint stands for, read from names or from what the checkpoints say of themselves. Pure.

It knows texts and numbers; no file. The invariant: every checkpoint gets a step of its own, or there is an error
that says what was ambiguous; an order is never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from wa_core.averaging.limits import MAX_STEP
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A bucket's own folder of one checkpoint, {attempt}-{step}-{nonce}: see wa_core.layout.
_BUCKET_FOLDER = re.compile(r"(?:^|/)\d{4}-(\d{12})-[0-9a-f]{16}/")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_NUMBER = re.compile(r"\d+")
_STEP_WORD = re.compile(
    r"(?:step|steps|iter|iters|iteration|update|updates|batch|ckpt|checkpoint)[\W_]*\Z", re.IGNORECASE
)
_SURE_WORD = re.compile(r"(?:step|steps|iter|iters|iteration)[\W_]*\Z", re.IGNORECASE)
_ADVICE = "rename them to step_100, step_200, … or give their steps (--steps 100,200,…), one for each in order"


def find_steps(names: Sequence[str], recorded: Sequence[int | None]) -> list[int]:
    """The step of every checkpoint, in the order given.

    A number after the word *step* (or *iter*, *checkpoint*, …) in the name counts first, then the one number in
    which otherwise equal names differ, then the steps recorded in the checkpoints, if all have one.

    Args:
        names: paths or URLs.
        recorded: the steps that the checkpoints say they are from, or None.

    Raises:
        InvalidInputError: no step can be told, two checkpoints have the same one, or names and records disagree
            on the order.
    """
    if len(names) == 1:
        named = _named_steps(names)
        return named or [recorded[0] or 0]
    steps = _named_steps(names) or _recorded_steps(recorded)
    if steps is None:
        raise InvalidInputError(
            f"the order of {len(names)} checkpoints cannot be told from their names ({_examples(names)}), and not "
            f"all of them record a step; {_ADVICE}",
            code="ambiguous_steps",
        )
    check_steps(names, steps)
    _check_order(names, steps, recorded)
    return steps


def check_steps(names: Sequence[str], steps: Sequence[int]) -> None:
    """Refuse steps that are not one for each name, or that repeat.

    Raises:
        InvalidInputError: `ambiguous_steps`.
    """
    if len(names) != len(steps):
        raise InvalidInputError(
            f"{len(steps)} steps were given for {len(names)} checkpoints; give one for each",
            code="ambiguous_steps",
        )
    twice, count = Counter(steps).most_common(1)[0]
    if count > 1:
        same = [name for name, step in zip(names, steps, strict=True) if step == twice]
        raise InvalidInputError(
            f"{count} checkpoints are of step {twice}: {_examples(same)}; a checkpoint counts once; {_ADVICE}",
            code="ambiguous_steps",
        )


def _named_steps(names: Sequence[str]) -> list[int] | None:
    texts = [_SHARD.sub("", name) for name in names]
    own = [_BUCKET_FOLDER.search(text) for text in texts]
    if all(own):
        return [int(found.group(1)) for found in own if found]
    for word in (_SURE_WORD, _STEP_WORD):
        if (found := _worded_steps(texts, word)) is not None:
            return found
    return _varying_number(texts)


def _worded_steps(texts: Sequence[str], word: re.Pattern[str]) -> list[int] | None:
    steps = []
    for text in texts:
        numbers = [match for match in _NUMBER.finditer(text) if word.search(text[: match.start()])]
        if not numbers:
            return None
        steps.append(_step(numbers[-1].group()))
    # A folder such as step-runs/ is in every name: it tells nothing.
    return steps if len(set(steps)) > 1 or len(steps) == 1 else None


def _varying_number(texts: Sequence[str]) -> list[int] | None:
    skeletons = {_NUMBER.sub("0", text) for text in texts}
    if len(skeletons) != 1:
        return None
    columns = list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
    varying = [column for column in columns if len({int(number) for number in column}) > 1]
    return [_step(number) for number in varying[0]] if len(varying) == 1 else None


def _recorded_steps(recorded: Sequence[int | None]) -> list[int] | None:
    known = [step for step in recorded if step is not None]
    return known if len(known) == len(recorded) else None


def _check_order(names: Sequence[str], steps: Sequence[int], recorded: Sequence[int | None]) -> None:
    if any(step is None for step in recorded) or len(set(recorded)) != len(recorded):
        return
    by_name = sorted(range(len(names)), key=lambda index: steps[index])
    by_record = sorted(range(len(names)), key=lambda index: recorded[index] or 0)
    if by_name != by_record:
        at = next(index for index in range(len(names)) if by_name[index] != by_record[index])
        one = by_name[at]
        raise InvalidInputError(
            f"names and records disagree on the order: {names[one]} is of step {steps[one]} by its name and of "
            f"step {recorded[one]} by its record; {_ADVICE}",
            code="ambiguous_steps",
        )


def _step(text: str) -> int:
    step = int(text) if len(text) <= len(str(MAX_STEP)) else MAX_STEP + 1
    if step > MAX_STEP:
        raise InvalidInputError(
            f"{text[:40]}… in a name is too large for a step; {_ADVICE}", code="ambiguous_steps"
        )
    return step


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, …" if len(names) > 3 else shown  # noqa: PLR2004  as many as fit a line
