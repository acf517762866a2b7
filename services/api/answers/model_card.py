"""The model card of published averaged weights, and the config beside it: what a Hugging Face folder holds. Pure.

The card's front matter is what huggingface_hub reads: YAML, of which JSON is a part, so that no value needs more
care than JSON gives it. What users wrote appears in code alone. The card never hides that an average lost to raw.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.api.answers.provenance import PublishedAverage
    from wa_core.records import Comparison

_VERDICTS = {"averaged": "averaged wins", "raw": "raw wins", "tie": "tie: the interval has 0 in it"}
_SHOWN = 8
_USE = """```python
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))  # config.json says which model that is
model.eval()
```"""


def card(published: PublishedAverage) -> str:
    """The text of ``README.md``."""
    name, run_id = published.manifest.name, published.spec.run_id
    parts = [
        f"---\n{_front_matter(published)}\n---",
        f"# Averaged weights `{name}` of run `{run_id}`",
        "These are **averaged** weights: a weighted mean of checkpoints, not the last, raw iterate of training.",
        "## What was averaged",
        _averaged(published),
        "## Evaluation",
        _evaluation(published),
        "## Training",
        _training(published),
        "## Use",
        _USE,
        "## Provenance",
        _provenance(published),
    ]
    return "\n\n".join(parts) + "\n"


def config(published: PublishedAverage) -> dict[str, Any]:
    """The content of ``config.json``: what it takes to build the model that the weights are of."""
    request, manifest = published.spec.request, published.manifest
    return {
        "recipe": published.recipe,
        "package": request.package,
        "config": request.config,
        "seed": request.seed,
        "weights": "averaged",
        "run_id": published.spec.run_id,
        "average": manifest.name,
        "generation": manifest.generation,
        "rule": manifest.rule,
    }


def _front_matter(published: PublishedAverage) -> str:
    fields: dict[str, Any] = {
        "library_name": "pytorch",
        "tags": ["weight-averaging", published.manifest.rule.partition(":")[0], "averaged"],
    }
    if results := _results(published):
        index = {"name": f"{published.manifest.name}-{published.spec.run_id}", "results": results}
        fields["model-index"] = [index]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())


def _results(published: PublishedAverage) -> list[dict[str, Any]]:
    assessment = published.served.assessment
    if assessment.averaged is None:
        return []
    raw = assessment.raw.metrics if assessment.raw else {}
    metrics = [
        {"type": metric, "name": f"{metric} ({which})", "value": values[metric]}
        for metric in assessment.averaged.metrics
        for which, values in (("averaged", assessment.averaged.metrics), ("raw", raw))
        if metric in values
    ]
    data = {"type": "heldout", "name": f"held-out data of {published.recipe}"}
    return [{"task": {"type": "other", "name": "held-out evaluation"}, "dataset": data, "metrics": metrics}]


def _averaged(published: PublishedAverage) -> str:
    manifest, found = published.manifest, published.coefficients()
    lines = [
        f"- rule: `{manifest.rule}`, summed in {manifest.accumulator_dtype}",
        f"- checkpoints: {manifest.n_averaged}, of steps {manifest.first_step} to {manifest.last_step}",
        f"- coefficients: {_summary([(one.step, one.coefficient) for one in found])}; they sum to 1",
        f"- BatchNorm statistics: {_batchnorm(published)}",
    ]
    if manifest.rejected:
        lines.append(f"- {len(manifest.rejected)} checkpoints were rejected as unsound, and are not in it")
    if (rebuilt := manifest.rebuilt) is not None:
        lines.append(f"- rebuilt from what was kept, {rebuilt.profile_error:.2%} from its rule")
    return "\n".join(lines)


def _summary(found: list[tuple[int, float]]) -> str:
    said = [f"{part:.4g} (step {step})" for step, part in found]
    return ", ".join(said if len(said) <= _SHOWN else [*said[:2], "…", *said[-3:]])


def _batchnorm(published: PublishedAverage) -> str:
    found = published.served.assessment.batchnorm
    if found.status == "recalibrated":
        return f"recomputed for the average over {found.num_samples} samples ({found.num_layers} layers)"
    if found.status == "skipped":
        return "none in the model"
    return "pooled over the checkpoints, not recomputed" + (f" (`{found.code}`)" if found.code else "")


def _evaluation(published: PublishedAverage) -> str:
    assessment = published.served.assessment
    columns = [("raw, last checkpoint", assessment.raw), ("averaged", assessment.averaged)]
    rows = [(title, found.step, found.metrics) for title, found in columns if found is not None]
    if not rows:
        return "Not measured."
    names = list(rows[-1][2])
    head = ["weights", "through step", *map(_code, names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        f"| {title} | {step} | " + " | ".join(_number(metrics.get(name)) for name in names) + " |"
        for title, step, metrics in rows
    ]
    said = _compared(assessment.comparison) if assessment.comparison else "They were not compared."
    return "\n".join(lines) + f"\n\n{said}"


def _compared(found: Comparison) -> str:
    unit = "samples" if found.unit == "sample" else "batches"
    return (
        f"Averaged minus raw, {_code(found.metric)} on the same {found.num_samples} held-out {unit}: "
        f"{found.difference:+.4g}, "
        f"{found.confidence:.0%} interval [{found.low:+.4g}, {found.high:+.4g}]. **{_VERDICTS[found.won]}.**"
    )


def _training(published: PublishedAverage) -> str:
    request = published.spec.request
    recipe = f"`{published.recipe}`" if published.recipe else "the owner's own training loop"
    where = f", of package `{request.package}`" if request.package else ""
    settings = json.dumps(request.config, indent=2)
    how = f"seed {request.seed}; {request.scaling.num_workers} workers"
    return f"Recipe: {recipe}{where}; {how}.\n\n```json\n{settings}\n```"


def _provenance(published: PublishedAverage) -> str:
    manifest, sources = published.manifest, [one for one in published.coefficients() if one.sha256]
    lines = [
        f"- run `{manifest.run_id}`, average `{manifest.name}`, generation {manifest.generation}",
        f"- `model.safetensors`: sha256 `{published.sha256}`",
        f"- {len(sources)} sources; the file's own metadata names each by step, coefficient and sha256",
    ]
    lines += [f"  - step {one.step}: sha256 `{one.sha256}`" for one in sources[-_SHOWN:]]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _code(text: str) -> str:
    """A name that a user chose, without anything that would end a code span or a table's cell."""
    return "`" + re.sub(r"[`|\s]+", " ", text)[:100] + "`"
