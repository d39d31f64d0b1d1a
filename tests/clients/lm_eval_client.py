"""lm-eval's `local-completions` with a real model: the tasks of `lm_eval/`, scored by the likelihood of each choice
and by generated text. `tests/lm_eval.rs` starts the server."""

import os
from pathlib import Path
from typing import Any

# Do not access the Hugging Face hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

from cases import run

TASKS = Path(__file__).parent / "lm_eval"


def evaluate(url: str, task: str, **settings: Any) -> dict[str, Any]:
    """Runs a task and returns its scores."""
    # The tasks' data files are relative to their folder.
    os.chdir(TASKS)
    evaluated = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "smollm2",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "remote",
            "max_retries": 1,
            **settings,
        },
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    return evaluated["results"][task]


def the_right_choice_scores_highest(url: str) -> None:
    for settings in [{}, {"batch_size": 4}, {"num_concurrent": 4}]:
        scores = evaluate(url, "capitals", **settings)
        assert scores["acc,none"] == 1.0, (settings, scores)


def the_right_answer_is_generated(url: str) -> None:
    scores = evaluate(url, "capitals_written")
    assert scores["exact_match,none"] == 1.0, scores


if __name__ == "__main__":
    raise SystemExit(run(the_right_choice_scores_highest, the_right_answer_is_generated))
