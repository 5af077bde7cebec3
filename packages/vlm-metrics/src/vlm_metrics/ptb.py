"""Captions into words, about as the Penn Treebank tokenizer of the COCO evaluation does."""


def tokenise_caption(text: str) -> list[str]:
    """Part a caption into lower-case words as PTB does, and drop the marks that the COCO evaluation drops."""
    raise NotImplementedError
