"""Summary for the merge request, as Markdown: `report.py junit.xml coverage.xml gate.md` prints what the jobs found."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def tests(root: ET.Element) -> list[str]:
    "How many tests passed, and the names of those that failed."
    cases = list(root.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    seconds = sum(float(case.get("time", 0)) for case in cases)
    counts = f"**{passed} passed, {len(failed)} failed, {len(skipped)} skipped** in {seconds:.0f} s."
    return [counts, *(f"- `{case.get('classname')}::{case.get('name')}`" for case in failed)]


def coverage(root: ET.Element) -> list[str]:
    "The shares of lines and branches that ran."
    return [f"Lines covered: {float(root.get('line-rate')):.1%}, branches: {float(root.get('branch-rate')):.1%}."]


def report(paths: list[Path]) -> str:
    "One section for each file; a missing file is named."
    sections = []
    for path in paths:
        if not path.exists():
            sections.append([f"`{path.name}` is missing: the job that writes it failed earlier or did not run."])
        elif path.suffix == ".xml":
            root = ET.parse(path).getroot()
            sections.append(coverage(root) if root.tag == "coverage" else tests(root))
        else:
            sections.append([path.read_text().strip()])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


if __name__ == "__main__":
    print(report([Path(name) for name in sys.argv[1:]]), end="")
