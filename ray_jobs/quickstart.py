"""The main job: images to zoo to generator to a report on classifiers nobody trained.

Zoo on Ray Data, training on Ray Train with DeepSpeed, evaluation on Ray Data. Run again with the
same name: what is there is kept, what is missing is made.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

from ray_jobs.build_zoo import build_zoo, ensure_generic
from ray_jobs.evaluate import evaluate
from ray_jobs.job import run_job, start_ray
from ray_jobs.train import check_ready, train_generator
from tina.configio import config_to_dict
from tina.report import print_report
from tina.run import Run


def on_its_gpus(run: Run) -> Run:
    """With no more ranks than the cluster has GPUs, if it has some: a workstation has one."""
    import ray

    gpus, cluster = int(ray.cluster_resources().get("GPU", 0)), run.config.cluster
    if not 0 < gpus < cluster.train_workers:
        return run
    print(f"note: cluster.train_workers is {gpus}, not {cluster.train_workers}: a rank has a GPU")
    return Run(replace(run.config, cluster=replace(cluster, train_workers=gpus)), run.base)


def work(run: Run) -> None:
    """The whole job."""
    begin = time.monotonic()
    if not run.checkpoint.exists():
        run.regressor()  # a wrong one must not be told of at the end
        start_ray()
        run = on_its_gpus(run)
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
