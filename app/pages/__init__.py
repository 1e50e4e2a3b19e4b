"""The pages: what a person sees, rendered on the server from the database.

Each module is a page with its fragments; `install_pages` puts them under the application after the live streams, whose
addresses (/jobs/live) would else be taken for a job's.
"""

from fastapi import FastAPI

from app.pages import datasets, hosts, job, jobs, knobs, new_job, settings
from app.services import Services


def install_pages(app: FastAPI, services: Services) -> None:
    # /jobs/new stands before /jobs/{job_id}.
    for page in (jobs, new_job, job, datasets, hosts, settings, knobs):
        app.include_router(page.router)
    app.state.fragments = job.LiveFragments(services)
