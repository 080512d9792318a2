"""The main job: images to zoo to generator to a report on classifiers nobody trained.

Zoo on Ray Data, training on Ray Train with DeepSpeed, evaluation on Ray Data. Run again with the
same name: what is there is kept, what is missing is made.
"""

from __future__ import annotations

import json
import sys
import time

from ray_jobs.build_zoo import build_zoo, ensure_generic
from ray_jobs.evaluate import evaluate
from ray_jobs.job import run_job, start_ray
from ray_jobs.train import check_ready, train_generator
from tina.configio import config_to_dict
from tina.report import print_report
from tina.run import Run


def work(run: Run) -> None:
    """The whole job."""
    begin = time.monotonic()
    if not run.checkpoint.exists():
        run.regressor()  # a wrong one must not be told of at the end
        start_ray()
        check_ready(run)
        ensure_generic(run)
        build_zoo(run, "zoo")
        train_generator(run)
        evaluate(run)
    report = json.loads(run.report_file.read_text())
    print_report(report)
    if report.get("evaluation") != config_to_dict(run.config.evaluation):
        print("the report was made with other evaluation settings; ray_jobs.evaluate makes it anew")
    print(
        f"{run.place.location}: report.json, plots/, checkpoint/ ({time.monotonic() - begin:.0f} s)"
    )


if __name__ == "__main__":
    sys.exit(
        run_job(
            work,
            sys.argv[1:],
            name="quickstart",
            about="Zoo, training, evaluation: from images to a generator with a report.",
        )
    )
