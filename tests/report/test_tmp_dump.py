from pathlib import Path
from vlmcore.report import render_report


def test_dump(run):
    Path("/tmp/report.html").write_text(render_report(run.report()), encoding="utf-8")
