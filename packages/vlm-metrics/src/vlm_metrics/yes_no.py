"""Yes or no, read out of an answer."""

from typing import Literal

from .vqa import strip_punctuation


def parse_yes_no(text: str) -> Literal["yes", "no"] | None:
    """Tell which of the words yes and no stands in an answer, in any case; None if both do, or neither.

    Punctuation is taken away as VQA's rule does.

    Source: `YOrN_Extraction` of VLMEvalKit e8e78f0, vlmeval/dataset/utils/yorn.py, which reads MME, HallusionBench and
    POPE with it; None counts as wrong there.
    """
    words = strip_punctuation(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"
