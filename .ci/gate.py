"""The model gate: `gate.py MODEL REPORT` decides on what `srsys run evaluate` found, and exits 1 if the challenger is refused.

A refusal is recorded in the registry; an acceptance waits for `srsys promote`, which a person starts.
"""

import sys
from pathlib import Path

from srsys.cli.common import read_settings
from srsys.evaluate.comparison import read_evidence
from srsys.registry.gating import gate
from srsys.registry.promotion import promote
from srsys.registry.store import Store, list_versions


def judge(model: str, report: Path) -> int:
    settings = read_settings()
    store, file = Store(settings.home, settings.tracking_uri), settings.home / f"runs/{model}.evidence.json"
    if not any("challenger" in version.aliases for version in list_versions(store, f"srsys-{model}")):
        report.write_text(f"srsys-{model} has no challenger: nothing to judge.\n")
        return 0
    decision = gate(*read_evidence(file))
    report.write_text(decision.markdown() + "\n")
    if not decision.accepted:
        promote(store, model, decision, [file])
    return 0 if decision.accepted else 1


if __name__ == "__main__":
    sys.exit(judge(sys.argv[1], Path(sys.argv[2])))
