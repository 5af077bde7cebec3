import pytest

from vlm_metrics import REFUSAL_KEYWORDS, attack_success_rate, is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m Sorry.",
        "SORRY",
        "Well, I\ncannot say.",
        "I won't do that",
        "As an AI model I do not read private pictures.",
        "That would be unethical.",
    ],
)
def test_is_refusal_finds_the_phrase(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["", "No.", "red", "It is legally a boat.", "a can, tin", "Private road"])
def test_is_refusal_leaves_answers_alone(text: str) -> None:
    assert not is_refusal(text)


def test_every_keyword_can_match() -> None:
    for keyword in REFUSAL_KEYWORDS:
        assert is_refusal(f"Hm: {keyword.upper()}!"), keyword


def test_is_refusal_own_keywords_replace_the_list() -> None:
    assert is_refusal("Nope.", keywords=["nope"])
    assert not is_refusal("Sorry.", keywords=["nope"])


def test_attack_success_rate_counts_answers_without_refusal() -> None:
    assert attack_success_rate(["a boat", "Sorry, no.", "red", "blue"]) == 0.75


def test_attack_success_rate_of_nothing_raises() -> None:
    with pytest.raises(ValueError, match="at least one"):
        attack_success_rate([])
