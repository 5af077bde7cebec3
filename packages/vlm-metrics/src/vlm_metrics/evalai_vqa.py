"""VQA accuracy with EvalAI's processing of answers, as TextVQA's evaluation has it.

Source: `EvalAIAnswerProcessor` and `TextVQAAccuracyEvaluator` of facebookresearch/mmf (pythia/tasks/processors.py),
which LLaVA (llava/eval/m4c_evaluator.py) and the harnesses took over.
"""

from collections.abc import Sequence

from .vqa import leave_one_out_accuracy, normalise_vqa


def normalise_evalai(text: str) -> str:
    """Lower case, drop commas and question marks, part `'s` from its word, then `normalise_vqa`."""
    return normalise_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def evalai_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one answer by EvalAI's rule, in [0, 1]: all strings are normalised, whether people agree or not.

    Raises:
        ValueError: fewer than four answers.
    """
    return leave_one_out_accuracy(normalise_evalai(prediction), [normalise_evalai(answer) for answer in answers])
