"""Influence through recorded fine-tunings against estimators that know their last model alone."""
