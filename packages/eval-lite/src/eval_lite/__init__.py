"""Questions with known answers put to a model, and figures with intervals: tasks, batched answers, scores."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import NEAR_TIE as NEAR_TIE
    from .answers import Answer as Answer
    from .answers import NearTie as NearTie
    from .answers import behind_prompt as behind_prompt
    from .answers import likeliest as likeliest
    from .answers import say as say
    from .answers import sequence_nats as sequence_nats
    from .asking import Asking as Asking
    from .asking import read_answers as read_answers
    from .demonstrations import Demonstrations as Demonstrations
    from .demonstrations import RandomDemonstrations as RandomDemonstrations
    from .demonstrations import SimilarDemonstrations as SimilarDemonstrations
    from .measures import Figure as Figure
    from .measures import Measure as Measure
    from .measures import f1_of as f1_of
    from .measures import mean_of as mean_of
    from .measures import mean_of_groups as mean_of_groups
    from .measures import sum_of_groups as sum_of_groups
    from .prediction import EvalItem as EvalItem
    from .prediction import Prediction as Prediction
    from .prediction import encode_prompts as encode_prompts
    from .prediction import predict as predict
    from .prediction import write_predictions as write_predictions
    from .scores import GroupScore as GroupScore
    from .scores import macro_accuracy as macro_accuracy
    from .scores import score_groups as score_groups
    from .tasks import TASKS as TASKS
    from .tasks import WORLD_TASKS as WORLD_TASKS
    from .tasks import check_task as check_task
    from .tasks import load_task as load_task
    from .tasks.files import TaskFileError as TaskFileError
    from .tasks.task import Asked as Asked
    from .tasks.task import Task as Task
    from .tasks.world import exam_items as exam_items
    from .wording import Wording as Wording
    from .wording import put as put
    from .wording import with_answer as with_answer

__all__ = [
    "NEAR_TIE",
    "TASKS",
    "WORLD_TASKS",
    "Answer",
    "Asked",
    "Asking",
    "Demonstrations",
    "EvalItem",
    "Figure",
    "GroupScore",
    "Measure",
    "NearTie",
    "Prediction",
    "RandomDemonstrations",
    "SimilarDemonstrations",
    "Task",
    "TaskFileError",
    "Wording",
    "behind_prompt",
    "check_task",
    "encode_prompts",
    "exam_items",
    "f1_of",
    "likeliest",
    "load_task",
    "macro_accuracy",
    "mean_of",
    "mean_of_groups",
    "predict",
    "put",
    "read_answers",
    "say",
    "score_groups",
    "sequence_nats",
    "sum_of_groups",
    "with_answer",
    "write_predictions",
]
_HOMES = {
    "Answer": "answers",
    "NEAR_TIE": "answers",
    "NearTie": "answers",
    "behind_prompt": "answers",
    "likeliest": "answers",
    "say": "answers",
    "sequence_nats": "answers",
    "Asking": "asking",
    "read_answers": "asking",
    "Demonstrations": "demonstrations",
    "RandomDemonstrations": "demonstrations",
    "SimilarDemonstrations": "demonstrations",
    "Figure": "measures",
    "Measure": "measures",
    "f1_of": "measures",
    "mean_of": "measures",
    "mean_of_groups": "measures",
    "sum_of_groups": "measures",
    "EvalItem": "prediction",
    "Prediction": "prediction",
    "encode_prompts": "prediction",
    "predict": "prediction",
    "write_predictions": "prediction",
    "GroupScore": "scores",
    "macro_accuracy": "scores",
    "score_groups": "scores",
    "TASKS": "tasks",
    "WORLD_TASKS": "tasks",
    "check_task": "tasks",
    "load_task": "tasks",
    "TaskFileError": "tasks.files",
    "Asked": "tasks.task",
    "Task": "tasks.task",
    "exam_items": "tasks.world",
    "Wording": "wording",
    "put": "wording",
    "with_answer": "wording",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
