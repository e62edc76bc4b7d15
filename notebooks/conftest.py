"""How nbval compares these notebooks: one thread, no progress bars, and a run that compared nothing fails."""

import os
from collections import Counter

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels inherit it; more threads add in another order
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

NEVER_COMPARED = ("text/html", "text/latex", "stderr", "image/svg+xml")
compared = Counter()  # notebook -> cells whose text was compared in this run


def pytest_collectstart(collector):
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare += NEVER_COMPARED


def has_text(output, skipped):
    """True when an output has text that nbval looks at."""
    if output.get("output_type") == "stream":
        return output.get("name") not in skipped and bool("".join(output["text"]).strip())
    return bool("".join(output.get("data", {}).get("text/plain", "")).strip())


def pytest_collection_modifyitems(items):
    from run_notebooks import is_progress_bar

    items.sort(key=lambda item: str(item.path) if item.path.suffix == ".ipynb" else "")
    for item in items:
        if type(item).__name__ != "IPyNbCell":
            continue

        def compare(test, ref, skip_compare=None, item=item, original=item.compare_outputs):
            # the saved notebooks hold no bars; a bar in the run is no difference
            same = original([output for output in test if not is_progress_bar(output)], ref, skip_compare)
            compared[item.path.name] += any(has_text(output, item.parent.skip_compare) for output in ref)
            return same

        item.compare_outputs = compare


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    wanted = session.config.getoption("nbval", False) or session.config.getoption("nbval_lax", False)
    if wanted and not session.config.option.collectonly and not sum(compared.values()):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED if exitstatus == 5 else pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if not (config.getoption("nbval", False) or config.getoption("nbval_lax", False)):
        return
    for name, cells in sorted(compared.items()):
        terminalreporter.write_line(f"nbval compared the text of {cells} cells of {name}")
    if not sum(compared.values()):
        terminalreporter.write_line("nbval compared nothing: are the notebooks saved with their outputs?", red=True)
