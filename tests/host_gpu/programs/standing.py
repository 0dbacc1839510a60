"""Does the standing list of GPU figures run from end to end? Its rehearsal, on tiny shapes.

    standing.py [ARGUMENTS OF benchmarks.gpu]

Nothing is checked, since kernels compute nothing. cuDNN is left out (`project`), so the rows of its attention
are refused; any other row has to be timed. The answer has the rows that were not.
"""

from __future__ import annotations

import sys

import fake_cuda

fake_cuda.settings(FAKE_ARCH=90)

import project

from benchmarks import gpu


def main():
    project.patch_out()
    rows = gpu.main(["--rehearse", "--no-check", *sys.argv[1:]])
    timed = [row for row in rows if row["median_us"] != ""]
    left = [row for row in rows if row["median_us"] == "" and row["what"] != "ceiling"]
    columns = ("what", "case", "format", "variant", "note")
    project.answer(
        timed=len(timed),
        kinds=sorted({row["what"] for row in timed}),
        graphs=sorted(
            row["variant"]
            for row in timed
            if row["what"] == "parts" and row["how"] == "graph" and "efficient" not in row["variant"]
        ),
        unchecked=all(row["note"].startswith("not checked") for row in timed),
        left=[{name: row[name] for name in columns} for row in left],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
