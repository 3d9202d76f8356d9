"""The fine-tuning stage: models made from text, trainer, evaluation."""
