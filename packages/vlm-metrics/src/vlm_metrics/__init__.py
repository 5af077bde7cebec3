"""Scoring rules of vision-language benchmarks as pure functions."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import BinaryScore as BinaryScore
    from .answers import binary_f1 as binary_f1
    from .answers import exact_match as exact_match
    from .answers import normalise_answer as normalise_answer
    from .bootstrap import Estimate as Estimate
    from .bootstrap import bootstrap_interval as bootstrap_interval
    from .bootstrap import paired_bootstrap as paired_bootstrap
    from .boxes import box_iou as box_iou
    from .boxes import grounding_accuracy as grounding_accuracy
    from .choices import match_letter as match_letter
    from .choices import parse_choice as parse_choice
    from .cider import CiderScores as CiderScores
    from .cider import DocumentFrequencies as DocumentFrequencies
    from .cider import cider_d as cider_d
    from .cider import document_frequencies as document_frequencies
    from .circular import circular_accuracy as circular_accuracy
    from .circular import circular_question as circular_question
    from .circular import circular_rotations as circular_rotations
    from .evalai_vqa import evalai_vqa_accuracy as evalai_vqa_accuracy
    from .evalai_vqa import normalise_evalai as normalise_evalai
    from .hallusion import HallusionItem as HallusionItem
    from .hallusion import HallusionScores as HallusionScores
    from .hallusion import hallusion_scores as hallusion_scores
    from .intervals import PairedDifference as PairedDifference
    from .intervals import paired_difference as paired_difference
    from .intervals import wilson_interval as wilson_interval
    from .levenshtein import anls as anls
    from .levenshtein import edit_distance as edit_distance
    from .mme import MME_COGNITION as MME_COGNITION
    from .mme import MME_PERCEPTION as MME_PERCEPTION
    from .mme import MmeItem as MmeItem
    from .mme import MmeScores as MmeScores
    from .mme import MmeSubtask as MmeSubtask
    from .mme import mme_answer as mme_answer
    from .mme import mme_scores as mme_scores
    from .mmmu import mmmu_correct as mmmu_correct
    from .mmmu import mmmu_parse_choice as mmmu_parse_choice
    from .mmmu import mmmu_parse_open as mmmu_parse_open
    from .pope import PopeScores as PopeScores
    from .pope import pope_answer as pope_answer
    from .pope import pope_scores as pope_scores
    from .ptb import tokenise_caption as tokenise_caption
    from .refusals import REFUSAL_KEYWORDS as REFUSAL_KEYWORDS
    from .refusals import attack_success_rate as attack_success_rate
    from .refusals import is_refusal as is_refusal
    from .relaxed import relaxed_accuracy as relaxed_accuracy
    from .skills import skill_accuracies as skill_accuracies
    from .vlguard import is_vlguard_refusal as is_vlguard_refusal
    from .vlguard import vlguard_attack_success_rate as vlguard_attack_success_rate
    from .vqa import normalise_vqa as normalise_vqa
    from .vqa import vqa_accuracy as vqa_accuracy
    from .yes_no import parse_yes_no as parse_yes_no

__all__ = [
    "MME_COGNITION",
    "MME_PERCEPTION",
    "REFUSAL_KEYWORDS",
    "BinaryScore",
    "CiderScores",
    "DocumentFrequencies",
    "Estimate",
    "HallusionItem",
    "HallusionScores",
    "MmeItem",
    "MmeScores",
    "MmeSubtask",
    "PairedDifference",
    "PopeScores",
    "anls",
    "attack_success_rate",
    "binary_f1",
    "bootstrap_interval",
    "box_iou",
    "cider_d",
    "circular_accuracy",
    "circular_question",
    "circular_rotations",
    "document_frequencies",
    "edit_distance",
    "evalai_vqa_accuracy",
    "exact_match",
    "grounding_accuracy",
    "hallusion_scores",
    "is_refusal",
    "is_vlguard_refusal",
    "match_letter",
    "mme_answer",
    "mme_scores",
    "mmmu_correct",
    "mmmu_parse_choice",
    "mmmu_parse_open",
    "normalise_answer",
    "normalise_evalai",
    "normalise_vqa",
    "paired_bootstrap",
    "paired_difference",
    "parse_choice",
    "parse_yes_no",
    "pope_answer",
    "pope_scores",
    "relaxed_accuracy",
    "skill_accuracies",
    "tokenise_caption",
    "vlguard_attack_success_rate",
    "vqa_accuracy",
    "wilson_interval",
]
_HOMES = {
    "anls": "levenshtein",
    "edit_distance": "levenshtein",
    "BinaryScore": "answers",
    "binary_f1": "answers",
    "exact_match": "answers",
    "normalise_answer": "answers",
    "Estimate": "bootstrap",
    "bootstrap_interval": "bootstrap",
    "paired_bootstrap": "bootstrap",
    "box_iou": "boxes",
    "grounding_accuracy": "boxes",
    "match_letter": "choices",
    "parse_choice": "choices",
    "CiderScores": "cider",
    "DocumentFrequencies": "cider",
    "cider_d": "cider",
    "document_frequencies": "cider",
    "circular_accuracy": "circular",
    "circular_question": "circular",
    "circular_rotations": "circular",
    "evalai_vqa_accuracy": "evalai_vqa",
    "normalise_evalai": "evalai_vqa",
    "HallusionItem": "hallusion",
    "HallusionScores": "hallusion",
    "hallusion_scores": "hallusion",
    "PairedDifference": "intervals",
    "paired_difference": "intervals",
    "wilson_interval": "intervals",
    "MME_COGNITION": "mme",
    "MME_PERCEPTION": "mme",
    "MmeItem": "mme",
    "MmeScores": "mme",
    "MmeSubtask": "mme",
    "mme_answer": "mme",
    "mme_scores": "mme",
    "mmmu_correct": "mmmu",
    "mmmu_parse_choice": "mmmu",
    "mmmu_parse_open": "mmmu",
    "PopeScores": "pope",
    "pope_answer": "pope",
    "pope_scores": "pope",
    "tokenise_caption": "ptb",
    "REFUSAL_KEYWORDS": "refusals",
    "attack_success_rate": "refusals",
    "is_refusal": "refusals",
    "relaxed_accuracy": "relaxed",
    "skill_accuracies": "skills",
    "is_vlguard_refusal": "vlguard",
    "vlguard_attack_success_rate": "vlguard",
    "normalise_vqa": "vqa",
    "vqa_accuracy": "vqa",
    "parse_yes_no": "yes_no",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
