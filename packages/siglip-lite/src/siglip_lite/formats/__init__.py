"""Weights as others publish them: Hugging Face's folders, in and out, and those of open_clip and timm, in.

Nothing here runs code from a checkpoint, and no model file knows of it.
"""
