"""Weights and settings to Hugging Face's classes and back.

μP's forward multipliers are numbers on weights, so they fold into them (abc-symmetry: Yang & Hu 2020, Tensor Programs
IV): the unmodified class of `transformers` computes the same logits. What no factor on a weight can say is refused.
"""
