import pytest

pytest.register_assert_rewrite("tests.celery_suite", "tests.celery_worker")
