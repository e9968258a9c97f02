"""The model gate: `gate.py MODEL REPORT` decides by what `srsys run evaluate` measured.

Exits with status 1 if the challenger is refused, which is recorded in the registry. An accepted challenger becomes
champion when a person starts `srsys promote`.
"""

import sys
from pathlib import Path

from srsys.cli.common import read_settings
from srsys.evaluate.comparison import read_evidence
from srsys.registry.gating import gate
from srsys.registry.promotion import promote
from srsys.registry.store import list_versions


def judge(model: str, report: Path) -> int:
    "Write the decision on the challenger of a model to `report`, and return the exit status."
    settings = read_settings()
    store = settings.store()
    if not any("challenger" in version.aliases for version in list_versions(store, f"srsys-{model}")):
        report.write_text(f"srsys-{model} has no challenger: nothing to judge.\n")
        return 0
    evidence = settings.home / f"runs/{model}.evidence.json"
    decision = gate(*read_evidence(evidence))
    report.write_text(decision.markdown() + "\n")
    if not decision.accepted:
        promote(store, model, decision, [evidence])
    return 0 if decision.accepted else 1


if __name__ == "__main__":
    sys.exit(judge(sys.argv[1], Path(sys.argv[2])))
