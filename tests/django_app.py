"""A Django project whose Celery workers store with ``result_backend = "django-db"``; run it to make its tables.

It is configured by the environment: ``AIORESULT_TEST_CELERY_BROKER`` is a URL, ``AIORESULT_TEST_DJANGO`` that of the
database.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import django
from celery import Celery
from celery.result import GroupResult
from django.conf import settings
from django.core.management import call_command

from .celery_app import CardDeclined

database = urlsplit(os.environ["AIORESULT_TEST_DJANGO"])
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": database.path.strip("/"),
            "USER": database.username,
            "HOST": database.hostname,
            "PORT": database.port,
        }
    },
    INSTALLED_APPS=["django_celery_results"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    TIME_ZONE="America/New_York",
    USE_TZ=True,
)
django.setup()

app = Celery("tests", broker=os.environ.get("AIORESULT_TEST_CELERY_BROKER"), backend="django-db")
app.conf.update(result_extended=True, task_track_started=True)


def task(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Celery's own decorator, which has no annotations."""
    decorate: Callable[[Callable[..., Any]], Any] = app.task(name=name, **options)
    return decorate


@task("django.add", bind=True)
def add(self: Any, x: int, y: int) -> int:
    self.add_trail(self.app.AsyncResult("a child"))
    return x + y


@task("django.fail")
def fail() -> None:
    raise CardDeclined("4242", 17)


@task("django.save")
def save(group_id: str, *task_ids: str) -> None:
    GroupResult(group_id, [app.AsyncResult(task_id) for task_id in task_ids]).save()


if __name__ == "__main__":
    call_command("migrate", verbosity=0)
